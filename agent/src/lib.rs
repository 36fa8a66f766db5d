//! WHO does it.
pub mod config;
pub mod control;
pub mod init;
pub mod initrd;
pub mod mkinitrd;
pub mod net;
pub mod outcome;
pub mod service;
mod sys;
pub mod timeline;
