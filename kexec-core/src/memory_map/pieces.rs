//! Where an arena could be taken from: in one piece if it can be had, else in several.
//!
//! Lowest first, unlike a region: arenas stay where they are for ever, so they belong into the block that low memory breaks
//! anyway, and below every region (what is reserved above a region costs a cap: see [`super::division`]).
//!
//! Every separate piece is one reservation in every later kernel, of which there are few
//! ([`MAX_RESERVATIONS`](crate::boot_params::MAX_RESERVATIONS)). So pieces that touch are counted as one, and no piece but the last
//! is smaller than the 64th part of what was wished. A page block of 2 MiB has one piece at most: a kernel isolates whole blocks
//! to take pages out of them (`isolate_single_pageblock()`, mm/page_isolation.c), and does not where one of ours is already.

use super::{Range, RangeSet};
use crate::layout::{LOW_MEMORY_END, PAGE};

/// Arenas of this size or more start on multiples of it, so that kernels can map them by large pages.
pub const GRAIN: u64 = 2 << 20;
/// What one call of the module takes at once while an arena is gathered: its own chunk (kmod/memory.c, `CHUNK_PAGES`).
const CHUNK: u64 = 128 << 20;
/// Places tried for a whole arena, spread over all memory: each may cost a second of moving pages.
const TRIES: u64 = 64;

/// RAM in which arenas may lie.
fn free(ram: &RangeSet, avoid: &RangeSet) -> RangeSet {
    ram.subtract(&Range::new(0, LOW_MEMORY_END).into()).subtract(avoid).shrink_to(PAGE)
}

/// What of it lies behind its first boundary.
fn on_boundary(room: Range) -> Range {
    Range::new(room.start().next_multiple_of(GRAIN).min(room.end()), room.end())
}

/// Places for `len` bytes (a multiple of 4096) in one piece, in the order in which they should be tried; outside of
/// `avoid`, which includes `arenas`.
pub fn whole(ram: &RangeSet, avoid: &RangeSet, arenas: &RangeSet, len: u64) -> Vec<Range> {
    let free = free(ram, avoid);
    let mut places = Vec::new();
    // Beside another arena it costs no reservation of its own.
    let beside = arenas.iter().filter(|arena| arena.end().is_multiple_of(GRAIN));
    places.extend(beside.filter_map(|arena| Range::with_len(arena.end(), len)));
    places.retain(|place| free.contains(*place));
    let rooms: Vec<Range> = free.iter().map(on_boundary).filter(|room| room.len() >= len).collect();
    let starts: u64 = rooms.iter().map(|room| (room.len() - len) / GRAIN + 1).sum();
    let step = starts.div_ceil(TRIES).max(1) * GRAIN;
    for room in rooms {
        let last = room.end() - len;
        places.extend((room.start()..=last).step_by(step as usize).map(|start| Range::new(start, start + len)));
    }
    places
}

/// Gathers `len` bytes (a multiple of 4096), lowest first, in pieces of 2 MiB and more. `take` says whether a piece could be
/// had. What comes back is what was taken: less than `len` when there is no more, or with the error that ended it.
pub fn gather<E>(
    ram: &RangeSet,
    avoid: &RangeSet,
    len: u64,
    mut take: impl FnMut(Range) -> Result<bool, E>,
) -> (Vec<Range>, Result<(), E>) {
    let smallest = (len / 64).next_multiple_of(GRAIN).max(GRAIN);
    let (mut taken, mut left) = (Vec::new(), len);
    for room in &free(ram, avoid) {
        let mut at = on_boundary(room).start();
        while left > 0 && at < room.end() {
            let chunk_end = (at + 1).next_multiple_of(CHUNK);
            let mut size = left.min(chunk_end - at).min(room.end() - at);
            let mut step = GRAIN;
            while size >= smallest.min(left) {
                let piece = Range::new(at, at + size);
                match take(piece) {
                    Ok(true) => {
                        taken.push(piece);
                        (left, step) = (left - size, size);
                        break;
                    }
                    Ok(false) if size <= GRAIN => break,
                    Ok(false) => size = (size / 2).next_multiple_of(GRAIN),
                    Err(error) => return (taken, Err(error)),
                }
            }
            at += step;
        }
    }
    (taken, Ok(()))
}

/// The same pieces in the same order, those that touch as one.
pub fn joined(pieces: impl IntoIterator<Item = Range>) -> Vec<Range> {
    let mut joined: Vec<Range> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if last.end() == piece.start() => *last = Range::new(last.start(), piece.end()),
            _ => joined.push(piece),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ram() -> RangeSet {
        RangeSet::from(vec![Range::new(0x1000, 0x9fc00), Range::new(MIB, 2047 * MIB + 0x3000)])
    }

    #[test]
    fn a_page_lies_beside_another_arena_where_a_block_begins_and_a_large_one_on_a_boundary() {
        let whole_blocks = RangeSet::from(Range::new(4 * MIB, 6 * MIB));
        let small = whole(&ram(), &whole_blocks, &whole_blocks, PAGE);
        assert_eq!(small[0], Range::new(6 * MIB, 6 * MIB + PAGE));
        let arenas = RangeSet::from(Range::new(4 * MIB, 4 * MIB + 3 * PAGE));
        let small = whole(&ram(), &arenas, &arenas, PAGE);
        assert_eq!(small[0].start(), 2 * MIB, "not in the block that the arena begins");
        let large = whole(&ram(), &arenas, &arenas, 1024 * MIB + PAGE);
        assert_eq!(large[0].start(), 6 * MIB, "not where the small one is");
        assert!(large.len() as u64 <= TRIES + 1, "{}", large.len());
        assert!(large.iter().all(|place| place.start().is_multiple_of(GRAIN)));
        assert!(whole(&ram(), &arenas, &arenas, 2046 * MIB).is_empty());
    }

    #[test]
    fn pieces_are_gathered_around_what_cannot_be_moved() {
        let stuck = RangeSet::from(vec![Range::new(100 * MIB, 101 * MIB), Range::new(300 * MIB, 310 * MIB)]);
        let (taken, end) =
            gather::<Infallible>(&ram(), &RangeSet::new(), 400 * MIB + PAGE, |piece| Ok(!stuck.overlaps(piece)));
        end.unwrap();
        assert_eq!(taken.iter().map(|piece| piece.len()).sum::<u64>(), 400 * MIB + PAGE);
        let joined = joined(taken);
        assert!(joined.len() <= 4, "{joined:?}");
        assert!(joined.iter().all(|piece| !stuck.overlaps(*piece) && piece.start().is_multiple_of(GRAIN)));
    }

    proptest! {
        #[test]
        fn what_is_gathered_is_free_and_never_too_much(
            stuck in prop::collection::vec((0u64..2048, 1u64..64), 0..12),
            avoid in prop::collection::vec((0u64..2048, 1u64..64), 0..4),
            pages in 1u64..(3 << 18),
        ) {
            let set = |v: Vec<(u64, u64)>| -> RangeSet {
                v.into_iter().map(|(at, len)| Range::new(at * MIB, (at + len) * MIB)).collect()
            };
            let (stuck, avoid) = (set(stuck), set(avoid));
            let len = pages * PAGE;
            let mut calls = 0;
            let (taken, _) = gather::<Infallible>(&ram(), &avoid, len, |piece| {
                calls += 1;
                assert!(ram().contains(piece) && !avoid.overlaps(piece) && piece.start() >= LOW_MEMORY_END);
                Ok(!stuck.overlaps(piece))
            });
            let total: u64 = taken.iter().map(|piece| piece.len()).sum();
            prop_assert!(total <= len);
            prop_assert!(calls <= 20_000);
            prop_assert_eq!(&taken.iter().copied().collect::<RangeSet>().total(), &total, "none twice");
            prop_assert!(joined(taken).len() <= 65);
        }
    }
}
