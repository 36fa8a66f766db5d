//! Every fixed physical address, in one place; overlaps do not compile.
//!
//! ```text
//! below 1 MiB, shared by the machine         a region, R on 2 MiB
//!  0x08000  SIPI page (under a lock)          R            control block, 1 MiB (state_schemas::control_block)
//!  0x10000  low slot 0 ┐                      R +  1 MiB   RAM of the successor
//!  0x30000  low slot 1 │ first page: root     R + 32 MiB   the image, up to its init_size
//!  0x50000  low slot 2 │ for SIPI; the rest   ...
//!  0x70000  low slot 3 ┘ is the kernel's      end, down    initrd, on a page
//!  0x90000  not ours (EBDA, a native kernel's own real-mode blob)
//! ```

use serde::{Deserialize, Serialize};
use state_schemas::control_block;

use crate::range::{Range, RangeSet};

/// Page size.
pub const PAGE: u64 = 4096;
/// A page of the page directory level: grain of a region.
pub const LARGE_PAGE: u64 = 2 << 20;

/// First byte that real mode cannot reach.
pub const LOW_MEMORY_END: u64 = 1 << 20;

/// Where a CPU starts after SIPI. One for the machine: whoever sends a SIPI holds a lock until the CPU has left the page.
pub const SIPI_PAGE: u64 = 0x8000;
/// The vector in the SIPI that means [`SIPI_PAGE`].
pub const SIPI_VECTOR: u8 = (SIPI_PAGE / PAGE) as u8;

/// Size of a low slot. A kernel puts its real-mode blob there (28 KiB in 6.12 and 7.3), and its decompressor two pages of
/// trampoline at the end.
pub const LOW_SLOT_SIZE: u64 = 0x2_0000;
/// Where the low slots start: Linux reserves everything below 64 KiB whatever e820 says.
pub const LOW_SLOTS_START: u64 = 0x1_0000;
/// How many successors can exist at once. A natively booted incumbent uses none of them.
pub const LOW_SLOT_COUNT: u8 = 4;
/// Nothing of ours from here on: the EBDA starts somewhere above, and a natively booted kernel has its own real-mode
/// blob just below 0x9f000.
pub const LOW_SLOTS_END: u64 = 0x9_0000;

/// Alignment of a region.
pub const REGION_ALIGN: u64 = LARGE_PAGE;
/// No region is smaller. (What an image needs is usually far more: see `PlacementError::RegionTooSmall`.)
pub const REGION_MIN: u64 = 16 << 20;
/// Offset of the image in its region, before its own alignment: below it is room for what the kernel wants low in its
/// memory, and above it for `init_size`.
pub const KERNEL_OFFSET: u64 = 32 << 20;
/// The 64-bit entry of every bzImage, from its load address (Documentation/arch/x86/boot.rst).
pub const ENTRY_OFFSET: u64 = 0x200;

/// Everything that the boot tables must map for the trampoline: what can be addressed in 32-bit mode, local APICs included.
pub const IDENTITY_END: u64 = 4 << 30;

const _: () = assert!(SIPI_PAGE.is_multiple_of(PAGE) && SIPI_PAGE / PAGE <= 0xff);
const _: () = assert!(SIPI_PAGE + PAGE <= LOW_SLOTS_START);
const _: () = assert!(LOW_SLOTS_START + LOW_SLOT_COUNT as u64 * LOW_SLOT_SIZE == LOW_SLOTS_END);
const _: () = assert!(LOW_SLOTS_END < 0x9_f000);
const _: () = assert!(control_block::SIZE <= KERNEL_OFFSET && control_block::SIZE.is_multiple_of(PAGE));
const _: () = assert!(REGION_MIN.is_multiple_of(REGION_ALIGN));
const _: () = assert!(control_block::PAGE_TABLES.size.is_multiple_of(PAGE));

/// One of the [`LOW_SLOT_COUNT`] low slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct LowSlot(u8);

impl TryFrom<u8> for LowSlot {
    type Error = String;
    fn try_from(index: u8) -> Result<LowSlot, String> {
        LowSlot::new(index).ok_or_else(|| format!("low slot {index} does not exist: there are {LOW_SLOT_COUNT}"))
    }
}

impl From<LowSlot> for u8 {
    fn from(slot: LowSlot) -> u8 {
        slot.0
    }
}

impl LowSlot {
    /// Slot `index`, if there is one.
    pub const fn new(index: u8) -> Option<LowSlot> {
        if index < LOW_SLOT_COUNT { Some(LowSlot(index)) } else { None }
    }

    /// All of them, ascending.
    pub fn all() -> impl Iterator<Item = LowSlot> {
        (0..LOW_SLOT_COUNT).map(LowSlot)
    }

    /// The whole slot.
    pub const fn range(self) -> Range {
        let start = LOW_SLOTS_START + self.0 as u64 * LOW_SLOT_SIZE;
        Range::new(start, start + LOW_SLOT_SIZE)
    }

    /// Its first page: a copy of the top-level page table. A CPU that comes out of SIPI is in 32-bit mode when it loads
    /// CR3, so that page must lie below 4 GiB, wherever the region lies. It is needed as long as CPUs may still be
    /// parked for this instance, so its kernel never hears of the page.
    pub const fn root_page(self) -> Range {
        let start = self.range().start();
        Range::new(start, start + PAGE)
    }

    /// What is RAM for the successor.
    pub const fn kernel_part(self) -> Range {
        Range::new(self.root_page().end(), self.range().end())
    }

    /// The slots that a successor can have: wholly RAM, which no firmware and no `memmap=` keeps for itself, and not `own`, the one
    /// that holds this address and is this kernel's.
    pub fn free_in(ram: &RangeSet, own: Option<u64>) -> impl Iterator<Item = LowSlot> {
        let own = own.and_then(LowSlot::holding);
        LowSlot::all().filter(move |slot| Some(*slot) != own && ram.contains(slot.range()))
    }

    /// The slot that holds this address, if any: how an instance recognises its own from its e820.
    pub fn holding(address: u64) -> Option<LowSlot> {
        LowSlot::all().find(|slot| slot.range().contains(Range::new(address, address + 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_where_the_picture_says() {
        let starts: Vec<_> = LowSlot::all().map(|s| s.range().start()).collect();
        assert_eq!(starts, [0x10000, 0x30000, 0x50000, 0x70000]);
        assert_eq!(LowSlot::new(4), None);
        assert_eq!(LowSlot::holding(0x31000), LowSlot::new(1));
        assert_eq!(LowSlot::holding(SIPI_PAGE), None);
        assert_eq!(LowSlot::holding(LOW_SLOTS_END), None);
        assert_eq!(SIPI_VECTOR, 8);
    }

    #[test]
    fn a_slot_of_which_a_page_is_reserved_is_nobodys() {
        let indexes = |ram: &RangeSet, own| LowSlot::free_in(ram, own).map(u8::from).collect::<Vec<_>>();
        let whole = RangeSet::from(Range::new(0x1000, 0x9_fc00));
        assert_eq!(indexes(&whole, None), [0, 1, 2, 3]);
        assert_eq!(indexes(&whole, Some(0x3_1000)), [0, 2, 3]);
        // memmap=4K$0x2f000 takes the last page of the first one.
        let torn = whole.subtract(&Range::new(0x2_f000, 0x3_0000).into());
        assert_eq!(indexes(&torn, None), [1, 2, 3]);
        assert_eq!(indexes(&RangeSet::new(), None), [0; 0]);
    }
}
