//! By which road each byte of the machine's RAM reaches the successor.
//!
//! ```text
//! low        below 1 MiB: the SIPI page and the low slots; the rest stays unused
//! region     the successor's own RAM from the start
//! arenas     shared while both run, never copied: e820 RAM, reserved by a SETUP_INDIRECT node
//! blocks     whole memory blocks of nothing else: hot-added after commit (BATON_IOC_MEM_ADOPT)
//! fragments  what is left in blocks that are not whole: e820 RAM, reserved like an arena, released after commit
//! ```
//!
//! And one exception: the cap. Linux 6.12 (7.3 no longer) takes `max_pfn` from the e820's plain RAM only (`e820__end_of_ram_pfn`; what
//! setup_data reserves has become `E820_TYPE_RESERVED_KERN` by then), and fall over RAM beyond it that belongs to no node
//! (`free_area_init`). So when anything reserved lies above the region, a page above it must be plain RAM of the successor:
//! taken from the incumbent like the region. What lies above the cap stays unused until the next update.
//!
//! Why two roads for the bulk: hot-add takes whole memory blocks only; a fragment costs struct pages in the region from
//! the start ([`struct_page_bytes`](super::struct_page_bytes)). So: fragments where it must be, blocks where it can.

use serde::{Deserialize, Serialize};

use super::{Range, RangeSet, expected_block_size};
use crate::layout::{LOW_MEMORY_END, PAGE, REGION_ALIGN};

/// Every page of the machine's RAM, in exactly one class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Division {
    /// RAM below 1 MiB.
    pub low: RangeSet,
    /// The successor's region.
    pub region: Range,
    /// The arenas.
    pub arenas: RangeSet,
    /// RAM that the successor knows from its e820 and keeps reserved until commit.
    pub fragments: RangeSet,
    /// RAM that is hot-added after commit; every end is a multiple of `block_size`.
    pub blocks: RangeSet,
    /// A page of the successor's own that is its highest RAM at boot; see above.
    pub cap: Option<Range>,
    /// RAM above the cap that nobody gets.
    pub unused: RangeSet,
    /// The grain of hot-add.
    pub block_size: u64,
}

/// Why a machine cannot be divided so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DivisionError {
    /// Not a grain.
    #[error("memory block size {size:#x} is not a power of two of at least 2 MiB")]
    BlockSize {
        /// Given.
        size: u64,
    },
    /// The region is misplaced.
    #[error("region {region} is not RAM above 1 MiB on 2 MiB boundaries")]
    Region {
        /// Given.
        region: Range,
    },
    /// An arena is misplaced.
    #[error("arena {arena} is not page-aligned RAM above 1 MiB, outside of region {region}")]
    Arena {
        /// Given.
        arena: Range,
        /// Given.
        region: Range,
    },
}

impl Division {
    /// Divides `ram` (what is not a whole page is no RAM).
    pub fn new(ram: &RangeSet, region: Range, arenas: &RangeSet, block_size: u64) -> Result<Division, DivisionError> {
        if !block_size.is_power_of_two() || block_size < REGION_ALIGN {
            return Err(DivisionError::BlockSize { size: block_size });
        }
        let ram = ram.shrink_to(PAGE);
        let low_memory = RangeSet::from(Range::new(0, LOW_MEMORY_END));
        let low = ram.intersect(&low_memory);
        let high = ram.subtract(&low_memory);
        if region.is_empty() || region != region.shrink_to(REGION_ALIGN) || !high.contains(region) {
            return Err(DivisionError::Region { region });
        }
        let available = high.subtract(&region.into());
        for arena in arenas {
            if arena != arena.shrink_to(PAGE) || !available.contains(arena) {
                return Err(DivisionError::Arena { arena, region });
            }
        }
        let rest = available.subtract(arenas);
        // `rest` holds neither low memory nor region nor arenas, so a block that lies wholly in it is free of them.
        let blocks = rest.shrink_to(block_size);
        let fragments = rest.subtract(&blocks);
        let (cap, unused) = (None, RangeSet::new());
        Ok(Division { low, region, arenas: arenas.clone(), fragments, blocks, cap, unused, block_size })
    }

    /// The same for a successor whose memory blocks may be larger than this kernel's, `own_block`: a block that is too small for it
    /// could not be hot-added after the commit, so it has to be a fragment from the start.
    pub fn for_successor(
        ram: &RangeSet,
        region: Range,
        arenas: &RangeSet,
        own_block: u64,
        hypervisor: bool,
    ) -> Result<Division, DivisionError> {
        let mut division = Division::new(ram, region, arenas, own_block)?;
        // Larger blocks leave more fragments, and so maybe more RAM that the successor sees at boot. Each round has larger blocks
        // than the one before, and there is a largest size.
        loop {
            let end = division.room_for_cap().map_or(0, |room| room.end()).max(region.end());
            let theirs = expected_block_size(end, hypervisor);
            if theirs <= division.block_size {
                return Ok(division);
            }
            division = Division::new(ram, region, arenas, theirs)?;
        }
    }

    /// Whether a successor whose RAM ends with this cap has blocks that are small enough for this division.
    pub fn allows_cap(&self, cap: Range, hypervisor: bool) -> bool {
        expected_block_size(cap.end(), hypervisor) <= self.block_size
    }

    /// Where the cap may be, if one is needed: in fragments above the region and all arenas.
    pub fn room_for_cap(&self) -> Option<RangeSet> {
        let reserved_end = self.reserved_in_successor().end();
        if reserved_end <= self.region.end() || self.cap.is_some() {
            return None;
        }
        let floor = self.region.end().max(self.arenas.end());
        Some(self.fragments.subtract(&Range::new(0, floor).into()))
    }

    /// The same division with the cap here, which must lie in [`Division::room_for_cap`].
    pub fn with_cap(mut self, cap: Range) -> Division {
        let above = RangeSet::from(Range::new(cap.end(), u64::MAX));
        self.unused = self.fragments.intersect(&above);
        self.fragments = self.fragments.subtract(&above).subtract(&cap.into());
        self.cap = Some(cap);
        self
    }

    /// What the successor's e820 shows as RAM, and its setup_data reserves: fragments and arenas, touching ones as one.
    pub fn reserved_in_successor(&self) -> RangeSet {
        self.fragments.union(&self.arenas)
    }

    /// Bytes that the successor has in the end: all but low memory.
    pub fn total_after_commit(&self) -> u64 {
        let cap = self.cap.map_or(0, Range::len);
        self.region.len() + self.arenas.total() + self.fragments.total() + self.blocks.total() + cap
    }
}

/// How a kernel hot-adds the blocks that it was left: in memory blocks of its own size, which its predecessor could only expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adoption {
    /// What becomes ordinary memory.
    pub ordinary: RangeSet,
    /// What is kept movable, so that the *next* region can be taken from it again: the highest place where it fits. Not all of it: a
    /// kernel whose memory is mostly movable runs out of room for its own (page tables, slab) while there seems to be plenty.
    pub movable: RangeSet,
    /// What is in no whole block of this kernel's, and has to wait for the next one.
    pub left: RangeSet,
    /// This kernel's block size.
    pub block_size: u64,
}

impl Adoption {
    /// Plans it: `blocks` are there, the next region will have `region` bytes.
    pub fn new(blocks: &RangeSet, region: u64, block_size: u64) -> Result<Adoption, DivisionError> {
        if !block_size.is_power_of_two() || block_size < REGION_ALIGN {
            return Err(DivisionError::BlockSize { size: block_size });
        }
        let whole = blocks.shrink_to(block_size);
        let left = blocks.subtract(&whole);
        let want = region.checked_next_multiple_of(block_size).unwrap_or(u64::MAX);
        let place = whole.iter().rev().find(|range| range.len() >= want);
        let movable = place.map_or_else(RangeSet::new, |range| Range::new(range.end() - want, range.end()).into());
        Ok(Adoption { ordinary: whole.subtract(&movable), movable, left, block_size })
    }

    /// The blocks of `set`, which is one of the above, one by one.
    pub fn each(&self, set: &RangeSet) -> impl Iterator<Item = Range> + use<> {
        let size = self.block_size;
        let starts =
            set.iter().flat_map(|r| (0..r.len() / size).map(move |i| r.start() + i * size)).collect::<Vec<_>>();
        starts.into_iter().map(move |start| Range::new(start, start + size))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;

    #[test]
    fn the_highest_place_for_a_region_stays_movable() {
        let blocks = RangeSet::from(vec![Range::new(BLOCK, 9 * BLOCK), Range::new(32 * BLOCK, 34 * BLOCK)]);
        let movable = |want| Adoption::new(&blocks, want, BLOCK).unwrap().movable;
        assert_eq!(movable(4 * BLOCK), RangeSet::from(Range::new(5 * BLOCK, 9 * BLOCK)));
        assert_eq!(movable(2 * BLOCK), RangeSet::from(Range::new(32 * BLOCK, 34 * BLOCK)));
        assert_eq!(movable(2 * BLOCK - MIB), movable(2 * BLOCK), "no block is torn");
        assert!(movable(9 * BLOCK).is_empty());
        assert!(movable(u64::MAX).is_empty());
    }

    #[test]
    fn blocks_are_adopted_by_the_size_that_this_kernel_has() {
        let blocks = RangeSet::from(vec![Range::new(7 * BLOCK, 33 * BLOCK)]);
        let left = |size| Adoption::new(&blocks, 0, size).unwrap().left.to_string();
        assert_eq!(left(BLOCK), "nothing");
        assert_eq!(left(2 * MIB), "nothing");
        // 2 GiB: 16 of them
        assert_eq!(left(16 * BLOCK), "0x38000000-0x7fffffff, 0x100000000-0x107ffffff");
        assert_eq!(left(64 * BLOCK), "0x38000000-0x107ffffff");
        let smaller = Adoption::new(&blocks, 3 * BLOCK, BLOCK / 2).unwrap();
        assert_eq!(smaller.each(&smaller.movable).count(), 6);
        assert_eq!(smaller.each(&smaller.ordinary).count(), 46);
        assert!(Adoption::new(&blocks, 0, 3 * BLOCK).is_err() && Adoption::new(&blocks, 0, 0).is_err());
    }

    #[test]
    fn a_successor_with_larger_blocks_gets_fragments_that_fill_them() {
        const GIB: u64 = 1 << 30;
        // 66 GiB with a hole below 4 GiB, as virtual machines have it; small blocks here, since this kernel's own region was low.
        let ram = RangeSet::from(vec![Range::new(MIB, 2 * GIB), Range::new(4 * GIB, 68 * GIB)]);
        let none = RangeSet::new();
        let divide = |region, hypervisor| Division::for_successor(&ram, region, &none, BLOCK, hypervisor).unwrap();
        let low = Range::new(GIB, GIB + 4 * BLOCK);
        // Nothing reserved but block 0: below 64 GiB all have small blocks.
        assert_eq!(divide(low, false).block_size, BLOCK);
        // A region that ends above: on metal 2 GiB, under a hypervisor what its end allows.
        let high = Range::new(66 * GIB - 4 * BLOCK, 66 * GIB);
        for hypervisor in [false, true] {
            let division = divide(high, hypervisor);
            assert_eq!(division.block_size, 2 * GIB);
            assert_eq!(division.fragments.to_string(), "0x100000-0x7fffffff, 0x1000000000-0x105fffffff");
            let adopted = Adoption::new(&division.blocks, high.len(), 2 * GIB).unwrap();
            assert!(adopted.left.is_empty());
        }
        let odd = Range::new(66 * GIB + 3 * BLOCK, 66 * GIB + 7 * BLOCK);
        assert_eq!(divide(odd, true).block_size, BLOCK);
        assert_eq!(divide(odd, false).block_size, 2 * GIB);
        // A cap in the last, ragged block counts as well as a region.
        let ragged = RangeSet::from(vec![Range::new(MIB, 2 * GIB), Range::new(4 * GIB, 68 * GIB + 5 * MIB)]);
        let division = Division::for_successor(&ragged, low, &none, BLOCK, false).unwrap();
        assert_eq!(division.block_size, 2 * GIB);
        let division = Division::for_successor(&ragged, low, &none, BLOCK, true).unwrap();
        assert_eq!(division.block_size, BLOCK);
        assert!(division.allows_cap(Range::new(68 * GIB + 4 * MIB, 68 * GIB + 5 * MIB), true));
        assert!(!division.allows_cap(Range::new(68 * GIB - PAGE, 68 * GIB), true));
    }

    #[test]
    fn a_cap_stands_above_all_that_is_reserved() {
        let ram = RangeSet::from(Range::new(MIB, 0x7ffd_e000));
        let arenas = RangeSet::from(Range::new(15 * BLOCK, 15 * BLOCK + 64 * MIB));
        let division = Division::new(&ram, Range::new(11 * BLOCK, 15 * BLOCK), &arenas, BLOCK).unwrap();
        let room = division.room_for_cap().unwrap();
        assert_eq!(room.to_string(), "0x7c000000-0x7ffddfff");
        let total = division.total_after_commit();
        let cap = Range::new(0x7ff0_0000, 0x7ff0_1000);
        let capped = division.with_cap(cap);
        assert_eq!(capped.reserved_in_successor().end(), cap.start());
        assert_eq!(capped.unused, RangeSet::from(Range::new(cap.end(), 0x7ffd_e000)));
        assert_eq!(capped.total_after_commit() + capped.unused.total(), total);
        assert_eq!(capped.room_for_cap(), None);
        // A region above everything else needs none.
        let ram = RangeSet::from(Range::new(MIB, 16 * BLOCK));
        let division = Division::new(&ram, Range::new(12 * BLOCK, 16 * BLOCK), &RangeSet::new(), BLOCK).unwrap();
        assert_eq!(division.room_for_cap(), None);
    }

    #[test]
    fn a_machine_of_two_gib() {
        let ram = RangeSet::from(vec![Range::new(0x1000, 0x9fc00), Range::new(MIB, 0x7ffd_e000)]);
        let region = Range::new(11 * BLOCK, 15 * BLOCK);
        let arenas = RangeSet::from(Range::new(10 * BLOCK, 10 * BLOCK + 64 * MIB));
        let division = Division::new(&ram, region, &arenas, BLOCK).unwrap();
        assert_eq!(division.low.to_string(), "0x1000-0x9efff");
        // block 0 (low memory), the rest of the arena's block, the last block (its end is the firmware's)
        assert_eq!(division.fragments.to_string(), "0x100000-0x7ffffff, 0x54000000-0x57ffffff, 0x78000000-0x7ffddfff");
        assert_eq!(division.blocks, RangeSet::from(Range::new(BLOCK, 10 * BLOCK)));
        assert_eq!(division.reserved_in_successor().count(), 3);
    }

    #[test]
    fn misplaced_ranges_are_refused() {
        let ram = RangeSet::from(Range::new(0, 1024 * MIB));
        let region = Range::new(128 * MIB, 256 * MIB);
        let none = RangeSet::new();
        let refused = |region, arenas: &RangeSet, block| Division::new(&ram, region, arenas, block).unwrap_err();
        assert!(matches!(refused(Range::new(0, 128 * MIB), &none, BLOCK), DivisionError::Region { .. }));
        assert!(matches!(refused(Range::new(960 * MIB, 1088 * MIB), &none, BLOCK), DivisionError::Region { .. }));
        assert!(matches!(refused(region, &none, 3 * MIB), DivisionError::BlockSize { .. }));
        let inside = RangeSet::from(Range::new(255 * MIB, 257 * MIB));
        assert_eq!(
            refused(region, &inside, BLOCK).to_string(),
            "arena 0xff00000-0x100fffff is not page-aligned RAM above 1 MiB, outside of region 0x8000000-0xfffffff"
        );
    }

    /// Any machine: RAM with ragged ends, a region and arenas cut out of it.
    fn machines() -> impl Strategy<Value = (RangeSet, Range, RangeSet, u64)> {
        let ram = prop::collection::vec((0u64..4096, 1u64..2048, 0u64..4096), 1..6).prop_map(|v| {
            v.into_iter().map(|(start, len, ragged)| Range::new(start * MIB + ragged, (start + len) * MIB)).collect()
        });
        (
            ram,
            any::<prop::sample::Index>(),
            1u64..16,
            prop::collection::vec((0u64..(1 << 20), 1u64..4096), 0..4),
            0u32..4,
        )
            .prop_filter_map(
                "no room for a region",
                |(ram, at, size, arenas, shift): (RangeSet, _, _, Vec<_>, _)| {
                    let above = ram.subtract(&Range::new(0, MIB).into()).shrink_to(2 * MIB);
                    let places: Vec<u64> = above
                        .iter()
                        .filter(|r| r.len() >= size * 2 * MIB)
                        .flat_map(|r| (r.start()..=r.end() - size * 2 * MIB).step_by(2 * MIB as usize))
                        .collect();
                    if places.is_empty() {
                        return None;
                    }
                    let start = places[at.index(places.len())];
                    let region = Range::new(start, start + size * 2 * MIB);
                    let wished: RangeSet =
                        arenas.into_iter().map(|(page, n)| Range::new(page * PAGE, (page + n) * PAGE)).collect();
                    let arenas = wished.intersect(&above).subtract(&region.into());
                    Some((ram, region, arenas, BLOCK << shift))
                },
            )
    }

    proptest! {
        #[test]
        fn every_byte_is_in_exactly_one_class((ram, region, arenas, block) in machines()) {
            let d = Division::new(&ram, region, &arenas, block).unwrap();
            let classes = [&d.low, &RangeSet::from(d.region), &d.arenas, &d.fragments, &d.blocks];
            let pages = ram.shrink_to(PAGE);
            // None twice: the sizes add up. None left out, none invented: the union is the RAM.
            let union = classes.iter().fold(RangeSet::new(), |all, class| all.union(class));
            prop_assert_eq!(&union, &pages);
            prop_assert_eq!(classes.iter().map(|c| c.total()).sum::<u64>(), pages.total());
            prop_assert_eq!(d.low.total() + d.total_after_commit(), pages.total());
            for r in &d.blocks {
                prop_assert_eq!(r, r.shrink_to(block));
            }
            // No whole block hides among the fragments.
            prop_assert!(d.fragments.shrink_to(block).is_empty());
            for r in &d.fragments {
                prop_assert_eq!(r, r.shrink_to(PAGE));
                prop_assert!(r.start() >= LOW_MEMORY_END);
            }
        }

        /// Whatever the successor's block size turns out to be: nothing twice, nothing torn, nothing forgotten. And no larger than
        /// expected means that nothing is left.
        #[test]
        fn every_block_is_adopted_or_named(
            (ram, region, arenas, block) in machines(),
            hypervisor in any::<bool>(),
            shift in 0u32..8,
        ) {
            let d = Division::for_successor(&ram, region, &arenas, block, hypervisor).unwrap();
            prop_assert!(d.block_size >= block);
            let theirs = (2 * MIB) << (2 * shift);
            let adoption = Adoption::new(&d.blocks, region.len(), theirs).unwrap();
            let steps: Vec<Range> = [&adoption.ordinary, &adoption.movable].into_iter().flat_map(|set| adoption.each(set)).collect();
            prop_assert!(steps.iter().all(|step| step.len() == theirs && *step == step.shrink_to(theirs)));
            let all = steps.iter().copied().chain(adoption.left.iter()).collect::<RangeSet>();
            prop_assert_eq!(&all, &d.blocks);
            prop_assert_eq!(steps.len() as u64 * theirs + adoption.left.total(), d.blocks.total());
            prop_assert!(adoption.left.is_empty() || theirs > d.block_size);
        }
    }
}
