//! Physical memory as a reader sees it: an address and a length, and maybe nothing there.

use std::collections::BTreeMap;

use state_schemas::handover_record::PhysRange;
use thiserror::Error;

/// Bytes of a page. KHO does not support an update between kernels with different ones.
pub const PAGE: u64 = 4096;

/// The memory that a handover lies in.
pub trait Memory {
    /// Copies what lies at `phys`.
    ///
    /// # Errors
    /// Nothing that may be read lies there.
    fn read(&self, phys: u64, into: &mut [u8]) -> Result<(), OutOfReach>;
}

impl<M: Memory + ?Sized> Memory for &M {
    fn read(&self, phys: u64, into: &mut [u8]) -> Result<(), OutOfReach> {
        (**self).read(phys, into)
    }
}

/// There is no readable memory there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no readable memory at {:#x} ({:#x} bytes)", range.start, range.len)]
pub struct OutOfReach {
    /// What was to be read.
    pub range: PhysRange,
}

/// Pieces of memory held as bytes: what [`crate::kho::Outgoing`] wrote, or a copy of what another kernel did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments(BTreeMap<u64, Vec<u8>>);

impl Segments {
    /// From pieces that do not overlap. Where two do, the one with the higher address counts.
    pub fn new(pieces: impl IntoIterator<Item = (u64, Vec<u8>)>) -> Segments {
        Segments(pieces.into_iter().collect())
    }

    /// Adds a piece.
    pub fn insert(&mut self, phys: u64, bytes: Vec<u8>) {
        self.0.insert(phys, bytes);
    }

    /// The pieces, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.0.iter().map(|(phys, bytes)| (*phys, bytes.as_slice()))
    }
}

impl Memory for Segments {
    fn read(&self, phys: u64, into: &mut [u8]) -> Result<(), OutOfReach> {
        let missing = OutOfReach { range: PhysRange { start: phys, len: into.len() as u64 } };
        let mut done = 0;
        while done < into.len() {
            let at = phys.checked_add(done as u64).ok_or(missing)?;
            let (start, bytes) = self.0.range(..=at).next_back().ok_or(missing)?;
            let skip = usize::try_from(at - start).map_err(|_| missing)?;
            let there = bytes.get(skip..).filter(|rest| !rest.is_empty()).ok_or(missing)?;
            let len = there.len().min(into.len() - done);
            into[done..done + len].copy_from_slice(&there[..len]);
            done += len;
        }
        Ok(())
    }
}

/// One whole page.
pub(crate) fn read_page(memory: &impl Memory, phys: u64) -> Result<Box<[u8; PAGE as usize]>, OutOfReach> {
    let mut page = Box::new([0; PAGE as usize]);
    memory.read(phys, page.as_mut_slice())?;
    Ok(page)
}
