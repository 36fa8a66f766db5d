//! Identity page tables for the CPUs that run between kernels.
//!
//! They map all that 32-bit mode can address, and the ranges asked for, each at its own address: present, writable,
//! executable, and never with the user bit: a CPU may arrive here with SMEP and SMAP on. The five-level root is one page above
//! the four-level one, so both can be used with the same tables.

use std::collections::BTreeMap;

use crate::layout::{IDENTITY_END, LARGE_PAGE, PAGE};
use crate::memory_map::Range;

const PRESENT_WRITABLE: u64 = 0b11;
const LEAF: u64 = 1 << 7;
const ENTRIES: usize = 512;
const GIB: u64 = 1 << 30;
/// What four levels can address in the lower half; identity maps need no more (and five-level kernels place us below).
const LOWER_HALF: u64 = 1 << 47;

/// Finished tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageTables {
    /// Their pages, to be put at the base that they were built for.
    pub bytes: Vec<u8>,
    /// Physical address of the four-level root.
    pub root_4level: u64,
    /// Physical address of the five-level root.
    pub root_5level: u64,
}

/// Why tables cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageTablesError {
    /// They do not fit.
    #[error("identity page tables need {needed} pages, but {room} are set aside: map less, or use 1 GiB pages")]
    NoRoom {
        /// Pages needed.
        needed: u64,
        /// Pages there.
        room: u64,
    },
    /// Out of reach.
    #[error("range {range} lies beyond what four levels of page tables can map ({LOWER_HALF:#x})")]
    TooHigh {
        /// Which.
        range: Range,
    },
}

impl PageTables {
    /// Tables for `[0, 4 GiB)` and `ranges` (grown to whole pages), to be put at the start of `room`.
    ///
    /// With `gigabyte_pages` (the CPU's `pdpe1gb`) the ranges above 4 GiB take no page directories. Below 4 GiB pages
    /// stay at 2 MiB: RAM and devices mix there, and a page should not span memory types.
    pub fn identity(room: Range, ranges: &[Range], gigabyte_pages: bool) -> Result<PageTables, PageTablesError> {
        // Which directory entries are needed, as sets keyed by the index from address 0: PDPTs by 512 GiB, PDs by GiB.
        // `None`: one 1 GiB leaf.
        let mut gigabytes: BTreeMap<u64, Option<Range>> = BTreeMap::new();
        let low = Range::new(0, IDENTITY_END);
        for gib in 0..IDENTITY_END / GIB {
            gigabytes.insert(gib, Some(low));
        }
        for &range in ranges {
            if range.end() > LOWER_HALF {
                return Err(PageTablesError::TooHigh { range });
            }
            let range = range.grow_to(LARGE_PAGE);
            for gib in range.start() / GIB..range.end().div_ceil(GIB) {
                if gib < IDENTITY_END / GIB {
                    continue;
                }
                let part = if gigabyte_pages { None } else { Some(range) };
                gigabytes
                    .entry(gib)
                    // Two ranges in one GiB: map what lies between, too. It is an identity map for trusted code.
                    .and_modify(|old| *old = old.zip(part).map(|(a, b)| span(a, b)))
                    .or_insert(part);
            }
        }
        let pdpt_count =
            gigabytes.keys().map(|gib| gib / ENTRIES as u64).collect::<std::collections::BTreeSet<_>>().len();
        let pd_count = gigabytes.values().flatten().count();
        let needed = (2 + pdpt_count + pd_count) as u64;
        if needed > room.len() / PAGE {
            return Err(PageTablesError::NoRoom { needed, room: room.len() / PAGE });
        }

        let mut writer = Writer { base: room.start(), pages: Vec::new() };
        let root_5level = writer.new_table();
        let root_4level = writer.new_table();
        writer.set(root_5level, 0, root_4level | PRESENT_WRITABLE);
        let mut pdpts = BTreeMap::new();
        for (gib, part) in gigabytes {
            let pdpt = *pdpts.entry(gib / ENTRIES as u64).or_insert_with(|| writer.new_table());
            writer.set(root_4level, (gib / ENTRIES as u64) as usize, pdpt | PRESENT_WRITABLE);
            let index = (gib % ENTRIES as u64) as usize;
            match part {
                None => writer.set(pdpt, index, (gib * GIB) | PRESENT_WRITABLE | LEAF),
                Some(part) => {
                    let directory = writer.new_table();
                    writer.set(pdpt, index, directory | PRESENT_WRITABLE);
                    let part = part.intersect(Range::new(gib * GIB, (gib + 1) * GIB));
                    for page in (part.start()..part.end()).step_by(LARGE_PAGE as usize) {
                        writer.set(directory, (page % GIB / LARGE_PAGE) as usize, page | PRESENT_WRITABLE | LEAF);
                    }
                }
            }
        }
        debug_assert_eq!(writer.pages.len() as u64, needed);
        let bytes = writer.pages.iter().flatten().flat_map(|entry| entry.to_le_bytes()).collect();
        Ok(PageTables { bytes, root_4level, root_5level })
    }

    /// A copy of the four-level root's page, for a place below 4 GiB.
    pub fn root_copy(&self, base: u64) -> Vec<u8> {
        let at = (self.root_4level - base) as usize;
        self.bytes[at..at + PAGE as usize].to_vec()
    }
}

fn span(a: Range, b: Range) -> Range {
    Range::new(a.start().min(b.start()), a.end().max(b.end()))
}

struct Writer {
    base: u64,
    pages: Vec<[u64; ENTRIES]>,
}

impl Writer {
    /// Address of a new empty table.
    fn new_table(&mut self) -> u64 {
        self.pages.push([0; ENTRIES]);
        self.base + (self.pages.len() as u64 - 1) * PAGE
    }

    fn set(&mut self, table: u64, index: usize, entry: u64) {
        self.pages[((table - self.base) / PAGE) as usize][index] = entry;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROOM: Range = Range::new(0x1_4002_0000, 0x1_4004_0000);

    /// Walks the tables as the CPU does (SDM volume 3, 4.5), knowing nothing of how they were built.
    fn translate(tables: &PageTables, levels: u32, address: u64) -> Option<u64> {
        let mut table = if levels == 5 { tables.root_5level } else { tables.root_4level };
        for level in (1..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let at = (table - ROOM.start() + ((address >> shift) & 511) * 8) as usize;
            let entry = u64::from_le_bytes(tables.bytes[at..at + 8].try_into().unwrap());
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0b10, 0b10, "writable at every level");
            assert_eq!(entry & 0b100, 0, "never for user mode");
            assert_eq!(entry >> 63, 0, "executable");
            if entry & LEAF != 0 {
                assert!(level == 2 || level == 3);
                let mask = (1u64 << shift) - 1;
                assert_eq!(entry & 0x000f_ffff_ffff_f000 & mask, 0, "reserved bits of a large page");
                return Some((entry & 0x000f_ffff_ffff_f000) | (address & mask));
            }
            table = entry & 0x000f_ffff_ffff_f000;
            assert!(ROOM.contains(Range::new(table, table + PAGE)), "table outside of its room");
        }
        panic!("4 KiB pages are never used")
    }

    #[test]
    fn low_four_gib_and_nothing_else() {
        let tables = PageTables::identity(ROOM, &[], false).unwrap();
        assert_eq!(tables.bytes.len(), 7 * 4096);
        for address in [0, 0x8000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, 4, address), Some(address));
            assert_eq!(translate(&tables, 5, address), Some(address));
        }
        assert_eq!(translate(&tables, 4, 1 << 32), None);
        assert_eq!(translate(&tables, 5, 1 << 48), None);
        assert_eq!(tables.root_copy(ROOM.start()), tables.bytes[4096..8192]);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let much = [Range::new(4 * GIB, 40 * GIB)];
        let error = PageTables::identity(ROOM, &much, false).unwrap_err();
        assert_eq!(error, PageTablesError::NoRoom { needed: 2 + 1 + 40, room: 32 });
        assert!(PageTables::identity(ROOM, &much, true).is_ok());
        let far = [Range::new(LOWER_HALF - GIB, LOWER_HALF + 1)];
        assert!(matches!(PageTables::identity(ROOM, &far, false), Err(PageTablesError::TooHigh { .. })));
    }

    proptest! {
        #[test]
        fn every_address_asked_for_maps_to_itself(
            ranges in prop::collection::vec((0u64..2048 * GIB, 1u64..3 * GIB), 0..4),
            probes in prop::collection::vec(any::<prop::sample::Index>(), 8),
            gigabyte_pages: bool,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(s, l)| Range::new(s, s + l)).collect();
            let tables = match PageTables::identity(ROOM, &ranges, gigabyte_pages) {
                Ok(tables) => tables,
                Err(error) => {
                    let no_room = matches!(error, PageTablesError::NoRoom { .. });
                    prop_assert!(no_room, "{}", error);
                    return Ok(());
                }
            };
            for range in ranges {
                for probe in &probes {
                    let address = range.start() + probe.index(range.len() as usize) as u64;
                    prop_assert_eq!(translate(&tables, 4, address), Some(address));
                    prop_assert_eq!(translate(&tables, 5, address), Some(address));
                }
                prop_assert_eq!(translate(&tables, 4, range.end() - 1), Some(range.end() - 1));
            }
        }
    }
}
