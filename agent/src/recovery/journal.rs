//! The last update's journal: one line a step ([`JournalLine`]), on the disk before the effect that it announces is carried out.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use handover::update::effect::Effect;
use handover::update::machine::{JournalLine, Next};
use handover::update::phase::Phase;
use handover::update::recover::{self, Evidence, Recovery, recover};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access};

/// Where it is.
pub const JOURNAL: &str = "/var/lib/baton/journal.jsonl";

/// What is set aside on the disk when a journal begins, in bytes, so that a disk that fills up meanwhile does not take the journal
/// away. More than an update of so many CPUs writes: 6 lines of at most 400 bytes for each, there and back, and some 50 others.
pub const fn room(cpus: usize) -> u64 {
    (32 + 3 * cpus as u64) << 10
}

/// Tells this boot of the kernel from all others.
///
/// # Errors
/// The kernel does not say.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
}

/// Begins a journal anew, with `room` bytes set aside for it.
///
/// # Errors
/// The folder or the file cannot be written, or the disk is full.
pub fn create(path: &Path, room: u64) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    match fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, room.cast_signed()) {
        // A file system that cannot set room aside says so when it is written to.
        Ok(()) | Err(Errno::EOPNOTSUPP) => {}
        Err(errno) => {
            return Err(errno).with_context(|| format!("no room of {} KiB for {}", room >> 10, path.display()));
        }
    }
    file.sync_all().with_context(|| format!("cannot flush {}", path.display()))?;
    Ok(file)
}

/// Whether a journal could begin at this place; touches nothing.
///
/// # Errors
/// As [`create`], as far as can be seen beforehand.
pub fn could_begin(path: &Path, room: u64) -> Result<String> {
    let folder = path.parent().context("a journal has a folder")?;
    let there = folder.ancestors().find(|folder| folder.exists()).context("there is no root folder")?;
    access(there, AccessFlags::W_OK).with_context(|| format!("{} cannot be written", there.display()))?;
    let disk = statvfs(there).with_context(|| format!("cannot look at the disk of {}", there.display()))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    if disk.flags().contains(FsFlags::ST_RDONLY) {
        bail!("{} is on a file system that is mounted read-only", there.display());
    }
    if free < room {
        bail!("the disk of {} has {} KiB left, a journal needs {}", there.display(), free >> 10, room >> 10);
    }
    Ok(format!("{} can be written", path.display()))
}

/// Adds a line to the journal of an update that somebody else began.
pub fn append(path: &Path, line: &JournalLine) -> Result<()> {
    let mut file =
        File::options().append(true).open(path).with_context(|| format!("cannot open {}", path.display()))?;
    write(&mut file, std::slice::from_ref(line))
}

/// Writes lines, and waits until they are on the disk.
pub fn write(file: &mut File, lines: &[JournalLine]) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    tracing::debug!("{}", String::from_utf8_lossy(&text).trim_end());
    file.write_all(&text)?;
    Ok(file.sync_data()?)
}

/// The lines of the last update.
#[derive(Debug, Default)]
pub struct Journal {
    lines: Vec<JournalLine>,
}

impl Journal {
    /// Reads the journal; one that is not there is empty.
    pub fn read(path: &Path) -> Result<Journal> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Journal::default()),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        Journal::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// The same, if this very kernel wrote it: what an update of another boot held is gone with that kernel. (One without a plan in
    /// its first line is of an older batond, and is believed.)
    ///
    /// # Errors
    /// As [`Journal::read`].
    pub fn of_this_boot(path: &Path) -> Result<Journal> {
        let journal = Journal::read(path)?;
        let boot = boot_id()?;
        let other = |line: &JournalLine| line.plan.as_ref().is_some_and(|plan| plan.boot != boot);
        Ok(if journal.lines.first().is_some_and(other) { Journal::default() } else { journal })
    }

    /// What has to be done about the update that these lines are of.
    ///
    /// # Errors
    /// The lines do not lead to where it is.
    pub fn recover(&self, evidence: Evidence) -> Result<Recovery> {
        Ok(recover(&self.lines, &boot_id()?, evidence, Duration::ZERO)?)
    }

    /// Reads its text.
    fn parse(text: &str) -> Result<Journal> {
        let lines = recover::parse(text);
        Ok(Journal { lines: lines.context("a line does not read")? })
    }

    /// The last line, if the update was under way. One that has passed the commit ends without a word: this kernel left.
    pub fn unfinished(&self) -> Option<&JournalLine> {
        let committed = |phase| matches!(phase, Phase::Commit | Phase::Drained);
        self.lines.last().filter(|line| matches!(line.next, Next::Do(_)) && !committed(line.phase))
    }

    /// CPUs that the update took offline, or was about to.
    pub fn cpus(&self) -> impl Iterator<Item = u32> + '_ {
        self.lines.iter().filter_map(|line| match &line.next {
            Next::Do(Effect::OfflineCpu { cpu }) => Some(cpu.number),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use handover::update::cpu::Cpu;
    use handover::update::error::Outcome;
    use handover::update::machine::{Event, Serves};

    use super::*;

    fn line(seq: u32, next: Next) -> String {
        let line = JournalLine {
            journal_version: 1,
            update: "u".into(),
            seq,
            at_ns: 0,
            phase: Phase::Granted,
            serves: Serves::Incumbent,
            event: Event::Done,
            next,
            plan: None,
        };
        serde_json::to_string(&line).unwrap() + "\n"
    }

    #[test]
    fn an_update_without_an_end_is_unfinished_and_names_its_cpus() {
        let offline = line(1, Next::Do(Effect::OfflineCpu { cpu: Cpu { number: 3, apic_id: 3 } }));
        let begun = line(0, Next::Do(Effect::TakeMemory)) + &offline;
        let found = Journal::parse(&begun).unwrap();
        assert_eq!(found.unfinished().map(|line| line.seq), Some(1));
        assert_eq!(found.cpus().collect::<Vec<_>>(), [3]);
        // A line that was cut off announced something that was never begun.
        assert_eq!(
            Journal::parse(&(begun.clone() + "{\"journal_ver")).unwrap().unfinished().map(|line| line.seq),
            Some(1)
        );
        let ended = begun.clone() + &line(2, Next::End(Outcome::Committed { left: Vec::new() }));
        assert!(Journal::parse(&ended).unwrap().unfinished().is_none());
        let left = begun.replace("\"granted\"", "\"commit\"");
        assert!(left != begun && Journal::parse(&left).unwrap().unfinished().is_none());
        assert!(Journal::parse("no journal\n").is_err());
        assert!(Journal::read(Path::new("/nonexistent")).unwrap().unfinished().is_none());
    }
}
