//! `baton-memo`: a program for the tests of kept memory. It knows systemd's fd store and nothing of Baton; or, on wish, the
//! service's library.
//!
//! It keeps one memfd of pages. Each page has two halves that are written in turn, so that a program that is stopped in the
//! middle of a write has lost nothing: each says how often the page was written, and every word of it follows from that and
//! from its place. The program finds the file by its name when it starts, looks at every word, says what it found and where
//! it lies ([`Found`], in a file that a test reads), and goes on writing.

use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_sdk::client::{Client, Order};
use baton_sdk::files::Keeper;
use baton_sdk::protocol::{DEFAULT_SOCKET, Hello};
use kexec_core::device::{Access, Mapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};
use state_schemas::shared::SharedMemory;

/// The file's name, wherever one is needed.
const NAME: &str = "memo";
const PAGE: u64 = 4096;
const HALF: u64 = PAGE / 2;
/// How long it rests after each page.
const REST: Duration = Duration::from_millis(1);
/// How often it says how it is.
const REPORT: Duration = Duration::from_millis(200);

/// How it is to be run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it says what it found.
    pub report: PathBuf,
    /// How many pages it keeps.
    pub pages: u64,
    /// By the service's library, under this name, instead of the fd store.
    pub sdk: Option<String>,
    /// When there is a file of this name, it goes, and one more memfd is given to the fd store: for a test that knows a moment at
    /// which that is too late.
    pub late: PathBuf,
}

/// What it found, and how it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Which process says this.
    pub pid: u32,
    /// There was a file already.
    pub found: bool,
    /// Pages of which neither half was right when it started.
    pub bad: u64,
    /// Halves that were not right when it started: one at most, which it was just writing.
    pub torn: u64,
    /// How many writes it found.
    pub writes_found: u64,
    /// How many there are now.
    pub writes: u64,
    /// Where its pages lie: frames as the kernel's page tables say, a run as `first+count`.
    pub physical: Vec<String>,
    /// The file's seals.
    pub seals: i32,
}

fn word(page: u64, count: u64, index: u64) -> u64 {
    (page << 40 ^ count << 12 ^ index).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ count
}

/// How often the half was written, if it is right; 0 for one that never was.
fn count_of(memory: &Mapping, page: u64, half: u64) -> Option<u64> {
    let at = page * PAGE + half * HALF;
    let count = memory.load(at);
    let right = |index| memory.load(at + 8 * index) == if count == 0 { 0 } else { word(page, count, index) };
    (1..HALF / 8).all(right).then_some(count)
}

fn write(memory: &Mapping, page: u64, count: u64) {
    let at = page * PAGE + count % 2 * HALF;
    memory.store(at, count);
    (1..HALF / 8).for_each(|index| memory.store(at + 8 * index, word(page, count, index)));
}

struct Memo {
    memory: Mapping,
    counts: Vec<u64>,
    next: usize,
    found: Found,
    reported: Option<Instant>,
    report: PathBuf,
    file: File,
}

impl Memo {
    fn attach(options: &Options, file: File, found: bool) -> Result<Memo> {
        let memory = Mapping::new(&file, options.pages * PAGE, Access::ReadWrite)?;
        let (mut bad, mut torn, mut counts) = (0, 0, Vec::new());
        for page in 0..options.pages {
            let halves = [count_of(&memory, page, 0), count_of(&memory, page, 1)];
            torn += halves.iter().filter(|half| half.is_none()).count() as u64;
            bad += u64::from(halves == [None, None]);
            counts.push(halves.into_iter().flatten().max().unwrap_or(0));
        }
        let writes = counts.iter().sum();
        let found = Found {
            pid: std::process::id(),
            found,
            bad,
            torn,
            writes_found: writes,
            writes,
            physical: Vec::new(),
            seals: 0,
        };
        Ok(Memo { memory, counts, next: 0, found, reported: None, report: options.report.clone(), file })
    }

    /// Writes one page, and says now and then how it goes.
    fn step(&mut self) -> Result<()> {
        let page = self.next;
        self.counts[page] += 1;
        write(&self.memory, page as u64, self.counts[page]);
        self.found.writes += 1;
        self.next = (page + 1) % self.counts.len();
        if self.reported.is_none_or(|at| at.elapsed() > REPORT) {
            self.reported = Some(Instant::now());
            self.found.physical = physical(self.counts.len() as u64)?;
            self.found.seals = nix::fcntl::fcntl(&self.file, nix::fcntl::FcntlArg::F_GET_SEALS)?;
            let aside = self.report.with_extension("new");
            fs::write(&aside, serde_json::to_vec(&self.found)?)?;
            fs::rename(aside, &self.report)?;
        }
        std::thread::sleep(REST);
        Ok(())
    }
}

/// Frames of the mapping of our file, in runs (Documentation/admin-guide/mm/pagemap.rst).
fn physical(pages: u64) -> Result<Vec<String>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.contains(&format!("/memfd:{NAME}"))).context("the file is not mapped")?;
    let start = u64::from_str_radix(line.split('-').next().unwrap_or_default(), 16)?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in 0..pages {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, (start / PAGE + page) * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        match runs.last_mut() {
            Some((first, count)) if *first + *count == frame => *count += 1,
            _ => runs.push((frame, 1)),
        }
    }
    Ok(runs.iter().map(|(first, count)| format!("{first:#x}+{count}")).collect())
}

fn new_file(pages: u64) -> Result<File> {
    let file = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(pages * PAGE)?;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_SHRINK))?;
    Ok(file)
}

/// Runs until the process is killed; with the service's library, until it is told to leave.
pub fn run(options: &Options) -> Result<()> {
    match &options.sdk {
        None => by_fd_store(options),
        Some(name) => by_library(options, name),
    }
}

fn by_fd_store(options: &Options) -> Result<()> {
    let kept = sd_notify::listen_fds_with_names()?.find(|(_, name)| name == NAME);
    let (file, found) = match kept {
        Some((fd, _)) => (File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}"))?, true),
        None => {
            let file = new_file(options.pages)?;
            store(NAME, &file)?;
            (file, false)
        }
    };
    let mut memo = Memo::attach(options, file, found)?;
    loop {
        memo.step()?;
        if fs::remove_file(&options.late).is_ok() {
            store("late", &new_file(1)?)?;
        }
    }
}

/// As any program does it that uses sd_pid_notify_with_fds(3).
fn store(name: &str, file: &File) -> Result<()> {
    let to = std::env::var_os("NOTIFY_SOCKET").context("NOTIFY_SOCKET is not set: who keeps the file?")?;
    let socket = UnixDatagram::unbound()?;
    socket.connect(Path::new(&to))?;
    let text = format!("FDSTORE=1\nFDNAME={name}\n");
    let (fds, iov) = ([file.as_raw_fd()], [IoSlice::new(text.as_bytes())]);
    sendmsg::<()>(socket.as_raw_fd(), &iov, &[ControlMessage::ScmRights(&fds)], MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn by_library(options: &Options, name: &str) -> Result<()> {
    let keeper = Keeper::new(name);
    let kept = keeper.files()?.into_iter().find(|file| file.name == NAME);
    let hello = Hello::new(name, u32::from_le_bytes(*b"memo"), 1, PAGE);
    let (mut client, _arena) = Client::connect(DEFAULT_SOCKET.as_ref(), hello)?;
    client.ready()?;
    let found = kept.is_some();
    let file = match kept {
        Some(kept) => File::from(kept.file),
        None => {
            let file = new_file(options.pages)?;
            keeper.keep(NAME, &file)?;
            file
        }
    };
    while let Some(order) = client.wait(None)? {
        let Order::Serve(held) = order else {
            if matches!(order, Order::Stop) {
                break;
            }
            continue;
        };
        // Only now: until here the memory was another's.
        let mut memo = Memo::attach(options, file.try_clone()?, found || held.resumed)?;
        client.activated(&held, memo.found.writes, 0)?;
        loop {
            match client.poll_order()? {
                Some(Order::Freeze { .. }) => break,
                Some(Order::AgentIsBack) => keeper.keep(NAME, &file)?,
                Some(other) => bail!("{other:?} while it serves"),
                None => memo.step()?,
            }
        }
        client.frozen(held, memo.found.writes, 0)?;
    }
    Ok(())
}

/// Asks for what must be refused, and prints each answer: what nobody may keep, and one more than there may be.
pub fn ask_for_the_impossible() -> Result<()> {
    let keeper = Keeper::new("impossible");
    let refused = |what: &str, result: Result<(), baton_sdk::Error>| match result {
        Ok(()) => println!("{what}: kept"),
        Err(error) => println!("{what}: {error}"),
    };
    let memfd = |flags: MFdFlags, len: u64| -> Result<File> {
        let file = File::from(memfd_create("impossible", MFdFlags::MFD_CLOEXEC | flags)?);
        file.set_len(len)?;
        Ok(file)
    };
    let (pipe, _) = io::pipe()?;
    refused("pipe", keeper.keep("pipe", pipe.as_fd()));
    refused("file", keeper.keep("file", File::open("/etc/passwd")?));
    refused("device", keeper.keep("device", File::open("/dev/null")?));
    refused("empty", keeper.keep("empty", memfd(MFdFlags::empty(), 0)?));
    refused("huge pages", keeper.keep("huge", memfd(MFdFlags::MFD_HUGETLB, 2 << 20)?));
    refused("too large", keeper.keep("large", memfd(MFdFlags::empty(), (1 << 40) + 1)?));
    refused("more than there is", keeper.keep("large", memfd(MFdFlags::empty(), 1 << 39)?));
    refused("long name", keeper.keep(&"x".repeat(256), memfd(MFdFlags::empty(), PAGE)?));
    refused("bad name", keeper.keep("a:b", memfd(MFdFlags::empty(), PAGE)?));
    let one = memfd(MFdFlags::empty(), PAGE)?;
    refused("once", keeper.keep("once", &one));
    refused("twice", keeper.keep("once", &one));
    refused("another name", keeper.keep("twice", &one));
    refused("another's", Keeper::new("thief").keep("once", &one));
    println!("kept: {}", keeper.files()?.len());
    let mut kept = 1;
    let last = loop {
        match keeper.keep("many", memfd(MFdFlags::empty(), PAGE)?) {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
    };
    println!("too many: {kept} of ours, then {last}");
    keeper.forget("many")?;
    keeper.forget("once")?;
    println!("left: {}", keeper.files()?.len());
    Ok(())
}
