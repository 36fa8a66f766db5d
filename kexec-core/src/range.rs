//! [`Range`] and [`RangeSet`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// `[start, end)` of physical addresses. Never inverted; may be empty.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawRange")]
pub struct Range {
    start: u64,
    end: u64,
}

/// What a serialized range alleges, before the order of its ends is checked.
#[derive(Deserialize)]
struct RawRange {
    start: u64,
    end: u64,
}

impl TryFrom<RawRange> for Range {
    type Error = String;
    fn try_from(raw: RawRange) -> Result<Range, String> {
        Range::checked(raw.start, raw.end)
            .ok_or_else(|| format!("range ends at {:#x}, before its start {:#x}", raw.end, raw.start))
    }
}

impl Range {
    /// `[start, end)`. Panics when `end < start`: for constants and computed values; see [`Range::checked`].
    pub const fn new(start: u64, end: u64) -> Range {
        assert!(start <= end, "range ends before it starts");
        Range { start, end }
    }

    /// `[start, end)`, or nothing when the ends are in the wrong order.
    pub const fn checked(start: u64, end: u64) -> Option<Range> {
        if start <= end { Some(Range { start, end }) } else { None }
    }

    /// `len` bytes from `start` on; nothing when that passes the end of the address space.
    pub const fn with_len(start: u64, len: u64) -> Option<Range> {
        match start.checked_add(len) {
            Some(end) => Some(Range { start, end }),
            None => None,
        }
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First byte behind it.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Bytes in it.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// No byte in it.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether they share a byte.
    pub const fn overlaps(self, other: Range) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// Whether every byte of `other` is in it. An empty range is in every range.
    pub const fn contains(self, other: Range) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// What they share; empty when nothing.
    pub fn intersect(self, other: Range) -> Range {
        let start = self.start.max(other.start);
        Range { start, end: self.end.min(other.end).max(start) }
    }

    /// The largest part of it whose ends are multiples of `grain` (a power of two).
    pub fn shrink_to(self, grain: u64) -> Range {
        debug_assert!(grain.is_power_of_two());
        let end = self.end & !(grain - 1);
        let start = self.start.checked_add(grain - 1).map_or(end, |s| s & !(grain - 1));
        if start < end { Range { start, end } } else { Range { start: end, end } }
    }

    /// The smallest range around it whose ends are multiples of `grain` (a power of two); stops at the end of the
    /// address space.
    pub fn grow_to(self, grain: u64) -> Range {
        debug_assert!(grain.is_power_of_two());
        let end = self.end.checked_add(grain - 1).map_or(u64::MAX, |e| e & !(grain - 1));
        Range { start: self.start & !(grain - 1), end }
    }
}

impl fmt::Display for Range {
    /// As `/proc/iomem` prints it, last byte included: it will be compared with that file by eye.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            write!(f, "(empty at {:#x})", self.start)
        } else {
            write!(f, "{:#x}-{:#x}", self.start, self.end - 1)
        }
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end)
    }
}

/// A set of addresses. Invariant: ranges are sorted, not empty, and neither overlap nor touch, so that two equal sets
/// are equal values.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<Range>", into = "Vec<Range>")]
pub struct RangeSet {
    ranges: Vec<Range>,
}

impl From<Vec<Range>> for RangeSet {
    fn from(mut ranges: Vec<Range>) -> RangeSet {
        ranges.retain(|r| !r.is_empty());
        ranges.sort_unstable();
        let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        RangeSet { ranges: merged }
    }
}

impl From<RangeSet> for Vec<Range> {
    fn from(set: RangeSet) -> Vec<Range> {
        set.ranges
    }
}

impl From<Range> for RangeSet {
    fn from(range: Range) -> RangeSet {
        RangeSet::from(vec![range])
    }
}

impl FromIterator<Range> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range>>(iter: I) -> RangeSet {
        RangeSet::from(iter.into_iter().collect::<Vec<_>>())
    }
}

impl<'a> IntoIterator for &'a RangeSet {
    type Item = Range;
    type IntoIter = std::iter::Copied<std::slice::Iter<'a, Range>>;
    fn into_iter(self) -> Self::IntoIter {
        self.ranges.iter().copied()
    }
}

impl RangeSet {
    /// No address.
    pub const fn new() -> RangeSet {
        RangeSet { ranges: Vec::new() }
    }

    /// Its ranges, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range> + ExactSizeIterator + '_ {
        self.ranges.iter().copied()
    }

    /// No address in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many separate ranges.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Bytes in it.
    pub fn total(&self) -> u64 {
        self.iter().map(Range::len).sum()
    }

    /// First byte behind the last range, 0 for the empty set.
    pub fn end(&self) -> u64 {
        self.ranges.last().map_or(0, |r| r.end)
    }

    /// Every byte of either.
    #[must_use]
    pub fn union(&self, other: &RangeSet) -> RangeSet {
        self.iter().chain(other.iter()).collect()
    }

    /// Every byte of `self` that is not in `other`.
    #[must_use]
    pub fn subtract(&self, other: &RangeSet) -> RangeSet {
        let mut left = Vec::with_capacity(self.ranges.len() + other.ranges.len());
        // Both are sorted: `holes` never needs to look back behind a range that ended before the current one began.
        let mut holes = other.ranges.as_slice();
        for range in self {
            while holes.first().is_some_and(|hole| hole.end <= range.start) {
                holes = &holes[1..];
            }
            let mut start = range.start;
            for hole in holes.iter().take_while(|hole| hole.start < range.end) {
                if start < hole.start {
                    left.push(Range { start, end: hole.start });
                }
                start = start.max(hole.end);
            }
            if start < range.end {
                left.push(Range { start, end: range.end });
            }
        }
        RangeSet { ranges: left }
    }

    /// Every byte in both.
    #[must_use]
    pub fn intersect(&self, other: &RangeSet) -> RangeSet {
        let (mut a, mut b) = (self.ranges.as_slice(), other.ranges.as_slice());
        let mut shared = Vec::new();
        while let (Some(&x), Some(&y)) = (a.first(), b.first()) {
            let both = x.intersect(y);
            if !both.is_empty() {
                shared.push(both);
            }
            if x.end <= y.end {
                a = &a[1..];
            } else {
                b = &b[1..];
            }
        }
        // From two sets without touching ranges no touching ranges can come.
        RangeSet { ranges: shared }
    }

    /// Each range shrunk to multiples of `grain`.
    #[must_use]
    pub fn shrink_to(&self, grain: u64) -> RangeSet {
        self.iter().map(|r| r.shrink_to(grain)).collect()
    }

    /// Each range grown to multiples of `grain`.
    #[must_use]
    pub fn grow_to(&self, grain: u64) -> RangeSet {
        self.iter().map(|r| r.grow_to(grain)).collect()
    }

    /// Whether every byte of `range` is in it.
    pub fn contains(&self, range: Range) -> bool {
        range.is_empty() || self.iter().any(|r| r.contains(range))
    }

    /// Whether a byte of `range` is in it.
    pub fn overlaps(&self, range: Range) -> bool {
        self.iter().any(|r| r.overlaps(range))
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing");
        }
        for (i, range) in self.iter().enumerate() {
            write!(f, "{}{range}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same set as one bit for each address: slow, and obviously right.
    fn bits(set: &RangeSet) -> [bool; 256] {
        std::array::from_fn(|i| set.iter().any(|r| (r.start()..r.end()).contains(&(i as u64))))
    }

    fn any_set() -> impl Strategy<Value = RangeSet> {
        prop::collection::vec((0u64..250, 0u64..40), 0..8)
            .prop_map(|v| v.into_iter().map(|(s, l)| Range::new(s, (s + l).min(256))).collect())
    }

    fn holds_invariant(set: &RangeSet) -> bool {
        set.ranges.iter().all(|r| !r.is_empty()) && set.ranges.windows(2).all(|w| w[0].end < w[1].start)
    }

    proptest! {
        #[test]
        fn set_algebra_equals_bits(a in any_set(), b in any_set()) {
            let (x, y) = (bits(&a), bits(&b));
            for (set, op) in [
                (a.union(&b), (|p, q| p || q) as fn(bool, bool) -> bool),
                (a.subtract(&b), |p, q| p && !q),
                (a.intersect(&b), |p, q| p && q),
            ] {
                prop_assert!(holds_invariant(&set), "{:?}", set);
                prop_assert_eq!(bits(&set), std::array::from_fn(|i| op(x[i], y[i])));
            }
        }

        #[test]
        fn aligning_brackets_the_set(a in any_set(), shift in 0u32..6) {
            let grain = 1u64 << shift;
            let (inner, outer) = (a.shrink_to(grain), a.grow_to(grain));
            prop_assert!(holds_invariant(&inner) && holds_invariant(&outer));
            prop_assert!(inner.subtract(&a).is_empty() && a.subtract(&outer).is_empty());
            for r in inner.iter().chain(outer.iter()) {
                prop_assert_eq!((r.start() % grain, r.end() % grain), (0, 0));
            }
        }
    }

    #[test]
    fn alignment_at_the_end_of_the_address_space_does_not_wrap() {
        let last = Range::new(u64::MAX - 10, u64::MAX);
        assert!(last.shrink_to(4096).is_empty());
        assert_eq!(last.grow_to(4096).end(), u64::MAX);
        assert_eq!(Range::with_len(u64::MAX, 2), None);
    }

    #[test]
    fn an_inverted_range_is_refused_when_read() {
        let error = Range::try_from(RawRange { start: 0x2000, end: 0x1000 }).unwrap_err();
        assert_eq!(error, "range ends at 0x1000, before its start 0x2000");
    }
}
