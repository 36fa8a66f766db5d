//! What the whole-machine tests share. The tests themselves are in `cases/`, one promise a file, named by it.
//!
//! Rules: one machine at a time ([`Turn`]), as many assertions on it as it can bear (a boot costs seconds, an update more);
//! patience follows what the guest says, not the clock; a test that cannot be made says so with [`skip`], which `.ci/run`
//! collects, and never passes in silence. They need root, and fail with one line where they have none.

pub mod agents;
pub mod clients;
pub mod console;
pub mod findings;
pub mod images;
pub mod installed;
pub mod memo;
pub mod refusal;
pub mod selftest;
pub mod share;
pub mod snapshot;
pub mod strangers;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use agent::daemon::control::Status;
use anyhow::{Context, Result, bail, ensure};
use demos::lab::cache::{self, Lock};
use demos::lab::server::Server;
use demos::lab::{Kernel, Lab, Progress};
use demos::story::stage::{Shape, Stage, Upgraded};

/// The series of the lab's two kernels.
pub const OLD: &str = "6.12";
/// See [`OLD`].
pub const NEW: &str = "7.";

static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// The lab, set up once per process. What keeps it from that (no root, no network) is one line.
pub fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        Lab::set_up(Progress::auto()).unwrap_or_else(|why| panic!("whole-machine tests cannot run: {why}"))
    })
}

/// One of the lab's kernels, by series.
pub fn kernel(series: &str) -> &'static Kernel {
    lab().tree().kernel(series).unwrap_or_else(|why| panic!("{why}"))
}

/// The turn to run a machine: emulated CPUs need the host's, and two machines at a time only run into each other's deadlines.
/// Held across processes.
#[derive(Debug)]
pub struct Turn {
    _lock: Lock,
}

impl Turn {
    /// Waits for it. What machines need is built before, so that nobody waits for a compiler.
    pub fn take() -> Turn {
        lab();
        let folder = cache::root().unwrap_or_else(|why| panic!("{why}"));
        let task = Progress::auto().task("turn to run a machine");
        let lock = Lock::exclusive(&folder.join("machine.lock"), &task).unwrap_or_else(|why| panic!("{why}"));
        Turn { _lock: lock }
    }
}

/// A machine with its turn. The machine goes first.
pub struct Played {
    /// The machine.
    pub stage: Stage,
    _turn: Turn,
}

/// Opens a stage when it is its turn.
pub fn open(series: &str, shape: &Shape) -> Result<Played> {
    open_with(series, shape, &[])
}

/// The same, with more words for QEMU.
pub fn open_with(series: &str, shape: &Shape, more: &[&str]) -> Result<Played> {
    let lab = lab();
    let mut spec = Stage::spec(lab, kernel(series), shape)?;
    spec.extra.extend(more.iter().map(|&word| word.to_owned()));
    let turn = Turn::take();
    let opening = || format!("a machine with {series}, {} CPUs, {} MiB", shape.vcpus, shape.memory_mib);
    let stage = Stage::start(lab, &spec, shape).with_context(opening)?;
    eprintln!("machine's logs: {}", stage.machine.folder().display());
    stage.await_serving().with_context(opening)?;
    Ok(Played { stage, _turn: turn })
}

/// Opens a Debian server ([`demos::lab::server`]) when it is the test's turn, and waits until everything on it has started.
pub fn open_server(series: &str, shape: &Shape, server: &Server) -> Result<Played> {
    let lab = lab();
    let spec = Stage::server_spec(lab, kernel(series), shape, server)?;
    let turn = Turn::take();
    let opening = || format!("a server with {series}, {} CPUs, {} MiB", shape.vcpus, shape.memory_mib);
    let stage = Stage::start(lab, &spec, shape).with_context(opening)?;
    eprintln!("machine's logs: {}", stage.machine.folder().display());
    stage.await_serving().with_context(opening)?;
    stage.await_started().with_context(opening)?;
    Ok(Played { stage, _turn: turn })
}

/// An update that must work, to the lab's kernel of a series: how things stand after it, with nothing left undone.
pub fn upgrade(stage: &mut Stage, series: &str, more: &[&str]) -> Result<Status> {
    let release = &kernel(series).release;
    match stage.upgrade(release, more)? {
        Upgraded::Drained(status) => {
            let left = &status.update.as_ref().context("it was an update")?.left_undone;
            ensure!(left.is_empty(), "left undone on the way to {release}: {left:?}");
            Ok(*status)
        }
        Upgraded::Refused(ran) => bail!("to {release}: {} {}", ran.text(), String::from_utf8_lossy(&ran.stderr)),
    }
}

/// Says that something is not tested, and why. Counted; `.ci/run` lists these lines.
pub fn skip(reason: &str) {
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    // A line of its own, whatever the test harness has written before.
    println!("\nSKIPPED {count}: {reason}");
}
