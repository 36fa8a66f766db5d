//! The log of the successor: read out of its memory while it has some, and what was kept of it afterwards.
//!
//! The module gives no memory back that is mapped. So it is mapped only here, when it is read for the first time, under a lock
//! that [`SuccessorLog::close`] takes, too: whoever wants to give the memory back waits for a reader, and no reader comes after.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kexec_core::device::{Access, Device, Mapping};
use kexec_core::klog::cause::{agent_gave_up, cause_of};
use kexec_core::klog::{DeathCause, FoundBy, KernelLog, Kind, LogTail, NoLog, Pieces, Record};
use kexec_core::memory_map::Range;
use kexec_core::placement::Mapped;
use serde::{Deserialize, Serialize};

/// Where the log of the last successor that failed is kept.
pub const KEPT: &str = "/var/lib/baton/successor-log.json";
/// So many records are given at once.
const MOST: usize = 1 << 15;
/// A panic is among so many last records: after its stack, a kernel says no more.
const END: usize = 256;
/// A log that is searched for by its looks is searched for again after this time: the search reads all of the successor's
/// memory, and there is a better way as soon as its kernel has begun to start its devices.
const SEARCH_AGAIN: Duration = Duration::from_secs(2);

/// A kernel's log, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Log {
    /// Version of this object.
    pub schema_version: u32,
    /// The module's number of that kernel's instance.
    pub instance: u32,
    /// Its release, by its image.
    pub release: String,
    /// It still has its memory.
    pub alive: bool,
    /// Why it died, if it is known.
    pub cause: Option<DeathCause>,
    /// Its messages, oldest first.
    pub records: Vec<Record>,
}

/// Whose log it is, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The module's number of the instance.
    pub id: u32,
    /// Its release.
    pub release: String,
    /// A word of its command line that no other kernel has.
    pub mark: String,
    /// Its memory.
    pub region: Range,
}

/// Whose end a successor's log tells of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndToldOf {
    /// It panicked.
    Kernel,
    /// Its kernel runs, and nobody in it will answer.
    Agent {
        /// In the agent's words.
        why: String,
    },
}

/// What a look at a successor's memory found, and when.
type Found = Option<(Instant, Result<KernelLog, NoLog>)>;

#[derive(Debug)]
struct Watched {
    instance: Instance,
    /// Its region. Mapping it takes its time, and holds up whoever maps at the same time: once is enough.
    memory: Option<Mapping>,
    /// Where its log was found, or not, and when.
    found: Found,
}

impl Watched {
    /// Calls with its memory, what was found last, and the mark of its log; gives what is found now and what was read.
    fn look<T>(&mut self, device: &Device, then: impl FnOnce(&Pieces<'_>, Found, &str) -> (Found, T)) -> Result<T> {
        let range = self.instance.region;
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => device.map(range, Access::ReadOnly)?,
        };
        let pieces = Pieces::new(vec![Mapped { range, memory: &memory }]);
        let (found, read) = then(&pieces, self.found.take(), &self.instance.mark);
        self.found = found;
        self.memory = Some(memory);
        Ok(read)
    }
}

/// The successor's log.
#[derive(Debug, Default)]
pub struct SuccessorLog {
    watched: Mutex<Option<Watched>>,
}

impl SuccessorLog {
    fn lock(&self) -> MutexGuard<'_, Option<Watched>> {
        // A thread that panicked with the lock has changed nothing halfway: each change is one assignment.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on there is something to read.
    pub fn open(&self, instance: Instance) {
        *self.lock() = Some(Watched { instance, memory: None, found: None });
    }

    /// Nothing of it is mapped from now on.
    pub fn close(&self) {
        *self.lock() = None;
    }

    /// The records of the successor that runs which are newer than `after`; nothing when none runs. A successor that has
    /// no log yet has no records.
    pub fn read(&self, device: &Device, after: Option<u64>) -> Result<Option<Log>> {
        let mut watched = self.lock();
        let Some(watched) = &mut *watched else { return Ok(None) };
        let records = watched.look(device, |memory, found, mark| {
            let holds = |when: Instant, found: &Result<KernelLog, NoLog>| match found {
                Ok(log) if log.found_by() == FoundBy::Vmcoreinfo => true,
                _ => when.elapsed() < SEARCH_AGAIN,
            };
            let (when, found) = match found {
                Some((when, found)) if holds(when, &found) => (when, found),
                _ => {
                    let found = KernelLog::find(memory, Some(mark));
                    (Instant::now(), found)
                }
            };
            let records = found.as_ref().map(|log| log.read(memory, after, MOST)).unwrap_or_default();
            (Some((when, found)), records)
        })?;
        Ok(Some(watched.instance.log(true, None, records)))
    }

    /// Whether the successor that runs will never answer, by its own log. Its module tells of a panic only once it is loaded, and its
    /// agent can say nothing else where it cannot read what it was given.
    ///
    /// Cheap, for it is asked while the services serve: no search.
    pub fn tells_of_end(&self, device: &Device) -> Result<Option<EndToldOf>> {
        let mut watched = self.lock();
        let Some(watched) = &mut *watched else { return Ok(None) };
        watched.look(device, |memory, found, mark| {
            let known = match found {
                Some((when, Ok(log))) if log.found_by() == FoundBy::Vmcoreinfo => Some((when, log)),
                _ => KernelLog::told(memory, Some(mark)).ok().map(|log| (Instant::now(), log)),
            };
            let Some((when, log)) = known else { return (None, None) };
            let records = log.read(memory, None, END);
            let panicked = cause_of(&records).is_some_and(|cause| cause.kind == Kind::Panic);
            let gave_up = || agent_gave_up(&records).map(|why| EndToldOf::Agent { why: why.to_owned() });
            let end = if panicked { Some(EndToldOf::Kernel) } else { gave_up() };
            (Some((when, Ok(log))), end)
        })
    }

    /// The whole log of a successor that was stopped, and how it ends; kept for whoever asks later.
    pub fn last_words(&self, device: &Device, lines: usize) -> Result<LogTail> {
        // It does not change any more, so what was found while it ran may be old.
        if let Some(watched) = &mut *self.lock() {
            watched.found = None;
        }
        let Some(mut log) = self.read(device, None)? else { return Ok(LogTail::default()) };
        let why = self.lock().as_ref().and_then(|watched| watched.found.as_ref()?.1.as_ref().err().copied());
        if let Some(why) = why {
            tracing::warn!("the successor left no log: {why}");
        }
        let tail = LogTail::of(&log.records, lines);
        (log.alive, log.cause) = (false, tail.cause.clone());
        if let Err(error) = keep(Path::new(KEPT), &log) {
            tracing::warn!("the successor's log is not kept: {error:#}");
        }
        Ok(tail)
    }
}

impl Instance {
    fn log(&self, alive: bool, cause: Option<DeathCause>, records: Vec<Record>) -> Log {
        Log { schema_version: 1, instance: self.id, release: self.release.clone(), alive, cause, records }
    }
}

fn keep(path: &Path, log: &Log) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    // Whole or not at all: a reader may come at any time, and a disk may be full.
    let new = path.with_extension("new");
    let written = fs::write(&new, serde_json::to_vec(log)?).and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// What was kept of the last successor that failed; nothing when none did.
pub fn kept(path: &Path) -> Result<Option<Log>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let log: Log = serde_json::from_slice(&text).with_context(|| format!("{} is no log", path.display()))?;
    anyhow::ensure!(log.schema_version == 1, "{} has version {}, not 1", path.display(), log.schema_version);
    Ok(Some(log))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What version 1 looks like, on disk and as `baton dmesg --json`.
    const VERSION_1: &str = r#"{"schema_version":1,"instance":3,"release":"7.3.4","alive":false,"cause":{"kind":"panic","what":"no init","place":"panic+0x1/0x2"},"records":[{"seq":0,"ts_ns":1500,"level":5,"facility":0,"caller":{"thread":0},"text":"Linux version\n2"},{"seq":1,"ts_ns":2500,"level":6,"facility":1,"caller":{"cpu":3},"text":"","subsystem":"pci","device":"+pci:0000:00:1f.0"}]}"#;

    #[test]
    fn version_1_is_read_and_written_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/log.json");
        assert_eq!(kept(&path).unwrap(), None);
        let log: Log = serde_json::from_str(VERSION_1).unwrap();
        assert_eq!(log.records[1].device.as_deref(), Some("+pci:0000:00:1f.0"));
        keep(&path, &log).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), VERSION_1);
        assert_eq!(kept(&path).unwrap(), Some(log));
        fs::write(&path, VERSION_1.replace(r#""schema_version":1"#, r#""schema_version":2"#)).unwrap();
        assert!(kept(&path).unwrap_err().to_string().contains("version 2"));
        fs::write(&path, &VERSION_1[..99]).unwrap();
        assert!(kept(&path).unwrap_err().to_string().contains("is no log"));
    }
}
