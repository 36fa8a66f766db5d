#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod arena;
pub mod channel;
pub mod kho;
pub mod luo;
pub mod update;
