//! The files that programs keep: memfds whose pages are memory that crosses, by service and name.
//!
//! ```text
//! kept ──► placed in contiguous pages, as an arena is ──► every update: settled before the record is written,
//!   ▲                                                      looked at once more when everybody is frozen
//!   └── the successor makes a file of the same size and seals, on the same pages, before its programs start
//! ```
//! A program comes to it in two ways: by the service's library ([`baton_sdk::files`], [`server`]), or, if it knows
//! systemd and not us, by `FDSTORE=1` and `LISTEN_FDS` ([`notify`], `baton run`). Whatever is no memfd is refused by name.
//!
//! Nothing here is left to trust: what cannot be in the record any more (a file kept, forgotten or resized after the
//! successor was placed) ends the cutover at [`Store::freeze`], which undoes the update, and nothing is lost.

pub mod notify;
pub mod orchestrator;
pub mod programs;
pub mod server;
pub mod sessions;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use kexec_core::device::{Content, Device, SELF, TakeMemory};
use kexec_core::layout::PAGE;
use kexec_core::memory_map::{Range, RangeSet};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::daemon::control::{ServiceState, ServiceStatus};
use crate::recovery::ledger::Ledger;
use crate::services::Crossing;
use crate::services::arenas::{self, take_whole};
use crate::services::watched::Watched;
use baton_sdk::files::check_name;
use programs::Program;
use sessions::Place;
use state_schemas::latest::handover_record as record;

/// Most files in all: the record holds so many.
pub const MAX_FILES: usize = 512;
/// Largest file.
pub const MAX_LEN: u64 = 1 << 40;
/// A change of a file less than this before it was looked at may carry the same time as the look: file times go by the
/// timer's tick, of which the slowest kernel has 100 a second.
const TICK: Duration = Duration::from_millis(20);
/// How long a successor's agent may take to make the files that its predecessor tells of.
const INHERITANCE_PATIENCE: Duration = Duration::from_secs(60);
/// `F_SEAL_EXEC`, which nix does not name (include/uapi/linux/fcntl.h).
const F_SEAL_EXEC: i32 = 0x20;

/// One kept file.
#[derive(Debug)]
struct Kept {
    service: String,
    name: String,
    file: File,
    /// Its pages, in their order; the last may go further than the file.
    pieces: Vec<Range>,
    /// Its size when it was settled.
    len: u64,
    /// When it had last changed, other than through a mapping, as it was settled; nothing when that is not certain.
    changed: Option<(i64, i64)>,
    /// A predecessor left it.
    inherited: bool,
}

/// What a successor must know of a kept file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrossingFile {
    /// Whose it is.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its pages.
    pub pieces: Vec<Range>,
    /// Its size.
    pub len: u64,
    /// Its seals.
    pub seals: u32,
}

/// The successor was told already what crosses.
#[derive(Debug, thiserror::Error)]
#[error("an update is under way, and what crosses with it is settled: ask again when it has ended")]
pub struct Settled;

#[derive(Debug, Default)]
struct Inner {
    kept: Vec<Kept>,
    /// Pages of forgotten files that somebody still has open.
    leaving: Vec<Range>,
    programs: std::collections::BTreeMap<String, Program>,
    /// Who kept files with an earlier batond, which are lost to this one: an update must not leave them behind unsaid.
    bereft: BTreeSet<String>,
    /// For a batond that comes after this one.
    ledger: Arc<Ledger>,
    /// What a predecessor left is here: until then nobody may conclude that there is nothing.
    complete: bool,
    /// Programs run; else they stand by or are frozen.
    running: bool,
    /// A record tells of these files: no other can cross with it.
    closed: bool,
    /// Why it would be wrong to cross with it.
    missed: Option<String>,
}

/// Where programs say things that nobody has heard yet.
pub trait LastWords: std::fmt::Debug + Send + Sync {
    /// Does what was said by now. `arenas` is what crosses beside the files.
    fn hear(&self, store: &Store, device: &Device, arenas: &RangeSet);
}

/// All files that are kept on this kernel.
#[derive(Debug, Default)]
pub struct Store {
    inner: Watched<Inner>,
    /// Held while what is kept is changed, which takes as long as files are large. [`Store::inner`] is not, so that how things stand
    /// can be said meanwhile.
    changing: Mutex<()>,
    /// What programs say by themselves.
    last_words: OnceLock<Arc<dyn LastWords>>,
}

impl Store {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    fn one_change_at_a_time(&self) -> MutexGuard<'_, ()> {
        // What a change that panicked has done is in the lists, or is not.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing kept yet; but an earlier batond of this kernel may have kept something.
    pub fn of_ledger(ledger: Arc<Ledger>) -> Store {
        let written = ledger.pages();
        let leaving = written.files.iter().filter_map(|&(start, len)| Range::with_len(start, len)).collect();
        let inner = Inner { bereft: written.keepers, leaving, ledger, ..Inner::default() };
        Store { inner: Watched::new(inner), ..Store::default() }
    }

    /// What programs say arrives here.
    pub fn listen(&self, last_words: Arc<dyn LastWords>) -> Result<()> {
        self.last_words.set(last_words).map_err(|_| anyhow!("programs are heard already"))
    }

    /// Nothing comes from any predecessor, or not to this batond, and programs may run.
    pub fn begin(&self) {
        let mut inner = self.lock();
        (inner.complete, inner.running) = (true, true);
    }

    /// Another kernel serves: programs do not run here, and nothing is kept.
    pub fn elsewhere(&self) {
        let mut inner = self.lock();
        (inner.complete, inner.running, inner.closed) = (true, false, true);
    }

    /// No program of this name comes back: one that has ended leaves its files, if `device` is there to give them back. Says
    /// if one was waited for.
    pub fn give_up(&self, device: Option<&Device>, name: &str) -> Result<bool> {
        let _one = self.one_change_at_a_time();
        let mut inner = self.lock();
        let mut was = inner.bereft.remove(name);
        let ended = inner.programs.get(name).is_some_and(|program| !program.lives());
        if let Some(device) = device.filter(|_| ended && !inner.closed) {
            inner.programs.remove(name);
            let (gone, kept) = std::mem::take(&mut inner.kept).into_iter().partition(|kept| kept.service == name);
            inner.kept = kept;
            inner.leave(gone);
            inner.release(device);
            was = true;
        }
        inner.note()?;
        Ok(was)
    }

    /// Waits until the lists are complete.
    fn complete(&self) -> Result<MutexGuard<'_, Inner>> {
        let until = Instant::now() + INHERITANCE_PATIENCE;
        self.inner.wait(Some(until), |inner| inner.complete.then_some(())).with_context(|| {
            format!("this kernel has not received its predecessor's files in {INHERITANCE_PATIENCE:?}")
        })?;
        // `complete` is never set back, so it holds under this lock, too.
        Ok(self.lock())
    }

    /// Keeps a memfd: its content moves into pages that cross, as the `arenas` do. The same file twice is one.
    pub fn keep(&self, device: &Device, arenas: &RangeSet, service: &str, name: &str, file: OwnedFd) -> Result<()> {
        check_name(name)?;
        sessions::check(name)?;
        let file = File::from(file);
        let len = memfd_len(&file)?;
        let _one = self.one_change_at_a_time();
        let id = identity(&file)?;
        let crossing = {
            let inner = self.complete()?;
            for kept in &inner.kept {
                if identity(&kept.file)? == id {
                    if kept.service == service && kept.name == name {
                        return Ok(());
                    }
                    bail!("it is kept already, as {:?} of {}", kept.name, kept.service);
                }
            }
            if Place::of(name).is_some() && inner.kept.iter().any(|kept| kept.name == name) {
                bail!("there is a file for this place in a session already");
            }
            if inner.closed {
                return Err(Settled.into());
            }
            if inner.kept.len() >= MAX_FILES {
                bail!("{MAX_FILES} files are kept, which is the most there can be");
            }
            inner.ranges().union(arenas)
        };
        let mut kept = Kept {
            service: service.to_owned(),
            name: name.to_owned(),
            file,
            pieces: Vec::new(),
            len,
            changed: None,
            inherited: false,
        };
        let settled = settle(device, &mut kept, &crossing);
        let mut inner = self.lock();
        match settled {
            Ok(()) => {
                tracing::info!(service, name, len, "kept in {}", Ranges(&kept.pieces));
                inner.kept.push(kept);
                inner.bereft.remove(service);
            }
            Err(_) => inner.leave(vec![kept]),
        }
        // Of a file that an earlier batond kept, these were the pages until now; or those of one that could not be settled.
        inner.release(device);
        settled.and_then(|()| inner.note())
    }

    /// Forgets all files of this name; says how many there were. Their pages are given back when nobody has them open.
    pub fn forget(&self, device: &Device, service: &str, name: &str) -> Result<usize> {
        let _one = self.one_change_at_a_time();
        let mut inner = self.lock();
        let before = inner.kept.len();
        let is_it = |kept: &Kept| kept.service == service && kept.name == name;
        if inner.closed && inner.kept.iter().any(is_it) {
            return Err(Settled.into());
        }
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut inner.kept).into_iter().partition(is_it);
        inner.kept = kept;
        inner.leave(gone);
        inner.release(device);
        inner.note()?;
        Ok(before - inner.kept.len())
    }

    /// Copies of a service's descriptors, in the order in which they were kept.
    pub fn of(&self, service: &str) -> Result<Vec<(String, OwnedFd)>> {
        let inner = self.complete()?;
        let own = inner.kept.iter().filter(|kept| kept.service == service);
        own.map(|kept| Ok((kept.name.clone(), kept.file.as_fd().try_clone_to_owned()?))).collect()
    }

    /// Whether a predecessor left this service a file of this name.
    pub fn was_left(&self, service: &str, name: &str) -> bool {
        self.lock().kept.iter().any(|kept| kept.inherited && kept.service == service && kept.name == name)
    }

    /// All pages that are kept, and those that are not free yet.
    pub fn ranges(&self) -> RangeSet {
        self.lock().ranges()
    }

    /// What crosses, as it is about to be told to a successor: nothing else does from now on, until [`Store::open`].
    pub fn close(&self, device: &Device, arenas: &RangeSet) -> Result<Vec<CrossingFile>> {
        let _one = self.one_change_at_a_time();
        let mut inner = self.lock();
        inner.release(device);
        for n in 0..inner.kept.len() {
            let crossing = inner.ranges().union(arenas);
            let kept = &mut inner.kept[n];
            settle(device, kept, &crossing).with_context(|| format!("file {:?} of {}", kept.name, kept.service))?;
        }
        (inner.closed, inner.missed) = (true, None);
        inner.note()?;
        inner.crossings()
    }

    /// What crosses, as it was settled.
    pub fn crossings(&self) -> Result<Vec<CrossingFile>> {
        self.lock().crossings()
    }

    /// Somebody who hears no answer wanted something else to cross: an update under way must not go on without it.
    pub fn miss(&self, why: String) {
        let mut inner = self.lock();
        if inner.closed {
            inner.missed.get_or_insert(why);
        }
    }

    /// The undo of [`Store::close`].
    pub fn open(&self) {
        let mut inner = self.lock();
        (inner.closed, inner.missed) = (false, None);
    }

    /// Once more before the cutover, so that little is left for it: what was written by file since. (What was written
    /// through mappings is there.)
    pub fn settle_again(&self, device: &Device) -> Result<()> {
        self.lock().settle_changed(device)
    }

    /// Nobody writes any more: programs are stopped, what they had said by then is heard, and every file is what the record
    /// says. `arenas` is what crosses beside the files.
    pub fn freeze(&self, device: &Device, arenas: &RangeSet, until: Instant) -> Result<()> {
        let mut inner = self.lock();
        inner.running = false;
        for (name, program) in &inner.programs {
            program.freeze(until).with_context(|| format!("program {name} cannot be stopped"))?;
        }
        drop(inner);
        if let Some(last_words) = self.last_words.get() {
            last_words.hear(self, device, arenas);
        }
        let mut inner = self.lock();
        if let Some(missed) = &inner.missed {
            bail!("{missed}: it would be lost");
        }
        inner.settle_changed(device)
    }

    /// The undo of [`Store::freeze`]; also the first word to programs that stand by. Each of them is told, whatever becomes of another.
    pub fn resume(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.running = true;
        let mut failed = Vec::new();
        for (name, program) in &inner.programs {
            match program.thaw() {
                Err(error) if program.lives() => failed.push(format!("program {name} cannot go on: {error:#}")),
                // It has ended, so there is no process to be thawed.
                Err(_) => tracing::warn!("program {name} has ended"),
                Ok(()) => {}
            }
        }
        drop(inner);
        self.inner.notify();
        if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
    }

    /// Waits until all programs that stood by have started.
    pub fn await_started(&self, until: Instant) -> Result<()> {
        let started = self.inner.wait(Some(until), |inner| inner.waiting().is_empty().then_some(()));
        started.with_context(|| format!("programs do not start: {}", self.lock().waiting().join(", ")))
    }

    /// Waits until the programs of all these names stand by.
    pub fn await_programs(&self, names: &[String], patience: Duration) -> Result<()> {
        let missing = |inner: &Inner| -> Vec<String> {
            let waits = |name: &&String| inner.programs.get(*name).is_some_and(|program| program.waiting);
            names.iter().filter(|name| !waits(name)).cloned().collect()
        };
        let until = Instant::now() + patience;
        let stand = self.inner.wait(Some(until), |inner| missing(inner).is_empty().then_some(()));
        stand.with_context(|| {
            let missing = missing(&self.lock()).join(", ");
            format!("programs that keep files do not stand by after {patience:?}: {missing}")
        })
    }

    /// A program is about to start: it stands by until programs may run here; then it gets its files.
    fn stand_by(&self, name: &str, program: Program) -> Result<Vec<(String, OwnedFd)>> {
        let mut inner = self.lock();
        inner.programs.insert(name.to_owned(), program);
        inner.bereft.remove(name);
        inner.note()?;
        drop(inner);
        self.inner.notify();
        self.inner.wait(None, |inner| inner.running.then_some(()));
        self.of(name)
    }

    /// It has them, or will never.
    fn started(&self, name: &str) {
        if let Some(program) = self.lock().programs.get_mut(name) {
            program.waiting = false;
        }
        self.inner.notify();
    }

    /// Which program's process this is.
    fn program_of(&self, pid: i32) -> Option<String> {
        let cgroup = programs::cgroup_of(pid).ok()?;
        let inner = self.lock();
        inner.programs.iter().find(|(_, program)| program.holds(&cgroup)).map(|(name, _)| name.clone())
    }

    /// The programs, for `baton status`.
    pub fn status(&self) -> Vec<ServiceStatus> {
        let inner = self.lock();
        let state = |program: &Program| match (program.lives(), program.waiting, inner.running) {
            (false, ..) => ServiceState::Absent,
            (true, true, _) => ServiceState::Standby,
            (true, false, true) => ServiceState::Serving,
            (true, false, false) => ServiceState::Frozen,
        };
        let kept = |name: &str| inner.kept.iter().filter(|kept| kept.service == name).map(|kept| kept.len).sum();
        let row = |name: &String, state| ServiceStatus {
            name: name.clone(),
            state,
            arena_bytes: kept(name),
            schema_kind: 0,
            schema_version: 0,
        };
        let programs = inner.programs.iter().map(|(name, program)| row(name, state(program)));
        // One that has ended and kept nothing leaves nothing that could be lost.
        let programs = programs.filter(|row| row.state != ServiceState::Absent || row.arena_bytes > 0);
        programs.chain(inner.bereft.iter().map(|name| row(name, ServiceState::Absent))).collect()
    }

    /// Makes the files that a predecessor's record tells of, on their pages.
    pub fn inherit(&self, device: &Device, record: &record::HandoverRecord) -> Result<()> {
        for file in &record.files {
            let arena = record.arenas.iter().find(|arena| arena.id == file.arena);
            let arena = arena.with_context(|| format!("file {:?} of {} has no pages", file.name, file.service))?;
            let pieces: Vec<Range> = arena.ranges.iter().map(|piece| crate::takeover::birth::range(*piece)).collect();
            let kept = inherit_one(device, file, pieces)
                .with_context(|| format!("file {:?} of {}", file.name, file.service))?;
            self.lock().kept.push(kept);
        }
        let mut inner = self.lock();
        inner.complete = true;
        inner.note()?;
        drop(inner);
        self.inner.notify();
        Ok(())
    }
}

impl Inner {
    /// These files are not kept any more; who has one open goes on having it.
    fn leave(&mut self, gone: Vec<Kept>) {
        self.leaving.extend(gone.into_iter().flat_map(|kept| kept.pieces));
    }

    /// Writes down whose files are kept. Nothing is written where nothing has changed.
    fn note(&self) -> Result<()> {
        let keepers = self.kept.iter().map(|kept| &kept.service).chain(&self.bereft).cloned().collect();
        let held = self.kept.iter().flat_map(|kept| &kept.pieces).chain(&self.leaving);
        let files = held.map(|range| (range.start(), range.len())).collect();
        self.ledger.change(|pages| (pages.keepers, pages.files) = (keepers, files))
    }

    fn ranges(&self) -> RangeSet {
        self.kept.iter().flat_map(|kept| &kept.pieces).chain(&self.leaving).copied().collect()
    }

    fn crossings(&self) -> Result<Vec<CrossingFile>> {
        let crossing = |kept: &Kept| {
            Ok(CrossingFile {
                service: kept.service.clone(),
                name: kept.name.clone(),
                pieces: kept.pieces.clone(),
                len: kept.len,
                seals: seals_of(&kept.file)?,
            })
        };
        self.kept.iter().map(crossing).collect()
    }

    /// Files that changed otherwise than through a mapping: pages may have been cut off, punched out, or come anew.
    fn settle_changed(&mut self, device: &Device) -> Result<()> {
        for kept in &mut self.kept {
            let meta = kept.file.metadata()?;
            if meta.len() != kept.len {
                let (service, name, was) = (&kept.service, &kept.name, kept.len);
                bail!("file {name:?} of {service} went from {was} to {} bytes during the update", meta.len());
            }
            if kept.changed != Some((meta.ctime(), meta.ctime_nsec())) {
                place(device, kept, Content::OfFile)?;
            }
        }
        Ok(())
    }

    /// Gives back what nobody has open any more.
    fn release(&mut self, device: &Device) {
        // mlock() leaves references in lists of each CPU, and whoever takes a page empties them. Where no page can be had, some
        // memory is just given back later.
        if !self.leaving.is_empty()
            && let Ok(Some(page)) = take_whole(device, &self.ranges(), PAGE)
        {
            let _ = device.give_back_memory(SELF, page);
        }
        self.leaving.retain(|range| match device.give_back_memory(SELF, *range) {
            Ok(()) => false,
            Err(error) => {
                if !error.is_busy() {
                    tracing::warn!("memory of a forgotten file: {error}");
                }
                true
            }
        });
    }

    fn waiting(&self) -> Vec<&str> {
        self.programs.iter().filter(|(_, program)| program.waiting).map(|(name, _)| name.as_str()).collect()
    }
}

/// For messages.
struct Ranges<'a>(&'a [Range]);

impl std::fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().enumerate().try_for_each(|(i, range)| write!(f, "{}{range}", if i > 0 { ", " } else { "" }))
    }
}

fn identity(file: &File) -> Result<(u64, u64)> {
    let meta = file.metadata()?;
    Ok((meta.dev(), meta.ino()))
}

/// Its size, if it is a file that can be kept; else why not.
fn memfd_len(file: &File) -> Result<u64> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let link = link.to_string_lossy();
    if !link.starts_with("/memfd:") {
        bail!("it is {link}, and no memfd: only memory crosses, so it stays with whoever has it open");
    }
    if fstatfs(file)?.filesystem_type() == HUGETLBFS_MAGIC {
        bail!("it has huge pages (MFD_HUGETLB), which cannot be exchanged one by one: keep it in ordinary pages");
    }
    let len = file.metadata()?.len();
    if len == 0 || len > MAX_LEN {
        bail!("it has {len} bytes; 1 byte to 1 TiB can be kept (set its size before you keep it)");
    }
    Ok(len)
}

fn seals_of(file: &File) -> Result<u32> {
    Ok(fcntl(file, FcntlArg::F_GET_SEALS)?.cast_unsigned())
}

/// As many pages as the file has, and all of them in their places. `crossing` is all that is kept.
fn settle(device: &Device, kept: &mut Kept, crossing: &RangeSet) -> Result<()> {
    let had: u64 = kept.pieces.iter().map(|piece| piece.len()).sum();
    kept.len = memfd_len(&kept.file)?;
    let wanted = kept.len.next_multiple_of(PAGE);
    if wanted > had {
        kept.pieces.extend(arenas::take(device, crossing, wanted - had)?);
    }
    place(device, kept, Content::OfFile)
}

fn place(device: &Device, kept: &mut Kept, content: Content) -> Result<()> {
    let now = SystemTime::now();
    let meta = kept.file.metadata()?;
    let end = meta.len().next_multiple_of(PAGE);
    let mut offset = 0;
    for piece in &kept.pieces {
        let len = piece.len().min(end.saturating_sub(offset));
        if len > 0 {
            let part = Range::new(piece.start(), piece.start() + len);
            device.place_in_file(part, kept.file.as_fd(), offset, content)?;
        }
        offset += piece.len();
    }
    kept.changed = changed_for_certain(meta.ctime(), meta.ctime_nsec(), now);
    Ok(())
}

/// When a file had last changed, if a later change is sure to carry another time: a program may set a file's time of
/// modification, but not this one.
fn changed_for_certain(ctime: i64, nanoseconds: i64, now: SystemTime) -> Option<(i64, i64)> {
    let at = Duration::new(ctime.try_into().ok()?, nanoseconds.try_into().ok()?);
    let then = now.checked_sub(TICK)?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    (at < then).then_some((ctime, nanoseconds))
}

fn inherit_one(device: &Device, file: &record::File, pieces: Vec<Range>) -> Result<Kept> {
    for piece in &pieces {
        device.take_memory(SELF, *piece, TakeMemory::Reserved)?;
    }
    // memfd_create(2) takes a shorter name than systemd does.
    let shown: String = file.name.chars().take(200).collect();
    let no_exec = file.seals.cast_signed() & F_SEAL_EXEC != 0;
    let flags = MFdFlags::MFD_CLOEXEC
        | if no_exec { MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL) } else { MFdFlags::MFD_ALLOW_SEALING };
    let memfd = File::from(memfd_create(shown.as_str(), flags)?);
    memfd.set_len(file.len)?;
    // Before the pages come: a seal against writing is refused while pages have more references than the kernel expects.
    let seals = SealFlag::from_bits_retain(file.seals.cast_signed() & !F_SEAL_EXEC);
    if !seals.is_empty() {
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(io::Error::from).context("cannot seal it again")?;
    }
    let (service, name) = (file.service.clone(), file.name.clone());
    let mut kept = Kept { service, name, file: memfd, pieces, len: file.len, changed: None, inherited: true };
    place(device, &mut kept, Content::OfMemory)?;
    Ok(kept)
}

/// What crosses, as a record says it: each file has an arena of its own, numbered behind those of the services.
#[derive(Debug)]
pub struct Numbered {
    /// The files.
    pub files: Vec<CrossingFile>,
    /// Number of the first one's arena.
    pub first: u32,
    /// The successor's kernel takes sessions: their files are not told to its agent.
    pub luo: bool,
}

impl Numbered {
    fn all(&self) -> impl Iterator<Item = (u32, &CrossingFile)> {
        (self.first..).zip(&self.files)
    }

    /// Their arenas.
    pub fn arenas(&self) -> impl Iterator<Item = record::Arena> + use<'_> {
        self.all().map(|(id, file)| record::Arena {
            id,
            name: file.service.clone(),
            ranges: file.pieces.iter().copied().map(crate::takeover::birth::phys).collect(),
            len: file.pieces.iter().map(|piece| piece.len()).sum(),
        })
    }

    /// The files that the successor's agent makes.
    pub fn files(&self) -> impl Iterator<Item = record::File> + use<'_> {
        self.all().filter(|(_, file)| self.place(file).is_none()).map(|(arena, file)| record::File {
            service: file.service.clone(),
            name: file.name.clone(),
            arena,
            len: file.len,
            seals: file.seals,
        })
    }

    /// The files that its kernel makes, with their arenas' numbers and their places.
    pub fn to_kernel(&self) -> impl Iterator<Item = (u32, &CrossingFile, Place<'_>)> {
        self.all().filter_map(|(arena, file)| Some((arena, file, self.place(file)?)))
    }

    fn place<'f>(&self, file: &'f CrossingFile) -> Option<Place<'f>> {
        Place::of(&file.name).filter(|_| self.luo)
    }
}

/// Names of programs whose files cross, but for services, which answer for themselves.
pub fn programs_of(record: &record::HandoverRecord) -> Vec<String> {
    let names = record.files.iter().map(|file| &file.service);
    let own = |name: &&String| !record.services.iter().any(|service| service.name == **name);
    let mut names: Vec<String> = names.filter(own).cloned().collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Says that a service is not admitted under a program's name, or the reverse: files are found by it.
pub fn check_owner(crossings: &[Crossing], program: &str) -> Result<()> {
    match crossings.iter().find(|crossing| crossing.name == program) {
        Some(_) => Err(anyhow!("{program} is a service with an arena: it cannot be started as a program too")),
        None => Ok(()),
    }
}

/// For those who only look.
pub fn borrowed(files: &[(String, OwnedFd)]) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
    files.iter().map(|(name, file)| (name.as_str(), file.as_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its own programs are known to batond by name alone, and their files died with it.
    #[test]
    fn a_change_just_before_the_look_is_not_certain() {
        let at = |nanos| SystemTime::UNIX_EPOCH + Duration::new(100, nanos);
        assert_eq!(changed_for_certain(100, 5, at(500_000_000)), Some((100, 5)));
        assert_eq!(changed_for_certain(100, 490_000_000, at(500_000_000)), None, "in the same tick");
        assert_eq!(changed_for_certain(100, 5, SystemTime::UNIX_EPOCH), None, "the clock was set back");
        assert_eq!(changed_for_certain(-1, 5, at(0)), None);
    }

    #[test]
    fn who_kept_files_with_an_earlier_batond_is_absent_until_it_is_back_or_given_up() -> Result<()> {
        let path = std::env::temp_dir().join(format!("baton-keepers-{}.json", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let ledger = Arc::new(Ledger::open(&path)?);
        ledger.change(|pages| {
            (pages.keepers, pages.files) = (["gone".to_owned(), "memo".to_owned()].into(), vec![(1 << 21, PAGE)]);
        })?;
        let files = Store::of_ledger(Arc::new(Ledger::open(&path)?));
        let states = || files.status().into_iter().map(|row| (row.name, row.state)).collect::<Vec<_>>();
        let row = |name: &str| (name.to_owned(), ServiceState::Absent);
        assert_eq!(states(), [row("gone"), row("memo")]);
        assert_eq!(files.ranges().to_string(), "0x200000-0x200fff", "not to be given to anybody while it may be open");
        assert!(files.give_up(None, "gone")? && !files.give_up(None, "gone")?);
        files.lock().bereft.remove("memo");
        files.lock().note()?;
        assert_eq!(states(), []);
        let written = Ledger::open(&path)?.pages();
        assert!(written.keepers.is_empty() && written.files == [(1 << 21, PAGE)]);
        Ok(std::fs::remove_file(path)?)
    }
}
