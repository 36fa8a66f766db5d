//! How an update's times depend on the amount of memory that crosses: one machine for each size of arena, filled to the brim, and
//! updated there and back. What the cutover does must not depend on it; what does, happens before the freeze or after the commit.

use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use agent::birth::phys;
use anyhow::{Context, Result, bail, ensure};
use handover::kho::{Abi, Outgoing};
use kexec_core::boot_params::SetupData;
use kexec_core::memory_map::division::Division;
use kexec_core::memory_map::{Range, RangeSet};
use serde::{Deserialize, Serialize};

use super::report::{MachineShape, Outcome, PhaseTime, SCHEMA_VERSION, Writes, medians};
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

/// What `cargo demo scale --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// What ran the machines.
    pub accelerator: Accelerator,
    /// The machines.
    pub machine: MachineShape,
    /// By size of the arena, ascending.
    pub sizes: Vec<OfSize>,
    /// What was only described, on the host itself.
    pub described: Vec<Described>,
}

/// Updates with one size of arena.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OfSize {
    /// The arena.
    pub arena_mib: u64,
    /// How much of it was filled before the first update.
    pub filled_mib: u64,
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
    /// Folder with the machine's logs.
    pub logs: String,
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

/// Measures. An update that does not succeed is an error.
pub fn run(lab: &Lab, options: &Options) -> Result<Scale> {
    let described = options.described_mib.iter().map(|mib| describe(*mib)).collect::<Result<_>>()?;
    let sizes = options.sizes_mib.iter().map(|mib| of_size(lab, options, *mib)).collect::<Result<_>>()?;
    Ok(Scale {
        schema_version: SCHEMA_VERSION,
        accelerator: accel::choose(lab.tree(), lab.progress())?,
        machine: options.machine.machine(),
        sizes,
        described,
    })
}

fn of_size(lab: &Lab, options: &Options, arena_mib: u64) -> Result<OfSize> {
    let mut machine = upgrade::Options { hops: options.runs, ..options.machine.clone() };
    machine.shape.services = vec![incumbent::demo_service_with(&["--arena-mib", &arena_mib.to_string()])];
    let fill_mib = arena_mib.saturating_sub(LEFT_EMPTY_MIB).max(1);
    let report = upgrade::run_prepared(lab, &machine, &mut |stage, task| {
        task.step(&format!("filling {fill_mib} of {arena_mib} MiB"));
        fill(stage, fill_mib, task)
    })?;
    if report.outcome != Outcome::Committed {
        let why = report.failure.unwrap_or_default();
        bail!("updates with {arena_mib} MiB ended as {:?}: {why}", report.outcome);
    }
    let cutover = |phases: &[PhaseTime]| phases.iter().find(|phase| phase.name == "cutover").cloned();
    let cutovers: Vec<PhaseTime> = report.hops.iter().filter_map(|hop| cutover(&hop.phases)).collect();
    let phases: Vec<&[PhaseTime]> = report.hops.iter().map(|hop| hop.phases.as_slice()).collect();
    let mut writes = Writes::default();
    report.hops.iter().for_each(|hop| writes.add(&hop.writes));
    Ok(OfSize {
        arena_mib,
        filled_mib: fill_mib,
        blackout_ms: distribution(report.hops.iter().map(|hop| hop.blackout_ms))?,
        cutover_ms: distribution(cutovers.iter().map(|cutover| cutover.ms))?,
        steps: steps(&cutovers)?,
        phases: medians(&phases),
        writes,
        logs: report.logs.unwrap_or_default(),
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
    ensure!(status.services.iter().all(|service| service.state == "serving"), "after filling: {status:?}");
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
