// Only where it is read: a page that changes is no reason to build every program anew.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "README.md, beside this crate, is its page.")]

pub mod acpi;
pub mod boot_params;
pub mod cmdline;
pub mod compression;
pub mod cpus;
pub mod device;
pub mod firmware;
pub mod image;
pub mod initrd;
pub mod klog;
pub mod layout;
pub mod memory_map;
pub mod page_tables;
pub mod placement;
pub mod ports;
pub mod range;
pub mod registry;
pub mod sys;

/// The code that this crate puts in place, for whoever writes its pages and arguments: agents depend on this crate only.
pub use trampoline;
