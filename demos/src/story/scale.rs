//! How an update's times depend on the amount of memory that crosses: one machine for each size of arena, filled to the brim, and
//! updated there and back. What the cutover does must not depend on it; what does, happens before the freeze or after the commit.

use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use agent::takeover::birth::phys;
use anyhow::{Context, Result, ensure};
use handover::kho::{Abi, Outgoing};
use handover::update::phase::Phase;
use kexec_core::boot_params::SetupData;
use kexec_core::memory_map::division::Division;
use kexec_core::memory_map::{Range, RangeSet};
use serde::{Deserialize, Serialize};

use super::report::{Hop, MachineShape, PhaseTime, SCHEMA_VERSION, Writes, medians};
use super::stage::{Stage, service};
use super::upgrade;
use crate::lab::progress::Task;
use crate::lab::{Accelerator, Lab, accel, incumbent};
use crate::load::client::{Client, Reply};
use crate::measure::Distribution;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Arenas that cross, MiB each.
    pub sizes_mib: Vec<u64>,
    /// Arenas that are only described, MiB each.
    pub described_mib: Vec<u64>,
    /// Updates for each size.
    pub runs: usize,
    /// Machine and prober; its `hops` are not looked at.
    pub machine: upgrade::Options,
}

impl Default for Options {
    fn default() -> Self {
        let mut machine = upgrade::Options::default();
        machine.shape.memory_mib = 6144;
        Options { sizes_mib: vec![16, 256, 1024], described_mib: vec![16, 1024, 16 << 10, 1 << 20], runs: 4, machine }
    }
}

/// What `cargo demo scale --json` prints, however it went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// What ran the machines.
    pub accelerator: Accelerator,
    /// The machines.
    pub machine: MachineShape,
    /// By size of the arena, in the order asked for; without those of which no update succeeded.
    pub sizes: Vec<OfSize>,
    /// Updates that gave no figure. The next one was made in a fresh machine.
    pub failures: Vec<FailedUpdate>,
    /// The median cutover with the largest arena in units of that with the smallest; nothing with fewer than two sizes.
    pub cutover_ratio: Option<f64>,
    /// What was only described, on the host itself.
    pub described: Vec<Described>,
    /// Why nothing can be said of a size, or a write that the service acknowledged and lost. A failed update alone is no reason.
    pub failure: Option<String>,
}

/// An update that gave no figure, or whose writes could not all be read back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedUpdate {
    /// The arena.
    pub arena_mib: u64,
    /// Which of those asked for, from 1.
    pub run: usize,
    /// What went wrong, with the end of the machine's logs where they say more.
    pub why: String,
    /// Folder with the machine's logs.
    pub logs: Option<String>,
}

/// Updates with one size of arena.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OfSize {
    /// The arena.
    pub arena_mib: u64,
    /// How much of it was filled before the first update.
    pub filled_mib: u64,
    /// How many updates were asked for; the figures say how many succeeded.
    pub asked: usize,
    /// Before the freeze, in the incumbent: describing what crosses and writing kernel, initrd and record into their places, ms.
    pub place_ms: Distribution,
    /// Before the freeze, in the successor: taking over the pages of what crosses, ms.
    pub take_over_ms: Distribution,
    /// The longest silence that the prober saw, ms.
    pub blackout_ms: Distribution,
    /// The whole cutover, ms.
    pub cutover_ms: Distribution,
    /// Its steps.
    pub steps: Vec<Step>,
    /// All phases, medians.
    pub phases: Vec<PhaseTime>,
    /// What became of the clients' writes.
    pub writes: Writes,
    /// Folders with the machines' logs.
    pub logs: Vec<String>,
}

/// One step of the cutover.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Which.
    pub name: String,
    /// How long it took, ms.
    pub ms: Distribution,
}

/// The description of an arena for a successor, without a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Described {
    /// The arena.
    pub arena_mib: u64,
    /// In how many separate pieces it lies.
    pub pieces: u64,
    /// Dividing the machine around it and listing its reservations, µs.
    pub divide_us: Distribution,
    /// Writing a kexec handover that preserves it, for a successor with KHO, µs.
    pub kho_us: Distribution,
}

/// A value of the store; the filling is made of such.
const VALUE: usize = 256 << 10;
/// How many requests are under way while an arena is filled.
const WINDOW: usize = 16;
/// How long one answer may take meanwhile.
const FILL_PATIENCE: Duration = Duration::from_secs(60);
/// What is left empty, so that the clients of the update have room for their writes.
const LEFT_EMPTY_MIB: u64 = 8;

/// Measures. An update that fails is recorded, and the next one gets a fresh machine; an error means that there are no machines at all.
pub fn run(lab: &Lab, options: &Options) -> Result<Scale> {
    let accelerator = accel::choose(lab.tree(), lab.progress())?;
    let described = options.described_mib.iter().map(|mib| describe(*mib)).collect::<Result<_>>()?;
    let (mut sizes, mut failures, mut objections) = (Vec::new(), Vec::new(), Vec::new());
    for arena_mib in &options.sizes_mib {
        match of_size(lab, options, *arena_mib, &mut failures)? {
            Some(size) => {
                let Writes { acknowledged, lost, contradictions, .. } = size.writes;
                if lost > 0 || contradictions > 0 {
                    objections.push(format!(
                        "{arena_mib} MiB: of {acknowledged} acknowledged writes {lost} are lost; {contradictions} contradictions"
                    ));
                }
                sizes.push(size);
            }
            None => objections.push(format!("{arena_mib} MiB: none of {} updates succeeded", options.runs)),
        }
    }
    Ok(Scale {
        schema_version: SCHEMA_VERSION,
        accelerator,
        machine: options.machine.machine(),
        cutover_ratio: cutover_ratio(&sizes),
        sizes,
        failures,
        described,
        failure: (!objections.is_empty()).then(|| objections.join("; ")),
    })
}

fn cutover_ratio(sizes: &[OfSize]) -> Option<f64> {
    let smallest = sizes.iter().min_by_key(|size| size.arena_mib)?;
    let largest = sizes.iter().max_by_key(|size| size.arena_mib)?;
    let apart = largest.arena_mib > smallest.arena_mib;
    apart.then(|| largest.cutover_ms.median() / smallest.cutover_ms.median())
}

/// Updates with an arena of this size. A machine makes them until one fails.
fn of_size(lab: &Lab, options: &Options, arena_mib: u64, failures: &mut Vec<FailedUpdate>) -> Result<Option<OfSize>> {
    let mut machine = options.machine.clone();
    machine.shape.services = vec![incumbent::demo_service_with(&["--arena-mib", &arena_mib.to_string()])];
    let filled_mib = arena_mib.saturating_sub(LEFT_EMPTY_MIB).max(1);
    let (mut hops, mut writes, mut logs) = (Vec::new(), Writes::default(), Vec::new());
    let mut done = 0;
    while done < options.runs {
        let mut failed = |run: usize, why: String, logs: Option<String>| {
            let run = run.min(options.runs);
            eprintln!("lab: update {run} of {} with {arena_mib} MiB FAILED: {why}", options.runs);
            failures.push(FailedUpdate { arena_mib, run, why, logs });
        };
        machine.hops = options.runs - done;
        let ran = upgrade::run_prepared(lab, &machine, &mut |stage, task| {
            task.step(&format!("filling {filled_mib} of {arena_mib} MiB"));
            fill(stage, filled_mib, task)
        });
        done += 1;
        match ran {
            Ok(report) => {
                done += report.hops.len();
                if let Some(why) = report.failure {
                    failed(done, why, report.logs.clone());
                }
                if let Some(unfinished) = report.unfinished {
                    writes.add(&unfinished.writes);
                }
                hops.extend(report.hops);
                logs.extend(report.logs);
            }
            Err(why) => failed(done, format!("{why:#}"), None),
        }
    }
    hops.iter().for_each(|hop| writes.add(&hop.writes));
    if hops.is_empty() { Ok(None) } else { figures(options.runs, arena_mib, filled_mib, &hops, writes, logs).map(Some) }
}

fn figures(
    asked: usize,
    arena_mib: u64,
    filled_mib: u64,
    hops: &[Hop],
    writes: Writes,
    logs: Vec<String>,
) -> Result<OfSize> {
    let all_of = |of: Phase| -> Vec<PhaseTime> {
        hops.iter().flat_map(|hop| &hop.phases).filter(|phase| phase.name == of.name()).cloned().collect()
    };
    let (cutovers, booting) = (all_of(Phase::Cutover), all_of(Phase::Booting));
    let of_booting = |name: &str| {
        let times = booting.iter().flat_map(|phase| &phase.steps).filter(|step| step.name == name);
        distribution(times.map(|step| step.ms)).with_context(|| format!("no update has the step {name:?}"))
    };
    let phases: Vec<&[PhaseTime]> = hops.iter().map(|hop| hop.phases.as_slice()).collect();
    Ok(OfSize {
        arena_mib,
        filled_mib,
        asked,
        place_ms: of_booting("place image")?,
        take_over_ms: of_booting("successor: prepare")?,
        blackout_ms: distribution(hops.iter().map(|hop| hop.blackout_ms))?,
        cutover_ms: distribution(cutovers.iter().map(|cutover| cutover.ms))?,
        steps: steps(&cutovers)?,
        phases: medians(&phases),
        writes,
        logs,
    })
}

fn distribution(values: impl IntoIterator<Item = f64>) -> Result<Distribution> {
    Distribution::of(values).context("no update, nothing to measure")
}

/// Each step of the cutover over all updates, in the order of the first.
fn steps(cutovers: &[PhaseTime]) -> Result<Vec<Step>> {
    let first = cutovers.first().context("no update has a cutover")?;
    let of_name = |name: &str| {
        let times = cutovers.iter().flat_map(|cutover| &cutover.steps).filter(|step| step.name == name);
        Ok(Step { name: name.to_owned(), ms: distribution(times.map(|step| step.ms))? })
    };
    first.steps.iter().map(|step| of_name(&step.name)).collect()
}

/// Fills the store through its own door, and looks whether it is all there.
fn fill(stage: &Stage, mib: u64, task: &Task) -> Result<()> {
    let values = (mib << 20) / (VALUE as u64 + 512);
    let (tell, told) = std::sync::mpsc::channel();
    let door = stage.machine.door();
    let filler = door.spawn("filler", move || fill_from_here(values, &tell))?;
    told.iter().for_each(|done: u64| task.detail(&format!("{done} of {values} values")));
    let stored = filler.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    stored.with_context(|| format!("filling the store with {mib} MiB"))?;
    let status = stage.status()?;
    ensure!(
        status.services.iter().all(|service| service.state == agent::daemon::control::ServiceState::Serving),
        "after filling: {status:?}"
    );
    Ok(())
}

fn fill_from_here(values: u64, tell: &std::sync::mpsc::Sender<u64>) -> io::Result<()> {
    let refused = |reply: Reply| io::Error::other(format!("the store answered {reply:?}"));
    let mut client = Client::connect(service(), FILL_PATIENCE)?;
    let mut value = vec![0u8; VALUE];
    let mut under_way = 0;
    for n in 0..values {
        // Not all the same: the bytes of each value tell which it is.
        value.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&n.to_le_bytes()));
        client.queue(&[b"SET", format!("fill:{n}").as_bytes(), &value]);
        client.send()?;
        under_way += 1;
        while under_way >= WINDOW || (under_way > 0 && n + 1 == values) {
            match client.receive()? {
                Reply::Status(ok) if ok == "OK" => under_way -= 1,
                other => return Err(refused(other)),
            }
        }
        if n % 64 == 0 {
            // Whoever listened may have seen enough.
            let _ = tell.send(n);
        }
    }
    Ok(())
}

/// The machine around an arena, as it is described to a successor: no machine is needed for that, so sizes that no lab has can be
/// measured. Pieces as in memory of medium fragmentation: one for each GiB, at most 64.
fn describe(arena_mib: u64) -> Result<Described> {
    const RUNS: usize = 50;
    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;
    let pieces = (arena_mib >> 10).clamp(1, 64);
    let piece = (arena_mib / pieces) * MIB;
    // Between two pieces lies a block of other memory.
    let starts = (0..pieces).map(|n| BLOCK + n * (piece + BLOCK).next_multiple_of(BLOCK));
    let arenas: RangeSet = starts.map(|start| Range::new(start, start + piece)).collect();
    let region = arenas.end().next_multiple_of(BLOCK);
    let region = Range::new(region, region + 4 * BLOCK);
    let ram = RangeSet::from(Range::new(MIB, region.end() + 4 * BLOCK));
    let (mut divide, mut kho) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let began = Instant::now();
        let division = Division::new(&ram, region, &arenas, BLOCK)?;
        let reserved: Vec<SetupData> = division.reserved_in_successor().iter().map(SetupData::Reserve).collect();
        black_box(reserved);
        divide.push(began.elapsed().as_secs_f64() * 1e6);
        let began = Instant::now();
        let mut out = Outgoing::new(Abi::V4, phys(Range::new(region.start() + MIB, region.start() + 32 * MIB)))?;
        out.scratch(phys(Range::new(region.start() + BLOCK, region.start() + 2 * BLOCK)));
        arenas.iter().try_for_each(|arena| out.preserve(phys(arena)))?;
        black_box(out.write()?);
        kho.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Described { arena_mib, pieces, divide_us: distribution(divide)?, kho_us: distribution(kho)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_size_can_be_described() {
        for mib in Options::default().described_mib {
            let described = describe(mib).unwrap();
            eprintln!(
                "{mib} MiB in {} pieces: setup_data {:.1} us, KHO {:.1} us",
                described.pieces,
                described.divide_us.median(),
                described.kho_us.median()
            );
        }
    }
}
