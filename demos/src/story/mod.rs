//! The stories that `cargo demo` tells, as functions that tests call too.
pub mod stage;
