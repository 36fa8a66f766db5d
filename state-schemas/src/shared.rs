//! How code reads and writes memory that another kernel writes at the same time.
//!
//! 1. Whatever is read may change before the next read: copy out, then check the copy.
//! 2. Only aligned words of 8 bytes are atomic.

use core::ops::Deref;

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

/// What points to such memory is as good: `&T`, `Arc<T>`.
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
