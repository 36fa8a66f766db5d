//! From the kernel's own addresses to physical ones.

use super::memory::{PhysicalMemory, word};
use crate::layout::PAGE;

/// Where x86-64 maps the kernel's image, before KASLR (`__START_KERNEL_map`).
pub(super) const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// How much is mapped there at most (`KERNEL_IMAGE_SIZE` with KASLR); modules follow.
const KERNEL_MAP_SIZE: u64 = 1 << 30;

/// Where the kernel half of the address space begins with five levels, the lower of both.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Whether it can be an address of the kernel's data.
pub(super) fn is_kernels(address: u64) -> bool {
    address >= KERNEL_HALF && address.is_multiple_of(8)
}

/// The kernel's page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tables {
    /// Physical address of the root (`swapper_pg_dir`).
    pub(super) root: u64,
    /// 4 or 5.
    pub(super) levels: u32,
    /// Bits of an entry that are no address (`sme_mask`).
    pub(super) mask: u64,
}

/// How addresses translate. The image by a constant; everything else by the page tables, or, where they are not known, by a
/// constant, too: that of the direct map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AddressSpace {
    /// Physical address of [`KERNEL_MAP`], modulo 2^64 (`phys_base`).
    pub(super) phys_base: u64,
    /// For everything else.
    pub(super) tables: Option<Tables>,
    /// Where physical address 0 is mapped (`page_offset_base`); for when there are no tables.
    pub(super) direct: Option<u64>,
}

impl AddressSpace {
    /// Where a byte is; nothing when it is not mapped. (Whether there is such memory is for [`PhysicalMemory::read`].)
    pub(super) fn physical(&self, memory: &dyn PhysicalMemory, address: u64) -> Option<u64> {
        if (KERNEL_MAP..KERNEL_MAP + KERNEL_MAP_SIZE).contains(&address) {
            return Some((address - KERNEL_MAP).wrapping_add(self.phys_base));
        }
        match (self.tables, self.direct) {
            (Some(tables), _) => tables.walk(memory, address),
            (None, Some(direct)) => address.checked_sub(direct),
            (None, None) => None,
        }
    }

    /// Reads by the kernel's addresses; false when any byte is not mapped, or not there.
    pub(super) fn read(&self, memory: &dyn PhysicalMemory, address: u64, into: &mut [u8]) -> bool {
        let mut at = address;
        let mut rest = into;
        while !rest.is_empty() {
            let in_page = (PAGE - at % PAGE).min(rest.len() as u64);
            let (part, others) = rest.split_at_mut(in_page as usize);
            if !self.physical(memory, at).is_some_and(|physical| memory.read(physical, part)) {
                return false;
            }
            rest = others;
            match at.checked_add(in_page) {
                Some(next) => at = next,
                None if rest.is_empty() => {}
                None => return false,
            }
        }
        true
    }

    /// Whether the first and the last byte are there.
    pub(super) fn holds(&self, memory: &dyn PhysicalMemory, address: u64, len: u64) -> bool {
        let there = |at| self.read(memory, at, &mut [0]);
        len > 0 && address.checked_add(len - 1).is_some_and(|last| there(address) && there(last))
    }
}

impl Tables {
    /// As the CPU does it: nine bits of the address a level, from the root down; a leaf at 1 GiB, 2 MiB or 4 KiB.
    fn walk(&self, memory: &dyn PhysicalMemory, address: u64) -> Option<u64> {
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let index = (address >> shift) & 0x1ff;
            let entry = word(memory, table.checked_add(8 * index)?)?;
            let target = entry & ENTRY_ADDRESS & !self.mask;
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let inside = (1 << shift) - 1;
                return Some((target & !inside) | (address & inside));
            }
            table = target;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use state_schemas::shared::{Local, SharedMemory};

    use super::*;
    use crate::klog::Pieces;
    use crate::memory_map::Range;
    use crate::placement::Mapped;

    const BASE: u64 = 0x40_0000;

    fn with<T>(entries: &[(u64, u64)], then: impl FnOnce(&dyn PhysicalMemory) -> T) -> T {
        let local = Local::new(8 * PAGE);
        for (at, value) in entries {
            local.store(*at, *value);
        }
        then(&Pieces::new(vec![Mapped { range: Range::new(BASE, BASE + 8 * PAGE), memory: &local }]))
    }

    #[test]
    fn four_and_five_levels_are_walked_down_to_each_kind_of_leaf() {
        let table = |n: u64| (BASE + n * PAGE) | PRESENT;
        // Root at 0: entry 0x1fe → page 1: entry 0 → page 2: [0] a 2 MiB leaf, [1] → page 3: [5] a 4 KiB leaf; page 1 [1] a 1 GiB leaf.
        let entries = [
            (8 * 0x1fe, table(1)),
            (PAGE, table(2)),
            (PAGE + 8, 0x4000_0000 | PRESENT | LARGE | 1 << 63),
            (2 * PAGE, 0x1234_5600_0000 & !0x1f_ffff | PRESENT | LARGE),
            (2 * PAGE + 8, table(3)),
            (3 * PAGE + 8 * 5, 0x7777_7000 | PRESENT),
        ];
        let va = |l4: u64, rest: u64| 0xffff_0000_0000_0000 | l4 << 39 | rest;
        with(&entries, |memory| {
            let four = Tables { root: BASE, levels: 4, mask: 0 };
            assert_eq!(four.walk(memory, va(0x1fe, 0x1f_ffff)), Some((0x1234_5600_0000 & !0x1f_ffff) | 0x1f_ffff));
            assert_eq!(four.walk(memory, va(0x1fe, 0x20_5abc)), Some(0x7777_7abc));
            assert_eq!(four.walk(memory, va(0x1fe, (1 << 30) + 0x123)), Some(0x4000_0123));
            assert_eq!(four.walk(memory, va(0x1fd, 0)), None);
            assert_eq!(four.walk(memory, va(0x1fe, 0x20_6000)), None);
        });
        let five = [(4 * PAGE + 8 * 0x1ff, table(0))];
        with(&[&entries[..], &five].concat(), |memory| {
            let five = Tables { root: BASE + 4 * PAGE, levels: 5, mask: 0 };
            assert_eq!(five.walk(memory, va(0x1fe, 0x20_5abc)), Some(0x7777_7abc));
        });
    }

    #[test]
    fn tables_that_lead_astray_lead_nowhere() {
        // A table that is its own child, one outside of the memory, one at the end of the address space.
        for entry in [BASE | PRESENT, 0x7fff_f000 | PRESENT, ENTRY_ADDRESS | PRESENT] {
            with(&[(8 * 0x1ff, entry)], |memory| {
                for levels in [4, 5] {
                    let tables = Tables { root: BASE, levels, mask: 0 };
                    let _ = tables.walk(memory, u64::MAX);
                    let space = AddressSpace { phys_base: 0, tables: Some(tables), direct: None };
                    assert!(!space.holds(memory, 0xffff_8000_0000_0000, u64::MAX));
                    assert!(!space.read(memory, u64::MAX, &mut [0; 9]));
                }
            });
        }
    }
}
