//! Kernel images: untrusted bytes in, a description out.
//!
//! - [`bzimage`]: the boot protocol's header: can it be placed, where, how much room, which release, is it signed.
//! - [`signature`]: whether it is what somebody signed, and who.
//! - [`payload`]: what only the compressed vmlinux inside knows: can it hand CPUs over through memory, does it speak KHO.

pub mod bzimage;
pub mod payload;
pub mod signature;
pub mod unified;

pub use bzimage::{BzImage, ImageError};
pub use payload::{KernelFacts, PayloadError};
