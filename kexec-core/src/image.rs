//! Kernel images: untrusted bytes in, a description out.
//!
//! - [`bzimage`]: the boot protocol's header: can it be placed, where, how much room, which release, is it signed.
//! - [`payload`]: what only the compressed vmlinux inside knows: can it hand CPUs over through memory, does it speak KHO.

pub mod bzimage;
pub mod payload;

pub use bzimage::{BzImage, ImageError, SignaturePolicy};
pub use payload::{KernelFacts, PayloadError};
