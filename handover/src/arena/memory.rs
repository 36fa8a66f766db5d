//! [`Arena`]: one arena's memory, with create, attach, seal and access at checked offsets.
//!
//! The stores here are the only ones there are, and they reach memory in the order in which they are written down: words are
//! stored atomically with release ordering, copies stand between two fences. That is for the compiler; x86 itself
//! makes the stores of one CPU visible in their order. Only within one copy there is no order (`rep movsb`, vector
//! registers), so that nothing may depend on what of it is there when the CPU is stopped.

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use state_schemas::arena::{
    ArenaHeader, ArenaHeaderError, HEADER_LEN, MAGIC, RECORD_SPOILT, STATE_LIVE, STATE_SEALED, VERSION, at, first_block,
};
use state_schemas::checked::Check;
use zerocopy::{FromBytes, IntoBytes};

use super::error::{ArenaError, corrupt};
use super::step::Record;

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
    /// Where blocks begin.
    first: u64,
    /// What this process knows of the change that is under way.
    pub(super) record: Record,
    /// Every store, in order, for the model of stops.
    #[cfg(test)]
    pub(super) tape: Vec<(u64, Vec<u8>)>,
}

impl<'m> Arena<'m> {
    fn over(memory: &'m mut [u8], length: u64, version: u32, torn: bool) -> Arena<'m> {
        Arena {
            memory,
            length,
            first: first_block(version),
            record: Record::new(version, torn),
            #[cfg(test)]
            tape: vec![],
        }
    }

    /// Makes an empty arena of all of `memory`, overwriting its first two pages and nothing else.
    ///
    /// # Errors
    /// If the memory is smaller than three pages or not aligned to 8, or the name is not allowed.
    pub fn create(memory: &'m mut [u8], birth: Birth<'_>) -> Result<Arena<'m>, ArenaError> {
        let mut arena = Arena::begin(memory, birth, VERSION)?;
        arena.show();
        Ok(arena)
    }

    /// The same, but for the magic: it is no arena yet for anybody who looks. [`Arena::show`] follows.
    pub(super) fn begin(memory: &'m mut [u8], birth: Birth<'_>, version: u32) -> Result<Arena<'m>, ArenaError> {
        let length = memory.len() as u64;
        let first = first_block(version);
        aligned(memory)?;
        if length < first + HEADER_LEN {
            return Err(ArenaHeaderError::TooSmall { have: length }.into());
        }
        let name = ArenaHeader::pad_name(birth.name).ok_or(ArenaError::Name { len: birth.name.len() })?;
        let header = ArenaHeader {
            magic: [0; _],
            version: version.into(),
            header_len: (first as u32).into(),
            length: length.into(),
            name,
            schema_kind: birth.schema_kind.into(),
            schema_version: birth.schema_version.into(),
            epoch: birth.epoch.into(),
            state: STATE_LIVE.into(),
            seal: 0.into(),
            mutations: 0.into(),
            root: 0.into(),
            top: first.into(),
            used: 0.into(),
            seed: birth.seed.into(),
            reserved: [0; _],
            tables: [0; _],
        };
        let mut arena = Arena::over(memory, length, version, false);
        // If another arena was here: from the first store on it is none.
        arena.store(0, 0);
        arena.copy(0, header.as_bytes());
        arena.copy(HEADER_LEN, &[0; HEADER_LEN as usize][..(first - HEADER_LEN) as usize]);
        Ok(arena)
    }

    /// The last store of a birth.
    pub(super) fn show(&mut self) {
        self.store(0, u64::from_le_bytes(MAGIC));
    }

    /// Attaches to an arena that somebody else filled: O(1), the header page is checked and nothing else is read. Nothing is written
    /// either: an arena whose owner was stopped within a change is mended by whoever takes it over ([`Arena::reclaim`]), and
    /// can neither be read nor written before.
    ///
    /// # Errors
    /// Whatever is wrong with the header page, or another owner's content.
    pub fn attach(memory: &'m mut [u8], schema_kind: u32, schema_version: u32) -> Result<Arena<'m>, ArenaError> {
        aligned(memory)?;
        let size = memory.len() as u64;
        let received = ArenaHeader::read(memory)?;
        let alleged = received.alleged();
        alleged.check_identity(size)?;
        let torn = alleged.mutations.get() % 2 == 1 && can_be_mended(alleged, memory);
        // Within a change the words need not agree with each other. They are checked once they are mended.
        let header = if torn { alleged.clone() } else { received.check(&size)? };
        let (found_kind, found_version) = (header.schema_kind.get(), header.schema_version.get());
        if found_kind != schema_kind || found_version > schema_version {
            return Err(ArenaError::Content { found_kind, found_version, kind: schema_kind, version: schema_version });
        }
        Ok(Arena::over(memory, header.length.get(), header.version.get(), torn))
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
        self.store(at::LENGTH, self.length);
        Ok(self.usage())
    }

    /// The header page, checked again.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    pub fn header(&self) -> Result<ArenaHeader, ArenaError> {
        self.header_with(self.get(at::MUTATIONS))
    }

    /// The same, as if this were the mutation count.
    pub(super) fn header_with(&self, mutations: u64) -> Result<ArenaHeader, ArenaError> {
        let mut header = ArenaHeader::read(self.memory)?.alleged().clone();
        header.mutations = mutations.into();
        header.check(&(self.memory.len() as u64))?;
        Ok(header)
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
        let mut header = ArenaHeader::read(self.memory)?.alleged().clone();
        header.state = STATE_SEALED.into();
        let crc = header.compute_seal();
        // One store: there is no moment at which it is sealed and the seal does not hold.
        self.store(at::STATE_AND_SEAL, u64::from(crc) << 32 | u64::from(STATE_SEALED));
        Ok(SealReceipt { epoch, crc, top: self.get(at::TOP) })
    }

    /// Nobody may write: it is sealed.
    pub fn is_sealed(&self) -> bool {
        self.get(at::STATE_AND_SEAL) as u32 != STATE_LIVE
    }

    /// Its owner was stopped within a change, which nobody has mended yet.
    pub fn is_torn(&self) -> bool {
        self.record.torn
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
        Usage { length, used, free: (length - self.first).saturating_sub(used), top: self.get(at::TOP) }
    }

    /// What keeps everybody from writing, and readers from what is half done.
    pub(super) fn whole(&self) -> Result<(), ArenaError> {
        if self.record.torn {
            return Err(ArenaHeaderError::Torn { mutations: self.get(at::MUTATIONS) }.into());
        }
        Ok(())
    }

    pub(super) fn writable(&self) -> Result<(), ArenaError> {
        self.whole()?;
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
        if word == 0 || (word >= self.first && word < self.length() && word % 16 == 8) {
            return Ok(word);
        }
        corrupt("points outside the arena", at)
    }

    /// Stores the 8-aligned word at `at`, in a block that was allocated in this step: there is nothing to bring back.
    pub(super) fn fresh_word(&mut self, at: u64, value: u64) -> Result<(), ArenaError> {
        self.check_word(at)?;
        self.store(at, value);
        Ok(())
    }

    /// Copies bytes to `at`, in a block that was allocated in this step.
    pub(super) fn fresh_bytes(&mut self, at: u64, bytes: &[u8]) -> Result<(), ArenaError> {
        self.range(at, bytes.len() as u64)?;
        self.copy(at, bytes);
        Ok(())
    }

    /// `len` bytes at `at`; never any of the header page or the record, so that data cannot pass for metadata.
    pub(super) fn bytes(&self, at: u64, len: u64) -> Result<&[u8], ArenaError> {
        let range = self.range(at, len)?;
        Ok(&self.memory[range])
    }

    /// A word of a block's own lies at `at`.
    pub(super) fn check_word(&self, at: u64) -> Result<(), ArenaError> {
        if !at.is_multiple_of(8) {
            return corrupt("a word must be aligned to 8", at);
        }
        self.range(at, 8).map(drop)
    }

    fn range(&self, at: u64, len: u64) -> Result<std::ops::Range<usize>, ArenaError> {
        match at.checked_add(len) {
            Some(end) if at >= self.first && end <= self.length => Ok(at as usize..end as usize),
            _ => corrupt("points outside the arena", at),
        }
    }

    /// A word that is known to lie within: of the header page, by one of our own constants, or one whose offset was checked.
    pub(super) fn get(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.memory[at as usize..at as usize + 8]);
        u64::from_le_bytes(word)
    }

    /// Stores such a word, at once and not before what was stored earlier.
    pub(super) fn store(&mut self, at: u64, value: u64) {
        #[cfg(test)]
        self.tape.push((at, value.to_le_bytes().to_vec()));
        let bytes = &mut self.memory[at as usize..at as usize + 8];
        let word = AtomicU64::mut_from_bytes(bytes).expect("memory is aligned, and so is every offset of a word");
        word.store(value.to_le(), Ordering::Release);
    }

    /// Copies bytes to where they are known to fit, in no order among them, but after all that was stored earlier and before
    /// all that comes later.
    pub(super) fn copy(&mut self, at: u64, bytes: &[u8]) {
        #[cfg(test)]
        self.tape.push((at, bytes.to_vec()));
        compiler_fence(Ordering::SeqCst);
        self.memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        compiler_fence(Ordering::SeqCst);
    }

    /// The same from one place in the arena to another, which do not overlap.
    pub(super) fn copy_within(&mut self, from: u64, to: u64, len: u64) {
        let from = from as usize..(from + len) as usize;
        #[cfg(test)]
        self.tape.push((to, self.memory[from.clone()].to_vec()));
        compiler_fence(Ordering::SeqCst);
        self.memory.copy_within(from, to as usize);
        compiler_fence(Ordering::SeqCst);
    }

    /// Bytes in all.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Offset of the first block.
    pub(super) fn first_block(&self) -> u64 {
        self.first
    }
}

/// Words are stored atomically, and for that their addresses must be multiples of 8. Memory that is mapped is.
fn aligned(memory: &[u8]) -> Result<(), ArenaError> {
    let off = memory.as_ptr().align_offset(8);
    if off == 0 { Ok(()) } else { Err(ArenaError::Unaligned { off }) }
}

/// There is a record, and the change found no corruption before it ended.
fn can_be_mended(header: &ArenaHeader, memory: &[u8]) -> bool {
    let record = memory.get(at::RECORD as usize..at::RECORD as usize + 8);
    header.version.get() >= 2 && record.is_some_and(|length| *length != RECORD_SPOILT.to_le_bytes())
}
