// Only where it is read: a page that changes is no reason to build every program anew.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "README.md, beside this crate, is its page.")]
#![forbid(unsafe_code)]

pub mod arena;
pub mod channel;
pub mod kho;
pub mod luo;
pub mod update;
