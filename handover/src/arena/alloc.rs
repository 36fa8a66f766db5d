//! The allocator: two-level segregated free lists (TLSF), all of it inside the arena.
//!
//! ```text
//! block   header word (tag << 48 | size | flags)   payload, at 8 modulo 16
//! free    header word   next free   previous free   ...   size, in the last word
//! tables  bitmap of first levels   second-level bitmaps, a byte each   list heads [first][second]
//! ```
//!
//! Sizes are multiples of 16, at least 32. A free block's list is found from its size: the first level is the power
//! of two, the second splits it in 8. Two free blocks never lie side by side, and none ends at the top: freeing
//! merges with both neighbours, or lowers the top. So allocating and freeing take constant time, and memory above
//! the top is untouched.
//!
//! All words read from memory are checked before they are followed: the tag, the size against the top, the lists'
//! back links.

use state_schemas::arena::{TABLES_LEN, at};

use super::error::{ArenaError, corrupt};
use super::memory::Arena;

/// Upper bits of each block's header word.
const TAG: u64 = 0xba70;
const TAG_SHIFT: u32 = 48;
const SIZE_MASK: u64 = (1 << TAG_SHIFT) - 16;
/// This block is free.
const FREE: u64 = 1;
/// The block below is free, and its size stands in the word before this header.
const BELOW_FREE: u64 = 2;

/// Bytes of a block's header.
const HEADER: u64 = 8;
/// Smallest block: header, two links, size at the end.
const MIN_BLOCK: u64 = 32;
/// Largest: what a header word can say, also far more than a machine has.
const MAX_BLOCK: u64 = 1 << 46;
const SECOND_BITS: u32 = 3;
const SECOND: u32 = 1 << SECOND_BITS;
/// `log2(MIN_BLOCK)`.
const FIRST_SHIFT: u32 = 5;
const FIRST: u32 = 46 - FIRST_SHIFT + 1;
/// When every list whose blocks would all be large enough is empty, so many blocks of the list below are looked at: some may be.
const LAST_RESORT: u32 = 8;

const FIRST_MAP_AT: u64 = at::TABLES;
const SECOND_MAPS_AT: u64 = FIRST_MAP_AT + 8;
const HEADS_AT: u64 = SECOND_MAPS_AT + 48;
const _: () = assert!(MIN_BLOCK == 1 << FIRST_SHIFT);
const _: () = assert!(FIRST <= 48 && FIRST <= 64);
const _: () = assert!(HEADS_AT + 8 * (FIRST as u64 * SECOND as u64) <= at::TABLES + TABLES_LEN as u64);

/// A block's header word, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) size: u64,
    pub(super) free: bool,
    pub(super) below_free: bool,
}

impl Block {
    fn word(self) -> u64 {
        TAG << TAG_SHIFT | self.size | if self.free { FREE } else { 0 } | if self.below_free { BELOW_FREE } else { 0 }
    }

    fn used(size: u64, below_free: bool) -> Block {
        Block { size, free: false, below_free }
    }
}

/// Which list a block of this size is in.
fn list_of(size: u64) -> (u32, u32) {
    let log = 63 - size.leading_zeros();
    let second = (size >> (log - SECOND_BITS)) as u32 & (SECOND - 1);
    (log - FIRST_SHIFT, second)
}

fn head_at(first: u32, second: u32) -> u64 {
    HEADS_AT + 8 * u64::from(first * SECOND + second)
}

impl Arena<'_> {
    /// Allocates `len` bytes and returns the payload's offset. The bytes are whatever was there before.
    pub(super) fn alloc(&mut self, len: u64) -> Result<u64, ArenaError> {
        self.note_alloc();
        let full = ArenaError::OutOfMemory { asked: len, free: self.usage().free, length: self.length() };
        if len > MAX_BLOCK - 16 || len > self.length() {
            return Err(full);
        }
        let size = (len + HEADER).next_multiple_of(16).max(MIN_BLOCK);
        let block = match self.find_fitting(size)? {
            Some(block) => self.take(block, size)?,
            None => match self.carve(size)? {
                Some(block) => block,
                None => match self.find_in_own_list(size)? {
                    Some(block) => self.take(block, size)?,
                    None => return Err(full),
                },
            },
        };
        let taken = self.block(block)?.size;
        self.put(at::USED, self.get(at::USED).saturating_add(taken))?;
        Ok(block + HEADER)
    }

    /// Gives back what [`Arena::alloc`] returned.
    pub(super) fn free(&mut self, payload: u64) -> Result<(), ArenaError> {
        self.note_free();
        let mut at = self.owned_block(payload)?;
        let block = self.block(at)?;
        let mut size = block.size;
        self.put(at::USED, self.get(at::USED).saturating_sub(size))?;
        if block.below_free {
            let below_size = self.word(at - 8)?;
            // Checked as a block of its own before it is believed: the word lies where data may lie, too.
            let Some(below) = at.checked_sub(below_size).filter(|&below| below >= self.first_block()) else {
                return corrupt("size of the free block below", at - 8);
            };
            let found = self.block(below)?;
            if !found.free || found.size != below_size {
                return corrupt("a free block below", below);
            }
            self.unlink(below, below_size)?;
            // The header that is now inside another block must not pass for one: it would allow a second free.
            self.set_word(at, 0)?;
            at = below;
            size += below_size;
        }
        let top = self.get(at::TOP);
        if at + size < top {
            let above = self.block(at + size)?;
            if above.free {
                self.unlink(at + size, above.size)?;
                self.set_word(at + size, 0)?;
                size += above.size;
            }
        }
        if at + size >= top {
            return self.put(at::TOP, at);
        }
        self.link(at, size)
    }

    /// How many bytes fit in the allocation at `payload`.
    pub(super) fn capacity(&self, payload: u64) -> Result<u64, ArenaError> {
        Ok(self.block(self.owned_block(payload)?)?.size - HEADER)
    }

    /// Makes the arena empty: no allocation is known any more. Nothing of it is saved: it is too much, and is done anew instead.
    pub(super) fn free_all(&mut self) {
        for at in (FIRST_MAP_AT..HEADS_AT + 8 * u64::from(FIRST * SECOND)).step_by(8) {
            self.store(at, 0);
        }
        self.store(at::TOP, self.first_block());
        self.store(at::USED, 0);
        self.store(at::ROOT, 0);
    }

    /// The block header at `at`, with its size within the arena's top.
    pub(super) fn block(&self, at: u64) -> Result<Block, ArenaError> {
        if !at.is_multiple_of(16) {
            return corrupt("a block must be aligned to 16", at);
        }
        let word = self.word(at)?;
        let size = word & SIZE_MASK;
        // `at` is inside the arena and size below 2^48: the sum cannot overflow.
        if word >> TAG_SHIFT != TAG || word & 0xc != 0 {
            return corrupt("no block header", at);
        }
        if size < MIN_BLOCK || at + size > self.get(at::TOP) {
            return corrupt("block size", at);
        }
        Ok(Block { size, free: word & FREE != 0, below_free: word & BELOW_FREE != 0 })
    }

    fn set_block(&mut self, at: u64, block: Block) -> Result<(), ArenaError> {
        self.set_word(at, block.word())
    }

    fn owned_block(&self, payload: u64) -> Result<u64, ArenaError> {
        if payload < self.first_block() + HEADER {
            return corrupt("points outside the arena", payload);
        }
        let at = payload - HEADER;
        if self.block(at)?.free {
            return corrupt("allocated, but the block is free", at);
        }
        Ok(at)
    }

    /// A free block of a list whose blocks all fit.
    fn find_fitting(&self, size: u64) -> Result<Option<u64>, ArenaError> {
        let log = 63 - size.leading_zeros();
        let (first, second) = list_of(size + (1 << (log - SECOND_BITS)) - 1);
        if first >= FIRST {
            return Ok(None);
        }
        let here = self.second_map(first) & (0xffu8 << second);
        let (first, map) = if here != 0 {
            (first, here)
        } else {
            let above = self.get(FIRST_MAP_AT) & u64::MAX.checked_shl(first + 1).unwrap_or(0);
            let first = above.trailing_zeros();
            if first >= FIRST {
                return Ok(None);
            }
            (first, self.second_map(first))
        };
        if map == 0 {
            return corrupt("free-list bitmaps disagree", FIRST_MAP_AT);
        }
        let head_at = head_at(first, map.trailing_zeros());
        let head = self.get(head_at);
        let block = self.block(head)?;
        if !block.free || block.size < size {
            return corrupt("head of a free list", head);
        }
        Ok(Some(head))
    }

    /// A free block that fits, of a list in which only some do. A bounded number of them is looked at, so that the time stays constant.
    fn find_in_own_list(&self, size: u64) -> Result<Option<u64>, ArenaError> {
        let (first, second) = list_of(size);
        let mut at = self.get(head_at(first, second));
        for _ in 0..LAST_RESORT {
            if at == 0 {
                break;
            }
            let block = self.block(at)?;
            if !block.free {
                return corrupt("a free list holds an allocated block", at);
            }
            if block.size >= size {
                return Ok(Some(at));
            }
            at = self.word(at + 8)?;
        }
        Ok(None)
    }

    /// A new block at the top. The block below the top is never free.
    fn carve(&mut self, size: u64) -> Result<Option<u64>, ArenaError> {
        let top = self.get(at::TOP);
        let Some(end) = top.checked_add(size).filter(|&end| end <= self.length()) else {
            return Ok(None);
        };
        self.set_block(top, Block::used(size, false))?;
        self.put(at::TOP, end)?;
        Ok(Some(top))
    }

    /// Takes a free block of at least `size`, and puts back what is left of it.
    fn take(&mut self, at: u64, size: u64) -> Result<u64, ArenaError> {
        let block = self.block(at)?;
        self.unlink(at, block.size)?;
        // The words that make it a free block. What else is in it is nobody's, and may be written over.
        self.save(at + 8, 2)?;
        self.save(at + block.size - 8, 1)?;
        let rest = block.size - size;
        if rest >= MIN_BLOCK {
            self.set_block(at, Block::used(size, block.below_free))?;
            self.link(at + size, rest)?;
        } else {
            self.set_block(at, Block::used(block.size, block.below_free))?;
            self.tell_above(at + block.size, false)?;
        }
        Ok(at)
    }

    /// Makes `at` a free block. Its neighbours are known to be allocated.
    fn link(&mut self, at: u64, size: u64) -> Result<(), ArenaError> {
        let (first, second) = list_of(size);
        let head_at = head_at(first, second);
        let head = self.get(head_at);
        let block = Block { size, free: true, below_free: false };
        self.set_block(at, block)?;
        self.set_word(at + 8, head)?;
        self.set_word(at + 16, 0)?;
        self.set_word(at + size - 8, size)?;
        if head != 0 {
            self.free_block(head)?;
            self.set_word(head + 16, at)?;
        }
        self.put(head_at, at)?;
        if head == 0 {
            self.set_second_map(first, self.second_map(first) | 1 << second)?;
            self.put(FIRST_MAP_AT, self.get(FIRST_MAP_AT) | 1 << first)?;
        }
        self.tell_above(at + size, true)
    }

    fn unlink(&mut self, at: u64, size: u64) -> Result<(), ArenaError> {
        let (first, second) = list_of(size);
        let head_at = head_at(first, second);
        let next = self.word(at + 8)?;
        let previous = self.word(at + 16)?;
        if next != 0 {
            self.free_block(next)?;
            if self.word(next + 16)? != at {
                return corrupt("back link of a free list", next + 16);
            }
            self.set_word(next + 16, previous)?;
        }
        if previous != 0 {
            self.free_block(previous)?;
            if self.word(previous + 8)? != at {
                return corrupt("forward link of a free list", previous + 8);
            }
            return self.set_word(previous + 8, next);
        }
        if self.get(head_at) != at {
            return corrupt("a free block is in no list", at);
        }
        self.put(head_at, next)?;
        if next == 0 {
            let map = self.second_map(first) & !(1 << second);
            self.set_second_map(first, map)?;
            if map == 0 {
                self.put(FIRST_MAP_AT, self.get(FIRST_MAP_AT) & !(1 << first))?;
            }
        }
        Ok(())
    }

    fn free_block(&self, at: u64) -> Result<Block, ArenaError> {
        let block = self.block(at)?;
        if !block.free {
            return corrupt("a free list holds an allocated block", at);
        }
        Ok(block)
    }

    /// Notes in the block above whether the one below it is free.
    fn tell_above(&mut self, above: u64, below_free: bool) -> Result<(), ArenaError> {
        if above >= self.get(at::TOP) {
            return Ok(());
        }
        let block = self.block(above)?;
        self.set_block(above, Block { below_free, ..block })
    }

    fn second_map(&self, first: u32) -> u8 {
        let word = self.get(SECOND_MAPS_AT + u64::from(first / 8) * 8);
        (word >> (first % 8 * 8)) as u8
    }

    fn set_second_map(&mut self, first: u32, map: u8) -> Result<(), ArenaError> {
        let at = SECOND_MAPS_AT + u64::from(first / 8) * 8;
        let shift = first % 8 * 8;
        let word = self.get(at) & !(0xff << shift) | u64::from(map) << shift;
        self.put(at, word)
    }

    /// The heads of all free lists with their indices, and whether the bitmaps say that the list has any block.
    pub(super) fn free_lists(&self) -> impl Iterator<Item = (u64, bool, (u32, u32))> {
        let first_map = self.get(FIRST_MAP_AT);
        (0..FIRST * SECOND).map(move |index| {
            let (first, second) = (index / SECOND, index % SECOND);
            let marked = first_map >> first & 1 == 1 && self.second_map(first) >> second & 1 == 1;
            (self.get(head_at(first, second)), marked, (first, second))
        })
    }

    /// Index of the list where a free block of this size belongs.
    pub(super) fn list_index(size: u64) -> (u32, u32) {
        list_of(size)
    }
}
