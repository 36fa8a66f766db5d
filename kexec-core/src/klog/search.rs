//! A log without [`super::vmcoreinfo`]: printk's ring by its looks, in a kernel that has said nothing of itself yet. Best effort:
//! the layout is the one of every kernel from 5.10 to 7.3 on 64-bit machines.
//!
//! Its head is eleven words, of which two are small numbers that go together, three are addresses of the kernel, two are
//! ids and one is zero above 32 bits: nothing else looks like that. Where those addresses are in physical memory follows from the
//! machine's rules: the image is moved by whole 2 MiB, the direct map by whole GiB; the ring itself says which of these it is,
//! since its ends must be descriptors with the right ids ([`Ring::is_sound`]).

use super::address::{AddressSpace, KERNEL_MAP, is_kernels};
use super::memory::PhysicalMemory;
use super::ring::{Layout, Place, Ring};
use crate::layout::LARGE_PAGE;
use crate::memory_map::Range;

/// `sizeof(struct printk_ringbuffer)`.
const HEAD: usize = 88;
/// The direct map begins at a multiple of this, wherever KASLR puts it (`PUD_SIZE`).
const GIB: u64 = 1 << 30;
/// A text of a record has 32 bytes on the average (`PRB_AVGBITS`), so both sizes go together.
const AVERAGE_BITS: u64 = 5;
/// Size of `struct printk_info`, and where its `dev_info` is: as ever, and with CONFIG_PRINTK_EXECUTION_CTX (in 7.3).
const INFOS: [(u64, u64); 2] = [(88, 24), (112, 44)];
/// How much is read at once.
const CHUNK: u64 = 64 << 10;
/// Places that look like a head are tried so many times: a kernel has two, and a few more may be left by those before it.
const MAX_HEADS: usize = 64;
/// So many records tell one size of an info from the other: with the wrong one, nearly none has the right number.
const ENOUGH: usize = 16;

fn layout((info_size, dev_info): (u64, u64)) -> Layout {
    Layout {
        ring_size: HEAD as u64,
        count_bits: 0,
        descs: 8,
        infos: 16,
        head_id: 24,
        tail_id: 32,
        size_bits: 48,
        data: 56,
        desc_size: 24,
        state: 0,
        begin: 8,
        next: 16,
        info_size,
        seq: 0,
        time: 8,
        text_len: 16,
        caller: 20,
        subsystem: Some((dev_info, 16)),
        device: Some((dev_info + 16, 48)),
    }
}

/// What is in a head that looks like one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    /// Its physical address.
    at: u64,
    descs: u64,
}

/// All rings that can be found.
pub(super) fn rings_in(memory: &dyn PhysicalMemory) -> Vec<Place> {
    heads_in(memory).take(MAX_HEADS).filter_map(|head| place_of(memory, head)).collect()
}

fn heads_in(memory: &dyn PhysicalMemory) -> impl Iterator<Item = Head> {
    let chunks = memory.ranges().into_iter().map(|range| range.shrink_to(8)).flat_map(|range| {
        (range.start()..range.end()).step_by(CHUNK as usize).map(move |start| {
            // What begins at the end of one chunk goes on in the next.
            Range::new(start, start.saturating_add(CHUNK + HEAD as u64 - 8).min(range.end()))
        })
    });
    chunks.flat_map(|chunk| {
        let mut bytes = vec![0; chunk.len() as usize];
        if !memory.read(chunk.start(), &mut bytes) {
            bytes.clear();
        }
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
        let heads = words.windows(HEAD / 8).enumerate().filter(|(_, words)| looks_like_a_head(words));
        heads.map(|(n, words)| Head { at: chunk.start() + 8 * n as u64, descs: words[1] }).collect::<Vec<_>>()
    })
}

fn looks_like_a_head(words: &[u64]) -> bool {
    let &[count_bits, descs, infos, head, tail, _, size_bits, data, head_lpos, tail_lpos, _] = words else {
        return false;
    };
    (3..=26).contains(&count_bits)
        && size_bits == count_bits + AVERAGE_BITS
        && [descs, infos, data].into_iter().all(is_kernels)
        && head >> 62 == 0
        && tail >> 62 == 0
        && head_lpos.wrapping_sub(tail_lpos) <= 1 << size_bits
}

/// Every way in which a head's addresses could translate, until one makes it a ring. The nearest first: the ring that a kernel
/// begins with has its descriptors beside its head, and those of a kernel that was there before may look as good.
fn place_of(memory: &dyn PhysicalMemory, head: Head) -> Option<Place> {
    let in_image = head.descs >= KERNEL_MAP;
    let grain = if in_image { LARGE_PAGE } else { GIB };
    let pages = memory.ranges().into_iter().flat_map(|range| {
        // Where the descriptors may be: at the same place in a page of that grain as their address says.
        (range.start() / grain * grain..range.end()).step_by(grain as usize)
    });
    let mut places: Vec<u64> = pages.map(|page| page.saturating_add(head.descs % grain)).collect();
    places.sort_unstable_by_key(|at| at.abs_diff(head.at));
    places.into_iter().find_map(|at| {
        let space = if in_image {
            AddressSpace { phys_base: at.wrapping_sub(head.descs - KERNEL_MAP), tables: None, direct: None }
        } else {
            AddressSpace { phys_base: 0, tables: None, direct: Some(head.descs.checked_sub(at)?) }
        };
        ring_with(memory, space, head.at)
    })
}

/// The ring with this head, if its arrays make sense, with the size of an info that reads more of the last records.
fn ring_with(memory: &dyn PhysicalMemory, space: AddressSpace, head: u64) -> Option<Place> {
    let read = |info| {
        let place = Place { space, layout: layout(info), head };
        let ring = Ring::at(memory, &place).filter(Ring::is_sound)?;
        let records = ring.newest(None, ENOUGH).len();
        (records > 0).then_some((records, place))
    };
    INFOS.into_iter().filter_map(read).max_by_key(|(records, _)| *records).map(|(_, place)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layouts_that_are_assumed_are_possible() {
        assert!(INFOS.into_iter().all(|info| layout(info).is_possible()));
    }
}
