//! A byte string in an arena: a length word, then the bytes.

use super::error::{ArenaError, corrupt};
use super::memory::Arena;

/// Bytes before the content.
const HEAD: u64 = 8;
/// A block more than this many times too large is given back rather than reused.
const SLACK: u64 = 4;
/// Up to so many bytes, head included, are written in place: what is written over has to be saved.
const IN_PLACE: u64 = 512;

impl Arena<'_> {
    /// Stores a copy of `content`.
    pub(super) fn value_new(&mut self, content: &[u8]) -> Result<u64, ArenaError> {
        let len = content.len() as u64;
        let value = self.alloc(HEAD.saturating_add(len))?;
        self.fresh_word(value, len)?;
        self.fresh_bytes(value + HEAD, content)?;
        Ok(value)
    }

    /// The content.
    pub(super) fn value(&self, value: u64) -> Result<&[u8], ArenaError> {
        self.value_check(value)?;
        let len = self.word(value)?;
        self.bytes(value + HEAD, len)
    }

    /// Puts `content` in the place of what was there, and returns where it lies now: the same place if it fits.
    /// Refused before anything is changed if there is no room.
    pub(super) fn value_replace(&mut self, value: u64, content: &[u8]) -> Result<u64, ArenaError> {
        let len = content.len() as u64;
        let needed = HEAD.saturating_add(len);
        let capacity = self.capacity(value)?;
        if needed <= capacity && capacity <= (needed * SLACK).max(64) && needed <= IN_PLACE {
            // A block's capacity is a number of whole words.
            self.save(value, needed.div_ceil(8))?;
            self.fresh_word(value, len)?;
            self.fresh_bytes(value + HEAD, content)?;
            return Ok(value);
        }
        let new = self.value_new(content)?;
        self.free(value)?;
        Ok(new)
    }

    /// Checks that the length in memory fits in the block.
    pub(super) fn value_check(&self, value: u64) -> Result<(), ArenaError> {
        let len = self.word(value)?;
        if len > self.capacity(value)?.saturating_sub(HEAD) {
            return corrupt("byte string is longer than its block", value);
        }
        Ok(())
    }
}
