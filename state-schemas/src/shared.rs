//! How code reads and writes memory that another kernel writes at the same time.
//!
//! 1. Whatever is read may change before the next read: copy out, then check the copy.
//! 2. Only aligned words of 8 bytes are atomic.

use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

use zerocopy::{FromZeros, IntoBytes};

/// Memory shared with another kernel. Offsets beyond [`SharedMemory::size`] panic: they are a bug of the caller,
/// never data (check data against `size` first).
pub trait SharedMemory {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Copies `into.len()` bytes out, from `offset` on.
    fn read(&self, offset: u64, into: &mut [u8]);
    /// Copies `from` in, at `offset`.
    fn write(&self, offset: u64, from: &[u8]);
    /// Loads an 8-aligned word with acquire ordering.
    fn load(&self, offset: u64) -> u64;
    /// Stores an 8-aligned word with release ordering.
    fn store(&self, offset: u64, value: u64);
}

/// Pointers to such memory can be used in its place: `&T`, `Arc<T>`.
impl<P: Deref<Target: SharedMemory>> SharedMemory for P {
    fn size(&self) -> u64 {
        (**self).size()
    }
    fn read(&self, offset: u64, into: &mut [u8]) {
        (**self).read(offset, into);
    }
    fn write(&self, offset: u64, from: &[u8]) {
        (**self).write(offset, from);
    }
    fn load(&self, offset: u64) -> u64 {
        (**self).load(offset)
    }
    fn store(&self, offset: u64, value: u64) {
        (**self).store(offset, value);
    }
}

/// Memory of this process alone, used like memory shared with another kernel: a copy of such memory that is looked at, or
/// the memory of both kernels where a test is both. Its threads may share it.
#[derive(Debug)]
pub struct Local(Vec<AtomicU64>);

impl Local {
    /// Zeros, whole words of them.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self(AtomicU64::new_vec_zeroed(size.div_ceil(8) as usize).expect("as much memory as any `Vec`"))
    }

    /// What it holds.
    #[must_use]
    pub fn into_bytes(mut self) -> Vec<u8> {
        self.0.as_mut_bytes().to_vec()
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "offset {offset:#x} is not that of a word");
        &self.0[(offset / 8) as usize]
    }
}

/// A copy; behind its end zeros, up to a whole word.
impl From<&[u8]> for Local {
    fn from(bytes: &[u8]) -> Self {
        let mut copy = Self::new(bytes.len() as u64);
        copy.0.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
        copy
    }
}

impl SharedMemory for Local {
    fn size(&self) -> u64 {
        self.0.len() as u64 * 8
    }
    fn read(&self, offset: u64, into: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(into) {
            *byte = self.0[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
        }
    }
    fn write(&self, offset: u64, from: &[u8]) {
        for (at, byte) in (offset as usize..).zip(from) {
            let mut word = self.0[at / 8].load(Ordering::Relaxed).to_le_bytes();
            word[at % 8] = *byte;
            self.0[at / 8].store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }
    fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }
    fn store(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }
}
