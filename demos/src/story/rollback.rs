//! A successor that serves, and is taken back in its probation, for one reason after the other: what a client sees of that.
//!
//! ```text
//! boot ─► { clients start ─ calm ─► update ─► watch ─► what goes wrong ─► incumbent serves ─ calm ─ clients stop ─► read back } per kind
//! ```
//! What goes wrong in a successor is done there, by a program that its initrd brings ([`traps`]): the machine is no other than a user's.

use std::fmt::Write;
use std::time::{Duration, Instant};

use agent::daemon::outcome::{Class, Failure};
use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::clients::{self, Clients};
use super::report::SCHEMA_VERSION;
use super::stage::{Shape, Stage};
use super::traps;
use super::upgrade::kernels;
use crate::lab::{Lab, accel};

/// How long the service may take to answer with nothing in its way.
const FIRST_ANSWERS: Duration = Duration::from_secs(60);
/// How long a whole update, and its way back, may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longer than any of these updates is watched.
const PROBATION: &str = "10m";

/// Why a successor is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `baton rollback`.
    Operator,
    /// Its service ends (SIGKILL), and the one that is started for it does not serve.
    Health,
    /// Its kernel panics.
    Panic,
    /// Its agent does not answer any more (SIGSTOP).
    Agent,
}

impl Kind {
    /// What happens in the successor when it is watched; nothing where it is the incumbent's operator who acts.
    fn trap(self) -> Option<&'static str> {
        match self {
            Kind::Operator => None,
            Kind::Health => Some("kill -KILL $(pidof baton-kv)"),
            Kind::Panic => Some("echo c > /proc/sysrq-trigger"),
            Kind::Agent => Some("kill -STOP $(pidof batond)"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Operator => "operator",
            Kind::Health => "health",
            Kind::Panic => "panic",
            Kind::Agent => "agent",
        }
    }
}

/// A shell's line that says `baton VERB` in the incumbent until batond heeds it.
#[must_use]
pub fn operator(verb: &str) -> String {
    format!("(until baton {verb}; do sleep 0.3; done) < /dev/null > /dev/null 2>&1 &")
}

/// What to tell.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which kinds, one update each.
    pub kinds: Vec<Kind>,
    /// The machine.
    pub shape: Shape,
    /// UDP probes a second.
    pub probe_hz: u32,
}

/// What `cargo demo rollback --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollbacks {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// What ran the machine.
    pub accelerator: crate::lab::Accelerator,
    /// In the order of the kinds.
    pub runs: Vec<Run>,
    /// What went wrong with the story itself, or is not as it must be.
    pub objections: Vec<String>,
    /// Folder with the machine's logs.
    pub logs: String,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Why it was taken back.
    pub kind: Kind,
    /// CPUs that had moved by then.
    pub after_cpus: u32,
    /// As `baton upgrade` calls it: `rolled_back`, or something that must not be.
    pub outcome: Class,
    /// The longest silence that the prober saw, of the way there and the way back.
    pub gap_ms: f64,
    /// What became of the writes.
    pub writes: Writes,
    /// What `baton upgrade` gives as the cause.
    pub cause: String,
}

/// Writes of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writes {
    /// That were acknowledged.
    pub acknowledged: u64,
    /// Of these, not there afterwards.
    pub lost: u64,
}

/// Tells it: an error means that there was no machine.
pub fn run(lab: &Lab, options: &Options) -> Result<Rollbacks> {
    let [old, new] = kernels(lab)?;
    let accelerator = accel::choose(lab.tree(), lab.progress())?;
    let task = lab.progress().task("machine");
    task.step(&format!("booting {}", old.release));
    let stage = Stage::open(lab, &old, &options.shape)?;
    let logs = stage.machine.folder().display().to_string();
    task.done(&format!("{} serves; logs: {logs}", old.release));
    let mut told =
        Rollbacks { schema_version: SCHEMA_VERSION, accelerator, runs: Vec::new(), objections: Vec::new(), logs };
    for &kind in &options.kinds {
        let task = lab.progress().task(kind.name());
        match one(&stage, kind, &new.release, options) {
            Ok(run) => {
                task.done(&format!("{:?}, silent for {:.0} ms: {}", run.outcome, run.gap_ms, run.cause));
                told.objections.extend(objection(&run));
                told.runs.push(run);
            }
            Err(why) => {
                told.objections.push(format!("{}: {why:#}", kind.name()));
                break; // the machine is not as it was
            }
        }
    }
    Ok(told)
}

fn one(stage: &Stage, kind: Kind, release: &str, options: &Options) -> Result<Run> {
    let guest = stage.guest();
    // All but the incumbent's last follow the first one before the watch begins.
    let successors = u32::from(options.shape.vcpus) - 1;
    let image = format!("/boot/vmlinuz-{release}");
    // A kernel that panics must wait to be stopped.
    let mut line = format!("console=ttyS{},115200 printk.devkmsg=on panic=0", 1 - stage.serving);
    let mut words = vec!["baton", "upgrade", "--json", "--kernel", &image, "--probation", PROBATION];
    match kind.trap() {
        Some(then) => {
            guest.put("/tmp/trap", 0o644, &traps::once_it_has(successors, then)?)?;
            words.extend(["--initrd", "/tmp/trap"]);
            line.push_str(" rdinit=/trap");
        }
        None => drop(guest.check(&["sh", "-c", &operator("rollback")])?),
    }
    words.extend(["--cmdline", &line]);
    let clients = Clients::start(stage.machine.door(), options.probe_hz)?;
    clients.calm(FIRST_ANSWERS)?;
    let began = Instant::now();
    let ran = guest.command(&words).timeout(PATIENCE).run()?;
    clients.calm(FIRST_ANSWERS).context("after the way back")?;
    let seen = clients.stop(began, stage.machine.folder())?;
    let read = clients::read_back(stage.machine.door(), seen.halted)?;
    let failure: Failure = serde_json::from_slice(&ran.stdout)
        .with_context(|| format!("baton said {:?} {:?}", ran.text(), String::from_utf8_lossy(&ran.stderr)))?;
    Ok(Run {
        kind,
        after_cpus: successors - 1,
        outcome: failure.class,
        gap_ms: seen.probe.silence.context("the prober sent nothing")?.blackout_ms,
        writes: Writes { acknowledged: read.acknowledged, lost: read.lost },
        cause: failure.cause,
    })
}

/// What must not be.
fn objection(run: &Run) -> Option<String> {
    let Run { kind, outcome, writes, cause, .. } = run;
    let kind = kind.name();
    if *outcome != Class::RolledBack {
        return Some(format!("{kind}: it ended as {outcome:?}: {cause}"));
    }
    (writes.lost > 0)
        .then(|| format!("{kind}: of {} acknowledged writes {} are lost", writes.acknowledged, writes.lost))
}

/// The same for people.
#[must_use]
pub fn for_people(told: &Rollbacks) -> String {
    let mut text = format!("taken back in the probation ({:?}):\n", told.accelerator);
    for Run { kind, after_cpus, gap_ms, writes, cause, .. } in &told.runs {
        let _ = writeln!(
            text,
            "  {:<9} after {after_cpus} CPUs: silent for {gap_ms:>7.1} ms, {} of {} acknowledged writes lost; {cause}",
            kind.name(),
            writes.lost,
            writes.acknowledged
        );
    }
    for objection in &told.objections {
        let _ = writeln!(text, "  NOT AS IT MUST BE: {objection}");
    }
    let _ = writeln!(text, "logs: {}", told.logs);
    text
}
