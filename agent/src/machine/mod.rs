//! The machine as it is: what the kernel, the firmware and the network say of it, and the few calls that change it.

pub mod bounded;
pub mod clock;
pub mod cpuid;
pub mod facts;
pub mod hardware;
pub mod liveupdate;
pub mod net;
pub mod network;
pub mod nft;
pub mod pci;
#[cfg(test)]
pub mod played;
pub mod processes;
pub mod reach;
pub mod regular;
pub mod rewrite;
pub mod sys;
pub mod sysfs;
pub mod world;
