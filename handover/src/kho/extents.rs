//! Ranges that must not overlap, merged where they touch.

use std::collections::BTreeMap;

use state_schemas::handover_record::PhysRange;

/// A set of bytes of physical memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Extents(BTreeMap<u64, u64>);

impl Extents {
    /// Adds a range that has an end and is not empty; an overlap is returned and nothing added.
    pub(crate) fn insert(&mut self, range: PhysRange) -> Result<(), PhysRange> {
        let (mut start, mut end) = (range.start, range.start + range.len);
        if let Some(there) = self.overlapping(range) {
            return Err(there);
        }
        if let Some((&before, &reaches)) = self.0.range(..start).next_back()
            && reaches == start
        {
            start = before;
        }
        if let Some(reaches) = self.0.remove(&end) {
            end = reaches;
        }
        self.0.insert(start, end);
        Ok(())
    }

    /// A range in it that shares a byte with this one.
    pub(crate) fn overlapping(&self, range: PhysRange) -> Option<PhysRange> {
        let end = range.start.saturating_add(range.len);
        let (&start, &reaches) = self.0.range(..end).next_back()?;
        (reaches > range.start).then_some(PhysRange { start, len: reaches - start })
    }

    /// All of this range is in it.
    pub(crate) fn covers(&self, range: PhysRange) -> bool {
        let Some(end) = range.end() else { return false };
        self.0.range(..=range.start).next_back().is_some_and(|(_, &reaches)| reaches >= end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn range(start: u64, end: u64) -> PhysRange {
        PhysRange { start, len: end - start }
    }

    #[test]
    fn neighbours_merge_and_overlaps_are_refused() {
        let mut set = Extents::default();
        for piece in [range(10, 20), range(30, 40), range(20, 30)] {
            set.insert(piece).unwrap();
        }
        assert!(set.covers(range(10, 40)));
        assert!(!set.covers(range(10, 41)) && !set.covers(range(9, 11)));
        for piece in [range(0, 11), range(39, 50), range(15, 16), range(0, 100)] {
            assert_eq!(set.insert(piece), Err(range(10, 40)), "{piece:?}");
        }
        assert_eq!(set.overlapping(range(40, 50)), None);
        assert_eq!(set.overlapping(range(0, 10)), None);
    }
}
