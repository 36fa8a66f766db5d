//! WHAT crosses an update, and WHEN: arenas, the channel, the update as a pure state machine. No I/O, no clock.
#![forbid(unsafe_code)]

pub mod arena;
pub mod channel;
