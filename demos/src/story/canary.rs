//! Trials beside a service under load: one candidate that passes, two that fail, and what clients of the incumbent noticed.
//!
//! ```text
//! boot ─► clients start ─ calm ─► { baton canary } per candidate ─ calm ─ clients stop ─► read every acknowledged write back
//! ```

use std::time::{Duration, Instant};

use agent::daemon::outcome::Class;
use agent::update::trial::report::{ClientGap, Report, Returned, Verdict};
use anyhow::{Context, Result, bail, ensure};

use super::clients::{self, Clients};
use super::stage::{Shape, Stage, cmdline};
use super::traps;
use super::upgrade::kernels;
use crate::lab::Lab;

/// How long the service may take to answer the first probe and the first write.
const FIRST_ANSWERS: Duration = Duration::from_secs(60);
/// How long one trial may take, on a busy host.
const PATIENCE: Duration = Duration::from_secs(300);

/// What to tell.
#[derive(Debug, Clone)]
pub struct Options {
    /// The machine.
    pub shape: Shape,
    /// UDP probes a second.
    pub probe_hz: u32,
}

impl Default for Options {
    fn default() -> Self {
        let mut shape = Shape::default();
        // How long the service that does not come up is waited for.
        shape.update.step_timeout_s = 30;
        Options { shape, probe_hz: 1000 }
    }
}

/// A candidate.
struct Tried {
    what: &'static str,
    /// More for its command line.
    words: &'static str,
    /// More for `baton canary`.
    more: &'static [&'static str],
    passes: bool,
}

const CANDIDATES: [Tried; 3] = [
    Tried {
        what: "a kernel that is fit",
        words: "",
        more: &["--cpus", "2", "--for", "5s", "--check", "test -x /usr/sbin/baton-kv"],
        passes: true,
    },
    Tried {
        what: "one that panics in its boot",
        words: "initcall_blacklist=populate_rootfs panic=0",
        more: &[],
        passes: false,
    },
    Tried {
        what: "one whose service does not stand by",
        words: "rdinit=/trap",
        more: &["--initrd", "/tmp/wrong"],
        passes: false,
    },
];

/// Tells it: all trials in one report, with what the clients saw.
///
/// # Errors
/// There was no machine, a trial that should have passed did not (or the other way round), or a write was lost.
pub fn run(lab: &Lab, options: &Options) -> Result<Report> {
    let [incumbent, candidate] = kernels(lab)?;
    let task = lab.progress().task("machine");
    task.step(&format!("booting {}", incumbent.release));
    let stage = Stage::open(lab, &incumbent, &options.shape)?;
    stage.guest().put("/tmp/wrong", 0o644, &traps::service("echo wrong")?)?;
    task.done(&format!("{} serves; logs: {}", incumbent.release, stage.machine.folder().display()));
    let clients = Clients::start(stage.machine.door(), options.probe_hz)?;
    clients.calm(FIRST_ANSWERS)?;
    let began = Instant::now();
    let image = format!("/boot/vmlinuz-{}", candidate.release);
    let mut all = Report {
        schema_version: 1,
        candidates: Vec::new(),
        client_gap_ms: ClientGap::default(),
        returned: Returned { cpus: true, memory: true },
    };
    for tried in &CANDIDATES {
        let task = lab.progress().task("candidate");
        task.step(tried.what);
        let line = format!("{} {}", cmdline(1), tried.words);
        let mut words = vec!["baton", "canary", "--json", "--kernel", &image, "--cmdline", &line];
        if !tried.more.contains(&"--for") {
            words.extend(["--for", "1s"]);
        }
        words.extend(tried.more);
        let ran = stage.guest().command(&words).timeout(PATIENCE).run()?;
        let said = || format!("{:?}: {} {}", ran.exit, ran.text(), String::from_utf8_lossy(&ran.stderr));
        let report: Report = serde_json::from_slice(&ran.stdout).with_context(said)?;
        let expected = if tried.passes { 0 } else { i32::from(Class::TrialFailed.exit_code()) };
        ensure!(ran.exit.code == Some(expected), "{}: {}", tried.what, said());
        let cause = report.candidates.iter().find_map(|candidate| candidate.cause.clone());
        task.done(&format!("{}: {}", tried.what, cause.as_deref().unwrap_or("passed")));
        all.candidates.extend(report.candidates);
        all.returned.cpus &= report.returned.cpus;
        all.returned.memory &= report.returned.memory;
    }
    let ended = Instant::now();
    clients.calm(FIRST_ANSWERS)?;
    let task = lab.progress().task("writes");
    task.step("reading every acknowledged write back");
    let seen = clients.stop(began, stage.machine.folder())?;
    let at = |moment: Instant| moment.saturating_duration_since(seen.started).as_nanos() as u64;
    let gap = |window| seen.samples.report(window).silence.map(|silence| silence.max_reply_gap_ms);
    all.client_gap_ms =
        ClientGap { before: gap(0..at(began)), during: gap(at(began)..at(ended)), after: gap(at(ended)..u64::MAX) };
    let load = clients::read_back(stage.machine.door(), seen.halted)?;
    if load.lost > 0 || load.contradictions > 0 {
        bail!("{} of {} writes are lost, {} contradictions", load.lost, load.acknowledged, load.contradictions);
    }
    task.done(&format!("{} acknowledged writes are there", load.acknowledged));
    Ok(all)
}

/// For people.
#[must_use]
pub fn for_people(report: &Report) -> String {
    let mut text = String::new();
    for (tried, candidate) in CANDIDATES.iter().zip(&report.candidates) {
        let verdict = if candidate.verdict == Verdict::Pass { "passed" } else { "FAILED" };
        let boot = candidate.boot_ms.map(|ms| format!(", agent after {:.1} s", ms / 1e3)).unwrap_or_default();
        text.push_str(&format!("{verdict}  {} ({}{boot})\n", tried.what, candidate.release));
        if let Some(cause) = &candidate.cause {
            text.push_str(&format!("        {cause}\n"));
        }
    }
    let ms = |gap: Option<f64>| gap.map_or("not measured".to_owned(), |ms| format!("{ms:.1} ms"));
    let ClientGap { before, during, after } = report.client_gap_ms;
    text.push_str(&format!(
        "longest time without an answer: {} before, {} during, {} after\n",
        ms(before),
        ms(during),
        ms(after)
    ));
    let Returned { cpus, memory } = report.returned;
    text.push_str(&format!("everything is back: CPUs {cpus}, memory {memory}\n"));
    text
}
