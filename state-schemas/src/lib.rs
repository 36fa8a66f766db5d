// Only where it is read: a page that changes is no reason to build every program anew.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "README.md, beside this crate, is its page.")]
#![forbid(unsafe_code)]

pub mod arena;
pub mod checked;
mod codec;
pub mod connections;
pub mod control_block;
pub mod convert;
pub mod header;
pub mod latest;
pub mod shared;
pub mod v1;
pub mod v2;

pub use codec::CodecError;
pub use convert::{Payload, PayloadError};
pub use latest::{connection, handover_record, message, platform};
