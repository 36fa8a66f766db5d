//! Where a region could be taken from.

use super::{Range, RangeSet};
use crate::layout::REGION_MIN;

/// What is asked of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Bytes, a multiple of `grain`.
    pub size: u64,
    /// Alignment of the start: the memory block size, so that a region wastes no block (what shares a block with the
    /// region cannot be hot-added later); at least 2 MiB.
    pub grain: u64,
}

/// Why a wish can never be granted, whatever memory there is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WishError {
    /// Too small for any kernel.
    #[error("a region of {size:#x} bytes is too small: at least {REGION_MIN:#x} are needed")]
    TooSmall {
        /// Wished.
        size: u64,
    },
    /// The grain is no grain.
    #[error("alignment {grain:#x} is not a power of two of at least 2 MiB")]
    Grain {
        /// Wished.
        grain: u64,
    },
    /// Size and grain contradict each other.
    #[error("region size {size:#x} is not a multiple of {grain:#x}")]
    Unaligned {
        /// Wished.
        size: u64,
        /// Wished.
        grain: u64,
    },
}

/// Devices of 32 bits reach no further, and swiotlb, through which a kernel has them do it, lies below.
const REACH_OF_32_BITS: u64 = 1 << 32;

/// All places in `ram`, outside of `avoid`, where the wish fits: those below 4 GiB first, and of each kind the highest first.
///
/// Below 4 GiB first, because a kernel that boots in a region above has no memory there and makes no swiotlb, for as long as it runs. High
/// first, because low addresses are what the incumbent's own early allocations fight for, and the kernel's unmovable pages gather there.
/// The caller tries them in order (the kernel may answer EBUSY for each). Steps are of one `grain`, so candidates overlap: after an EBUSY
/// the next one avoids part of the pages that could not be moved.
pub fn candidates(
    ram: &RangeSet,
    avoid: &RangeSet,
    wish: &Wish,
) -> Result<impl Iterator<Item = Range> + use<>, WishError> {
    let Wish { size, grain } = *wish;
    if !grain.is_power_of_two() || grain < crate::layout::REGION_ALIGN {
        return Err(WishError::Grain { grain });
    }
    if size < REGION_MIN {
        return Err(WishError::TooSmall { size });
    }
    if !size.is_multiple_of(grain) {
        return Err(WishError::Unaligned { size, grain });
    }
    let low = RangeSet::from(Range::new(0, crate::layout::LOW_MEMORY_END));
    let free: Vec<Range> =
        ram.subtract(&low).subtract(avoid).shrink_to(grain).iter().filter(|r| r.len() >= size).collect();
    let all = move || {
        free.clone().into_iter().rev().flat_map(move |range| {
            let places = (range.len() - size) / grain + 1;
            (0..places).rev().map(move |i| {
                let start = range.start() + i * grain;
                Range::new(start, start + size)
            })
        })
    };
    let reached = |range: &Range| range.end() <= REACH_OF_32_BITS;
    Ok(all().filter(reached).chain(all().filter(move |range| !reached(range))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 128 << 20;

    #[test]
    fn highest_first_and_outside_of_what_is_avoided() {
        let ram = RangeSet::from(vec![Range::new(0x1000, 0x9fc00), Range::new(1 << 20, 2046 << 20)]);
        let avoid = RangeSet::from(Range::new(1000 << 20, 1010 << 20));
        let wish = Wish { size: 4 * BLOCK, grain: BLOCK };
        let found: Vec<_> = candidates(&ram, &avoid, &wish).unwrap().collect();
        // blocks 1..=6 are whole below the hole, 8..=14 above it
        let starts: Vec<_> = found.iter().map(|r| r.start() / BLOCK).collect();
        assert_eq!(starts, [11, 10, 9, 8, 3, 2, 1]);
    }

    #[test]
    fn what_devices_of_32_bits_reach_comes_first() {
        // As q35 has it: from 2 GiB on, memory is moved up to 4 GiB.
        let ram = RangeSet::from(vec![Range::new(1 << 20, 2 << 30), Range::new(4 << 30, 6 << 30)]);
        let wish = Wish { size: 4 * BLOCK, grain: BLOCK };
        let starts: Vec<u64> =
            candidates(&ram, &RangeSet::new(), &wish).unwrap().map(|range| range.start() / BLOCK).collect();
        let expected: Vec<u64> = (1..=12).rev().chain((32..=44).rev()).collect();
        assert_eq!(starts, expected);
        let across = RangeSet::from(Range::new((4 << 30) - 4 * BLOCK, (4 << 30) + BLOCK));
        let starts: Vec<u64> =
            candidates(&across, &RangeSet::new(), &wish).unwrap().map(|range| range.start() / BLOCK).collect();
        assert_eq!(starts, [28, 29], "all of it has to be below");
    }

    #[test]
    fn impossible_wishes_are_named() {
        let refuse = |size, grain| {
            let wish = Wish { size, grain };
            candidates(&RangeSet::new(), &RangeSet::new(), &wish).map(|_| ()).unwrap_err().to_string()
        };
        assert_eq!(refuse(1 << 20, 2 << 20), "a region of 0x100000 bytes is too small: at least 0x1000000 are needed");
        assert_eq!(refuse(BLOCK, 4096), "alignment 0x1000 is not a power of two of at least 2 MiB");
        assert_eq!(refuse(BLOCK + (2 << 20), BLOCK), "region size 0x8200000 is not a multiple of 0x8000000");
    }

    proptest! {
        #[test]
        fn every_candidate_fits(
            ram in prop::collection::vec((0u64..64, 0u64..40), 0..5),
            avoid in prop::collection::vec((0u64..64, 0u64..8), 0..5),
            blocks in 1u64..6,
        ) {
            let mib16 = 16u64 << 20;
            let set = |v: Vec<(u64, u64)>| -> RangeSet {
                v.into_iter().map(|(s, l)| Range::new(s * mib16 + 4096, (s + l) * mib16 + 4096)).collect()
            };
            let (ram, avoid) = (set(ram), set(avoid));
            let wish = Wish { size: blocks * mib16, grain: mib16 };
            let mut last = u64::MAX;
            for range in candidates(&ram, &avoid, &wish).unwrap() {
                prop_assert_eq!(range.len(), wish.size);
                prop_assert!(range.start().is_multiple_of(wish.grain) && range.start() < last);
                prop_assert!(ram.contains(range) && !avoid.overlaps(range));
                last = range.start();
            }
        }
    }
}
