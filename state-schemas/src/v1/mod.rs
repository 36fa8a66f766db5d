//! Payloads of version 1: the first. Frozen once released: a change is a new folder, whose first line says why it came.
//!
//! [`message`] is the exception: words are added to it, and none is changed (see there).
//!
//! Wire form: numbers little-endian and of their width; a `String` or `Vec` is a u64 count and its items; an `Option` is
//! a byte, 0 or 1, and its value; an enum is a u32, the number that stands beside each variant, and its fields.

pub mod connection;
pub mod message;
pub mod platform;
pub mod record;
