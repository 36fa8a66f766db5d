//! The same change three ways, in machines of the same shape, with the same kernels, service and clients: Baton, `kexec -e`, and a full
//! reboot. The silence is measured by the same prober from outside, until the service answers again.
//!
//! kexec and reboot are shown at their quickest: the new kernel is loaded beforehand, nothing is shut down in an orderly way, and the service
//! comes back empty instead of restoring its data.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::clients::{self, Clients};
use super::report::{Comparison, Method, Methods, Outcome, Report, Run, SCHEMA_VERSION, Writes};
use super::report::{PhaseTime, medians};
use super::stage::{Stage, cmdline};
use super::upgrade;
use crate::lab::progress::Task;
use crate::lab::{Guest, Kernel, Lab, Patience, accel};
use crate::measure::Distribution;

/// How long the service may take to answer the first probe and the first write, with nothing in its way.
const FIRST_ANSWERS: Duration = Duration::from_secs(60);
/// How often it is asked whether the new kernel is there.
const LOOK: Duration = Duration::from_millis(100);
/// Where the initrd for kexec is made in the guest.
const INITRD: &str = "/tmp/kexec-initrd";

/// What to compare.
#[derive(Debug, Clone)]
pub struct Options {
    /// Live updates.
    pub runs: usize,
    /// Runs of kexec, and of reboot.
    pub other_runs: usize,
    /// Machine and prober; its `hops` are not looked at.
    pub machine: upgrade::Options,
}

impl Default for Options {
    fn default() -> Self {
        Options { runs: 10, other_runs: 3, machine: upgrade::Options::default() }
    }
}

/// Compares. Any run that does not succeed is an error: there is nothing to compare then.
pub fn run(lab: &Lab, options: &Options) -> Result<Comparison> {
    let live = upgrade::run(lab, &upgrade::Options { hops: options.runs, ..options.machine.clone() })?;
    let baton = of_report(live)?;
    let kexec = Restarts::Kexec.run(lab, options)?;
    let reboot = Restarts::Reboot.run(lab, options)?;
    let median = baton.distribution.median();
    Ok(Comparison {
        schema_version: SCHEMA_VERSION,
        accelerator: accel::choose(lab.tree(), lab.progress())?,
        machine: options.machine.machine(),
        ratio_kexec_over_baton: kexec.distribution.median() / median,
        ratio_reboot_over_baton: reboot.distribution.median() / median,
        methods: Methods { baton, kexec, reboot },
    })
}

/// Live updates as one way among others.
fn of_report(report: Report) -> Result<Method> {
    if report.outcome != Outcome::Committed {
        bail!("the live updates ended as {:?}: {}", report.outcome, report.failure.unwrap_or_default());
    }
    let phases: Vec<&[PhaseTime]> = report.hops.iter().map(|hop| hop.phases.as_slice()).collect();
    let phases = medians(&phases);
    let mut writes = Writes::default();
    report.hops.iter().for_each(|hop| writes.add(&hop.writes));
    let runs = report.hops.into_iter().map(|hop| Run {
        from: hop.incumbent_release,
        to: hop.successor_release,
        blackout_ms: hop.blackout_ms,
        silence_began_in: hop.silence_began_in,
        prober_stalled_ms: hop.silence.prober_stalled_ms,
    });
    method(runs.collect(), phases, writes, true, report.logs.unwrap_or_default())
}

fn method(runs: Vec<Run>, phases: Vec<PhaseTime>, writes: Writes, survives: bool, logs: String) -> Result<Method> {
    let blackout_ms: Vec<f64> = runs.iter().map(|run| run.blackout_ms).collect();
    let distribution = Distribution::of(blackout_ms.iter().copied()).context("no run, nothing to compare")?;
    Ok(Method { blackout_ms, distribution, runs, phases, writes, data_survives: survives, logs })
}

/// The ways in which everything starts anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Restarts {
    Kexec,
    Reboot,
}

impl Restarts {
    fn name(self) -> &'static str {
        match self {
            Self::Kexec => "kexec",
            Self::Reboot => "reboot",
        }
    }

    fn run(self, lab: &Lab, options: &Options) -> Result<Method> {
        let kernels = upgrade::kernels(lab)?;
        let task = lab.progress().task(&format!("machine for {}", self.name()));
        task.step(&format!("booting {}", kernels[0].release));
        let mut spec = Stage::spec(lab, &kernels[0], &options.machine.shape)?;
        spec.reboots = self == Self::Reboot;
        let stage = Stage { machine: lab.start(&spec)?, serving: 0 };
        stage.await_serving()?;
        task.done(&format!("{} serves; logs: {}", kernels[0].release, stage.machine.folder().display()));

        let (mut runs, mut writes) = (Vec::new(), Writes::default());
        for n in 0..options.other_runs {
            let task = lab.progress().task(&format!("{} {} of {}", self.name(), n + 1, options.other_runs));
            let kernel = match self {
                Self::Kexec => Some(&kernels[(n + 1) % 2]),
                Self::Reboot => None,
            };
            let run = self.restart(&stage, kernel, options, &mut writes, &task)?;
            task.done(&format!("{}, silent for {:.0} ms", run.to, run.blackout_ms));
            runs.push(run);
        }
        method(runs, Vec::new(), writes, false, stage.machine.folder().display().to_string())
    }

    /// One run: everything that can be done beforehand, then the clients, then the jump.
    fn restart(
        self,
        stage: &Stage,
        to: Option<&Kernel>,
        options: &Options,
        writes: &mut Writes,
        task: &Task,
    ) -> Result<Run> {
        let guest = stage.guest();
        let from = identity(&guest)?;
        let jump: &[&str] = match to {
            Some(kernel) => {
                task.step(&format!("loading {}", kernel.release));
                load(&guest, kernel, &format!("{} {}", cmdline(0), options.machine.shape.cmdline))?;
                &["kexec", "-e"]
            }
            None => &["reboot", "-f"],
        };
        task.step("clients start");
        let clients = Clients::start(stage.machine.door(), options.machine.probe_hz)?;
        clients.calm(FIRST_ANSWERS)?;
        task.step("the machine starts anew");
        let began = Instant::now();
        let _jumping = guest.command(jump).begin()?;
        let now = another_kernel(stage, &from)?;
        clients.calm(FIRST_ANSWERS)?;
        let seen = clients.stop(began, stage.machine.folder())?;
        if let Some(kernel) = to.filter(|kernel| kernel.release != now.release) {
            bail!("{} should run {}, it runs {}", self.name(), kernel.release, now.release);
        }
        let silence = seen.probe.silence.context("the prober sent nothing")?;
        writes.add(&Writes::of(&clients::read_back(stage.machine.door(), seen.halted)?));
        Ok(Run {
            from: from.release,
            to: now.release,
            blackout_ms: silence.blackout_ms,
            silence_began_in: None,
            prober_stalled_ms: silence.prober_stalled_ms,
        })
    }
}

/// Loads a kernel for `kexec -e`, with the initrd that a successor would get.
fn load(guest: &Guest, kernel: &Kernel, cmdline: &str) -> Result<()> {
    guest.check(&["baton", "mkinitrd", "--release", &kernel.release, "--output", INITRD])?;
    let (initrd, words) = (format!("--initrd={INITRD}"), format!("--command-line={cmdline}"));
    let image = format!("/boot/vmlinuz-{}", kernel.release);
    // By file: the running kernel itself reads the image, as distributions do it now.
    guest.check(&["kexec", "--kexec-file-syscall", "-l", &image, &initrd, &words])?;
    // The loaded copy is the kernel's own.
    guest.check(&["rm", INITRD])?;
    Ok(())
}

/// A boot of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    boot: String,
    release: String,
}

fn identity(guest: &Guest) -> Result<Identity> {
    let text = guest.check(&["cat", "/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/osrelease"])?;
    let (boot, release) = text.trim().split_once('\n').with_context(|| format!("no boot id and release: {text:?}"))?;
    Ok(Identity { boot: boot.to_owned(), release: release.to_owned() })
}

/// Waits until another boot's kernel answers. Nothing announces it, so this asks; the old one may still answer for a moment.
fn another_kernel(stage: &Stage, old: &Identity) -> Result<Identity> {
    let guest = stage.guest();
    let deadline = Instant::now() + Patience::BOOT.total;
    loop {
        // Connecting first, and shortly: a request to a kernel that is just going would wait for its connection's end.
        let answer = guest.connect(Duration::from_secs(1)).ok().and_then(|_| identity(&guest).ok());
        if let Some(now) = answer.filter(|now| now.boot != old.boot) {
            return Ok(now);
        }
        if Instant::now() > deadline {
            bail!("no new kernel answers\n{}", stage.machine.logs(60));
        }
        std::thread::sleep(LOOK);
    }
}
