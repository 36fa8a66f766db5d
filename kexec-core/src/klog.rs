//! What another kernel has written into its log, read out of its memory: without its help, alive or dead, from its first
//! message on.
//!
//! ```text
//! memory ──► vmcoreinfo: where printk's ring is, how it is laid out, and how its addresses translate ─┐
//!    │          (there from "subsys_initcall" on: after the CPUs, before the drivers)                 ├─► ring ─► records ─► cause
//!    └─────► search: a ring by its looks, for a kernel that died or hangs before that ────────────────┘
//! ```
//! Everything here is hostile: the other kernel may be broken, may write at the same time, or its memory may hold what an
//! earlier kernel left there. So each address is looked up in the memory that was given, each loop ends by what fits into
//! that memory, and nothing read is printed as it is ([`record::escaped`]).
//!
//! Reads only, and no I/O of its own: memory is a trait ([`PhysicalMemory`]).

mod address;
pub mod cause;
pub mod memory;
pub mod record;
mod ring;
mod search;
mod vmcoreinfo;

pub use self::cause::{DeathCause, Kind, LogTail};
pub use self::memory::{PhysicalMemory, Pieces};
pub use self::record::{Caller, Record};
use self::ring::Ring;
use self::vmcoreinfo::Vmcoreinfo;

/// How many records are read to find out whose log it is: the command line is among the first ten messages of a kernel.
const FIRST: usize = 64;

/// How the log was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    /// By what the kernel itself says of its structures.
    Vmcoreinfo,
    /// By its looks: the kernel has not said anything yet. What is read this way is right as far as each record's own
    /// checks go, but printk's layout is assumed.
    Search,
}

/// Where a kernel's log is. It stays true while that kernel runs, unless found by [`FoundBy::Search`]: a kernel may move
/// its ring once, early in its boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelLog {
    ring: ring::Place,
    found_by: FoundBy,
    release: Option<String>,
}

/// Why there is no log to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoLog {
    /// Neither of the two ways leads to one.
    #[error("no kernel has begun a log in this memory")]
    None,
    /// It is not the log of the kernel that was asked for.
    #[error("the only log in this memory was left by another kernel that ran there before")]
    Stale,
}

/// Whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    /// The messages that would tell are overwritten, or not written yet.
    Unknown,
    /// The command line in it has the mark.
    Marked,
}

impl KernelLog {
    /// Finds the log of the kernel whose command line has the word `mark`. Without a mark, any kernel's.
    ///
    /// Memory is not always empty when a kernel is put there, so there may be more than one log in it; the mark tells
    /// them apart.
    pub fn find(memory: &dyn PhysicalMemory, mark: Option<&str>) -> Result<KernelLog, NoLog> {
        let why = match KernelLog::told(memory, mark) {
            Ok(log) => return Ok(log),
            Err(why) => why,
        };
        let seen = search::rings_in(memory).into_iter();
        best(memory, mark, seen.map(|ring| KernelLog { ring, found_by: FoundBy::Search, release: None }))
            .map_err(|search| if why == NoLog::Stale { why } else { search })
    }

    /// The same, only by [`FoundBy::Vmcoreinfo`]: that looks at the beginning of each page, not at all of each.
    pub fn told(memory: &dyn PhysicalMemory, mark: Option<&str>) -> Result<KernelLog, NoLog> {
        let told = Vmcoreinfo::all_in(memory).filter_map(|info| {
            let ring = info.ring(memory)?;
            Some(KernelLog { ring, found_by: FoundBy::Vmcoreinfo, release: info.release() })
        });
        best(memory, mark, told)
    }

    /// How it was found.
    pub fn found_by(&self) -> FoundBy {
        self.found_by
    }

    /// The kernel's release, when it has said so.
    pub fn release(&self) -> Option<&str> {
        self.release.as_deref()
    }

    /// The last `most` records that are newer than the record `after`, oldest first. Fewer when the ring has no more, or
    /// when what it holds contradicts itself.
    pub fn read(&self, memory: &dyn PhysicalMemory, after: Option<u64>, most: usize) -> Vec<Record> {
        match Ring::at(memory, &self.ring) {
            Some(ring) => ring.newest(after, most),
            None => Vec::new(),
        }
    }

    /// Whose log it is, and its newest record's number; nothing when it is another kernel's for certain, or has no record.
    fn whose(&self, memory: &dyn PhysicalMemory, mark: Option<&str>) -> Option<(Whose, u64)> {
        let ring = Ring::at(memory, &self.ring)?;
        let newest = ring.newest(None, 1).last()?.seq;
        let Some(mark) = mark else { return Some((Whose::Unknown, newest)) };
        let first = ring.oldest(FIRST);
        let lines: Vec<&Record> = first.iter().filter(|record| is_command_line(record)).collect();
        if lines.is_empty() {
            return Some((Whose::Unknown, newest));
        }
        let marked = lines.iter().any(|record| record.text.split_ascii_whitespace().any(|word| word == mark));
        marked.then_some((Whose::Marked, newest))
    }
}

/// What x86 says of its command line (`setup_arch`), before anything that could take long.
fn is_command_line(record: &Record) -> bool {
    record.is_kernels() && ["Command line: ", "Kernel command line: "].iter().any(|s| record.text.starts_with(s))
}

/// The one that is most certainly the kernel's, and among those the one with most messages.
fn best(
    memory: &dyn PhysicalMemory,
    mark: Option<&str>,
    logs: impl Iterator<Item = KernelLog>,
) -> Result<KernelLog, NoLog> {
    let mut best: Option<((Whose, u64), KernelLog)> = None;
    let mut why = NoLog::None;
    for log in logs {
        match log.whose(memory, mark) {
            None => why = NoLog::Stale,
            Some(rank) if best.as_ref().is_none_or(|(other, _)| *other < rank) => best = Some((rank, log)),
            Some(_) => {}
        }
    }
    best.map(|(_, log)| log).ok_or(why)
}
