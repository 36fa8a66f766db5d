//! What the fuzz targets call, and `cargo test` with it.

pub mod entry;
pub mod shared;
