//! The main story: a machine under load changes its kernel while it runs, there and, if wished, back.
//!
//! ```text
//! boot ─► { clients start ─ calm ─► update ─► calm ─ clients stop } per hop ─► read every acknowledged write back
//! ```

use std::time::{Duration, Instant};

use agent::control::Status;
use agent::outcome::{Class, Failure};
use anyhow::{Context, Result};

use super::clients::{self, CALM, Clients, Seen};
use super::report::{BeforeAfter, Connections, Cpus, Hop, MachineShape, Outcome, Report, SCHEMA_VERSION, Writes};
use super::report::{phase_at, phases};
use super::stage::{News, Shape, Stage, Upgraded};
use crate::lab::guest::{Guest, Ran};
use crate::lab::progress::Task;
use crate::lab::{Accelerator, Door, Kernel, Lab, accel};
use crate::load::Halted;

/// How long the service may take to answer the first probe and the first write, with nothing in its way.
const FIRST_ANSWERS: Duration = Duration::from_secs(60);

/// What to tell.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many updates: from 6.12 to 7.x, back, and so on.
    pub hops: usize,
    /// The machine.
    pub shape: Shape,
    /// UDP probes a second.
    pub probe_hz: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options { hops: 1, shape: Shape::default(), probe_hz: 1000 }
    }
}

impl Options {
    /// As reports have it.
    #[must_use]
    pub fn machine(&self) -> MachineShape {
        MachineShape { vcpus: self.shape.vcpus, memory_mib: self.shape.memory_mib, probe_hz: self.probe_hz }
    }
}

/// The kernels by turns: trixie's, the one from backports.
pub fn kernels(lab: &Lab) -> Result<[Kernel; 2]> {
    Ok([lab.tree().kernel("6.12")?.clone(), lab.tree().kernel("7.")?.clone()])
}

/// Tells it. An update that does not succeed is in the report; an error means that there was nothing to update, or nothing to look
/// at it with.
pub fn run(lab: &Lab, options: &Options) -> Result<Report> {
    let kernels = kernels(lab)?;
    let accelerator = accel::choose(lab.tree(), lab.progress())?;
    let task = lab.progress().task("machine");
    task.step(&format!("booting {}", kernels[0].release));
    let mut stage = Stage::open(lab, &kernels[0], &options.shape)?;
    task.done(&format!("{} serves; logs: {}", kernels[0].release, stage.machine.folder().display()));

    let mut updated = Vec::new();
    let mut failure = None;
    for n in 0..options.hops {
        let task = lab.progress().task(&format!("update {} of {}", n + 1, options.hops));
        match hop(&mut stage, &kernels[(n + 1) % 2], options.probe_hz, &task) {
            Ok(one) => {
                task.done(&format!("{}, silent for {:.1} ms", one.hop.successor_release, one.hop.blackout_ms));
                updated.push(one);
            }
            Err(why) => {
                failure = Some(why);
                break;
            }
        }
    }
    let logs = stage.machine.folder().display().to_string();
    Ok(judge(&stage, accelerator, options, updated, failure, logs, &lab.progress().task("writes")))
}

/// An update that was carried through, its writes not yet read back.
struct Updated {
    hop: Hop,
    halted: Halted,
}

/// Why an update was not carried through.
enum Unfinished {
    /// `baton upgrade` said no, or gave everything back.
    Refused { why: Failure, halted: Box<Halted> },
    /// Anything else.
    Broke(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Unfinished {
    fn from(why: E) -> Self {
        Self::Broke(why.into())
    }
}

/// One update under the eyes of its clients.
fn hop(stage: &mut Stage, to: &Kernel, probe_hz: u32, task: &Task) -> Result<Updated, Unfinished> {
    task.step("clients start");
    let before = Look::at(&stage.guest())?;
    let clients = Clients::start(stage.machine.door(), probe_hz)?;
    clients.calm(FIRST_ANSWERS)?;

    let image = format!("/boot/vmlinuz-{}", to.release);
    let (began, mut drained, mut shown) = (Instant::now(), None, String::new());
    let upgraded = stage.upgrade_telling(&["--kernel", &image], &[], &mut |news| match news {
        News::Said(line) => show(task, &mut shown, line),
        News::Drained => drained = Some(Instant::now()),
    })?;
    task.step("clients go on for a while");
    std::thread::sleep(CALM);
    let seen = clients.stop(began, stage.machine.folder())?;
    match (upgraded, drained) {
        (Upgraded::Drained(status), Some(drained)) => {
            let after = Look::at(&stage.guest())?;
            Ok(account(status, drained, &before, &after, seen)?)
        }
        (Upgraded::Drained(_), None) => unreachable!("the stage tells of the end before it returns it"),
        (Upgraded::Refused(ran), _) => Err(Unfinished::Refused { why: refusal(&ran), halted: Box::new(seen.halted) }),
    }
}

/// `PHASE STEP`: phases are worth a line each, steps only where they replace each other.
fn show(task: &Task, shown: &mut String, line: &str) {
    let phase = line.split_whitespace().next().unwrap_or_default();
    if phase != shown {
        phase.clone_into(shown);
        task.step(phase);
    }
    task.detail(line);
}

fn refusal(ran: &Ran) -> Failure {
    serde_json::from_slice(&ran.stdout).unwrap_or_else(|_| {
        let said = String::from_utf8_lossy(&ran.stderr);
        Failure::new(Class::Unknown, format!("{:?}: {} {}", ran.exit, ran.text().trim(), said.trim()), "")
    })
}

/// Puts together what the kernels say and what the clients saw.
fn account(status: Status, drained: Instant, before: &Look, after: &Look, seen: Seen) -> Result<Updated> {
    let update = status.update.context("the successor's status knows of no update")?;
    let silence = seen.probe.silence.context("the prober sent nothing during the update")?;
    // The last step's end and the serial port's news of it are the same moment: there the two clocks meet.
    let end_ms = update.timeline.iter().map(|span| span.at_ms + span.ms).fold(0.0, f64::max);
    let drained_ms = drained.duration_since(seen.started).as_secs_f64() * 1e3;
    let phases = phases(&update.timeline);
    let hop = Hop {
        incumbent_release: update.incumbent_release,
        successor_release: update.successor_release,
        blackout_ms: silence.blackout_ms,
        silence,
        silence_began_in: phase_at(&phases, silence.began_at_ms - drained_ms + end_ms).map(str::to_owned),
        latencies: seen.probe.latencies,
        epoch_regressions: seen.probe.epoch_regressions,
        phases,
        cpus: Cpus { total: update.cpus_total, moved: update.cpus_moved, online: after.cpus_online },
        mem_total_kib: BeforeAfter { before: before.mem_total_kib, after: after.mem_total_kib },
        writes: Writes::default(),
        connections: Connections::default(),
        left_undone: update.left_undone,
    };
    Ok(Updated { hop, halted: seen.halted })
}

/// Reads all writes back, the first update's too, and says how it all ended.
fn judge(
    stage: &Stage,
    accelerator: Accelerator,
    options: &Options,
    updated: Vec<Updated>,
    failure: Option<Unfinished>,
    logs: String,
    task: &Task,
) -> Report {
    task.step("reading every acknowledged write back");
    let door = stage.machine.door();
    let mut report = Report {
        schema_version: SCHEMA_VERSION,
        outcome: Outcome::Committed,
        accelerator: Some(accelerator),
        machine: options.machine(),
        hops: Vec::new(),
        failure: None,
        logs: Some(logs),
    };
    let mut objections = Vec::new();
    for Updated { mut hop, halted } in updated {
        objections.extend(read_back(door, halted, &mut hop.writes, &mut hop.connections).err());
        report.hops.push(hop);
    }
    objections.extend(Report::objection(&report.hops));
    match failure {
        None => {}
        Some(Unfinished::Broke(why)) => objections.push(format!("{why:#}")),
        Some(Unfinished::Refused { why, halted }) => {
            let (mut writes, mut connections) = Default::default();
            objections.extend(read_back(door, *halted, &mut writes, &mut connections).err());
            if writes.lost > 0 || writes.contradictions > 0 {
                objections.push(format!("{} writes are lost after the update failed", writes.lost));
            }
            let gave_back = matches!(why.class, Class::RolledBack | Class::Precondition | Class::Busy | Class::Usage);
            report.outcome = if gave_back { Outcome::RolledBack } else { Outcome::Failed };
            report.failure = Some([why.cause, why.advice].join("; ").trim_end_matches("; ").to_owned());
        }
    }
    if !objections.is_empty() {
        objections.extend(report.failure.take());
        report.outcome = Outcome::Failed;
        report.failure = Some(objections.join("; "));
    }
    report
}

fn read_back(
    door: &Door,
    halted: Halted,
    writes: &mut Writes,
    connections: &mut Connections,
) -> std::result::Result<(), String> {
    let load = clients::read_back(door, halted).map_err(|why| format!("{why:#}"))?;
    *writes = Writes::of(&load);
    let of = load.connections;
    *connections = Connections { kept: of.kept, reset: of.reset, timed_out: of.timed_out };
    Ok(())
}

/// What a kernel has.
struct Look {
    mem_total_kib: u64,
    cpus_online: u32,
}

impl Look {
    fn at(guest: &Guest) -> Result<Self> {
        let text = guest.check(&["cat", "/proc/meminfo", "/sys/devices/system/cpu/online"])?;
        let mem = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
        let online = text.lines().last().and_then(count);
        Ok(Self {
            mem_total_kib: mem.context("/proc/meminfo has no MemTotal")?,
            cpus_online: online.with_context(|| format!("which CPUs are online? {text:?}"))?,
        })
    }
}

/// How many are in a list such as `0-2,5`.
fn count(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0, |sum, part| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (u32, u32) = (from.parse().ok()?, to.parse().ok()?);
        Some(sum + to.checked_sub(from)? + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!((count("0-3\n"), count("0"), count("0-2,5,7-8")), (Some(4), Some(1), Some(6)));
        assert_eq!((count(""), count("3-1"), count("x")), (None, None, None));
    }
}
