//! Arenas: memory whose content crosses an update in place, never copied.
//!
//! An arena is a run of bytes that starts with the header page of [`state_schemas::arena`]. Everything in it refers
//! to everything else by offset, so it may be mapped anywhere, by any kernel. From the bottom up:
//!
//! | file | what it is |
//! |---|---|
//! | `memory.rs` | [`Arena`]: create, attach, seal; words and bytes at checked offsets |
//! | `record.rs` | the undo record: every word is saved before it is changed |
//! | `step.rs` | what a process remembers of the step under way |
//! | `alloc.rs` | blocks in it: two-level segregated free lists, constant time, neighbours merged |
//! | `map.rs`, `list.rs`, `value.rs` | containers of bytes, of which none ever moves all of its content at once |
//! | `change.rs` | changes, wholly or not at all; taking over what a stopped owner left |
//! | [`store`] | a key-value store on top of them: what a service keeps in an arena |
//! | `verify.rs` | walks everything, and accounts for every block |
//!
//! **Attaching is O(1)**: the header page is checked, nothing else is read. What lies behind it is believed only as
//! far as each step needs: every offset is checked before it is followed, every walk has a bound, so that bytes
//! from a lying kernel give [`ArenaError::Corrupt`], never a panic, an endless loop or a large allocation.
//!
//! **Who may write** is a matter of the epoch: [`Arena::seal`] ends the right to write, [`Arena::unseal`] begins it
//! for an epoch that is not older. A kernel that has been succeeded cannot unseal: the arena's epoch is newer than
//! its own. What an owner left unsealed because it was stopped, only [`Arena::reclaim`] gives to another.
//!
//! **A change that was not finished** shows: the header's mutation count is odd from the first to the last store of
//! each change. Whoever takes the arena over ([`Arena::reclaim`]) mends it first: the change is then wholly there or wholly not,
//! whatever instruction its owner was stopped at. `record.rs` says why. Attaching alone writes nothing, so that a kernel that was succeeded
//! cannot do harm by looking. In an arena of version 1, which has no record, or after a change that found corruption, the mark
//! stays, and whoever attaches is told ([`ArenaError::Header`] with `Torn`).
//!
//! What this is not: shared memory. One kernel at a time reads and writes an arena; the seal is the fence between.

mod alloc;
mod change;
mod error;
mod hash;
mod list;
mod map;
mod memory;
mod record;
mod step;
#[cfg(test)]
mod stops;
pub mod store;
mod value;
mod verify;

pub use error::ArenaError;
pub use memory::{Arena, Birth, SealReceipt, Usage};
pub use store::{Store, StoreError};
pub use verify::Verified;
