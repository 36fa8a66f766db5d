//! The last update's journal: one line a step ([`JournalLine`]), on the disk before the effect that it announces is carried out.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use handover::update::effect::Effect;
use handover::update::machine::{JournalLine, Next, Serves};
use handover::update::phase::Phase;
use handover::update::recover::{self, Evidence, Recovery, Resumed, recover};
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

    /// The update that was under way, given that its successor has answered that it serves, and what comes next.
    ///
    /// # Errors
    /// The lines do not lead to an update whose successor serves.
    pub fn resume_serving(&self) -> Result<Resumed> {
        let evidence = Evidence { answered: true, epoch_word: None };
        let recovery = recover(&self.lines, &boot_id()?, evidence, Duration::ZERO);
        match recovery.context("the journal does not lead to where the update is")? {
            Recovery::GoOn(resumed) | Recovery::Leave(resumed) => Ok(*resumed),
            // It was on its way back already: there it goes on, from the undo that was under way.
            Recovery::TakeBack(resumed) if self.lines.iter().any(|line| line.serves == Serves::Successor) => {
                Ok(*resumed)
            }
            Recovery::TakeBack(resumed) => {
                bail!("the journal ends in phase {}, in which no successor serves", resumed.update.phase())
            }
            Recovery::Nothing => bail!("the journal says that the update had ended"),
        }
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
    use handover::update::cpu::{Cpu, Cpus, Moving};
    use handover::update::deadline::Deadlines;
    use handover::update::error::Outcome;
    use handover::update::machine::{Event, Update};
    use handover::update::plan::{Goal, Plan, ProbationPolicy};
    use state_schemas::handover_record::UpdateId;

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

    fn plan() -> Plan {
        let cpu = |number| Cpu { number, apic_id: number };
        let second = Duration::from_secs(1);
        let deadlines = Deadlines {
            granted: second,
            booting: second,
            trial: second,
            cutover: second,
            per_cpu: second,
            commit: second,
            undo: second,
        };
        Plan {
            update: UpdateId([7; 16]),
            boot: boot_id().unwrap(),
            services: vec!["kv".into()],
            goal: Goal::Upgrade,
            epoch: 4,
            cpus: Cpus {
                spare: Moving { cpu: cpu(3), online: true },
                others: vec![Moving { cpu: cpu(1), online: true }, Moving { cpu: cpu(2), online: true }],
                last: cpu(0),
            },
            devices: true,
            probation: ProbationPolicy::CommitAtOnce,
            deadlines,
        }
    }

    /// A driver that dies at each step of an update that goes well: once its successor has answered that it serves, the next one
    /// goes on with the very effect that was under way, also where nobody could write down that it serves.
    #[test]
    fn an_update_whose_successor_serves_is_gone_on_with_at_any_line() {
        let mut update = Update::new(plan());
        let (mut lines, mut unwritten) = (Vec::new(), Vec::new());
        let mut next = update.step(Duration::ZERO, Event::Begin).unwrap();
        let (mut resumed_at, mut refused_at) = (0, 0);
        while let Next::Do(effect) = &next {
            unwritten.extend(update.take_journal());
            if update.may_write_journal() {
                lines.append(&mut unwritten);
            }
            let journal = Journal { lines: lines.clone() };
            if update.serves() == Serves::Successor {
                let resumed = journal.resume_serving().unwrap();
                assert_eq!(resumed.next, Next::Do(effect.clone()));
                assert_eq!((resumed.update.serves(), resumed.update.is_rolling_back()), (Serves::Successor, false));
                resumed_at += 1;
            } else if update.serves() == Serves::Incumbent {
                assert!(journal.resume_serving().unwrap_err().to_string().contains("no successor serves"));
                refused_at += 1;
            }
            next = update.step(Duration::ZERO, Event::Done).unwrap();
        }
        assert!(resumed_at > 5 && refused_at > 5, "{resumed_at} {refused_at}");
        lines.extend(update.take_journal());
        let ended = Journal { lines }.resume_serving().unwrap_err().to_string();
        assert!(ended.contains("had ended"), "{ended}");
    }
}
