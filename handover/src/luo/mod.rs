//! The Live Update Orchestrator (LUO): files that outlive a kernel, as `/dev/liveupdate` gives them back.
//!
//! A program on the successor opens a *session* by its name and asks it for a file by a *token*. What lies in memory
//! for that (`kernel/liveupdate/luo_*.c`, `mm/memfd_luo.c`, `include/linux/kho/abi/{luo,block,memfd}.h`):
//!
//! ```text
//! KHO blob "LUO"
//! luo_ser "luo-v5" ─► blocks of sessions ─► blocks of files: (token, "memfd-v2", data)
//!        │            (name, files)                                             │
//!        └─► FLBs, shared by files                                   memfd_luo_ser (size, position, seals)
//!                                                                               │
//!                                     vmalloc area of folios: (page, index, flags) ─► the pages themselves
//! ```
//!
//! A *block* is a page: address of the next block, number of entries, entries (`kernel/liveupdate/kho_block.c`).
//! Everything here but the content's pages is restored and freed by the kernel page by page, once it has read it:
//! each is a folio of its own and is preserved as one.
//!
//! - [`Memfd::write`], then [`Orchestration::write`] put it into a [`crate::kho::Outgoing`].
//! - [`Orchestration::read`], then [`Memfd::read`] follow only addresses that lie in preserved pages of a handover that
//!   has been checked, each of them once.
//!
//! The kernel checks little and forgives nothing: one session that it cannot restore, and `/dev/liveupdate` cannot be
//! opened (`luo_session_deserialize`, EIO); another version, or a list of sessions that is not one, and it *panics*
//! (`luo_restore_fail`). So what is written is checked before, and written only for a kernel that names all three
//! formats in versions that we speak ([`Names::of`]). What nobody retrieves of a session is freed when the session is closed.

mod error;
pub mod memfd_v2;
mod model;
pub mod names;
pub mod v5;

pub use error::LuoError;
pub use memfd_v2::{Memfd, Piece};
pub use model::{File, Flb, Orchestration, Session};
pub use names::Names;
