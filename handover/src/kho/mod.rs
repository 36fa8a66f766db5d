//! Kexec Handover (KHO): the kernel's own format for memory and data that outlive a kernel.
//!
//! A successor with `CONFIG_KEXEC_HANDOVER` that is given these bytes takes our memory as if kexec had brought it. What
//! the kernel finds, and from where (`kernel/liveupdate/kexec_handover.c`, `include/linux/kho/abi/`):
//!
//! ```text
//! setup_data type 10 ─► FDT, one page: "kho-v4"
//!        │                ├─ preserved-memory-map ─► radix tree: which pages, in which orders
//!        │                ├─ kexec-metadata ───────► previous release, count of updates
//!        │                ├─ LUO ──────────────────► sessions and files (crate::luo)
//!        │                └─ any name ─────────────► a blob of ours
//!        └──────────► scratch list: memory that holds nothing of value
//! ```
//!
//! - [`Outgoing`] writes it, into a *pool*: memory of the successor that nobody else uses until it has booted.
//! - [`Incoming`] reads it. What it reads was written by another kernel, maybe by one that lies: every number is
//!   bounded before it is followed, and what comes out is [`Received`](state_schemas::checked::Received) until it has
//!   been checked against the machine.
//! - Upstream promises nothing between versions: [`Abi`] is the table of those that exist, one module each ([`v4`]).
//!
//! What becomes of the written pages in the successor: preserved ones stay untouched until somebody there restores
//! them; those of the tree are free once it has been read (nobody preserves them, and the kernel's own are not
//! preserved either); the scratch list stays reserved for good. So the pool must be RAM to the successor and must not
//! lie in scratch.

pub mod abi;
mod error;
mod extents;
mod incoming;
mod memory;
mod model;
mod outgoing;
mod outline;
mod pool;
pub mod v4;

pub use abi::{Abi, Unspoken};
pub use error::{IncomingError, OutgoingError, Overlap, ReadError, ScratchAlign};
pub use incoming::{Incoming, Machine};
pub use memory::{Memory, OutOfReach, PAGE, Segments};
pub use model::{Handed, Limits, Run, Subtree};
pub use outgoing::{Outgoing, Written};
pub use outline::Outline;
pub use v4::metadata::Metadata;
pub use v4::vmalloc::Vmalloc;
