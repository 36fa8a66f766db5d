//! What can be wrong with an arena. A full one is the owner's problem; all else is blamed on who wrote it.

use state_schemas::arena::ArenaHeaderError;
use thiserror::Error;

/// Why an operation on an arena was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// The header page is not acceptable.
    #[error("arena header refused")]
    Header(#[from] ArenaHeaderError),
    /// A name must have 1 to 32 bytes and no NUL.
    #[error("arena name of {len} bytes: 1 to 32 are allowed, none of them NUL")]
    Name {
        /// Its length.
        len: usize,
    },
    /// Memory that cannot be written in whole words.
    #[error("an arena's memory must begin at a multiple of 8: this does so {off} bytes later")]
    Unaligned {
        /// Bytes to the next such address.
        off: usize,
    },
    /// What lies in the arena belongs to another kind of owner.
    #[error(
        "the arena holds schema {found_kind:#010x} version {found_version}, this owner reads {kind:#010x} up to version {version}"
    )]
    Content {
        /// Kind in the header.
        found_kind: u32,
        /// Version in the header.
        found_version: u32,
        /// Kind expected.
        kind: u32,
        /// Newest version that is understood.
        version: u32,
    },
    /// It is sealed: nobody may write.
    #[error("the arena is sealed (epoch {epoch})")]
    Sealed {
        /// Epoch in the header.
        epoch: u64,
    },
    /// Another epoch owns it.
    #[error("epoch {given} may not do this: the arena belongs to epoch {owner}")]
    NotOwner {
        /// Epoch of the caller.
        given: u64,
        /// Epoch in the header.
        owner: u64,
    },
    /// No room.
    #[error("no room for {asked} bytes: the arena has {free} free of {length}")]
    OutOfMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes not allocated (perhaps in pieces).
        free: u64,
        /// Bytes in all.
        length: u64,
    },
    /// The bytes contradict themselves.
    #[error("arena is corrupt at offset {at:#x}: {what}")]
    Corrupt {
        /// What was expected there.
        what: &'static str,
        /// Offset of the word that is wrong.
        at: u64,
    },
}

/// Tells corruption, after which nobody takes the arena for whole again, from a refusal, which changes nothing.
pub(super) trait IsCorrupt {
    fn is_corrupt(&self) -> bool;
}

impl IsCorrupt for ArenaError {
    fn is_corrupt(&self) -> bool {
        matches!(self, ArenaError::Corrupt { .. })
    }
}

/// Shorthand of the modules here.
pub(super) const fn corrupt<T>(what: &'static str, at: u64) -> Result<T, ArenaError> {
    Err(ArenaError::Corrupt { what, at })
}
