//! What outlives a `batond`: what it writes down, and what the next one makes of it.

pub mod journal;
pub mod ledger;
pub mod recover;
