//! The door between a memory file and memory: a mapped arena becomes a slice.
#![expect(unsafe_code, reason = "mmap of the arena")]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::stat::{SFlag, fstat};

use super::Error;
use super::held::Held;
use super::protocol::MAX_ARENA;

/// Address space that is set aside for an arena: one 128th of a process's.
const ROOM: NonZeroUsize = NonZeroUsize::new(MAX_ARENA as usize).unwrap();
const PAGE: u64 = 4096;

/// An arena, mapped shared and present in the page tables from the start (no page fault inside the blackout). Reachable only
/// while its service holds an epoch.
///
/// Its pieces lie one behind the other at the start of a reservation of address space, which costs nothing and leaves room for
/// it to grow: what is mapped never moves.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    len: usize,
    reserved: NonZeroUsize,
    fresh: bool,
}

impl Arena {
    /// Maps the first piece of an arena, `len` bytes from offset 0 of a memory file.
    ///
    /// # Errors
    /// A length that is no multiple of 4096, zero, above [`MAX_ARENA`] or beyond the file's end; or mmap's own.
    pub fn map(file: impl AsFd, len: u64, fresh: bool) -> Result<Self, Error> {
        let len = check(&file, len, MAX_ARENA)?;
        // A process whose address space is limited gets its arena all the same; it just cannot grow.
        let (start, reserved) =
            reserve(ROOM).map(|start| (start, ROOM)).or_else(|_| Ok::<_, Error>((reserve(len)?, len)))?;
        let mut arena = Self { start, len: 0, reserved, fresh };
        arena.map_behind(file, len)?;
        Ok(arena)
    }

    /// Maps another piece behind what there is.
    ///
    /// # Errors
    /// As [`Arena::map`], and a piece for which no address space was reserved; the arena is then as it was.
    pub fn append(&mut self, file: impl AsFd, len: u64) -> Result<(), Error> {
        let room = self.reserved.get() - self.len;
        let len = check(&file, len, room as u64)?;
        self.map_behind(file, len)
    }

    /// Maps what the agent gave, behind what there is.
    ///
    /// # Errors
    /// As [`Arena::append`]; what came before the piece that failed stays.
    pub fn extend(&mut self, more: super::resize::More) -> Result<(), Error> {
        more.pieces.into_iter().try_for_each(|(file, len)| self.append(file, len))
    }

    fn map_behind(&mut self, file: impl AsFd, len: NonZeroUsize) -> Result<(), Error> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED | MapFlags::MAP_POPULATE;
        let at = self.start.addr().get() + self.len;
        // SAFETY: (1) `at..at + len` lies in the reservation, of which `check` left that much: so what is replaced is our own
        // PROT_NONE mapping, in which nothing is; (2) it is used only through this Arena, which unmaps it when it is dropped.
        unsafe { mmap(NonZeroUsize::new(at), len, access, flags, file, 0) }.map_err(io::Error::from)?;
        self.len += len.get();
        Ok(())
    }

    /// Whether nothing is in it yet.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Its size.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty arena cannot be mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// A copy of the first page, where what an arena is stands written. No epoch is needed: its owner may write at the same
    /// time, in another kernel too, so that words which change may not fit each other.
    #[must_use]
    pub fn first_page(&self) -> Vec<u8> {
        let words = (0..PAGE as usize / 8).flat_map(|word| {
            // SAFETY: (1) the first page is mapped (a length is a multiple of it and not zero) until drop; (2) it is
            // page-aligned, so every word is; (3) whoever writes beside us writes from another process or kernel: a relaxed
            // load of an aligned word sees some whole value.
            let value = unsafe { std::sync::atomic::AtomicU64::from_ptr(self.start.cast::<u64>().as_ptr().add(word)) };
            value.load(std::sync::atomic::Ordering::Relaxed).to_le_bytes()
        });
        words.collect()
    }

    /// The memory, for as long as the epoch is held. Whatever borrows it must be gone before [`Held`] can be given up
    /// (`Client::frozen` consumes it), so a frozen service cannot reach the arena any more.
    pub fn memory<'a>(&'a mut self, _held: &'a Held) -> &'a mut [u8] {
        // SAFETY: (1) `start` is `len` bytes mapped readable and writable by `map_behind`, unmapped only in drop, which the
        // borrow of self rules out; any bit pattern is a u8. (2) No second reference in this process: self is borrowed
        // mutably. (3) No other writer: a Held exists only between the agent's order to serve and the report that the
        // service is frozen, and the agents of both kernels give an epoch to one service at a time. (4) The file is not
        // cut short: its owner is the agent (root), which keeps an arena's size for the arena's life.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly what `reserve` gave this Arena, once; nothing borrows it any more. An error would leave it mapped:
        // harmless.
        let _ = unsafe { munmap(self.start.cast(), self.reserved.get()) };
    }
}

// SAFETY: (1) the mapping belongs to the process, not to a thread; (2) access needs &mut, so threads take turns.
unsafe impl Send for Arena {}

/// Whether `len` bytes of the file can be mapped where there is room for `room`.
fn check(file: &impl AsFd, len: u64, room: u64) -> Result<NonZeroUsize, Error> {
    let stat = fstat(file).map_err(io::Error::from)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    // The module's memory file (an anonymous inode: no kind, no size) knows its own end and refuses a longer mapping;
    // behind the end of a regular file there would be SIGBUS instead.
    let held = if kind == SFlag::S_IFREG { u64::try_from(stat.st_size).unwrap_or(0) } else { len };
    let fits = len <= held.min(room) && len.is_multiple_of(PAGE);
    let size = usize::try_from(len).ok().and_then(NonZeroUsize::new);
    size.filter(|_| fits).ok_or(Error::ArenaLength { held, announced: len, room })
}

/// Sets address space aside, without memory.
fn reserve(len: NonZeroUsize) -> Result<NonNull<u8>, Error> {
    // SAFETY: no address is asked for, so no existing mapping is replaced; the result is the caller's to unmap.
    let start =
        unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE) };
    Ok(start.map_err(io::Error::from)?.cast())
}
