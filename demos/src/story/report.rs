//! What the stories say, as plain data: JSON for programs ([`SCHEMA_VERSION`]), text for people. No I/O.

use std::fmt::Write;

use agent::timeline::Span;
use comfy_table::{Cell, CellAlignment, Table, presets};
use handover::phase;
use serde::{Deserialize, Serialize};

use crate::lab::Accelerator;
use crate::load::LoadReport;
use crate::measure::{Distribution, Latencies, Silence};

/// Of both JSON objects. Raised when a field changes its meaning or goes; new ones may come at any time.
pub const SCHEMA_VERSION: u32 = 1;

/// How a story of updates ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every update was carried through, and no acknowledged write is missing.
    Committed,
    /// An update was not, and the old kernel goes on as before; no acknowledged write is missing.
    RolledBack,
    /// Anything else.
    Failed,
}

/// The machine that the story was told with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineShape {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory.
    pub memory_mib: u32,
    /// UDP probes a second.
    pub probe_hz: u32,
}

/// What `cargo demo upgrade --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// What ran the machine; nothing when none ran.
    pub accelerator: Option<Accelerator>,
    /// The machine.
    pub machine: MachineShape,
    /// The updates that were carried through.
    pub hops: Vec<Hop>,
    /// Why it is not committed.
    pub failure: Option<String>,
    /// Folder with the machine's logs.
    pub logs: Option<String>,
}

/// One update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hop {
    /// The kernel that handed over.
    pub incumbent_release: String,
    /// The kernel that took over.
    pub successor_release: String,
    /// The longest silence that the prober saw, from the request for the update to two seconds after its end.
    pub blackout_ms: f64,
    /// The same silence in full.
    pub silence: Silence,
    /// In which phase it began, as near as the two clocks can be laid beside each other.
    pub silence_began_in: Option<String>,
    /// Round trips of the probes in the same time.
    pub latencies: Option<Latencies>,
    /// Answers of a kernel that had been succeeded. Must be 0.
    pub epoch_regressions: usize,
    /// The phases with their steps, as both kernels measured them.
    pub phases: Vec<PhaseTime>,
    /// CPUs.
    pub cpus: Cpus,
    /// `MemTotal` of both kernels.
    pub mem_total_kib: BeforeAfter,
    /// What became of the load's writes.
    pub writes: Writes,
    /// What became of the load's connections.
    pub connections: Connections,
    /// What the successor could not do.
    pub left_undone: Vec<String>,
}

/// A phase, or a step of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which.
    pub name: String,
    /// How long it took.
    pub ms: f64,
    /// When it began, from the update's first step on.
    pub at_ms: f64,
    /// What it consists of. Steps of two kernels may overlap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<PhaseTime>,
}

/// CPUs of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// That the machine has.
    pub total: u32,
    /// That went over to the successor.
    pub moved: u32,
    /// That are online in it at the end.
    pub online: u32,
}

/// A figure of both kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeforeAfter {
    /// The incumbent's.
    pub before: u64,
    /// The successor's.
    pub after: u64,
}

/// What became of writes; all were looked for at the very end, after the last update.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writes {
    /// That the service said yes to.
    pub acknowledged: u64,
    /// Of these, not there at the end.
    pub lost: u64,
    /// That were never answered: there or not, both is right.
    pub unknown: u64,
    /// Answers and content that cannot be.
    pub contradictions: u64,
    /// The first of the losses and contradictions, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub complaints: Vec<String>,
}

/// What became of connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Open all the time.
    pub kept: u64,
    /// Reset or closed by the machine.
    pub reset: u64,
    /// Given up by their client.
    pub timed_out: u64,
}

/// What `cargo demo compare --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// What ran the machines.
    pub accelerator: Accelerator,
    /// Their shape: the same for all.
    pub machine: MachineShape,
    /// The three ways.
    pub methods: Methods,
    /// kexec's median blackout in units of Baton's.
    pub ratio_kexec_over_baton: f64,
    /// A reboot's median blackout in units of Baton's.
    pub ratio_reboot_over_baton: f64,
}

/// The ways to change a kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Methods {
    /// Live updates, there and back in one machine.
    pub baton: Method,
    /// `kexec -e`, there and back in one machine; the new kernel was loaded before.
    pub kexec: Method,
    /// A reboot; the same kernel comes back.
    pub reboot: Method,
}

/// What one way gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// Of each run, in their order.
    pub blackout_ms: Vec<f64>,
    /// The same, with median and the rest.
    pub distribution: Distribution,
    /// Which kernels.
    pub runs: Vec<Run>,
    /// Medians of the phases and steps; only Baton has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<PhaseTime>,
    /// What became of the load's writes, all runs together.
    pub writes: Writes,
    /// Whether the service has its data afterwards.
    pub data_survives: bool,
    /// Folder with the machine's logs.
    pub logs: String,
}

/// One run of a way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Release before.
    pub from: String,
    /// Release after.
    pub to: String,
    /// The longest silence.
    pub blackout_ms: f64,
    /// In which phase of an update it began, as near as the two clocks can be laid beside each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence_began_in: Option<String>,
    /// The prober's own worst lateness within it.
    pub prober_stalled_ms: f64,
}

impl Writes {
    /// Of a load.
    #[must_use]
    pub fn of(load: &LoadReport) -> Self {
        let LoadReport { acknowledged, lost, unknown, contradictions, ref complaints, .. } = *load;
        Self { acknowledged, lost, unknown, contradictions, complaints: complaints.clone() }
    }

    /// Adds another load's.
    pub fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.lost += other.lost;
        self.unknown += other.unknown;
        self.contradictions += other.contradictions;
        self.complaints.extend(other.complaints.iter().take(20 - self.complaints.len().min(20)).cloned());
    }
}

impl Report {
    /// The report of a story that came to no update.
    #[must_use]
    pub fn without_updates(machine: MachineShape, failure: String) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            outcome: Outcome::Failed,
            accelerator: None,
            machine,
            hops: Vec::new(),
            failure: Some(failure),
            logs: None,
        }
    }

    /// Why this is no success although every update was carried through, if so.
    #[must_use]
    pub fn objection(hops: &[Hop]) -> Option<String> {
        hops.iter().enumerate().find_map(|(n, hop)| {
            let Writes { acknowledged, lost, contradictions, .. } = hop.writes;
            let n = n + 1;
            if lost > 0 || contradictions > 0 {
                let first = hop.writes.complaints.first().map(String::as_str).unwrap_or_default();
                return Some(format!(
                    "update {n}: of {acknowledged} acknowledged writes {lost} are lost; {contradictions} contradictions: {first}"
                ));
            }
            (acknowledged == 0).then(|| format!("update {n}: no write was acknowledged, which proves nothing"))
        })
    }
}

/// A successor's timeline as phases with their steps. A step belongs to the phase in which it began; what began in none (a successor's
/// own preparation, while the incumbent waits) to the last that had begun.
#[must_use]
pub fn phases(timeline: &[Span]) -> Vec<PhaseTime> {
    let is_phase = |span: &Span| phase::ALL.iter().any(|phase| phase.name() == span.name);
    let time = |span: &Span| PhaseTime { name: span.name.clone(), ms: span.ms, at_ms: span.at_ms, steps: Vec::new() };
    let by_time = |a: &PhaseTime, b: &PhaseTime| a.at_ms.total_cmp(&b.at_ms);
    let mut phases: Vec<PhaseTime> = timeline.iter().filter(|span| is_phase(span)).map(time).collect();
    phases.sort_by(by_time);
    let mut steps: Vec<PhaseTime> = timeline.iter().filter(|span| !is_phase(span)).map(time).collect();
    steps.sort_by(by_time);
    for step in steps {
        // A phase's own mark is set a moment after its first step's on some paths.
        let place = phases.partition_point(|phase| phase.at_ms <= step.at_ms + 1.0).saturating_sub(1);
        if let Some(phase) = phases.get_mut(place) {
            phase.steps.push(step);
        }
    }
    phases
}

/// Medians over several updates, by name. Numbers are left out of the names: which CPU is moved differs from update to update, and
/// one update's CPUs count together.
#[must_use]
pub fn medians(hops: &[&[PhaseTime]]) -> Vec<PhaseTime> {
    let without_number = |name: &str| name.trim_end_matches(|c: char| c.is_ascii_digit() || c == ' ').to_owned();
    let mut names: Vec<String> = Vec::new();
    for name in hops.iter().flat_map(|phases| phases.iter()).map(|phase| without_number(&phase.name)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let median = |values: Vec<f64>| Distribution::of(values).map_or(0.0, |d| d.median());
    let of_name = |name: String| {
        let of_hop = |phases: &&[PhaseTime]| -> Vec<PhaseTime> {
            phases.iter().filter(|phase| without_number(&phase.name) == name).cloned().collect()
        };
        let having: Vec<Vec<PhaseTime>> = hops.iter().map(of_hop).filter(|same| !same.is_empty()).collect();
        let steps: Vec<Vec<PhaseTime>> =
            having.iter().map(|same| same.iter().flat_map(|phase| phase.steps.clone()).collect()).collect();
        let steps: Vec<&[PhaseTime]> = steps.iter().map(Vec::as_slice).collect();
        PhaseTime {
            ms: median(having.iter().map(|same| same.iter().map(|phase| phase.ms).sum()).collect()),
            at_ms: median(having.iter().filter_map(|same| Some(same.first()?.at_ms)).collect()),
            steps: if steps.iter().all(|steps| steps.is_empty()) { Vec::new() } else { medians(&steps) },
            name,
        }
    };
    names.into_iter().map(of_name).collect()
}

/// The phase that was under way at a time of the timeline.
#[must_use]
pub fn phase_at(phases: &[PhaseTime], at_ms: f64) -> Option<&str> {
    let began = phases.iter().rev().find(|phase| phase.at_ms <= at_ms)?;
    Some(&began.name)
}

/// What emulation does to numbers, in a sentence.
fn caveat(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Tcg => "emulated (TCG): compare ratios, not milliseconds",
        Accelerator::Kvm => "KVM",
    }
}

/// Prose in lines that fit on a terminal.
fn wrapped(prose: &str) -> String {
    const WIDTH: usize = 110;
    let (mut text, mut column) = (String::new(), 0);
    for word in prose.split_whitespace() {
        let len = word.chars().count();
        if column > 0 && column + 1 + len > WIDTH {
            text.push('\n');
            column = 0;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += len;
    }
    text.push('\n');
    text
}

fn title(machine: &MachineShape, accelerator: Option<Accelerator>) -> String {
    let run_by = accelerator.map_or("not run", caveat);
    format!("machine: {} CPUs, {} MiB, {run_by}\n", machine.vcpus, machine.memory_mib)
}

fn measured(machine: &MachineShape) -> String {
    wrapped(&format!(
        "silence: the longest that a client saw: {} UDP probes a second, sent whether or not earlier ones were answered, from the \
         host's end of the machine's network to the service, by the host's clock; nothing is subtracted",
        machine.probe_hz
    ))
}

fn table(header: &[&str], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(header.iter().enumerate().map(|(n, text)| cell(text, numbers.contains(&n))).collect::<Vec<_>>());
    for column in numbers {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn cell(text: &str, number: bool) -> Cell {
    Cell::new(text).set_alignment(if number { CellAlignment::Right } else { CellAlignment::Left })
}

fn phase_table(phases: &[PhaseTime], header: &[&str]) -> String {
    let mut table = table(header, &[1, 2]);
    for phase in phases {
        let ms = |ms: f64| format!("{ms:.1}");
        table.add_row(vec![phase.name.clone(), ms(phase.at_ms), ms(phase.ms), steps_in_lines(&phase.steps)]);
    }
    table.to_string()
}

/// Steps side by side, in lines that fit on a terminal beside the other columns.
fn steps_in_lines(steps: &[PhaseTime]) -> String {
    const WIDTH: usize = 64;
    let mut lines = vec![String::new()];
    for step in steps {
        let text = format!("{} {:.1}", step.name, step.ms);
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(&text),
            Some(line) if line.len() + text.len() + 2 <= WIDTH => {
                let _ = write!(line, ", {text}");
            }
            _ => lines.push(text),
        }
    }
    lines.join("\n")
}

/// The report for people.
#[must_use]
pub fn for_people(report: &Report) -> String {
    let mut text = title(&report.machine, report.accelerator);
    for (n, hop) in report.hops.iter().enumerate() {
        let _ = writeln!(
            text,
            "\nupdate {} of {}: {} → {}",
            n + 1,
            report.hops.len(),
            hop.incumbent_release,
            hop.successor_release
        );
        let began = hop.silence_began_in.as_deref().map(|phase| format!(", began in `{phase}`")).unwrap_or_default();
        let _ = writeln!(text, "  silence      {:.1} ms{began}", hop.blackout_ms);
        if hop.silence.prober_stalled_ms > hop.blackout_ms / 4.0 {
            let _ = writeln!(
                text,
                "               (the prober itself was kept waiting for {:.1} ms of it: the host is too busy)",
                hop.silence.prober_stalled_ms
            );
        }
        let Writes { acknowledged, lost, unknown, .. } = hop.writes;
        let _ =
            writeln!(text, "  writes       {acknowledged} acknowledged, {lost} of them lost; {unknown} never answered");
        let Connections { kept, reset, timed_out } = hop.connections;
        let _ = writeln!(text, "  connections  {kept} kept, {reset} reset, {timed_out} timed out");
        let Cpus { total, moved, online } = hop.cpus;
        let _ = writeln!(text, "  CPUs         {moved} of {total} moved, {online} online");
        let BeforeAfter { before, after } = hop.mem_total_kib;
        let share = after as f64 / before.max(1) as f64 * 100.0;
        let _ = writeln!(text, "  memory       {before} KiB before, {after} KiB after ({share:.1} %)");
        for undone in &hop.left_undone {
            let _ = writeln!(text, "  left undone  {undone}");
        }
        let _ = writeln!(text, "{}", phase_table(&hop.phases, &["phase", "at ms", "ms", "steps (ms)"]));
    }
    if !report.hops.is_empty() {
        text += "\n";
        text += &measured(&report.machine);
    }
    if let Some(logs) = &report.logs {
        let _ = writeln!(text, "logs: {logs}");
    }
    let _ = match (report.outcome, &report.failure) {
        (Outcome::Committed, _) => writeln!(text, "outcome: committed"),
        (Outcome::RolledBack, why) => {
            writeln!(text, "outcome: rolled back, the old kernel goes on: {}", why.as_deref().unwrap_or_default())
        }
        (Outcome::Failed, why) => writeln!(text, "outcome: failed: {}", why.as_deref().unwrap_or_default()),
    };
    text
}

/// The comparison for people.
#[must_use]
pub fn comparison_for_people(comparison: &Comparison) -> String {
    let Methods { baton, kexec, reboot } = &comparison.methods;
    let mut text = title(&comparison.machine, Some(comparison.accelerator));
    text += &measured(&comparison.machine);
    let header = ["silence (ms)", "runs", "min", "median", "p90", "max", "× Baton", "data afterwards"];
    let mut rows = table(&header, &[1, 2, 3, 4, 5, 6]);
    let mut add = |name: &str, method: &Method| {
        let d = &method.distribution;
        let ms = |value: f64| format!("{value:.1}");
        let times = format!("{:.1}", d.median() / baton.distribution.median());
        let data = if method.data_survives { "all there" } else { "gone" };
        let values = [ms(d.min()), ms(d.median()), ms(d.p90()), ms(d.max())];
        let row = [name.to_owned(), d.count().to_string()].into_iter().chain(values);
        rows.add_row(row.chain([times, data.to_owned()]).collect::<Vec<_>>());
    };
    add("Baton", baton);
    for to in directions(baton) {
        if let Some(part) = only_to(baton, &to) {
            add(&format!("  to {}", short(&to)), &part);
        }
    }
    add("kexec -e", kexec);
    add("reboot", reboot);
    let _ = writeln!(text, "{rows}");
    let _ = writeln!(
        text,
        "writes acknowledged and lost: {}",
        losses(&[("Baton", baton), ("kexec", kexec), ("reboot", reboot)])
    );
    text += &wrapped(
        "kexec: the new kernel is loaded beforehand, and nothing is shut down in an orderly way before `kexec -e`. reboot: \
         `reboot -f`, and QEMU loads the same kernel again: no firmware self-test, no boot loader's menu, no disk. After both the \
         service starts EMPTY and answers at once: nothing is restored. All of that is in their favour.",
    );
    let _ = writeln!(text, "\nBaton, phase by phase (medians)");
    let _ = writeln!(text, "{}", phase_table(&baton.phases, &["phase", "at ms", "ms", "steps (ms)"]));
    let _ = write!(text, "\n{}", wrapped(&limit(baton)));
    let _ = writeln!(
        text,
        "kexec's median silence is {:.0} times Baton's, a reboot's {:.0} times.",
        comparison.ratio_kexec_over_baton, comparison.ratio_reboot_over_baton
    );
    let _ = writeln!(text, "logs: {}, {}, {}", baton.logs, kexec.logs, reboot.logs);
    text
}

fn losses(methods: &[(&str, &Method)]) -> String {
    let one =
        |(name, method): &(&str, &Method)| format!("{name} {} of {}", method.writes.lost, method.writes.acknowledged);
    let all: Vec<String> = methods.iter().map(one).collect();
    all.join(", ")
}

/// What the silence of a live update consists of: the cutover, if the silences began there; else something else was silent for longer.
fn limit(baton: &Method) -> String {
    let silence = baton.distribution.median();
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
         the {} updates began {} (placed by the serial line, tens of milliseconds early).",
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

fn only_to(method: &Method, to: &str) -> Option<Method> {
    let runs: Vec<Run> = method.runs.iter().filter(|run| run.to == to).cloned().collect();
    let blackout_ms: Vec<f64> = runs.iter().map(|run| run.blackout_ms).collect();
    let distribution = Distribution::of(blackout_ms.iter().copied())?;
    Some(Method { blackout_ms, distribution, runs, ..method.clone() })
}

/// A release without its vendor's words.
fn short(release: &str) -> &str {
    release.split(['+', '-']).next().unwrap_or(release)
}

#[cfg(test)]
mod tests;
