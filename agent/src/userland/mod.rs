//! What the successor boots with, and its first program.

pub mod init;
pub mod initrd;
pub mod kernels;
pub mod known_images;
pub mod mkinitrd;
pub mod modules;
pub mod newest;
pub mod packages;
pub mod verdicts;
