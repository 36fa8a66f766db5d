//! Why a session cannot be handed over, or is not believed.

use state_schemas::handover_record::PhysRange;
use thiserror::Error;

use crate::kho::OutgoingError;

/// What no kernel would give back: ours to mend before it is written, the other kernel's if it was read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LuoError {
    /// A name that does not fit its field.
    #[error("{what} {name:?}: a name has 1 to {limit} printable bytes")]
    Name {
        /// Of what.
        what: &'static str,
        /// The name.
        name: String,
        /// Bytes.
        limit: usize,
    },
    /// The same name twice.
    #[error("{what} {name:?} twice: the kernel would give back neither")]
    NameTwice {
        /// Of what.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The same token twice in one session.
    #[error("session {session:?} has two files with token {token:#x}: the second could never be retrieved")]
    TokenTwice {
        /// Which session.
        session: String,
        /// The token.
        token: u64,
    },
    /// Two files of one content.
    #[error("two files refer to {data:#x}: the kernel restores and frees what lies there once")]
    DataTwice {
        /// Where both point.
        data: u64,
    },
    /// More than the kernel reads.
    #[error("{what}: {count}, but the kernel takes {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// Limit.
        limit: u64,
    },
    /// A seal that has no meaning.
    #[error("a memfd with seals {seals:#x}: {known:#x} are those that can be handed over")]
    Seals {
        /// All of them.
        seals: u32,
        /// Those known.
        known: u32,
    },
    /// A size or position beyond what a file can have.
    #[error("a memfd of {size:#x} bytes at position {pos:#x} is none that a kernel could hold")]
    Size {
        /// Bytes.
        size: u64,
        /// Position.
        pos: u64,
    },
    /// Pages that have no place in the file.
    #[error(
        "a memfd's pages {index:#x} to {end:#x} are out of order, not aligned to order {order}, or beyond its {pages:#x} pages"
    )]
    Index {
        /// First page.
        index: u64,
        /// Behind the last.
        end: u64,
        /// Order of the folios.
        order: u32,
        /// Of the file.
        pages: u64,
    },
    /// Flags that have no meaning.
    #[error("a memfd's folio has flags {flags:#x}, of which only {known:#x} are known")]
    Flags {
        /// All of them.
        flags: u16,
        /// Those known.
        known: u16,
    },
    /// Two places in a file for one page.
    #[error("{:#x} bytes at {:#x} are in a memfd twice", range.len, range.start)]
    PageTwice {
        /// Where.
        range: PhysRange,
    },
    /// What is beneath.
    #[error(transparent)]
    Kho(#[from] OutgoingError),
}
