//! The memory that is read.

use crate::layout::PAGE;
use crate::memory_map::Range;
use crate::placement::Mapped;

/// Memory of another kernel, by physical address. It may change at any time.
pub trait PhysicalMemory {
    /// What there is: ascending, no two overlap.
    fn ranges(&self) -> Vec<Range>;

    /// Copies `into.len()` bytes from `address` on; false when any of them is not there (`into` is undefined then).
    fn read(&self, address: u64, into: &mut [u8]) -> bool;
}

/// Reads a fixed number of bytes.
pub(super) fn bytes<const N: usize>(memory: &dyn PhysicalMemory, address: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    memory.read(address, &mut bytes).then_some(bytes)
}

/// Reads a word.
pub(super) fn word(memory: &dyn PhysicalMemory, address: u64) -> Option<u64> {
    bytes(memory, address).map(u64::from_le_bytes)
}

/// The pages that lie wholly in it, ascending.
pub(super) fn pages(memory: &dyn PhysicalMemory) -> impl Iterator<Item = u64> + use<> {
    memory.ranges().into_iter().flat_map(|range| {
        let whole = range.shrink_to(PAGE);
        (whole.start()..whole.end()).step_by(PAGE as usize)
    })
}

/// Memory in mapped pieces.
pub struct Pieces<'a>(Vec<Mapped<'a>>);

impl<'a> Pieces<'a> {
    /// Of these pieces. Panics when two overlap, or one's mapping is shorter than its range: whoever mapped them knows.
    pub fn new(mut pieces: Vec<Mapped<'a>>) -> Pieces<'a> {
        pieces.sort_by_key(|piece| piece.range);
        assert!(pieces.is_sorted_by(|a, b| a.range.end() <= b.range.start()), "pieces of memory overlap");
        assert!(pieces.iter().all(|piece| piece.range.len() <= piece.memory.size()), "a piece is not mapped whole");
        Pieces(pieces)
    }
}

impl PhysicalMemory for Pieces<'_> {
    fn ranges(&self) -> Vec<Range> {
        self.0.iter().map(|piece| piece.range).collect()
    }

    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let Some(wanted) = Range::with_len(address, into.len() as u64) else { return false };
        let mut at = wanted.start();
        for piece in &self.0 {
            let part = piece.range.intersect(Range::new(at, wanted.end()));
            if part.is_empty() {
                continue;
            }
            if part.start() != at {
                return false;
            }
            let (from, to) = ((part.start() - address) as usize, (part.end() - address) as usize);
            piece.memory.read(part.start() - piece.range.start(), &mut into[from..to]);
            at = part.end();
        }
        at == wanted.end()
    }
}
