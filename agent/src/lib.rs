#![doc = include_str!("../README.md")]

pub mod cli;
pub mod daemon;
pub mod machine;
pub mod recovery;
pub mod services;
pub mod takeover;
pub mod update;
pub mod userland;
