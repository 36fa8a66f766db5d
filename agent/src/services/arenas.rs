//! Memory that crosses: how it is had, and how it is given back.
//!
//! An arena is one piece of physical memory where that can be had, else several, mapped one behind the other
//! ([`kexec_core::memory_map::pieces`]). It stays where it is from kernel to kernel; each kernel counts it as its own
//! (`BATON_SELF`), as memory that is in use.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kexec_core::boot_params::MAX_RESERVATIONS;
use kexec_core::device::{Device, DeviceError, FileFlags, SELF, TakeMemory};
use kexec_core::layout::PAGE;
use kexec_core::memory_map::{Range, RangeSet, pieces};

use crate::daemon::outcome::Failure;
use crate::machine::facts::{available_memory, managed_memory};

/// How long a single piece is looked for before several will do.
const ONE_PIECE_PATIENCE: Duration = Duration::from_secs(5);
/// Memory that no arena takes from the rest of the system.
const LEFT_FREE: u64 = 64 << 20;
/// Reservations of a successor that are not for arenas: what is left of the machine's RAM between whole memory blocks.
const OTHER_RESERVATIONS: usize = 24;

/// A part of an arena: one memory object of the module.
#[derive(Debug)]
pub struct Piece {
    /// Which part of physical memory.
    pub range: Range,
    /// Its memory file, which is given to the service.
    pub file: OwnedFd,
}

impl Piece {
    fn open(device: &Device, range: Range) -> Result<Piece> {
        Ok(Piece { range, file: device.memory_file(range, FileFlags::PAGES)? })
    }

    /// What [`take`] takes, with its files.
    pub fn take(device: &Device, kept: &RangeSet, len: u64) -> Result<Vec<Piece>> {
        let ranges = take(device, kept, len)?;
        // Those that were opened are closed again before the memory goes back.
        let opened: Result<Vec<_>> = ranges.iter().map(|range| Piece::open(device, *range)).collect();
        if opened.is_err() {
            give_back(device, ranges)?;
        }
        opened
    }
}

/// The memory of one service.
#[derive(Debug)]
pub struct Arena {
    /// Where it lies, in this order.
    pub pieces: Vec<Piece>,
    /// Nothing was ever written to it.
    pub fresh: bool,
}

impl Arena {
    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.range.len()).sum()
    }

    /// Where it lies; pieces that touch are one.
    pub fn ranges(&self) -> Vec<Range> {
        pieces::joined(self.pieces.iter().map(|piece| piece.range))
    }

    /// An arena that an earlier batond of this kernel had: the module has kept its memory for this kernel.
    pub fn find_again(device: &Device, ranges: impl IntoIterator<Item = Range>, fresh: bool) -> Result<Arena> {
        let pieces = ranges.into_iter().map(|range| Piece::open(device, range)).collect::<Result<_>>()?;
        Ok(Arena { pieces, fresh })
    }

    /// An arena that a predecessor left here: its pages, reserved until now, become memory that is in use.
    pub fn inherit(device: &Device, ranges: impl IntoIterator<Item = Range>) -> Result<Arena> {
        let pieces = ranges
            .into_iter()
            .map(|range| {
                device.take_memory(SELF, range, TakeMemory::Reserved)?;
                Piece::open(device, range)
            })
            .collect::<Result<_>>()?;
        Ok(Arena { pieces, fresh: false })
    }

    /// Gives its memory to this kernel's allocator. While somebody has it mapped, nothing is done, and it is handed back.
    pub fn give_back(self, device: &Device) -> std::result::Result<(), (Arena, anyhow::Error)> {
        let mut kept = Arena { pieces: Vec::new(), fresh: self.fresh };
        let mut first_error = None;
        for Piece { range, file } in self.pieces {
            drop(file); // the module counts open files as users
            let error = match device.give_back_memory(SELF, range) {
                Ok(()) => continue,
                Err(error) => anyhow::Error::from(error).context(format!("arena memory {range}")),
            };
            // A service has all pieces mapped or none, so where one is in use none has been given back before it.
            if let Ok(piece) = Piece::open(device, range) {
                kept.pieces.push(piece);
            }
            first_error = first_error.or(Some(error));
        }
        first_error.map_or(Ok(()), |error| Err((kept, error)))
    }
}

/// Takes `len` bytes (rounded up to whole pages) out of this kernel's allocator, for an arena or a file; beside `kept`, which is
/// all memory that crosses already. In one piece if that can be had, else in several, in the order in which they are to be mapped.
pub fn take(device: &Device, kept: &RangeSet, len: u64) -> Result<Vec<Range>> {
    let len = len.checked_next_multiple_of(PAGE).context("the length passes the end of memory")?;
    let available = available_memory()?;
    if available < len.saturating_add(LEFT_FREE) {
        return Err(Failure::precondition(
            format!(
                "{} KiB of memory that crosses are asked for, and {} KiB are available, of which {} stay free",
                len >> 10,
                available >> 10,
                LEFT_FREE >> 10
            ),
            "free memory (stop a program), or ask for less",
        )
        .into());
    }
    let (taken, end) = match take_whole(device, kept, len)? {
        Some(place) => (vec![place], Ok(())),
        None => pieces::gather(&managed_memory()?, kept, len, |range| wanted(device, range)),
    };
    let refused = end.map_err(anyhow::Error::from).and_then(|()| enough(&taken, kept, len)).err();
    match refused {
        None => Ok(taken),
        Some(why) => {
            give_back(device, taken)?;
            Err(why)
        }
    }
}

fn give_back(device: &Device, ranges: Vec<Range>) -> Result<()> {
    ranges.into_iter().try_for_each(|range| Ok(device.give_back_memory(SELF, range)?))
}

/// The same in one piece, if it can soon be had; nobody counts it.
pub fn take_whole(device: &Device, kept: &RangeSet, len: u64) -> Result<Option<Range>> {
    let until = Instant::now() + ONE_PIECE_PATIENCE;
    for place in pieces::whole(&managed_memory()?, kept, kept, len) {
        if wanted(device, place)? {
            return Ok(Some(place));
        }
        if Instant::now() > until {
            break;
        }
    }
    Ok(None)
}

fn wanted(device: &Device, range: Range) -> std::result::Result<bool, DeviceError> {
    match device.take_memory(SELF, range, TakeMemory::Alloc) {
        Ok(()) => Ok(true),
        // In use and not to be moved, or not of this kernel's allocator: another place.
        Err(
            DeviceError::Busy { .. }
            | DeviceError::Exists { .. }
            | DeviceError::NoMemory { .. }
            | DeviceError::Refused { .. },
        ) => Ok(false),
        Err(error) => Err(error),
    }
}

fn enough(taken: &[Range], kept: &RangeSet, len: u64) -> Result<()> {
    let had: u64 = taken.iter().map(|piece| piece.len()).sum();
    if had < len {
        return Err(Failure::precondition(
            format!(
                "no {} KiB of memory that can stay where it is: {} KiB could be had, in {} pieces; in the rest something \
                 cannot be moved",
                len >> 10,
                had >> 10,
                pieces::joined(taken.iter().copied()).len()
            ),
            "free memory (stop a program, drop caches), or ask for less",
        )
        .into());
    }
    reservations(kept.union(&taken.iter().copied().collect()).count()).map_err(anyhow::Error::from)
}

/// Whether a successor's kernel can remember so many separate pieces of memory.
pub fn reservations(separate: usize) -> Result<(), Failure> {
    let most = MAX_RESERVATIONS - OTHER_RESERVATIONS;
    if separate > most {
        return Err(Failure::precondition(
            format!(
                "arenas and files would lie in {separate} separate pieces of memory, and a successor surely remembers {most}"
            ),
            "free memory (stop a program, drop caches), or keep less: fewer arenas and files, or larger ones",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_pieces_than_a_successor_remembers_are_refused_with_numbers() {
        assert!(reservations(72).is_ok());
        let failure = reservations(73).unwrap_err();
        assert!(failure.cause.contains("73 separate pieces") && failure.cause.contains("72"), "{failure:?}");
    }
}
