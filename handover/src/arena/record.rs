//! The undo record: what an arena needs to get back to the state before a step, wherever in it a CPU was stopped.
//!
//! A word is saved in the record before it is changed ([`Arena::save`]): first the entry, then the record's length, then the
//! change itself. So whatever has changed in memory stands in the record that is there with it. A step becomes final by one
//! store, which makes the record empty ([`Arena::commit`]); until then [`Arena::undo`] brings back what was, read from the last entry to the
//! first. Undoing writes only what was there before the step, so that it may itself be stopped anywhere, and begin again.
//!
//! Three things need no undo, and are not saved: memory above the top (nobody looks there); the content of a block that was
//! allocated in this step, but for the words that made it a free block; and the record itself. From the second follows the
//! rule that no step allocates after it has freed: it might write over what undoing would bring back.
//!
//! An arena of version 1 has no record. This process keeps one for it in its own memory: an operation that finds no room is
//! taken back all the same; a stop within a change stays visible and cannot be mended.

use state_schemas::arena::{HEADER_LEN, PENDING_CLEAR, PENDING_LIST, PENDING_MAP, RECORD_SPOILT, RECORD_WORDS, at};

use super::error::{ArenaError, corrupt};
use super::memory::Arena;
use super::step::own_record;

/// Bits of an entry's last word that are an offset.
const AT_BITS: u32 = 48;
const AT_MASK: u64 = (1 << AT_BITS) - 1;
/// Words of the header page that changes change; the tables, too.
const HEADER_WORDS: [u64; 5] = [at::EPOCH, at::STATE_AND_SEAL, at::ROOT, at::TOP, at::USED];

/// One entry: these words of the record belong at this offset.
struct Saved {
    at: u64,
    start: u64,
    words: u64,
}

impl Arena<'_> {
    /// Begins a step.
    pub(super) fn begin_step(&mut self) {
        self.record.top = self.get(at::TOP);
        self.record.freed = false;
        self.record.header_saved = 0;
    }

    /// Makes what was done since [`Arena::begin_step`] final.
    pub(super) fn commit(&mut self) {
        if self.record.length != 0 {
            self.set_record_length(0);
        }
    }

    /// Saves words that are about to be changed. Their offset is known to lie within.
    pub(super) fn save(&mut self, at: u64, words: u64) -> Result<(), ArenaError> {
        if at >= self.record.top || self.record.forgetful {
            return Ok(());
        }
        let start = self.record.length;
        let end = start + words + 1;
        if end > RECORD_WORDS {
            return corrupt("a change is larger than its undo record", at::RECORD);
        }
        if words > 2 && self.record.own.is_none() {
            self.copy_within(at, at::ENTRIES + 8 * start, 8 * words);
        } else {
            for index in 0..words {
                let old = self.get(at + 8 * index);
                self.set_record_word(start + index, old);
            }
        }
        self.set_record_word(end - 1, words << AT_BITS | at);
        self.set_record_length(end);
        Ok(())
    }

    /// Changes a word of the header page.
    pub(super) fn put(&mut self, at: u64, value: u64) -> Result<(), ArenaError> {
        // These two change with every block: once in a step is enough.
        let once = match at {
            at::TOP => 1,
            at::USED => 2,
            _ => 0,
        };
        if self.record.header_saved & once == 0 {
            self.save(at, 1)?;
            self.record.header_saved |= once;
        }
        self.store(at, value);
        Ok(())
    }

    /// Changes the 8-aligned word at `at`.
    pub(super) fn set_word(&mut self, at: u64, value: u64) -> Result<(), ArenaError> {
        self.check_word(at)?;
        self.save(at, 1)?;
        self.store(at, value);
        Ok(())
    }

    /// What is still to be freed.
    pub(super) fn pending(&self) -> u64 {
        self.record.pending
    }

    /// Notes what is to be freed, or with 0 that nothing is.
    pub(super) fn set_pending(&mut self, pending: u64) -> Result<(), ArenaError> {
        if self.record.own.is_none() {
            self.put(at::PENDING, pending)?;
        }
        self.record.pending = pending;
        Ok(())
    }

    /// Takes up what the arena says is to be freed.
    pub(super) fn load_pending(&mut self) -> Result<(), ArenaError> {
        if self.record.own.is_some() {
            self.record.pending = 0;
            return Ok(());
        }
        let pending = self.get(at::PENDING);
        let container = matches!(pending & 0xf, at if at == 8 + PENDING_LIST || at == 8 + PENDING_MAP);
        if pending != 0 && pending != PENDING_CLEAR && !container {
            return corrupt("what is to be freed", at::PENDING);
        }
        self.record.pending = pending;
        Ok(())
    }

    /// For the allocator: the step frees a block.
    pub(super) fn note_free(&mut self) {
        self.record.freed = true;
    }

    /// For the allocator: the step allocates a block.
    pub(super) fn note_alloc(&self) {
        debug_assert!(!self.record.freed, "a step allocates after it has freed");
    }

    /// Takes up the record as the arena has it; says whether there is anything in it.
    pub(super) fn load_record(&mut self) -> Result<bool, ArenaError> {
        let length = self.get(at::RECORD);
        if length > RECORD_WORDS {
            return corrupt("length of the undo record", at::RECORD);
        }
        self.record.length = length;
        Ok(length != 0)
    }

    /// Brings back what the step has changed. Everything is checked before anything is written.
    pub(super) fn undo(&mut self) -> Result<(), ArenaError> {
        self.each_saved(|_, _| Ok(()))?;
        self.each_saved(|arena, saved| {
            for index in 0..saved.words {
                let old = arena.record_word(saved.start + index);
                arena.store(saved.at + 8 * index, old);
            }
            Ok(())
        })?;
        // Only now: whoever is stopped before this begins again from the last entry.
        self.set_record_length(0);
        self.load_pending()
    }

    /// The word as it was when the step began, if the step has changed it.
    pub(super) fn before_step(&mut self, at: u64) -> Result<Option<u64>, ArenaError> {
        let mut old = None;
        self.each_saved(|arena, saved| {
            if saved.at == at {
                old = Some(arena.record_word(saved.start));
            }
            Ok(())
        })?;
        Ok(old)
    }

    /// There is no way back to a whole arena. This process goes on with a record of its own.
    pub(super) fn spoil(&mut self) {
        self.record.pending = 0;
        if self.record.own.is_none() {
            self.store(at::RECORD, RECORD_SPOILT);
            self.record.own = Some(own_record());
        }
    }

    /// Saves nothing from now on. It shows what the record costs, and that a check for torn arenas finds them.
    #[doc(hidden)]
    pub fn forget(&mut self) {
        self.record.forgetful = true;
    }

    /// The entries, from the last to the first.
    fn each_saved(
        &mut self,
        mut each: impl FnMut(&mut Self, Saved) -> Result<(), ArenaError>,
    ) -> Result<(), ArenaError> {
        let mut end = self.record.length;
        while end != 0 {
            let last = self.record_word(end - 1);
            let (words, at) = (last >> AT_BITS, last & AT_MASK);
            let Some(start) = (end - 1).checked_sub(words).filter(|_| words != 0 && at.is_multiple_of(8)) else {
                return corrupt("an entry of the undo record", at::ENTRIES + 8 * (end - 1));
            };
            let tables = (at::TABLES..HEADER_LEN).contains(&at) && at + 8 * words <= HEADER_LEN;
            let pending = at == at::PENDING && self.record.own.is_none();
            let header = tables || words == 1 && (HEADER_WORDS.contains(&at) || pending);
            // Both are far below 2^63.
            if !header && (at < self.first_block() || at + 8 * words > self.length()) {
                return corrupt("an entry of the undo record", at::ENTRIES + 8 * (end - 1));
            }
            each(self, Saved { at, start, words })?;
            end = start;
        }
        Ok(())
    }

    fn record_word(&self, index: u64) -> u64 {
        match &self.record.own {
            None => self.get(at::ENTRIES + 8 * index),
            Some(own) => own[index as usize],
        }
    }

    fn set_record_word(&mut self, index: u64, word: u64) {
        match &mut self.record.own {
            None => self.store(at::ENTRIES + 8 * index, word),
            Some(own) => own[index as usize] = word,
        }
    }

    fn set_record_length(&mut self, length: u64) {
        self.record.length = length;
        if self.record.own.is_none() {
            self.store(at::RECORD, length);
        }
    }
}
