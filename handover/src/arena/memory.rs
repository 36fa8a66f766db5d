//! [`Arena`]: one arena's memory, with create, attach, seal and access at checked offsets.

use std::sync::atomic::{Ordering, compiler_fence};

use state_schemas::arena::{ArenaHeader, HEADER_LEN, MAGIC, STATE_LIVE, STATE_SEALED, VERSION, at};
use zerocopy::IntoBytes;

use super::error::{ArenaError, corrupt};
use state_schemas::arena::ArenaHeaderError;

/// What an arena is made with; fixed for its life, but for the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Birth<'a> {
    /// Its name, 1 to 32 bytes.
    pub name: &'a str,
    /// The kind of its content: the owner's schema.
    pub schema_kind: u32,
    /// The version of that schema.
    pub schema_version: u32,
    /// Epoch of the kernel that owns it first.
    pub epoch: u64,
    /// Seed of its hashes: a random number, so that nobody outside can choose keys that collide.
    pub seed: u64,
}

/// Proof of a seal, for the handover's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealReceipt {
    /// Epoch that sealed.
    pub epoch: u64,
    /// CRC-32 of the header page.
    pub crc: u32,
    /// Bytes below the top: what has to cross.
    pub top: u64,
}

/// How full an arena is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// All of it, header page included.
    pub length: u64,
    /// In allocated blocks, their headers included.
    pub used: u64,
    /// Not allocated.
    pub free: u64,
    /// Below the highest block: the rest was never touched, or was given back.
    pub top: u64,
}

/// An attached arena.
#[derive(Debug)]
pub struct Arena<'m> {
    memory: &'m mut [u8],
    /// Bytes of it that are the arena's, as its header says; behind them may lie memory that it has not taken yet.
    length: u64,
}

impl<'m> Arena<'m> {
    /// Makes an empty arena of all of `memory`, overwriting its first page and nothing else.
    ///
    /// # Errors
    /// If the memory is smaller than two pages or the name is not allowed.
    pub fn create(memory: &'m mut [u8], birth: Birth<'_>) -> Result<Arena<'m>, ArenaError> {
        let length = memory.len() as u64;
        if length < 2 * HEADER_LEN {
            return Err(ArenaHeaderError::TooSmall { have: length }.into());
        }
        let name = ArenaHeader::pad_name(birth.name).ok_or(ArenaError::Name { len: birth.name.len() })?;
        let header = ArenaHeader {
            magic: MAGIC,
            version: VERSION.into(),
            header_len: (HEADER_LEN as u32).into(),
            length: length.into(),
            name,
            schema_kind: birth.schema_kind.into(),
            schema_version: birth.schema_version.into(),
            epoch: birth.epoch.into(),
            state: STATE_LIVE.into(),
            seal: 0.into(),
            mutations: 0.into(),
            root: 0.into(),
            top: HEADER_LEN.into(),
            used: 0.into(),
            seed: birth.seed.into(),
            reserved: [0; _],
            tables: [0; _],
        };
        memory[..HEADER_LEN as usize].copy_from_slice(header.as_bytes());
        Ok(Arena { memory, length })
    }

    /// Attaches to an arena that somebody else filled: O(1), the header page is checked and nothing else is read.
    ///
    /// # Errors
    /// Whatever is wrong with the header page, or another owner's content.
    pub fn attach(memory: &'m mut [u8], schema_kind: u32, schema_version: u32) -> Result<Arena<'m>, ArenaError> {
        let header = ArenaHeader::read(memory)?.check(&(memory.len() as u64))?;
        let (found_kind, found_version) = (header.schema_kind.get(), header.schema_version.get());
        if found_kind != schema_kind || found_version > schema_version {
            return Err(ArenaError::Content { found_kind, found_version, kind: schema_kind, version: schema_version });
        }
        Ok(Arena { memory, length: header.length.get() })
    }

    /// Makes all of the memory the arena's: it was given more since it was made. One store, in constant time.
    ///
    /// # Errors
    /// If `epoch` does not own the arena, or it is sealed.
    pub fn take_all(&mut self, epoch: u64) -> Result<Usage, ArenaError> {
        let owner = self.epoch();
        if owner != epoch {
            return Err(ArenaError::NotOwner { given: epoch, owner });
        }
        self.writable()?;
        self.length = self.memory.len() as u64;
        self.put(at::LENGTH, self.length);
        Ok(self.usage())
    }

    /// The header page, checked again.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn header(&self) -> Result<ArenaHeader, ArenaError> {
        Ok(ArenaHeader::read(self.memory)?.check(&(self.memory.len() as u64))?)
    }

    /// Ends the right to write: the time this takes does not depend on the arena's size.
    ///
    /// # Errors
    /// If `epoch` does not own the arena, or it is sealed already.
    pub fn seal(&mut self, epoch: u64) -> Result<SealReceipt, ArenaError> {
        let owner = self.epoch();
        if owner != epoch {
            return Err(ArenaError::NotOwner { given: epoch, owner });
        }
        self.writable()?;
        self.put(at::STATE_AND_SEAL, STATE_SEALED.into());
        let crc = ArenaHeader::read(self.memory)?.alleged().compute_seal();
        self.put(at::STATE_AND_SEAL, u64::from(crc) << 32 | u64::from(STATE_SEALED));
        Ok(SealReceipt { epoch, crc, top: self.get(at::TOP) })
    }

    /// Begins the right to write for `epoch`: the successor's at activation, or once more the owner's after an abort.
    /// Does nothing if `epoch` may write already.
    ///
    /// # Errors
    /// If the arena belongs to a newer epoch, or the page was changed under the seal.
    pub fn unseal(&mut self, epoch: u64) -> Result<(), ArenaError> {
        let header = self.header()?;
        let owner = header.epoch.get();
        if !header.is_sealed() && epoch != owner {
            return Err(ArenaError::NotOwner { given: epoch, owner });
        }
        self.reclaim(epoch)
    }

    /// Like [`Arena::unseal`], for an arena whose owner, of an older epoch, may have been stopped before it could seal. Only for a caller
    /// that knows that this owner does not run any more: a service may, when its agent tells it to go on.
    ///
    /// # Errors
    /// If the arena belongs to a newer epoch, the page was changed under the seal, or the owner was stopped within a change.
    pub fn reclaim(&mut self, epoch: u64) -> Result<(), ArenaError> {
        let owner = self.header()?.epoch.get();
        if epoch < owner {
            return Err(ArenaError::NotOwner { given: epoch, owner });
        }
        // The epoch first: should this kernel die between the two stores, the older epoch stays locked out.
        self.put(at::EPOCH, epoch);
        compiler_fence(Ordering::SeqCst);
        self.put(at::STATE_AND_SEAL, STATE_LIVE.into());
        Ok(())
    }

    /// Nobody may write: it is sealed.
    pub fn is_sealed(&self) -> bool {
        self.get(at::STATE_AND_SEAL) as u32 != STATE_LIVE
    }

    /// Epoch that owns the arena.
    pub fn epoch(&self) -> u64 {
        self.get(at::EPOCH)
    }

    /// Offset of the owner's root object, 0 if none.
    pub fn root(&self) -> u64 {
        self.get(at::ROOT)
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        let length = self.length;
        let used = self.get(at::USED);
        Usage { length, used, free: (length - HEADER_LEN).saturating_sub(used), top: self.get(at::TOP) }
    }

    /// Carries out one change: refused while sealed, marked as under way while it runs.
    /// A change that finds corruption leaves the mark: nobody may take this arena for whole again.
    pub(super) fn change<R, E: From<ArenaError> + IsCorrupt>(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<R, E>,
    ) -> Result<R, E> {
        self.writable()?;
        let before = self.get(at::MUTATIONS);
        self.put(at::MUTATIONS, before | 1);
        // The mark must reach memory before the change does: a kernel may be stopped between any two instructions.
        // x86 keeps stores in order, so that only the compiler has to be told.
        compiler_fence(Ordering::SeqCst);
        let result = change(self);
        compiler_fence(Ordering::SeqCst);
        let corrupt = matches!(&result, Err(error) if error.is_corrupt());
        if before.is_multiple_of(2) && !corrupt {
            self.put(at::MUTATIONS, before.wrapping_add(2));
        }
        result
    }

    fn writable(&self) -> Result<(), ArenaError> {
        if self.is_sealed() {
            return Err(ArenaError::Sealed { epoch: self.epoch() });
        }
        Ok(())
    }

    /// The 8-aligned word at `at`.
    pub(super) fn word(&self, at: u64) -> Result<u64, ArenaError> {
        let bytes = self.bytes(at, 8)?;
        if !at.is_multiple_of(8) {
            return corrupt("a word must be aligned to 8", at);
        }
        let mut word = [0; 8];
        word.copy_from_slice(bytes);
        Ok(u64::from_le_bytes(word))
    }

    /// The word at `at`, which must be 0 or the offset of a payload. Small constants may be added to it unchecked.
    pub(super) fn offset(&self, at: u64) -> Result<u64, ArenaError> {
        let word = self.word(at)?;
        if word == 0 || (word >= HEADER_LEN && word < self.length() && word % 16 == 8) {
            return Ok(word);
        }
        corrupt("points outside the arena", at)
    }

    /// Stores the 8-aligned word at `at`.
    pub(super) fn set_word(&mut self, at: u64, value: u64) -> Result<(), ArenaError> {
        if !at.is_multiple_of(8) {
            return corrupt("a word must be aligned to 8", at);
        }
        self.bytes_mut(at, 8)?.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    /// `len` bytes at `at`; never any of the header page, so that data cannot pass for metadata.
    pub(super) fn bytes(&self, at: u64, len: u64) -> Result<&[u8], ArenaError> {
        let range = self.range(at, len)?;
        Ok(&self.memory[range])
    }

    /// `len` bytes at `at`, to be written to; never any of the header page.
    pub(super) fn bytes_mut(&mut self, at: u64, len: u64) -> Result<&mut [u8], ArenaError> {
        let range = self.range(at, len)?;
        Ok(&mut self.memory[range])
    }

    fn range(&self, at: u64, len: u64) -> Result<std::ops::Range<usize>, ArenaError> {
        match at.checked_add(len) {
            Some(end) if at >= HEADER_LEN && end <= self.length => Ok(at as usize..end as usize),
            _ => corrupt("points outside the arena", at),
        }
    }

    /// A word of the header page. The offset is one of our own constants, within the page that was there at attach.
    pub(super) fn get(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.memory[at as usize..at as usize + 8]);
        u64::from_le_bytes(word)
    }

    /// Stores a word of the header page.
    pub(super) fn put(&mut self, at: u64, value: u64) {
        self.memory[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Bytes in all.
    pub(super) fn length(&self) -> u64 {
        self.length
    }
}

/// Tells corruption, after which a change may be half done, from a refusal, before which nothing was changed.
pub(super) trait IsCorrupt {
    fn is_corrupt(&self) -> bool;
}

impl IsCorrupt for ArenaError {
    fn is_corrupt(&self) -> bool {
        matches!(self, ArenaError::Corrupt { .. })
    }
}
