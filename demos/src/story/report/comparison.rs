//! What `cargo demo compare` says: [`Comparison`], as JSON and for people.

use std::fmt::Write;

use handover::update::phase;
use serde::{Deserialize, Serialize};

use super::{MachineShape, PhaseTime, SCHEMA_VERSION, Writes, measured, phase_table, table, title, wrapped};
use crate::lab::Accelerator;
use crate::measure::Distribution;

/// What `cargo demo compare --json` prints, however it went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// What ran the machines; nothing when none ran.
    pub accelerator: Option<Accelerator>,
    /// Their shape: the same for all.
    pub machine: MachineShape,
    /// The three ways.
    pub methods: Methods,
    /// kexec's median blackout in units of Baton's; nothing when one of them has no run.
    pub ratio_kexec_over_baton: Option<f64>,
    /// A reboot's median blackout in units of Baton's; nothing when one of them has no run.
    pub ratio_reboot_over_baton: Option<f64>,
    /// Why this is no comparison, or not one to Baton's credit. A failed run alone is no reason: it is among its method's `failures`.
    pub failure: Option<String>,
}

/// The ways to change a kernel.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Methods {
    /// Live updates, there and back in one machine.
    pub baton: Method,
    /// `kexec -e`, there and back in one machine; the new kernel was loaded before.
    pub kexec: Method,
    /// A reboot; the same kernel comes back.
    pub reboot: Method,
}

/// What one way gave.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// How many runs were asked for; `runs` and `failures` say what became of them.
    pub asked: usize,
    /// Of each run that succeeded, in their order.
    pub blackout_ms: Vec<f64>,
    /// The same, with median and the rest; nothing without a run.
    pub distribution: Option<Distribution>,
    /// The runs that succeeded.
    pub runs: Vec<Run>,
    /// The others. The next run was made in a fresh machine.
    pub failures: Vec<FailedRun>,
    /// Medians of the phases and steps; only Baton has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<PhaseTime>,
    /// What became of the load's writes, all runs together.
    pub writes: Writes,
    /// Whether the service has its data afterwards.
    pub data_survives: bool,
    /// Folders with the machines' logs.
    pub logs: Vec<String>,
}

/// One run of a way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Which of those asked for, from 1.
    pub run: usize,
    /// Release before.
    pub from: String,
    /// Release after.
    pub to: String,
    /// The longest silence.
    pub blackout_ms: f64,
    /// In which phase of an update it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence_began_in: Option<String>,
    /// The prober's own worst lateness within it.
    pub prober_stalled_ms: f64,
}

/// A run that gave no figure, or one whose writes did not survive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedRun {
    /// Which of those asked for, from 1.
    pub run: usize,
    /// What went wrong, with the end of the machine's logs where they say more.
    pub why: String,
    /// Folder with the machine's logs; nothing when no machine came up.
    pub logs: Option<String>,
}

impl Method {
    /// A way that is to be tried so often.
    #[must_use]
    pub fn asked(asked: usize, data_survives: bool) -> Self {
        Self { asked, data_survives, ..Self::default() }
    }

    /// A run succeeded.
    pub fn add(&mut self, run: Run) {
        self.blackout_ms.push(run.blackout_ms);
        self.distribution = Distribution::of(self.blackout_ms.iter().copied());
        self.runs.push(run);
    }

    fn median(&self) -> Option<f64> {
        self.distribution.as_ref().map(Distribution::median)
    }
}

impl Comparison {
    /// Of what the methods gave.
    #[must_use]
    pub fn of(machine: MachineShape, accelerator: Accelerator, methods: Methods) -> Self {
        let over_baton = |other: &Method| Some(other.median()? / methods.baton.median()?);
        Self {
            schema_version: SCHEMA_VERSION,
            accelerator: Some(accelerator),
            machine,
            ratio_kexec_over_baton: over_baton(&methods.kexec),
            ratio_reboot_over_baton: over_baton(&methods.reboot),
            failure: objection(&methods),
            methods,
        }
    }

    /// Of a lab that could not be set up.
    #[must_use]
    pub fn without_runs(machine: MachineShape, failure: String) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            accelerator: None,
            machine,
            methods: Methods::default(),
            ratio_kexec_over_baton: None,
            ratio_reboot_over_baton: None,
            failure: Some(failure),
        }
    }
}

impl Methods {
    fn named(&self) -> [(&'static str, &Method); 3] {
        [("Baton", &self.baton), ("kexec -e", &self.kexec), ("reboot", &self.reboot)]
    }
}

/// A comparison needs a run of each way, and Baton must not have lost what it promises to keep.
fn objection(methods: &Methods) -> Option<String> {
    let mut objections = Vec::new();
    let Writes { acknowledged, lost, unread, contradictions, .. } = methods.baton.writes;
    if lost > 0 || contradictions > 0 {
        objections.push(format!(
            "live updates lost {lost} of {acknowledged} acknowledged writes, with {contradictions} contradictions"
        ));
    }
    if unread > 0 {
        objections.push(format!("{unread} writes acknowledged around live updates could not be read back"));
    }
    for (name, method) in methods.named() {
        if method.runs.is_empty() {
            objections.push(format!("no ratio: none of {} runs of {name} succeeded", method.asked));
        }
    }
    (!objections.is_empty()).then(|| objections.join("; "))
}

/// The comparison for people.
#[must_use]
pub fn comparison_for_people(comparison: &Comparison) -> String {
    let Methods { baton, .. } = &comparison.methods;
    let mut text = title(&comparison.machine, comparison.accelerator);
    if comparison.methods.named().iter().any(|(_, method)| !method.runs.is_empty()) {
        text += &measured(&comparison.machine);
        text += &silences(&comparison.methods);
        text += &wrapped(
            "kexec: the new kernel is loaded beforehand, and nothing is shut down in an orderly way before `kexec -e`. reboot: \
             `reboot -f`, and QEMU loads the same kernel again: no firmware self-test, no boot loader's menu, no disk. After both \
             the service starts EMPTY and answers at once: nothing is restored. All of that is in their favour.",
        );
    }
    if !baton.runs.is_empty() {
        let _ = writeln!(text, "\nBaton, phase by phase (medians)");
        let _ = writeln!(text, "{}", phase_table(&baton.phases, &["phase", "at ms", "ms", "steps (ms)"]));
        let _ = write!(text, "\n{}", wrapped(&limit(baton)));
    }
    for (ratio, name) in
        [(comparison.ratio_kexec_over_baton, "kexec"), (comparison.ratio_reboot_over_baton, "a reboot")]
    {
        if let Some(ratio) = ratio {
            let _ = writeln!(text, "{name}'s median silence is {ratio:.0} times Baton's.");
        }
    }
    for (name, method) in comparison.methods.named() {
        for FailedRun { run, why, logs } in &method.failures {
            let why = why.lines().next().unwrap_or_default();
            let logs = logs.as_ref().map(|logs| format!("; logs: {logs}")).unwrap_or_default();
            let _ =
                write!(text, "{}", wrapped(&format!("FAILED: run {run} of {} of {name}: {why}{logs}", method.asked)));
        }
    }
    let logs: Vec<&str> =
        comparison.methods.named().iter().flat_map(|(_, method)| method.logs.iter().map(String::as_str)).collect();
    if !logs.is_empty() {
        let _ = writeln!(text, "logs: {}", logs.join(", "));
    }
    if let Some(failure) = &comparison.failure {
        let _ = writeln!(text, "failed: {failure}");
    }
    text
}

fn silences(methods: &Methods) -> String {
    let header = ["silence (ms)", "runs", "min", "median", "p90", "max", "× Baton", "data afterwards"];
    let mut rows = table(&header, &[1, 2, 3, 4, 5, 6]);
    let mut add = |name: &str, runs: String, method: &Method| {
        let ms = |of: fn(&Distribution) -> f64| {
            method.distribution.as_ref().map_or_else(|| "–".into(), |distribution| format!("{:.1}", of(distribution)))
        };
        let times = method.median().zip(methods.baton.median());
        let times = times.map_or_else(|| "–".into(), |(own, baton)| format!("{:.1}", own / baton));
        let data = if method.data_survives { "all there" } else { "gone" };
        let values =
            [ms(Distribution::min), ms(Distribution::median), ms(Distribution::p90), ms(Distribution::max), times];
        rows.add_row([name.to_owned(), runs].into_iter().chain(values).chain([data.to_owned()]).collect::<Vec<_>>());
    };
    for (name, method) in methods.named() {
        let runs = match method.runs.len() {
            all if all == method.asked => all.to_string(),
            some => format!("{some} of {}", method.asked),
        };
        add(name, runs, method);
        // kexec goes there and back too, but it has a few runs only.
        for to in directions(method).iter().filter(|_| method.data_survives) {
            let part = only_to(method, to);
            add(&format!("  to {}", short(to)), part.runs.len().to_string(), &part);
        }
    }
    format!("{rows}\nwrites acknowledged and lost: {}\n", losses(methods))
}

fn losses(methods: &Methods) -> String {
    let one = |(name, Method { writes, .. }): (&str, &Method)| {
        let unread =
            if writes.unread > 0 { format!(" ({} more could not be read back)", writes.unread) } else { String::new() };
        format!("{name} {} of {}{unread}", writes.lost, writes.acknowledged)
    };
    methods.named().map(one).join(", ")
}

/// What the silence of a live update consists of: the cutover, if the silences began there; else something else was silent for longer.
fn limit(baton: &Method) -> String {
    let Some(silence) = baton.median() else {
        return "What limits Baton is not known: no update was carried through.".into();
    };
    let cutover_name = phase::Phase::Cutover.name();
    let Some(cutover) = baton.phases.iter().find(|phase| phase.name == cutover_name) else {
        return "What limits Baton is not known: no update has a cutover.".into();
    };
    let incumbents: Vec<&PhaseTime> =
        cutover.steps.iter().filter(|step| !step.name.starts_with("successor:")).collect();
    let longest = incumbents.iter().max_by(|a, b| a.ms.total_cmp(&b.ms));
    let parts: Vec<String> = incumbents.iter().map(|step| format!("{} {:.1}", step.name, step.ms)).collect();
    let most = longest.map(|step| format!("; most of it is `{}`", step.name)).unwrap_or_default();
    let mut places: Vec<(&str, usize)> = Vec::new();
    for began in baton.runs.iter().map(|run| run.silence_began_in.as_deref().unwrap_or("an unknown phase")) {
        match places.iter_mut().find(|(place, _)| *place == began) {
            Some((_, count)) => *count += 1,
            None => places.push((began, 1)),
        }
    }
    places.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let counted: Vec<String> = places.iter().map(|(place, count)| format!("{count} in `{place}`")).collect();
    format!(
        "What limits Baton: the median silence is {silence:.1} ms, the cutover takes {:.1} ms ({}){most}. The longest silences of \
         the {} updates began {}.",
        cutover.ms,
        parts.join(", "),
        baton.runs.len(),
        counted.join(", ")
    )
}

fn directions(method: &Method) -> Vec<String> {
    let mut to: Vec<String> = Vec::new();
    for run in &method.runs {
        if !to.contains(&run.to) {
            to.push(run.to.clone());
        }
    }
    if to.len() > 1 { to } else { Vec::new() }
}

fn only_to(method: &Method, to: &str) -> Method {
    let mut part = Method::asked(method.asked, method.data_survives);
    method.runs.iter().filter(|run| run.to == to).cloned().for_each(|run| part.add(run));
    part
}

/// A release without its vendor's words.
fn short(release: &str) -> &str {
    release.split(['+', '-']).next().unwrap_or(release)
}
