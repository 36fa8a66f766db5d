#![doc = include_str!("../README.md")]
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
