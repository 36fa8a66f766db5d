// Only where it is read: a page that changes is no reason to build every program anew.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "README.md, beside this crate, is its page.")]

pub mod cli;
pub mod daemon;
pub mod machine;
pub mod recovery;
pub mod services;
pub mod takeover;
pub mod update;
pub mod userland;
