//! What the stories say, as plain data: JSON for programs ([`SCHEMA_VERSION`]), text for people. No I/O.

mod comparison;
mod scale;

use std::fmt::Write;

use agent::daemon::outcome::Class;
use agent::update::timeline::Span;
use comfy_table::{Cell, CellAlignment, Table, presets};
use handover::update::phase;
use serde::{Deserialize, Serialize};

use crate::lab::Accelerator;
use crate::load::LoadReport;
use crate::measure::{Distribution, Latencies, Silence};

pub use comparison::{Comparison, FailedRun, Method, Methods, Run, comparison_for_people};
pub use scale::scale_for_people;

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
    /// The update that was not, if one was begun.
    pub unfinished: Option<UnfinishedUpdate>,
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
    /// In which phase it began.
    pub silence_began_in: Option<String>,
    /// How far the clocks of clients and kernels may be apart, on which that rests.
    pub clocks_within_ms: f64,
    /// Probes until the cutover began: whatever the update does before it, clients should notice nothing.
    pub before_cutover: Probes,
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

/// Probes of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probes {
    /// That were due.
    pub due: usize,
    /// Of these, never answered.
    pub lost: usize,
}

/// What clients noticed of an update that was refused, undone or broken off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnfinishedUpdate {
    /// The kernel that was to take over.
    pub successor_release: String,
    /// How `baton upgrade` called it; nothing when it did not come to say so.
    pub class: Option<Class>,
    /// The longest silence, from the request for the update to two seconds after its end.
    pub silence: Option<Silence>,
    /// What became of the load's writes.
    pub writes: Writes,
    /// What became of the load's connections.
    pub connections: Connections,
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
    /// That the service said yes to, and that nobody could look for, because it could not be read any more.
    #[serde(default)]
    pub unread: u64,
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

impl Writes {
    /// Of a load.
    #[must_use]
    pub fn of(load: &LoadReport) -> Self {
        let LoadReport { acknowledged, lost, unknown, contradictions, ref complaints, .. } = *load;
        Self { acknowledged, lost, unread: 0, unknown, contradictions, complaints: complaints.clone() }
    }

    /// Of a load whose service is gone.
    #[must_use]
    pub fn unread(acknowledged: u64) -> Self {
        Self { unread: acknowledged, ..Self::default() }
    }

    /// Adds another load's.
    pub fn add(&mut self, other: &Self) {
        self.acknowledged += other.acknowledged;
        self.lost += other.lost;
        self.unread += other.unread;
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
            unfinished: None,
            failure: Some(failure),
            logs: None,
        }
    }

    /// Why this is no success although every update was carried through, if so.
    #[must_use]
    pub fn objection(hops: &[Hop]) -> Option<String> {
        hops.iter().enumerate().find_map(|(n, hop)| {
            let Writes { acknowledged, lost, unread, contradictions, .. } = hop.writes;
            let n = n + 1;
            if unread > 0 {
                return Some(format!("update {n}: {unread} acknowledged writes could not be read back"));
            }
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

/// What became of a load.
fn fate(writes: &Writes, connections: Connections) -> String {
    let Writes { acknowledged, lost, unread, unknown, .. } = writes;
    let unread = if *unread > 0 { format!("; {unread} more could not be read back") } else { String::new() };
    let Connections { kept, reset, timed_out } = connections;
    format!(
        "  writes       {acknowledged} acknowledged, {lost} of them lost{unread}; {unknown} never answered\n  \
           connections  {kept} kept, {reset} reset, {timed_out} timed out\n"
    )
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
        let Probes { due, lost } = hop.before_cutover;
        let _ = writeln!(text, "  before it    {lost} of {due} probes lost before the cutover");
        text += &fate(&hop.writes, hop.connections);
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
    if let Some(unfinished) = &report.unfinished {
        let _ = writeln!(text, "\nupdate to {}: not carried through", unfinished.successor_release);
        if let Some(silence) = unfinished.silence {
            let _ = writeln!(text, "  silence      {:.1} ms", silence.blackout_ms);
        }
        text += &fate(&unfinished.writes, unfinished.connections);
    }
    if !report.hops.is_empty() || report.unfinished.is_some() {
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

#[cfg(test)]
mod tests;
