//! Memory as values: ranges, sets of them, and the questions a placement asks. Nothing here touches memory.
//!
//! - [`Range`] and [`RangeSet`] ([`crate::range`]): half-open, sorted, merged; union, subtract, intersect, align.
//! - [`iomem`]: what `/proc/iomem` and `/sys/firmware/memmap` say, from text.
//! - [`candidates`]: where a region could be taken from, best first.
//! - [`pieces`]: where an arena could be.
//! - [`division`]: which part of the machine's RAM reaches the successor by which road.

mod candidates;
pub mod division;
pub mod iomem;
pub mod pieces;

pub use crate::range::{Range, RangeSet};
pub use candidates::{Wish, WishError, candidates};

/// Bytes of `struct page` that a kernel needs for `bytes` of RAM (64 bytes a page, on every x86-64 configuration that
/// a distribution ships). Fragments are paid from the region at boot, so a region has to be large enough for them.
pub const fn struct_page_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(crate::layout::PAGE) * 64
}

/// The memory block size that a kernel will choose, given the end of the RAM in its e820 (`probe_memory_block_size`
/// in arch/x86/mm/init_64.c). Hot-add takes whole blocks of this size, so a region that lies high makes the grain
/// coarser. The device tells the true value once that kernel runs.
pub const fn expected_block_size(end_of_ram: u64, hypervisor: bool) -> u64 {
    const LARGE_FROM: u64 = 64 << 30;
    const SMALLEST: u64 = 128 << 20;
    const LARGEST: u64 = 2 << 30;
    if end_of_ram < LARGE_FROM {
        return SMALLEST;
    }
    if !hypervisor {
        return LARGEST;
    }
    let mut size = LARGEST;
    while size > SMALLEST && !end_of_ram.is_multiple_of(size) {
        size /= 2;
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_size_follows_the_kernel() {
        assert_eq!(expected_block_size(2 << 30, true), 128 << 20);
        assert_eq!(expected_block_size((64 << 30) - 1, false), 128 << 20);
        assert_eq!(expected_block_size(65 << 30, false), 2 << 30);
        assert_eq!(expected_block_size(65 << 30, true), 1 << 30);
        assert_eq!(expected_block_size((65 << 30) + (128 << 20), true), 128 << 20);
    }
}
