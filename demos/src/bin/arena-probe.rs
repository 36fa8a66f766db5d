//! `arena-probe`: a service that finds out what its arena can do, in every kernel that it comes to, and writes it down.
//!
//! It fills the arena with words that tell where they are, so that a piece that is missing, or in the wrong place, shows in
//! the next kernel; then it does to the memory what programs do to memory: direct I/O, futexes, reading by another process's
//! means, giving pages to pipes and sockets without copying.

use std::fs::{self, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use baton_sdk::Error;
use baton_sdk::client::{Client, Order};
use baton_sdk::mapping::Arena;
use baton_sdk::protocol::{DEFAULT_SOCKET, Hello};
use baton_sdk::resize::Resizer;
use clap::Parser;
use nix::fcntl::{Flock, FlockArg, SpliceFFlags, vmsplice};
use nix::sys::socket::{MsgFlags, send, setsockopt};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::{setsockopt_impl, sockopt_impl};
use rustix::thread::futex;
use serde_json::{Map, Value, json};
use zerocopy::FromBytes;

/// What lies in the arena.
const KIND: u32 = u32::from_le_bytes(*b"prob");
const PAGE: usize = 4096;
/// Pages at the arena's end with which things are done.
const SCRATCH: usize = 64 * PAGE;
/// A disk in memory (the kernel's `brd`), on which direct I/O is what it is on any disk: the kernel pins our pages and copies
/// between them and its own.
const DISK: &str = "/dev/ram0";

sockopt_impl!(
    /// `SO_ZEROCOPY` (Documentation/networking/msg_zerocopy.rst).
    ZeroCopy, SetOnly, libc::SOL_SOCKET, libc::SO_ZEROCOPY, bool
);

/// Finds out what an arena can do, and writes it to /run/NAME.json.
#[derive(Debug, Parser)]
struct Arguments {
    /// The service's name
    #[arg(long)]
    name: String,
    /// Size of the arena, KiB
    #[arg(long)]
    arena_kib: u64,
    /// In the first kernel, make it longer by so much, KiB
    #[arg(long, default_value_t = 0)]
    grow_kib: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", arguments.name);
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<(), Error> {
    let hello = Hello::new(&arguments.name, KIND, 1, arguments.arena_kib << 10);
    let (mut agent, mut arena) = Client::connect(DEFAULT_SOCKET.as_ref(), hello)?;
    agent.ready()?;
    while let Some(order) = agent.wait(None)? {
        match order {
            Order::Serve(held) => {
                let fresh = held.fresh;
                let bad = if fresh { 0 } else { bad_pages(arena.memory(&held)) };
                agent.activated(&held, bad, 0)?;
                let mut found = Map::new();
                let mut note = |what: &str, value: Value| found.insert(what.to_owned(), value);
                note("epoch", json!(held.epoch));
                note("fresh", json!(fresh));
                note("bad_pages", json!(bad));
                if fresh && arguments.grow_kib > 0 {
                    note("grow", told(grow(arguments, &mut arena)));
                }
                note("bytes", json!(arena.len()));
                let memory = arena.memory(&held);
                note("address", json!(memory.as_ptr().addr()));
                mark(memory);
                let scratch = memory.len().saturating_sub(SCRATCH);
                for (what, result) in [
                    ("direct_io", direct_io(&mut memory[scratch..])),
                    ("private_futex", futexes(&mut memory[scratch..], futex::Flags::PRIVATE)),
                    ("shared_futex", futexes(&mut memory[scratch..], futex::Flags::empty())),
                    ("process_vm_readv", process_vm(&memory[scratch..])),
                    ("vmsplice", splice(&memory[scratch..])),
                    ("zero_copy_send", zero_copy(&memory[scratch..])),
                ] {
                    note(what, told(result));
                }
                mark(memory);
                write_down(&arguments.name, &found)?;
                while !matches!(agent.wait(None)?, Some(Order::Freeze { .. }) | None) {}
                agent.frozen(held, 0, 0)?;
            }
            Order::StandBy | Order::Freeze { .. } | Order::AgentIsBack => {}
            Order::Stop => break,
        }
    }
    Ok(())
}

/// "ok", or what was wrong.
fn told<E: std::fmt::Display>(result: Result<(), E>) -> Value {
    result.map_or_else(|error| json!(error.to_string()), |()| json!("ok"))
}

fn write_down(name: &str, found: &Map<String, Value>) -> io::Result<()> {
    let text = serde_json::to_string(found)?;
    fs::write(format!("/run/{name}.new"), text)?;
    fs::rename(format!("/run/{name}.new"), format!("/run/{name}.json"))
}

/// Every page says at its end which it is.
fn mark(memory: &mut [u8]) {
    for (n, page) in memory.chunks_exact_mut(PAGE).enumerate() {
        page[PAGE - 8..].copy_from_slice(&(!(n as u64)).to_le_bytes());
    }
}

fn bad_pages(memory: &[u8]) -> u64 {
    let bad = |(n, page): &(usize, &[u8])| page[PAGE - 8..] != (!(*n as u64)).to_le_bytes();
    memory.chunks_exact(PAGE).enumerate().filter(bad).count() as u64
}

fn grow(arguments: &Arguments, arena: &mut Arena) -> Result<(), Error> {
    arena.extend(Resizer::new(&arguments.name).grow(arguments.grow_kib << 10)?)
}

/// From the arena to a disk and back, without the page cache. The disk is one for all probes: whoever uses it has it locked,
/// as is the custom for block devices (<https://systemd.io/BLOCK_DEVICE_LOCKING/>).
fn direct_io(scratch: &mut [u8]) -> io::Result<()> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(DISK)?;
    let disk = Flock::lock(disk, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    let before = scratch.to_vec();
    disk.write_all_at(scratch, 0)?;
    scratch.fill(0xa5);
    disk.read_exact_at(scratch, 0)?;
    same(scratch, &before)
}

/// A thread that sleeps on a word of the arena, and one that wakes it.
fn futexes(scratch: &mut [u8], flags: futex::Flags) -> io::Result<()> {
    const AWAKE: u32 = 1;
    let word = AtomicU32::mut_from_bytes(&mut scratch[..4]).map_err(|_| io::Error::other("no word there"))?;
    word.store(0, Ordering::SeqCst);
    let word = &*word;
    let patience = futex::Timespec { tv_sec: 20, tv_nsec: 0 };
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(move || -> io::Result<()> {
            while word.load(Ordering::SeqCst) != AWAKE {
                match futex::wait(word, flags, 0, Some(&patience)) {
                    Ok(()) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        });
        // It may not sleep yet, or not be able to: then nobody is woken, and it looks at the word.
        let mut woken = 0;
        while woken == 0 && !sleeper.is_finished() {
            woken = futex::wake(word, flags, 1)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        word.store(AWAKE, Ordering::SeqCst);
        let _ = futex::wake(word, flags, 1);
        sleeper.join().unwrap_or_else(|_| Err(io::Error::other("the sleeper panicked")))?;
        if woken == 0 { Err(io::Error::other("nobody was woken")) } else { Ok(()) }
    })
}

/// As a debugger reads it.
fn process_vm(scratch: &[u8]) -> io::Result<()> {
    let mut copy = vec![0; scratch.len()];
    let there = RemoteIoVec { base: scratch.as_ptr().addr(), len: scratch.len() };
    process_vm_readv(nix::unistd::getpid(), &mut [IoSliceMut::new(&mut copy)], &[there])?;
    same(&copy, scratch)
}

/// Pages of the arena into a pipe, uncopied.
fn splice(scratch: &[u8]) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    let part = &scratch[..scratch.len().min(8 * PAGE)];
    let sent = vmsplice(writer.as_fd(), &[IoSlice::new(part)], SpliceFFlags::empty())?;
    let mut copy = vec![0; sent];
    reader.read_exact(&mut copy)?;
    same(&copy, &part[..sent])
}

/// Pages of the arena into a socket: the kernel pins them, and sends from them where the interface can (the loopback copies in
/// the end).
fn zero_copy(scratch: &[u8]) -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    setsockopt(&sender, ZeroCopy, &true)?;
    let part = &scratch[..scratch.len().min(8 * PAGE)];
    let sent = send(sender.as_raw_fd(), part, MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY))?;
    let mut copy = vec![0; sent];
    receiver.read_exact(&mut copy)?;
    (&sender).flush()?;
    same(&copy, &part[..sent])
}

fn same(one: &[u8], other: &[u8]) -> io::Result<()> {
    if one == other { Ok(()) } else { Err(io::Error::other("other bytes than were written")) }
}
