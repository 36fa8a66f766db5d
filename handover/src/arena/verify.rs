//! Walks all of a store and accounts for every block: what attaching in O(1) leaves out.
//!
//! Takes time and memory proportional to the arena (one bit for 16 bytes), so it runs in tests, after a torn change, or
//! in the trial; never in a cutover.

use super::error::{ArenaError, corrupt};
use super::memory::Arena;
use super::store::{Kind, Store, StoreError};

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Keys of the store.
    pub keys: u64,
    /// Allocated blocks: each is reached from the root exactly once.
    pub blocks: u64,
    /// Free blocks: each is in the free list where it belongs.
    pub free_blocks: u64,
}

/// A bit for each place where a block may start.
struct Marks(Vec<u64>);

impl Marks {
    fn new(length: u64) -> Marks {
        Marks(vec![0; (length / 16 / 64 + 1) as usize])
    }
    fn set(&mut self, block: u64) {
        self.0[(block / 16 / 64) as usize] |= 1 << (block / 16 % 64);
    }
    /// Clears the mark; says whether it was set.
    fn clear(&mut self, block: u64) -> bool {
        let (word, bit) = ((block / 16 / 64) as usize, 1 << (block / 16 % 64));
        match self.0.get_mut(word) {
            Some(word) if *word & bit != 0 => {
                *word &= !bit;
                true
            }
            _ => false,
        }
    }
}

impl Arena<'_> {
    /// Walks all blocks and free lists; returns the marks of allocated blocks, their number, that of the free ones.
    fn check_blocks(&self) -> Result<(Marks, u64, u64), ArenaError> {
        let usage = self.usage();
        let (mut used_marks, mut free_marks) = (Marks::new(usage.top), Marks::new(usage.top));
        let (mut blocks, mut free_blocks, mut used) = (0, 0, 0);
        let mut at = self.first_block();
        let mut below_free = false;
        while at < usage.top {
            let block = self.block(at)?;
            if block.below_free != below_free {
                return corrupt("flag of the block below", at);
            }
            if block.free {
                if below_free {
                    return corrupt("two free blocks side by side", at);
                }
                if self.word(at + block.size - 8)? != block.size {
                    return corrupt("size at the end of a free block", at + block.size - 8);
                }
                free_marks.set(at);
                free_blocks += 1;
            } else {
                used_marks.set(at);
                blocks += 1;
                used += block.size;
            }
            below_free = block.free;
            at += block.size;
        }
        if below_free {
            return corrupt("a free block ends at the top", at);
        }
        if used != usage.used {
            return corrupt("bytes in use", state_schemas::arena::at::USED);
        }
        let mut listed = 0;
        for (head, marked, index) in self.free_lists() {
            if (head != 0) != marked {
                return corrupt("bitmap of the free lists", head);
            }
            let (mut at, mut before) = (head, 0);
            while at != 0 {
                // A second visit finds no mark: cycles end here.
                if !free_marks.clear(at) {
                    return corrupt("a free list holds what is no free block", at);
                }
                if Self::list_index(self.block(at)?.size) != index {
                    return corrupt("a free block is in the wrong list", at);
                }
                if self.word(at + 16)? != before {
                    return corrupt("back link of a free list", at + 16);
                }
                before = at;
                at = self.word(at + 8)?;
                listed += 1;
            }
        }
        if listed != free_blocks {
            return corrupt("a free block is in no list", self.first_block());
        }
        Ok((used_marks, blocks, free_blocks))
    }
}

impl Store<'_> {
    /// Walks everything.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn verify(&self) -> Result<Verified, StoreError> {
        let arena = self.arena();
        arena.header()?;
        let (mut marks, blocks, free_blocks) = arena.check_blocks()?;
        let mut reached = 0;
        let mut seen = |payload: u64| {
            if !payload.checked_sub(8).is_some_and(|block| block % 16 == 0 && marks.clear(block)) {
                return corrupt("no block of its own", payload);
            }
            reached += 1;
            Ok(())
        };
        arena.map_check(arena.root(), &mut seen, &mut |seen, kind, value| {
            if kind == Kind::String as u32 {
                arena.value_check(value)?;
                seen(value)
            } else if kind == Kind::List as u32 {
                arena.list_check(value, seen)
            } else if kind == Kind::Set as u32 {
                arena.map_check(value, seen, &mut |_, _, _| Ok(()))
            } else {
                corrupt("kind of a key's value", value)
            }
        })?;
        if reached != blocks {
            return Ok(corrupt("a block that nothing refers to", arena.first_block())?);
        }
        Ok(Verified { keys: self.len()?, blocks, free_blocks })
    }
}
