//! The tree of preserved pages ("KHO persistent memory tracker" in `include/linux/kho/abi/kexec_handover.h`).
//!
//! A set of keys. A key names a page of an order: the page's number shifted right by the order, with one bit set above
//! all that such a number can have, whose place says the order:
//!
//! ```text
//! order 0   1 at bit 52, address >> 12        63..60   59..51 50..42 41..33 32..24 23..15   14..0
//! order 1   1 at bit 51, address >> 13          0    | Lv 5 | Lv 4 | Lv 3 | Lv 2 | Lv 1 | bit in the leaf |
//! order n   1 at bit 52-n, address >> 12+n
//! ```
//!
//! Nodes of levels 5 to 1 are pages of 512 physical addresses, 0 for none; those of level 0 are bitmaps. One leaf of
//! order 0 tells of 128 MiB, one of order 9 of 64 GiB.

use std::collections::{BTreeMap, HashSet};

use state_schemas::handover_record::PhysRange;

use crate::kho::error::ReadError;
use crate::kho::memory::{Memory, PAGE, read_page};
use crate::kho::model::{Limits, Run};

/// log2 of [`PAGE`].
const PAGE_SHIFT: u32 = PAGE.trailing_zeros();
/// `KHO_TREE_MAX_DEPTH - 1`: the level of the root.
const ROOT_LEVEL: u32 = 5;
/// `KHO_TABLE_SIZE_LOG2`
const TABLE_BITS: u32 = 9;
/// `KHO_BITMAP_SIZE_LOG2`
const LEAF_BITS: u32 = 15;
/// Where the bit of order 0 is: `64 - PAGE_SHIFT`.
const ORDER_0_BIT: u32 = 64 - PAGE_SHIFT;
/// The highest order that is read or written: its keys still have a leaf for themselves. A page of 2^49 bytes.
pub const MAX_ORDER: u32 = ORDER_0_BIT - LEAF_BITS;

const _: () = assert!((ORDER_0_BIT + 1 - LEAF_BITS).div_ceil(TABLE_BITS) == ROOT_LEVEL);

/// `kho_encode_radix_key`: the key of the page at `phys`, which is aligned to the order.
pub const fn key(phys: u64, order: u32) -> u64 {
    1 << (ORDER_0_BIT - order) | phys >> (PAGE_SHIFT + order)
}

/// `kho_decode_radix_key`: address and order. `None` for what `kho_encode_radix_key` cannot have made.
pub const fn page_of(key: u64) -> Option<(u64, u32)> {
    if key == 0 || key.ilog2() > ORDER_0_BIT {
        return None;
    }
    let order = ORDER_0_BIT - key.ilog2();
    let number = key ^ 1 << key.ilog2();
    Some((number << PAGE_SHIFT << order, order))
}

/// Splits a run of whole pages as `kho_preserve_pages` does, so that `kho_restore_pages` of the same run finds each
/// piece: always the largest that is aligned and fits.
pub fn pieces(range: PhysRange) -> impl Iterator<Item = (u64, u32)> {
    let mut next = range.start >> PAGE_SHIFT;
    let end = next + (range.len >> PAGE_SHIFT);
    std::iter::from_fn(move || {
        (next < end).then(|| {
            let order = next.trailing_zeros().min((end - next).ilog2());
            let phys = next << PAGE_SHIFT;
            next += 1 << order;
            (phys, order)
        })
    })
}

/// The set of keys, to be written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tree {
    /// By the key's upper bits.
    leaves: BTreeMap<u64, Box<[u64; 512]>>,
}

impl Tree {
    /// Adds `count` pages of one order, next to each other.
    pub(crate) fn insert(&mut self, phys: u64, order: u32, count: u64) {
        let mut key = key(phys, order);
        let end = key + count;
        while key < end {
            let leaf = self.leaves.entry(key >> LEAF_BITS).or_insert_with(|| Box::new([0; 512]));
            let leaf_end = ((key >> LEAF_BITS) + 1) << LEAF_BITS;
            while key < end.min(leaf_end) {
                let (word, bit) = (key % (1 << LEAF_BITS) / 64, key % 64);
                let here = (64 - bit).min(end - key);
                leaf[word as usize] |= u64::MAX >> (64 - here) << bit;
                key += here;
            }
        }
    }

    /// Pages that it takes.
    pub(crate) fn nodes(&self) -> u64 {
        let mut nodes = 1 + self.leaves.len() as u64; // the root is there even if nothing is preserved
        for level in 1..ROOT_LEVEL {
            let mut last = None;
            for prefix in self.leaves.keys().map(|leaf| leaf >> (TABLE_BITS * level)) {
                nodes += u64::from(last.replace(prefix) != Some(prefix));
            }
        }
        nodes
    }

    /// Its pages, in memory that `take` gives, one each. Answers with where the root is.
    pub(crate) fn write<E>(
        &self,
        mut take: impl FnMut() -> Result<u64, E>,
        mut put: impl FnMut(u64, &[u8]),
    ) -> Result<u64, E> {
        let mut below: Vec<(u64, u64)> = Vec::with_capacity(self.leaves.len());
        for (prefix, leaf) in &self.leaves {
            let at = take()?;
            put(at, &bytes_of(leaf));
            below.push((*prefix, at));
        }
        for _ in 1..ROOT_LEVEL {
            let mut nodes = Vec::new();
            for children in below.chunk_by(|a, b| a.0 >> TABLE_BITS == b.0 >> TABLE_BITS) {
                nodes.push((children[0].0 >> TABLE_BITS, write_node(children, &mut take, &mut put)?));
            }
            below = nodes;
        }
        write_node(&below, &mut take, &mut put)
    }
}

fn write_node<E>(
    children: &[(u64, u64)],
    take: &mut impl FnMut() -> Result<u64, E>,
    put: &mut impl FnMut(u64, &[u8]),
) -> Result<u64, E> {
    let mut table = [0; 512];
    for (prefix, at) in children {
        table[(prefix % (1 << TABLE_BITS)) as usize] = *at;
    }
    let at = take()?;
    put(at, &bytes_of(&table));
    Ok(at)
}

fn bytes_of(words: &[u64; 512]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words_of(page: &[u8; PAGE as usize]) -> impl Iterator<Item = u64> {
    page.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// What a tree holds.
pub(crate) struct Walked {
    /// Ascending by key: largest order first.
    pub(crate) runs: Vec<Run>,
    pub(crate) nodes: Vec<u64>,
}

/// Walks a tree that somebody else has written: each page once, never more of them than allowed.
pub(crate) fn walk(memory: &impl Memory, root: u64, limits: &Limits) -> Result<Walked, ReadError> {
    let mut walk = Walk { memory, limits, seen: HashSet::new(), nodes: Vec::new(), runs: Vec::new() };
    walk.node(root, ROOT_LEVEL, 0)?;
    Ok(Walked { runs: walk.runs, nodes: walk.nodes })
}

struct Walk<'a, M> {
    memory: &'a M,
    limits: &'a Limits,
    seen: HashSet<u64>,
    nodes: Vec<u64>,
    runs: Vec<Run>,
}

impl<M: Memory> Walk<'_, M> {
    /// Recursion of six levels, no more: the level counts down.
    fn node(&mut self, at: u64, level: u32, prefix: u64) -> Result<(), ReadError> {
        const WHAT: &str = "a node of the tree of preserved pages";
        if at == 0 || !at.is_multiple_of(PAGE) {
            return Err(ReadError::Place { what: WHAT, at });
        }
        if !self.seen.insert(at) {
            return Err(ReadError::Cycle { what: WHAT, at });
        }
        if self.seen.len() > self.limits.nodes {
            let limit = self.limits.nodes as u64;
            return Err(ReadError::TooMany { what: "nodes of the tree of preserved pages", count: limit + 1, limit });
        }
        self.nodes.push(at);
        let page = read_page(self.memory, at).map_err(|missing| ReadError::Memory { what: WHAT, missing })?;
        if level == 0 {
            return self.leaf(&page, prefix);
        }
        let shift = LEAF_BITS + TABLE_BITS * (level - 1);
        for (index, child) in words_of(&page).enumerate().filter(|(_, child)| *child != 0) {
            // The root's index has 9 bits from 51 on: nothing is shifted out. What is beyond bit 52 shows in the leaf.
            self.node(child, level - 1, prefix | (index as u64) << shift)?;
        }
        Ok(())
    }

    fn leaf(&mut self, page: &[u8; PAGE as usize], prefix: u64) -> Result<(), ReadError> {
        for (index, mut word) in words_of(page).enumerate() {
            while word != 0 {
                let first = word.trailing_zeros();
                let count = (word >> first).trailing_ones();
                word &= u64::MAX.checked_shl(first + count).unwrap_or(0);
                let key = prefix | (index as u64 * 64 + u64::from(first));
                self.keys(key, u64::from(count))?;
            }
        }
        Ok(())
    }

    /// Keys in a row. All have the order of the first: the row lies within one leaf, and up to [`MAX_ORDER`] no leaf
    /// has two.
    fn keys(&mut self, key: u64, count: u64) -> Result<(), ReadError> {
        let (start, order) = page_of(key).ok_or(ReadError::Key { key })?;
        if order > self.limits.order.min(MAX_ORDER) {
            return Err(ReadError::Key { key });
        }
        let size = PAGE << order;
        match self.runs.last_mut() {
            Some(last) if last.order == order && last.range().end() == Some(start) => last.count += count,
            _ => {
                if self.runs.len() >= self.limits.runs {
                    let limit = self.limits.runs as u64;
                    return Err(ReadError::TooMany { what: "runs of preserved pages", count: limit + 1, limit });
                }
                self.runs.push(Run { start, order, count });
            }
        }
        // Checked here, so that nobody behind has to fear an overflow.
        let last = self.runs.last().expect("one was just pushed or extended");
        match last.count.checked_mul(size).and_then(|len| last.start.checked_add(len)) {
            Some(end) if end <= self.limits.top => Ok(()),
            _ => Err(ReadError::Place { what: "a preserved page", at: start }),
        }
    }
}
