//! A list of byte strings that grows and shrinks at both ends.
//!
//! ```text
//! list   length   first   last
//! node   next     previous   length   bytes
//! ```
//!
//! The head of a list is a block of its own, and stays where it is. A node is a block; nothing else ever moves.

use super::error::{ArenaError, corrupt};
use super::memory::Arena;

const LEN: u64 = 0;
const FIRST: u64 = 8;
const LAST: u64 = 16;
const LIST_BYTES: u64 = 24;

const NEXT: u64 = 0;
const PREVIOUS: u64 = 8;
const NODE_LEN: u64 = 16;
const NODE_HEAD: u64 = 24;

/// An end of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Redis calls it left.
    Front,
    /// Redis calls it right.
    Back,
}

impl End {
    /// Offset in the list's head of the link to this end.
    fn link(self) -> u64 {
        match self {
            End::Front => FIRST,
            End::Back => LAST,
        }
    }
    /// Offset in a node of the link away from this end.
    fn inward(self) -> u64 {
        match self {
            End::Front => NEXT,
            End::Back => PREVIOUS,
        }
    }
    fn other(self) -> End {
        match self {
            End::Front => End::Back,
            End::Back => End::Front,
        }
    }
}

impl Arena<'_> {
    /// An empty list.
    pub(super) fn list_new(&mut self) -> Result<u64, ArenaError> {
        let list = self.alloc(LIST_BYTES)?;
        for word in [LEN, FIRST, LAST] {
            self.fresh_word(list + word, 0)?;
        }
        Ok(list)
    }

    /// How many items there are.
    pub(super) fn list_len(&self, list: u64) -> Result<u64, ArenaError> {
        self.word(list + LEN)
    }

    /// Adds an item and returns the new length. Refused before anything is changed if there is no room.
    pub(super) fn list_push(&mut self, list: u64, end: End, item: &[u8]) -> Result<u64, ArenaError> {
        let len = item.len() as u64;
        let count = self.list_len(list)?;
        let neighbour = self.offset(list + end.link())?;
        let node = self.alloc(NODE_HEAD.saturating_add(len))?;
        self.fresh_word(node + NODE_LEN, len)?;
        self.fresh_bytes(node + NODE_HEAD, item)?;
        self.fresh_word(node + end.inward(), neighbour)?;
        self.fresh_word(node + end.other().inward(), 0)?;
        if neighbour == 0 {
            self.set_word(list + end.other().link(), node)?;
        } else {
            self.set_word(neighbour + end.other().inward(), node)?;
        }
        self.set_word(list + end.link(), node)?;
        let count = count.saturating_add(1);
        self.set_word(list + LEN, count)?;
        Ok(count)
    }

    /// Takes an item away.
    pub(super) fn list_pop(&mut self, list: u64, end: End) -> Result<Option<Vec<u8>>, ArenaError> {
        let node = self.offset(list + end.link())?;
        if node == 0 {
            return Ok(None);
        }
        let count = self.list_len(list)?;
        if count == 0 {
            return corrupt("an empty list has items", list);
        }
        let item = self.node_item(node)?.to_vec();
        let rest = self.offset(node + end.inward())?;
        self.set_word(list + end.link(), rest)?;
        if rest == 0 {
            self.set_word(list + end.other().link(), 0)?;
        } else {
            self.set_word(rest + end.other().inward(), 0)?;
        }
        self.set_word(list + LEN, count - 1)?;
        self.free(node)?;
        Ok(Some(item))
    }

    /// The node at `index` from the front, found from the nearer end.
    pub(super) fn list_node(&self, list: u64, index: u64) -> Result<u64, ArenaError> {
        let count = self.list_len(list)?;
        if count > self.length() / NODE_HEAD {
            return corrupt("list length", list);
        }
        let (end, steps) =
            if index <= count / 2 { (End::Front, index) } else { (End::Back, count.saturating_sub(index + 1)) };
        let mut node = self.offset(list + end.link())?;
        for _ in 0..steps {
            node = self.offset(node + end.inward())?;
        }
        Ok(node)
    }

    /// A node's bytes.
    pub(super) fn node_item(&self, node: u64) -> Result<&[u8], ArenaError> {
        let len = self.word(node + NODE_LEN)?;
        if len > self.capacity(node)?.saturating_sub(NODE_HEAD) {
            return corrupt("list item is longer than its block", node);
        }
        self.bytes(node + NODE_HEAD, len)
    }

    /// The node behind this one, 0 at the end.
    pub(super) fn node_next(&self, node: u64) -> Result<u64, ArenaError> {
        self.offset(node + NEXT)
    }

    /// Frees one block of a list that nothing refers to any more; says whether it was the last.
    pub(super) fn list_free_step(&mut self, list: u64) -> Result<bool, ArenaError> {
        let node = self.offset(list + FIRST)?;
        if node == 0 {
            self.free(list)?;
            return Ok(true);
        }
        // Every step frees a block, and a freed block is not a node: a cycle ends in an error at its second visit.
        let next = self.node_next(node)?;
        self.set_word(list + FIRST, next)?;
        self.free(node)?;
        Ok(false)
    }

    /// For `verify`: walks the list, gives each of its blocks to `seen`.
    pub(super) fn list_check(
        &self,
        list: u64,
        seen: &mut impl FnMut(u64) -> Result<(), ArenaError>,
    ) -> Result<(), ArenaError> {
        if self.capacity(list)? < LIST_BYTES {
            return corrupt("a list's head is larger than its block", list);
        }
        seen(list)?;
        let (mut node, mut before, mut count) = (self.offset(list + FIRST)?, 0, 0u64);
        while node != 0 {
            seen(node)?; // refuses a block that it has seen: cycles end here
            self.node_item(node)?;
            if self.word(node + PREVIOUS)? != before {
                return corrupt("back link of a list", node + PREVIOUS);
            }
            before = node;
            node = self.node_next(node)?;
            count += 1;
        }
        if self.word(list + LAST)? != before {
            return corrupt("last item of a list", list + LAST);
        }
        if count != self.list_len(list)? {
            return corrupt("list length", list + LEN);
        }
        Ok(())
    }
}
