#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod arena;
pub mod checked;
mod codec;
pub mod control_block;
pub mod convert;
pub mod header;
pub mod latest;
pub mod shared;
pub mod v1;

pub use codec::CodecError;
pub use convert::{Payload, PayloadError};
pub use latest::{handover_record, message};

/// Version of the whole handover: control block, channel, record and messages together. Two agents that name the same
/// number understand each other; [`message::ToIncumbent::Hello`] carries it.
pub const ABI: u32 = 1;
