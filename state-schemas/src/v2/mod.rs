//! Payloads of version 2, where they differ from version 1: the handover record. It came because a service may keep
//! several arenas and memory files (memfds), because a kernel that speaks KHO is told where its structures lie, and
//! because what this program does not know must survive it ([`record::HandoverRecord::carried`]).
//!
//! Wire form as in [`crate::v1`].

mod check;
pub mod record;

pub use check::RecordError;
