#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod arena;
pub mod channel;
pub mod deadline;
pub mod error;
pub mod kho;
pub mod luo;
pub mod machine;
pub mod phase;
pub mod plan;
pub mod successor;
pub mod undo;
