//! WHAT crosses: every byte that both kernels must agree on. No I/O, no unsafe code.
pub mod arena;
pub mod checked;
pub mod control_block;
pub mod shared;
