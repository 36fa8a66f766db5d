//! The main story: a machine under load changes its kernel while it runs, there and, if wished, back.
//!
//! ```text
//! boot ─► { clients start ─ calm ─► update ─► calm ─ clients stop } per hop ─► read every acknowledged write back
//! ```

use std::time::{Duration, Instant};

use agent::daemon::control::Status;
use agent::daemon::outcome::{Class, Failure};
use agent::update::timeline::Zero;
use anyhow::{Context, Result};
use handover::update::phase::Phase;

use super::clients::{self, CALM, Clients, Seen};
use super::report::{
    BeforeAfter, Connections, Cpus, Hop, MachineShape, Outcome, Probes, Report, UnfinishedUpdate, Writes,
};
use super::report::{phase_at, phases};
use super::stage::{Shape, Stage, Upgraded};
use crate::lab::guest::{Clock, Guest, Ran};
use crate::lab::progress::Task;
use crate::lab::{Door, Kernel, Lab, accel};
use crate::load::Halted;

/// How long the service may take to answer the first probe and the first write, with nothing in its way.
const FIRST_ANSWERS: Duration = Duration::from_secs(60);

/// A probe sent so shortly before the cutover may arrive in it.
const IN_FLIGHT: Duration = Duration::from_millis(10);

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

/// Tells it. An update that does not succeed is in the report, and so is a machine whose service never answers; an error means that there
/// was no machine.
pub fn run(lab: &Lab, options: &Options) -> Result<Report> {
    run_prepared(lab, options, &mut |_, _| Ok(()))
}

/// The same, with something to be done in the machine before the first update; it is told of on the task.
pub fn run_prepared(
    lab: &Lab,
    options: &Options,
    prepare: &mut dyn FnMut(&Stage, &Task) -> Result<()>,
) -> Result<Report> {
    let kernels = kernels(lab)?;
    let accelerator = accel::choose(lab.tree(), lab.progress())?;
    let task = lab.progress().task("machine");
    task.step(&format!("booting {}", kernels[0].release));
    let mut stage = Stage::start(lab, &Stage::spec(lab, &kernels[0], &options.shape)?, &options.shape)?;
    let mut report = Report {
        accelerator: Some(accelerator),
        logs: Some(stage.machine.folder().display().to_string()),
        ..Report::without_updates(options.machine(), String::new())
    };
    if let Err(why) = stage.await_serving() {
        report.failure = Some(format!("{why:#}"));
        return Ok(report);
    }
    prepare(&stage, &task)?;
    task.done(&format!("{} serves; logs: {}", kernels[0].release, stage.machine.folder().display()));

    let mut updated = Vec::new();
    let mut unfinished = None;
    for n in 0..options.hops {
        let task = lab.progress().task(&format!("update {} of {}", n + 1, options.hops));
        match hop(&mut stage, &kernels[(n + 1) % 2], options.probe_hz, &task) {
            Ok(one) => {
                task.done(&format!("{}, silent for {:.1} ms", one.hop.successor_release, one.hop.blackout_ms));
                updated.push(one);
            }
            Err(why) => {
                unfinished = Some(why);
                break;
            }
        }
    }
    judge(&mut report, stage.machine.door(), updated, unfinished, &lab.progress().task("writes"));
    Ok(report)
}

/// An update that was carried through, its writes not yet read back.
struct Updated {
    hop: Hop,
    halted: Halted,
}

/// An update that was not.
struct Unfinished {
    why: Why,
    /// What its clients saw, if there were any.
    seen: Option<Box<Seen>>,
    /// Where it was to lead.
    to: String,
}

/// Why an update was not carried through.
enum Why {
    /// `baton upgrade` said no, or gave everything back.
    Refused(Failure),
    /// Anything else.
    Broke(anyhow::Error),
}

/// One update under the eyes of its clients.
fn hop(stage: &mut Stage, to: &Kernel, probe_hz: u32, task: &Task) -> Result<Updated, Unfinished> {
    let unfinished = |why, seen| Unfinished { why, seen, to: to.release.clone() };
    task.step("clients start");
    let onlookers = || {
        let before = Look::at(&stage.guest())?;
        let clients = Clients::start(stage.machine.door(), probe_hz)?;
        clients.calm(FIRST_ANSWERS)?;
        Ok((before, clients))
    };
    let (before, clients) = onlookers().map_err(|why| unfinished(Why::Broke(why), None))?;

    let image = format!("/boot/vmlinuz-{}", to.release);
    let (began, mut shown) = (Instant::now(), String::new());
    let upgraded = stage.upgrade_telling(&["--kernel", &image], &[], &mut |line| show(task, &mut shown, line));
    task.step("clients go on for a while");
    std::thread::sleep(CALM);
    // Whatever came of it: they know which writes must be there now.
    let seen = clients.stop(began, stage.machine.folder()).map_err(|why| unfinished(Why::Broke(why), None))?;
    let told = match upgraded {
        Ok(Upgraded::Drained(status)) => {
            Look::at(&stage.guest()).and_then(|after| account(*status, &before, &after, &seen)).map_err(Why::Broke)
        }
        Ok(Upgraded::Refused(ran)) => Err(Why::Refused(refusal(&ran))),
        Err(why) => Err(Why::Broke(why)),
    };
    match told {
        Ok(hop) => Ok(Updated { hop, halted: seen.halted }),
        Err(why) => Err(unfinished(why, Some(Box::new(seen)))),
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
fn account(status: Status, before: &Look, after: &Look, seen: &Seen) -> Result<Hop> {
    let update = status.update.context("the successor's status knows of no update")?;
    let silence = seen.probe.silence.context("the prober sent nothing during the update")?;
    let zero = update.zero.context("the successor's status does not say when the update began")?;
    // What the prober's zero is on the timeline.
    let prober_at = on_timeline(zero, after.clock, seen.started);
    let phases = phases(&update.timeline);
    let cutover = phases.iter().find(|phase| phase.name == Phase::Cutover.name()).context("there was no cutover")?;
    let cutover_ms = cutover.at_ms - prober_at - IN_FLIGHT.as_secs_f64() * 1e3;
    let before_cutover = seen.samples.report(seen.from..(cutover_ms * 1e6) as u64);
    Ok(Hop {
        incumbent_release: update.incumbent_release,
        successor_release: update.successor_release,
        blackout_ms: silence.blackout_ms,
        silence,
        silence_began_in: phase_at(&phases, silence.began_at_ms + prober_at).map(str::to_owned),
        clocks_within_ms: after.clock.within.as_secs_f64() * 1e3,
        before_cutover: Probes { due: before_cutover.due, lost: before_cutover.lost },
        latencies: seen.probe.latencies,
        epoch_regressions: seen.probe.epoch_regressions,
        phases,
        cpus: Cpus { total: update.cpus_total, moved: update.cpus_moved, online: after.cpus_online },
        mem_total_kib: BeforeAfter { before: before.mem_total_kib, after: after.mem_total_kib },
        writes: Writes::default(),
        connections: Connections::default(),
        left_undone: update.left_undone,
    })
}

/// A moment of our clock, in milliseconds of the timeline.
fn on_timeline(zero: Zero, clock: Clock, moment: Instant) -> f64 {
    let clock_at_ms = (i128::from(clock.tsc) - i128::from(zero.tsc)) as f64 / zero.khz.max(1) as f64;
    let before = clock.at.saturating_duration_since(moment).as_secs_f64();
    let after = moment.saturating_duration_since(clock.at).as_secs_f64();
    clock_at_ms + (after - before) * 1e3
}

/// Reads all writes back, the first update's too, and says how it all ended.
fn judge(report: &mut Report, door: &Door, updated: Vec<Updated>, unfinished: Option<Unfinished>, task: &Task) {
    task.step("reading every acknowledged write back");
    report.outcome = Outcome::Committed;
    let mut objections = Vec::new();
    let mut reader = Reader { door, gone: false };
    for Updated { mut hop, halted } in updated {
        let objection;
        (hop.writes, hop.connections, objection) = reader.read_back(halted);
        objections.extend(objection);
        report.hops.push(hop);
    }
    objections.extend(Report::objection(&report.hops));
    let mut reason = None;
    if let Some(Unfinished { why, seen, to }) = unfinished {
        let class = match &why {
            Why::Refused(failure) => Some(failure.class),
            Why::Broke(_) => None,
        };
        if let Some(seen) = seen {
            let Seen { probe, halted, .. } = *seen;
            let (writes, connections, objection) = reader.read_back(halted);
            objections.extend(objection);
            if writes.lost > 0 || writes.contradictions > 0 {
                objections.push(format!(
                    "of {} writes acknowledged around the update that failed {} are lost; {} contradictions",
                    writes.acknowledged, writes.lost, writes.contradictions
                ));
            }
            let silence = probe.silence;
            report.unfinished = Some(UnfinishedUpdate { successor_release: to, class, silence, writes, connections });
        }
        match why {
            Why::Broke(why) => objections.push(format!("{why:#}")),
            Why::Refused(why) => {
                let gave_back =
                    matches!(why.class, Class::RolledBack | Class::Precondition | Class::Busy | Class::Usage);
                report.outcome = if gave_back { Outcome::RolledBack } else { Outcome::Failed };
                reason = Some([why.cause, why.advice].join("; ").trim_end_matches("; ").to_owned());
            }
        }
    }
    if !objections.is_empty() {
        report.outcome = Outcome::Failed;
    }
    objections.extend(reason);
    report.failure = (!objections.is_empty()).then(|| objections.join("; "));
}

/// Reads loads back from one machine.
struct Reader<'d> {
    door: &'d Door,
    /// The service could not be read: it is not tried again for each load.
    gone: bool,
}

impl Reader<'_> {
    fn read_back(&mut self, halted: Halted) -> (Writes, Connections, Option<String>) {
        let (acknowledged, of) = (halted.acknowledged(), halted.connections());
        let connections = Connections { kept: of.kept, reset: of.reset, timed_out: of.timed_out };
        if self.gone {
            return (Writes::unread(acknowledged), connections, None);
        }
        match clients::read_back(self.door, halted) {
            Ok(load) => (Writes::of(&load), connections, None),
            Err(why) => {
                self.gone = true;
                (Writes::unread(acknowledged), connections, Some(format!("{why:#}")))
            }
        }
    }
}

/// What a kernel has.
struct Look {
    mem_total_kib: u64,
    cpus_online: u32,
    clock: Clock,
}

impl Look {
    fn at(guest: &Guest) -> Result<Self> {
        let text = guest.check(&["cat", "/proc/meminfo", "/sys/devices/system/cpu/online"])?;
        let mem = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
        let online = text.lines().last().and_then(count);
        Ok(Self {
            mem_total_kib: mem.context("/proc/meminfo has no MemTotal")?,
            clock: guest.clock()?,
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
    fn a_moment_is_found_on_the_timeline() {
        let zero = Zero { tsc: 1_000_000, khz: 1_000 };
        let clock = Clock { tsc: 6_000_000, at: Instant::now(), within: Duration::ZERO };
        let at = |moment| on_timeline(zero, clock, moment);
        assert_eq!(at(clock.at), 5000.0);
        assert_eq!(at(clock.at - Duration::from_millis(1500)), 3500.0);
        assert_eq!(at(clock.at + Duration::from_millis(250)), 5250.0);
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!((count("0-3\n"), count("0"), count("0-2,5,7-8")), (Some(4), Some(1), Some(6)));
        assert_eq!((count(""), count("3-1"), count("x")), (None, None, None));
    }
}
