//! Who has an arena mapped.
//!
//! A service's process may have ended and a child of it serve on: so who has an arena is not asked of a connection but of
//! the processes' memory, which shows the arena's pages (proc_pid_maps(5), proc_pid_pagemap(5)).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use kexec_core::layout::PAGE;
use kexec_core::memory_map::Range;

/// What the module's memory files are called in `maps`.
const FILE: &str = "[baton-memory]";
/// Bit 63 of an entry of `pagemap`: the page is in memory. Its frame is in bits 0 to 54.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// Entries that are read at once.
const ENTRIES: u64 = 512;

/// The processes that have some of this memory mapped.
///
/// Not seen is one that has only the memory file open, and maps it later; the SDK closes it as soon as it is mapped.
pub fn of(ranges: &[Range]) -> Result<Vec<i32>> {
    let mut holders = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list processes")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        match holds(pid, ranges) {
            Ok(true) => holders.push(pid),
            Ok(false) => {}
            Err(error) if has_ended(&error) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot see which memory process {pid} has mapped"));
            }
        }
    }
    Ok(holders)
}

fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn holds(pid: i32, ranges: &[Range]) -> io::Result<bool> {
    let maps = fs::read(format!("/proc/{pid}/maps"))?;
    let maps = String::from_utf8_lossy(&maps);
    let mut mappings = mappings(&maps).peekable();
    if mappings.peek().is_none() {
        return Ok(false);
    }
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    for (start, end) in mappings {
        // All of a mapping is of one piece, so one page tells.
        if let Some(address) = first_page(&pagemap, start / PAGE, end / PAGE)?
            && ranges.iter().any(|range| (range.start()..range.end()).contains(&address))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The address ranges in which a process has memory files of the module mapped.
fn mappings(maps: &str) -> impl Iterator<Item = (u64, u64)> {
    maps.lines().filter(|line| line.ends_with(FILE)).filter_map(|line| {
        let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some((hex(start)?, hex(end)?))
    })
}

/// Physical address of the first page that is there.
fn first_page(pagemap: &File, start: u64, end: u64) -> io::Result<Option<u64>> {
    let mut at = start;
    while at < end {
        let count = ENTRIES.min(end - at);
        let mut entries = vec![0; count as usize * 8];
        pagemap.read_exact_at(&mut entries, at * 8)?;
        if let Some(present) = entries.chunks_exact(8).find_map(present) {
            return match present {
                0 => Err(io::Error::new(io::ErrorKind::PermissionDenied, "no frames are shown without CAP_SYS_ADMIN")),
                frame => Ok(Some(frame * PAGE)),
            };
        }
        at += count;
    }
    Ok(None)
}

fn present(entry: &[u8]) -> Option<u64> {
    let entry = u64::from_le_bytes(entry.try_into().ok()?);
    (entry & PRESENT != 0).then_some(entry & FRAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_modules_files_are_looked_at() {
        let maps = "55d0-55e0 r-xp 00000000 fe:01 1234   /usr/sbin/kv\n\
                    7f0000000000-7f0000200000 rw-s 00000000 00:0e 1057   anon_inode:[baton-memory]\n\
                    7f0000200000-7f0000300000 ---p 00000000 00:00 0\n\
                    7f0000300000-7f0000301000 rw-s 00000000 00:0e 1057   anon_inode:[baton-memory]\n\
                    7ffe-7fff rw-p 00000000 00:00 0   [stack]\n";
        let found: Vec<_> = mappings(maps).collect();
        assert_eq!(found, [(0x7f00_0000_0000, 0x7f00_0020_0000), (0x7f00_0030_0000, 0x7f00_0030_1000)]);
    }

    #[test]
    fn a_page_that_is_there_says_where() {
        assert_eq!(present(&(PRESENT | 0x1234).to_le_bytes()), Some(0x1234));
        assert_eq!(present(&0x1234u64.to_le_bytes()), None);
        // Of this process, which has none of the module's.
        assert!(!holds(std::process::id().cast_signed(), &[Range::new(0, 1 << 40)]).unwrap());
    }
}
