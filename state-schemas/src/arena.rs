//! The first page of an arena: how a kernel knows memory that another kernel filled.
//!
//! It is a fixed layout, not bincode: it lives in place, is read before anything is known about the writer, and
//! three of its words change with every write of the service. The seal covers this page only (4096 bytes, allocator
//! tables included), not the data: the cutover must not depend on the size of what crosses.
//!
//! ```text
//! 0x00 magic "BATONAR\0"   0x08 version u32, page length u32   0x10 length u64
//! 0x18 name, NUL-padded    0x38 schema kind u32, version u32    0x40 epoch u64
//! 0x48 state u32, seal u32 0x50 mutations u64                   0x58 root u64
//! 0x60 top u64             0x68 used u64                        0x70 seed u64
//! 0x78 reserved            0x100 allocator tables               0x1000 end
//! ```
//!
//! From version 2 on, the second page is the undo record: what it takes to bring back the state before a change that was
//! never finished, because its owner was stopped within it.
//!
//! ```text
//! 0x00 length u64          0x08 pending u64                     0x10 entries     0x1000 end
//! ```
//!
//! An entry is the words as they were before the change, then one word of its own: their number in the upper 16 bits, their offset in the
//! arena in the lower 48. It is put behind the others, and then the length (in words) is raised, before the first of these words is
//! changed. So the entries, read from the last to the first, undo what was done since the length was last zero. Storing zero
//! there is the one store by which a step of a change becomes final.
//!
//! `pending` is the offset of a container that nothing refers to any more and whose blocks are still to be freed, plus what it
//! is ([`PENDING_LIST`], [`PENDING_MAP`]), or [`PENDING_CLEAR`]: all of the arena is being emptied. Such a change has more than one step: the
//! first is what counts, the others are carried on with whoever does them.
//!
//! All integers are little-endian. Reserved bytes are zero when written and ignored when read.
//!
//! An arena keeps the version that it was made in: an update that is called off gives it back to the program that made it.

use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checked::{Check, Received};

/// First bytes of every arena.
pub const MAGIC: [u8; 8] = *b"BATONAR\0";
/// Version of this page's layout, of the allocator's tables in it, and of the undo record behind it.
pub const VERSION: u32 = 2;
/// The oldest version that is read and written: without an undo record.
pub const OLDEST_VERSION: u32 = 1;
/// Bytes of the header page.
pub const HEADER_LEN: u64 = 4096;
/// Bytes of the undo record, from version 2 on.
pub const RECORD_LEN: u64 = 4096;
/// Words of entries that the undo record holds.
pub const RECORD_WORDS: u64 = RECORD_LEN / 8 - 2;
/// In the place of the record's length: a change found corruption, and there is no way back to a whole arena.
pub const RECORD_SPOILT: u64 = u64::MAX;

/// Added to the offset of a list whose blocks are to be freed.
pub const PENDING_LIST: u64 = 1;
/// Added to the offset of a map whose blocks are to be freed.
pub const PENDING_MAP: u64 = 2;
/// All of the arena is being emptied.
pub const PENDING_CLEAR: u64 = 3;
/// Longest name, in bytes.
pub const NAME_LEN: usize = 32;
/// Bytes of the allocator's tables, at the page's end.
pub const TABLES_LEN: usize = HEADER_LEN as usize - 0x100;

/// The service may write; only the holder of `epoch` is that service.
pub const STATE_LIVE: u32 = 1;
/// Nobody may write; the page's seal holds.
pub const STATE_SEALED: u32 = 2;

/// The header page as it lies in memory.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ArenaHeader {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// Bytes before the first block: [`first_block`] of this version.
    pub header_len: U32,
    /// Bytes of the arena, this page included.
    pub length: U64,
    /// UTF-8, padded with NUL.
    pub name: [u8; NAME_LEN],
    /// What lies in it: the owner's schema kind.
    pub schema_kind: U32,
    /// And that schema's version.
    pub schema_version: U32,
    /// Epoch of the kernel whose service may write. Never decreases.
    pub epoch: U64,
    /// [`STATE_LIVE`] or [`STATE_SEALED`].
    pub state: U32,
    /// CRC-32 of the page with this field zero; meaningful while sealed.
    pub seal: U32,
    /// Odd while a change is under way: an owner that died there left a torn change behind. From version 2 on the record undoes it.
    pub mutations: U64,
    /// Offset of the owner's root object, 0 if none.
    pub root: U64,
    /// First byte that was never allocated, or that was given back.
    pub top: U64,
    /// Bytes in allocated blocks, their headers included.
    pub used: U64,
    /// Seed of the hashes of the containers within.
    pub seed: U64,
    /// Zero.
    pub reserved: [u8; 0x100 - 0x78],
    /// Free lists and their bitmaps; see `handover::arena`.
    pub tables: [u8; TABLES_LEN],
}

/// The undo record as it lies in memory behind the header page.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UndoRecord {
    /// Words of [`UndoRecord::entries`] that count, or [`RECORD_SPOILT`].
    pub length: U64,
    /// What is to be freed, and carried on with by whoever finds it; 0 if nothing.
    pub pending: U64,
    /// What undoes the step that is under way.
    pub entries: [U64; RECORD_WORDS as usize],
}

const _: () = assert!(size_of::<ArenaHeader>() as u64 == HEADER_LEN);
const _: () = assert!(size_of::<UndoRecord>() as u64 == RECORD_LEN);
const _: () = assert!(core::mem::offset_of!(ArenaHeader, tables) == 0x100);

/// Offsets of the words that are changed in place.
pub mod at {
    use super::ArenaHeader;
    use core::mem::offset_of;

    /// [`ArenaHeader::length`].
    pub const LENGTH: u64 = offset_of!(ArenaHeader, length) as u64;
    /// [`ArenaHeader::epoch`].
    pub const EPOCH: u64 = offset_of!(ArenaHeader, epoch) as u64;
    /// [`ArenaHeader::state`], with the seal in the upper half of the same word.
    pub const STATE_AND_SEAL: u64 = offset_of!(ArenaHeader, state) as u64;
    /// [`ArenaHeader::mutations`].
    pub const MUTATIONS: u64 = offset_of!(ArenaHeader, mutations) as u64;
    /// [`ArenaHeader::root`].
    pub const ROOT: u64 = offset_of!(ArenaHeader, root) as u64;
    /// [`ArenaHeader::top`].
    pub const TOP: u64 = offset_of!(ArenaHeader, top) as u64;
    /// [`ArenaHeader::used`].
    pub const USED: u64 = offset_of!(ArenaHeader, used) as u64;
    /// [`ArenaHeader::seed`].
    pub const SEED: u64 = offset_of!(ArenaHeader, seed) as u64;
    /// [`ArenaHeader::tables`].
    pub const TABLES: u64 = offset_of!(ArenaHeader, tables) as u64;
    /// [`UndoRecord::length`](super::UndoRecord::length).
    pub const RECORD: u64 = super::HEADER_LEN + offset_of!(super::UndoRecord, length) as u64;
    /// [`UndoRecord::pending`](super::UndoRecord::pending).
    pub const PENDING: u64 = super::HEADER_LEN + offset_of!(super::UndoRecord, pending) as u64;
    /// [`UndoRecord::entries`](super::UndoRecord::entries).
    pub const ENTRIES: u64 = super::HEADER_LEN + offset_of!(super::UndoRecord, entries) as u64;
    const _: () = assert!(offset_of!(ArenaHeader, seal) == offset_of!(ArenaHeader, state) + 4);
    const _: () = assert!(
        LENGTH.is_multiple_of(8)
            && STATE_AND_SEAL.is_multiple_of(8)
            && TABLES.is_multiple_of(8)
            && TOP.is_multiple_of(8)
    );
}

/// Why a page is not the header of an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ArenaHeaderError {
    /// Not even a page.
    #[error("an arena needs at least {HEADER_LEN} bytes, this memory has {have}")]
    TooSmall {
        /// Bytes there are.
        have: u64,
    },
    /// Something else lies here.
    #[error("no arena here: magic is {found:#018x}")]
    NotAnArena {
        /// What stands where the magic belongs.
        found: u64,
    },
    /// Written by a Baton that we do not understand.
    #[error("arena version {found}, this program reads versions {OLDEST_VERSION} to {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The memory is smaller than the arena. (It may be larger: more of it was given, and the owner has not taken it yet.)
    #[error("the arena says it has {header:#x} bytes, the memory has {memory:#x}")]
    Length {
        /// What the header says.
        header: u64,
        /// What is mapped.
        memory: u64,
    },
    /// A field lies outside its bounds.
    #[error("arena header: {field} is {value:#x}, allowed is {low:#x} to {high:#x}")]
    Field {
        /// Its name.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Smallest allowed.
        low: u64,
        /// Largest allowed.
        high: u64,
    },
    /// The name is not UTF-8.
    #[error("arena name is not UTF-8 from byte {at} on")]
    Name {
        /// Where it stops being UTF-8.
        at: u32,
    },
    /// Sealed, and changed since.
    #[error("seal broken: the page's CRC is {found:#010x}, the seal says {sealed:#010x}")]
    SealBroken {
        /// CRC of the page now.
        found: u32,
        /// CRC stored at sealing.
        sealed: u32,
    },
    /// The owner died within a change. If the arena has an undo record, whoever takes the arena over mends it; else it stays so.
    #[error("a change was never finished (mutation count {mutations} is odd)")]
    Torn {
        /// The mutation count.
        mutations: u64,
    },
}

/// Where an arena's first block lies, in arenas of this version.
pub const fn first_block(version: u32) -> u64 {
    if version < 2 { HEADER_LEN } else { HEADER_LEN + RECORD_LEN }
}

impl ArenaHeader {
    /// Copies the page out of `memory` (its first 4096 bytes).
    ///
    /// # Errors
    /// If there is no whole page.
    pub fn read(memory: &[u8]) -> Result<Received<ArenaHeader>, ArenaHeaderError> {
        ArenaHeader::read_from_prefix(memory)
            .map(|(header, _)| Received::new(header))
            .map_err(|_| ArenaHeaderError::TooSmall { have: memory.len() as u64 })
    }

    /// CRC-32 over the page with the seal field zero.
    pub fn compute_seal(&self) -> u32 {
        let seal_at = core::mem::offset_of!(ArenaHeader, seal);
        let bytes = self.as_bytes();
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[..seal_at]);
        crc.update(&[0; 4]);
        crc.update(&bytes[seal_at + 4..]);
        crc.finalize()
    }

    /// The name without its padding. Only after [`Check`] is it known to be UTF-8; before, what is not is left out.
    pub fn name(&self) -> &str {
        let end = self.name.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
        core::str::from_utf8(&self.name[..end]).unwrap_or("")
    }

    /// Pads a name; `None` if it is empty, too long or contains NUL.
    pub fn pad_name(name: &str) -> Option<[u8; NAME_LEN]> {
        if name.is_empty() || name.len() > NAME_LEN || name.contains('\0') {
            return None;
        }
        let mut padded = [0; NAME_LEN];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        Some(padded)
    }

    /// What holds from the arena's birth to its end, so that it can be checked while its owner writes: this is an arena in
    /// a form that we read, of this size. All else is checked by [`Check`], once nobody writes.
    ///
    /// # Errors
    /// The first bound that does not hold.
    pub fn check_identity(&self, memory: u64) -> Result<(), ArenaHeaderError> {
        if self.magic != MAGIC {
            return Err(ArenaHeaderError::NotAnArena { found: u64::from_le_bytes(self.magic) });
        }
        let version = self.version.get();
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(ArenaHeaderError::Version { found: version });
        }
        let first = first_block(version);
        within("header_len", self.header_len.get().into(), first, first)?;
        let length = self.length.get();
        // It may have been given more memory than it has taken.
        if length > memory || length < first {
            return Err(ArenaHeaderError::Length { header: length, memory });
        }
        let end = self.name.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
        match core::str::from_utf8(&self.name[..end]) {
            Ok(_) => Ok(()),
            Err(error) => Err(ArenaHeaderError::Name { at: error.valid_up_to() as u32 }),
        }
    }

    /// Nobody may write.
    pub fn is_sealed(&self) -> bool {
        self.state.get() == STATE_SEALED
    }
}

fn within(field: &'static str, value: u64, low: u64, high: u64) -> Result<(), ArenaHeaderError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(ArenaHeaderError::Field { field, value, low, high })
}

impl Check for ArenaHeader {
    /// Bytes of memory that are mapped.
    type Against = u64;
    type Error = ArenaHeaderError;

    fn check(&self, memory: &u64) -> Result<(), ArenaHeaderError> {
        self.check_identity(*memory)?;
        let length = self.length.get();
        within("state", self.state.get().into(), STATE_LIVE.into(), STATE_SEALED.into())?;
        if self.is_sealed() {
            let found = self.compute_seal();
            let sealed = self.seal.get();
            if found != sealed {
                return Err(ArenaHeaderError::SealBroken { found, sealed });
            }
        }
        let mutations = self.mutations.get();
        if mutations % 2 == 1 {
            return Err(ArenaHeaderError::Torn { mutations });
        }
        let top = self.top.get();
        let first = first_block(self.version.get());
        within("top", top, first, length)?;
        within("top's alignment", top % 16, 0, 0)?;
        within("used", self.used.get(), 0, top - first)?;
        if self.root.get() != 0 {
            within("root", self.root.get(), first, top.saturating_sub(8))?;
            within("root's alignment", self.root.get() % 16, 8, 8)?;
        }
        Ok(())
    }
}
