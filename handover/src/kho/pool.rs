//! The pool: the memory that a handover is written into. It gives whole folios, naturally aligned, as
//! `kho_alloc_preserve` does.

use state_schemas::handover_record::PhysRange;

use super::error::OutgoingError;
use super::memory::PAGE;

/// The memory, and what has been put into it.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    range: PhysRange,
    /// Everything up to the highest page in use; pages that nobody took are zeros.
    bytes: Vec<u8>,
    /// Skipped for the sake of alignment; single pages go here first.
    gaps: Vec<PhysRange>,
}

impl Pool {
    pub(crate) fn new(range: PhysRange) -> Result<Pool, OutgoingError> {
        match range.end() {
            Some(_) if range.start != 0 && range.start.is_multiple_of(PAGE) => {
                Ok(Pool { range, bytes: Vec::new(), gaps: Vec::new() })
            }
            _ => Err(OutgoingError::Range { what: "pool", range }),
        }
    }

    pub(crate) const fn range(&self) -> PhysRange {
        self.range
    }

    /// What is used, with the gaps.
    pub(crate) fn used(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Pages in gaps.
    pub(crate) fn spare(&self) -> u64 {
        self.gaps.iter().map(|gap| gap.len / PAGE).sum()
    }

    /// Zeroed memory of `PAGE << order` bytes, aligned to that.
    pub(crate) fn take(&mut self, order: u32) -> Result<u64, OutgoingError> {
        let size = PAGE << order;
        for (i, gap) in self.gaps.iter().copied().enumerate() {
            let at = gap.start.next_multiple_of(size);
            let end = gap.start + gap.len;
            if at + size <= end {
                self.gaps.remove(i);
                self.gaps.extend(
                    [PhysRange { start: gap.start, len: at - gap.start }, piece(at + size, end)]
                        .into_iter()
                        .filter(|rest| rest.len > 0),
                );
                return Ok(at);
            }
        }
        let next = self.range.start + self.used();
        let full = OutgoingError::PoolFull {
            needed: self.used().saturating_add(size),
            at: self.range.start,
            pool: self.range.len,
        };
        let Some(at) = next.checked_next_multiple_of(size) else { return Err(full) };
        let used = (at - self.range.start).saturating_add(size);
        if used > self.range.len {
            return Err(full);
        }
        if at > next {
            self.gaps.push(piece(next, at));
        }
        self.bytes.resize(usize::try_from(used).map_err(|_| full)?, 0);
        Ok(at)
    }

    /// Puts bytes into memory that was taken.
    pub(crate) fn put(&mut self, phys: u64, bytes: &[u8]) {
        let at = (phys - self.range.start) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

const fn piece(start: u64, end: u64) -> PhysRange {
    PhysRange { start, len: end - start }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folios_are_aligned_and_gaps_are_used() {
        let mut pool = Pool::new(PhysRange { start: 0x1000, len: 0x8000 }).unwrap();
        assert_eq!(pool.take(0), Ok(0x1000));
        assert_eq!(pool.take(2), Ok(0x4000));
        assert_eq!(pool.spare(), 2);
        assert_eq!(pool.take(0), Ok(0x2000));
        assert_eq!(pool.take(0), Ok(0x3000));
        assert_eq!(pool.take(0), Ok(0x8000));
        assert_eq!(pool.take(0), Err(OutgoingError::PoolFull { needed: 0x9000, at: 0x1000, pool: 0x8000 }));
        pool.put(0x3ffe, &[1, 2]);
        assert_eq!(pool.into_bytes()[0x2ffe..0x3000], [1, 2]);
    }
}
