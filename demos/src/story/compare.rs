//! The same change three ways, in machines of the same shape, with the same kernels, service and clients: Baton, `kexec -e`, and a full
//! reboot. The silence is measured by the same prober from outside, until the service answers again.
//!
//! kexec and reboot are shown at their quickest: the new kernel is loaded beforehand, nothing is shut down in an orderly way, and the service
//! comes back empty instead of restoring its data.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::clients::{self, Clients};
use super::report::{Comparison, FailedRun, Method, Methods, PhaseTime, Run, Writes, medians};
use super::stage::{Stage, cmdline};
use super::upgrade;
use crate::lab::progress::Task;
use crate::lab::{Guest, Kernel, Lab, Patience, accel};

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

/// Compares. A run that fails is recorded, and the next one gets a fresh machine; an error means that there are no machines at all.
pub fn run(lab: &Lab, options: &Options) -> Result<Comparison> {
    let accelerator = accel::choose(lab.tree(), lab.progress())?;
    let baton = live(lab, options);
    let kexec = Restarts::Kexec.run(lab, options)?;
    let reboot = Restarts::Reboot.run(lab, options)?;
    Ok(Comparison::of(options.machine.machine(), accelerator, Methods { baton, kexec, reboot }))
}

/// Live updates. A machine makes them until one fails.
fn live(lab: &Lab, options: &Options) -> Method {
    let mut method = Method::asked(options.runs, true);
    let mut hops = Vec::new();
    let mut done = 0;
    while done < options.runs {
        let mut failed = |run, why: String, logs: Option<String>| {
            eprintln!("lab: run {run} of {} of live updates FAILED: {why}", options.runs);
            method.failures.push(FailedRun { run, why, logs });
        };
        match upgrade::run(lab, &upgrade::Options { hops: options.runs - done, ..options.machine.clone() }) {
            Ok(report) => {
                let last = done + report.hops.len();
                if let Some(why) = report.failure {
                    // Without a run that is missing, the writes are what failed: that was seen after the last one.
                    failed((last + 1).min(options.runs), why, report.logs.clone());
                }
                let numbered = report.hops.into_iter().zip(done + 1..);
                hops.extend(numbered);
                method.logs.extend(report.logs);
                if let Some(unfinished) = report.unfinished {
                    method.writes.add(&unfinished.writes);
                }
                done = last + 1;
            }
            Err(why) => {
                failed(done + 1, format!("{why:#}"), None);
                done += 1;
            }
        }
    }
    let phases: Vec<&[PhaseTime]> = hops.iter().map(|(hop, _)| hop.phases.as_slice()).collect();
    method.phases = medians(&phases);
    for (hop, run) in hops {
        method.writes.add(&hop.writes);
        method.add(Run {
            run,
            from: hop.incumbent_release,
            to: hop.successor_release,
            blackout_ms: hop.blackout_ms,
            silence_began_in: hop.silence_began_in,
            prober_stalled_ms: hop.silence.prober_stalled_ms,
        });
    }
    method
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
        let mut method = Method::asked(options.other_runs, false);
        let mut series = Series { way: self, lab, options, kernels: upgrade::kernels(lab)?, machine: None };
        for run in 1..=options.other_runs {
            let task = lab.progress().task(&format!("{} {run} of {}", self.name(), options.other_runs));
            let ended = series.restart(&task, &mut method);
            match ended {
                Ok(one) => {
                    task.done(&format!("{}, silent for {:.0} ms", one.to, one.blackout_ms));
                    method.add(Run { run, ..one });
                }
                Err(why) => {
                    let why = if series.machine.as_ref().is_some_and(has_ended) {
                        // Who notices first depends on the moment; what is wrong does not.
                        format!("the machine ended: {why:#}")
                    } else {
                        format!("{why:#}")
                    };
                    task.done(&format!("FAILED: {why}"));
                    // Nobody knows what state it is in: the next run gets another.
                    let logs = series.machine.take().map(|machine| folder(&machine.stage));
                    method.failures.push(FailedRun { run, why, logs });
                }
            }
        }
        Ok(method)
    }
}

/// Runs of one way, in one machine as long as that can be used.
struct Series<'l> {
    way: Restarts,
    lab: &'l Lab,
    options: &'l Options,
    kernels: [Kernel; 2],
    machine: Option<Running>,
}

/// A machine, and which of the kernels it runs.
struct Running {
    stage: Stage,
    kernel: usize,
}

impl Series<'_> {
    /// A machine that was not there yet is started for this run.
    fn machine(&mut self, task: &Task, method: &mut Method) -> Result<&mut Running> {
        if self.machine.is_none() {
            let kernel = &self.kernels[0];
            task.step(&format!("a machine boots {}", kernel.release));
            let mut spec = Stage::spec(self.lab, kernel, &self.options.machine.shape)?;
            spec.reboots = self.way == Restarts::Reboot;
            let stage = Stage::start(self.lab, &spec, &self.options.machine.shape)?;
            method.logs.push(folder(&stage));
            // Kept before it serves: its logs are wanted if it never does.
            self.machine.insert(Running { stage, kernel: 0 }).stage.await_serving()?;
        }
        self.machine.as_mut().context("there is no machine")
    }

    /// One run: everything that can be done beforehand, then the clients, then the jump.
    fn restart(&mut self, task: &Task, method: &mut Method) -> Result<Run> {
        let (way, options, kernels) = (self.way, self.options, self.kernels.clone());
        let Running { stage, kernel } = self.machine(task, method)?;
        let guest = stage.guest();
        let from = identity(&guest)?;
        let jump: &[&str] = match way {
            Restarts::Kexec => {
                *kernel = (*kernel + 1) % kernels.len();
                let release = &kernels[*kernel].release;
                task.step(&format!("loading {release}"));
                load(&guest, release, &format!("{} {}", cmdline(0), options.machine.shape.cmdline))?;
                &["kexec", "-e"]
            }
            Restarts::Reboot => &["reboot", "-f"],
        };
        let wanted = &kernels[*kernel].release;
        task.step("clients start");
        let clients = Clients::start(stage.machine.door(), options.machine.probe_hz)?;
        clients.calm(FIRST_ANSWERS)?;
        task.step("the machine starts anew");
        let began = Instant::now();
        let _jumping = guest.command(jump).begin()?;
        let now = another_kernel(stage, &from).and_then(|now| clients.calm(FIRST_ANSWERS).map(|()| now));
        // Whatever came of it: what the prober saw goes to the logs.
        let seen = clients.stop(began, stage.machine.folder())?;
        let now = now?;
        if now.release != *wanted {
            bail!("{} should run {wanted}, it runs {}", way.name(), now.release);
        }
        let silence = seen.probe.silence.context("the prober sent nothing")?;
        method.writes.add(&Writes::of(&clients::read_back(stage.machine.door(), seen.halted)?));
        Ok(Run {
            run: 0,
            from: from.release,
            to: now.release,
            blackout_ms: silence.blackout_ms,
            silence_began_in: None,
            prober_stalled_ms: silence.prober_stalled_ms,
        })
    }
}

fn has_ended(machine: &Running) -> bool {
    machine.stage.machine.serial(0).wait_closed(Patience::of(LOOK)).is_ok()
}

fn folder(stage: &Stage) -> String {
    stage.machine.folder().display().to_string()
}

/// Loads a kernel for `kexec -e`, with the initrd that a successor would get.
fn load(guest: &Guest, release: &str, cmdline: &str) -> Result<()> {
    guest.check(&["baton", "mkinitrd", "--release", release, "--output", INITRD])?;
    let (initrd, words) = (format!("--initrd={INITRD}"), format!("--command-line={cmdline}"));
    let image = format!("/boot/vmlinuz-{release}");
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
        if stage.machine.serial(0).wait_closed(Patience::of(LOOK)).is_ok() {
            bail!("no new kernel answered\n{}", stage.machine.logs(60));
        }
    }
}
