//! Why a kernel died, or what it said last, out of its log.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::record::Record;

/// What a kernel died of, as far as its log says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeathCause {
    /// Of which kind.
    pub kind: Kind,
    /// In the kernel's words.
    pub what: String,
    /// Where, as the kernel names it: `function+offset/length [module]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// What went wrong before, where this is only what became of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// Kinds of causes, the gravest first: what is told is the gravest, and of those the first (an oops that follows an oops says
/// less), except for [`Kind::Error`], of which it is the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It ended itself: `Kernel panic - not syncing`.
    Panic,
    /// A fault of the kernel's own: `BUG:`, `Oops:`, `kernel BUG at`.
    Oops,
    /// A CPU or a task did not go on.
    Lockup,
    /// No memory was left.
    Memory,
    /// A module would not load.
    Module,
    /// What the agent over there reported as an error.
    Agent,
    /// The first program gave up, and so nothing else was started.
    Init,
    /// What it complained of last, with the level of an error.
    Error,
    /// `WARNING:`: a doubt of the kernel's own.
    Warning,
}

impl Kind {
    /// Nothing that the kernel did afterwards can be trusted.
    pub fn is_fatal(self) -> bool {
        self <= Kind::Memory
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Panic => "its kernel panicked",
            Kind::Oops => "its kernel had a fault",
            Kind::Lockup => "its kernel hung",
            Kind::Memory => "its kernel ran out of memory",
            Kind::Module => "a module did not load in it",
            Kind::Agent => "its agent reported",
            Kind::Init => "its first program gave up",
            Kind::Error => "its last error",
            Kind::Warning => "its kernel warned",
        })
    }
}

impl fmt::Display for DeathCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.what)?;
        if let Some(after) = &self.after {
            write!(f, ", after {after}")?;
        }
        if let Some(place) = &self.place {
            write!(f, ", in {place}")?;
        }
        Ok(())
    }
}

/// How a log ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogTail {
    /// Why the kernel died, if it said so.
    pub cause: Option<DeathCause>,
    /// Its last lines, with their times.
    pub lines: Vec<String>,
    /// Its last message.
    pub last: Option<String>,
}

impl LogTail {
    /// The end of a log: its last `lines` lines.
    pub fn of(records: &[Record], lines: usize) -> LogTail {
        let mut tail: Vec<String> = Vec::new();
        for record in records.iter().rev() {
            if tail.len() >= lines {
                break;
            }
            tail.extend(record.lines().collect::<Vec<_>>().into_iter().rev());
        }
        tail.truncate(lines);
        tail.reverse();
        let last = records.iter().rev().find_map(|record| record.text.lines().next_back());
        LogTail { cause: cause_of(records), lines: tail, last: last.map(str::to_owned) }
    }
}

impl fmt::Display for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.last.as_deref().map(|last| format!("its last message: {last}"));
        match (&self.cause, last) {
            // A panic is the end; of everything else it matters how far it came.
            (Some(cause), _) if cause.kind == Kind::Panic => write!(f, "{cause}"),
            (Some(cause), Some(last)) if !last.ends_with(&cause.what) => write!(f, "{cause}; {last}"),
            (Some(cause), _) => write!(f, "{cause}"),
            (None, Some(last)) => f.write_str(&last),
            (None, None) => f.write_str("it left no message"),
        }
    }
}

/// How a panic begins.
const PANIC: &str = "Kernel panic - not syncing: ";
/// How process 1 of our initrds says that it gives up.
const INIT: &str = "baton-init: ";
/// All that a kernel complained of: what [`cause_of`] knows how to tell, from a panic down to a warning, each with the function if it
/// said one. At most `most` of them, in their order.
///
/// Only what the kernel itself wrote counts. An oops is several lines that each begin like one, so what follows a complaint of the
/// same kind within its stack is part of it.
pub fn complaints(records: &[Record], most: usize) -> Vec<DeathCause> {
    let kernels = records.iter().filter(|record| record.is_kernels());
    let said: Vec<(usize, &str)> = kernels.flat_map(|record| record.text.lines()).enumerate().collect();
    let mut found: Vec<(usize, DeathCause)> = Vec::new();
    for (n, line) in &said {
        let Some(kind) = kind_of(line) else { continue };
        if found.last().is_some_and(|(last, of)| of.kind == kind && n - last < STACK) {
            continue;
        }
        if found.len() == most {
            break;
        }
        let place = rip_after(&said, *n).filter(|_| kind != Kind::Module && kind != Kind::Memory);
        found.push((*n, DeathCause { kind, what: (*line).to_owned(), place, after: None }));
    }
    found.into_iter().map(|(_, complaint)| complaint).collect()
}

/// What comes before the name of the function, in the kernel (selector 0x10).
const RIP: &str = "RIP: 0010:";
/// Functions through which every panic goes: the frame below them is the one that panicked.
const PANIC_ITSELF: [&str; 6] = ["dump_stack_lvl+", "dump_stack+", "panic+", "vpanic+", "nmi_panic+", "__warn+"];
/// An oops, and a stack, belong to a cause when they are within so many lines of it.
const NEAR: usize = 120;
/// No second complaint of the same kind is told within so many lines: they are those of its registers and its stack.
const STACK: usize = 12;

/// The gravest thing that a log tells, in the words of the kernel. Only what the kernel itself wrote counts as the kernel's; the agent
/// and the first program are heard, too, when they say why they end.
pub fn cause_of(records: &[Record]) -> Option<DeathCause> {
    let lines: Vec<(&Record, &str)> =
        records.iter().flat_map(|record| record.text.lines().map(move |line| (record, line))).collect();
    let kernel = |(n, (record, line)): (usize, &(&Record, _))| record.is_kernels().then_some((n, *line));
    let said: Vec<(usize, &str)> = lines.iter().enumerate().filter_map(kernel).collect();
    let first = |kind: Kind| said.iter().find(|(_, line)| kind_of(line) == Some(kind)).copied();
    if let Some((n, line)) = first(Kind::Panic) {
        let what = line.trim_start_matches(PANIC).to_owned();
        let before = &said[..said.partition_point(|(other, _)| *other < n)];
        let near = &before[before.len().saturating_sub(NEAR)..];
        let oops = near.iter().find(|(_, line)| kind_of(line) == Some(Kind::Oops));
        let place = match oops {
            Some((at, _)) => rip_after(&said, *at),
            None => rip_after(&said, n).or_else(|| frame_after(&said, n)),
        };
        return Some(DeathCause { kind: Kind::Panic, what, place, after: oops.map(|(_, line)| (*line).to_owned()) });
    }
    for kind in [Kind::Oops, Kind::Lockup, Kind::Memory, Kind::Module] {
        if let Some((n, line)) = first(kind) {
            let place = if kind == Kind::Oops || kind == Kind::Lockup { rip_after(&said, n) } else { None };
            return Some(DeathCause { kind, what: line.to_owned(), place, after: None });
        }
    }
    let plain = |kind, what: &str| DeathCause { kind, what: what.to_owned(), place: None, after: None };
    let mut programs = lines.iter().filter(|(record, _)| !record.is_kernels());
    if let Some((_, why)) = programs.clone().find_map(|(_, line)| agents_error(line)) {
        return Some(plain(Kind::Agent, why));
    }
    let gave_up = programs.rfind(|(record, line)| record.level <= ERROR && line.starts_with(INIT));
    if let Some((_, line)) = gave_up {
        return Some(plain(Kind::Init, line.trim_start_matches(INIT)));
    }
    let says_something = |line: &str| !line.trim().is_empty() && !line.contains(EACH_SUCCESSORS);
    let complained = lines.iter().rfind(|(record, line)| record.level <= ERROR && says_something(line));
    if let Some((_, line)) = complained {
        return Some(plain(Kind::Error, line));
    }
    first(Kind::Warning).map(|(_, line)| plain(Kind::Warning, line))
}

/// An error of every successor's, which is booted with `pci=off` (arch/x86/pci/init.c): it tells of nothing.
const EACH_SUCCESSORS: &str = "PCI: Fatal: No config space access function found";

/// Why the agent over there will never answer: the error with which its program ended, or its part as a successor. Of its other errors
/// it may get better.
pub fn agent_gave_up(records: &[Record]) -> Option<&str> {
    let programs = records.iter().filter(|record| !record.is_kernels());
    let mut errors = programs.flat_map(|record| record.text.lines()).filter_map(agents_error);
    errors.find_map(
        |(target, message)| if target == "batond" { Some(message) } else { message.strip_prefix(AS_SUCCESSOR) },
    )
}

/// How the agent says that it cannot be a successor, and why.
pub const AS_SUCCESSOR: &str = "as successor: ";

/// Who tells of an error, and what, in a line of batond's tracing: `TIME ERROR TARGET: MESSAGE`.
fn agents_error(line: &str) -> Option<(&str, &str)> {
    let (time, rest) = line.trim_start().split_once(' ')?;
    let told = rest.trim_start().strip_prefix("ERROR ")?.split_once(": ")?;
    (time.starts_with(|c: char| c.is_ascii_digit()) && time.ends_with('Z')).then_some(told)
}

/// KERN_ERR; what is graver is less.
const ERROR: u8 = 3;

/// What a line of the kernel's is about, by how such lines begin in 6.12 and 7.3.
fn kind_of(line: &str) -> Option<Kind> {
    let begins = |starts: &[&str]| starts.iter().any(|start| line.starts_with(start));
    let says = |parts: &[&str]| parts.iter().any(|part| line.contains(part));
    if begins(&[PANIC]) {
        Some(Kind::Panic)
    } else if begins(&["BUG: ", "Oops: ", "kernel BUG at ", "general protection fault", "PANIC: double fault"]) {
        Some(Kind::Oops)
    } else if begins(&["watchdog: BUG: soft lockup", "INFO: task "])
        || says(&["hard LOCKUP", "detected stalls on CPUs", "self-detected stall on CPU"])
    {
        Some(Kind::Lockup)
    } else if begins(&["Out of memory: ", "Out of memory and no killable"]) {
        Some(Kind::Memory)
    } else if says(&[
        ": version magic '",
        ": Unknown symbol ",
        ": disagrees about version of symbol ",
        "Loading of module with unavailable key is rejected",
        "Loading of unsigned module is rejected",
    ]) {
        Some(Kind::Module)
    } else if begins(&[
        // Every report of lockdep's begins so, too, but for the next one.
        "WARNING: ",
        "INFO: trying to register non-static key",
        "UBSAN: ",
        "x86/mm: Found insecure W+X mapping",
        "x86/mm: Checked W+X mappings: FAILED",
    ]) {
        Some(Kind::Warning)
    } else {
        None
    }
}

fn after<'a>(said: &'a [(usize, &'a str)], line: usize) -> impl Iterator<Item = &'a str> {
    said.iter().skip_while(move |(n, _)| *n < line).take(NEAR).map(|(_, line)| *line)
}

/// The function of the first kernel `RIP:` from this line on.
fn rip_after(said: &[(usize, &str)], line: usize) -> Option<String> {
    after(said, line).find_map(|line| line.strip_prefix(RIP)).map(str::to_owned)
}

/// The first frame of the stack that follows this line, below panic() itself.
fn frame_after(said: &[(usize, &str)], line: usize) -> Option<String> {
    let mut stack = after(said, line).skip_while(|line| !line.starts_with("Call Trace:")).skip(1);
    let frame = stack.find(|line| {
        let line = line.trim_start();
        !line.starts_with(['?', '<']) && !PANIC_ITSELF.iter().any(|itself| line.starts_with(itself))
    })?;
    let frame = frame.trim();
    frame.contains("+0x").then(|| frame.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::klog::Caller;

    /// A log: each line with its level, 8 more for one that a program wrote.
    fn log(lines: &[(u8, &str)]) -> Vec<Record> {
        let record = |(seq, (level, text)): (usize, &(u8, &str))| Record {
            seq: seq as u64,
            ts_ns: 0,
            level: level % 8,
            facility: level / 8,
            caller: Caller::Thread(1),
            text: (*text).to_owned(),
            subsystem: None,
            device: None,
        };
        lines.iter().enumerate().map(record).collect()
    }

    fn told(lines: &[(u8, &str)]) -> String {
        LogTail::of(&log(lines), 30).to_string()
    }

    #[test]
    fn a_panic_is_told_with_the_function_that_panicked() {
        assert_eq!(
            told(&[
                (6, "sysrq: Trigger a crash"),
                (0, "Kernel panic - not syncing: sysrq triggered crash"),
                (0, "CPU: 3 UID: 0 PID: 1 Comm: init Not tainted"),
                (0, "Call Trace:"),
                (0, " <TASK>"),
                (0, " dump_stack_lvl+0x5d/0x80"),
                (0, " panic+0x118/0x2db"),
                (0, " ? _printk+0x64/0x80"),
                (0, " sysrq_handle_crash+0x16/0x20"),
                (0, "RIP: 0033:0x7f0c5a0a5b00"),
                (6, "Kernel Offset: disabled"),
            ]),
            "its kernel panicked: sysrq triggered crash, in sysrq_handle_crash+0x16/0x20"
        );
    }

    #[test]
    fn a_panic_that_follows_an_oops_is_told_with_it() {
        assert_eq!(
            told(&[
                (1, "BUG: kernel NULL pointer dereference, address: 0000000000000010"),
                (1, "Oops: Oops: 0002 [#1] PREEMPT SMP PTI"),
                (4, "RIP: 0010:bad_probe+0x2a/0x100 [virtio_net]"),
                (4, "RIP: 0033:0x7f0c5a0a5b00"),
                (0, "Kernel panic - not syncing: Fatal exception"),
            ]),
            "its kernel panicked: Fatal exception, after BUG: kernel NULL pointer dereference, address: 0000000000000010, \
             in bad_probe+0x2a/0x100 [virtio_net]"
        );
    }

    #[test]
    fn what_is_less_than_a_panic_is_told_with_the_last_message() {
        assert_eq!(
            told(&[(1, "kernel BUG at mm/slub.c:4"), (4, "RIP: 0010:kfree+0x1/0x2"), (6, "and goes on")]),
            "its kernel had a fault: kernel BUG at mm/slub.c:4, in kfree+0x1/0x2; its last message: and goes on"
        );
        assert_eq!(
            told(&[(3, "baton: version magic '6.12 SMP' should be '7.3 SMP'"), (6, "random: crng init done")]),
            "a module did not load in it: baton: version magic '6.12 SMP' should be '7.3 SMP'; its last message: random: \
             crng init done"
        );
        assert_eq!(
            told(&[(6, "smp: Bringing up secondary CPUs ...")]),
            "its last message: smp: Bringing up secondary CPUs ..."
        );
        assert_eq!(told(&[(3, "mce: no"), (6, "on")]), "its last error: mce: no; its last message: on");
        assert_eq!(told(&[(3, "mce: no")]), "its last error: mce: no");
        assert_eq!(
            told(&[(3, "PCI: Fatal: No config space access function found"), (6, "on")]),
            "its last message: on"
        );
        assert_eq!(told(&[]), "it left no message");
    }

    #[test]
    fn programs_cannot_say_that_the_kernel_panicked() {
        let program = 8;
        assert_eq!(
            told(&[(program, "Kernel panic - not syncing: no"), (program + 5, "baton-init on 7.3")]),
            "its last error: Kernel panic - not syncing: no; its last message: baton-init on 7.3"
        );
        assert_eq!(
            told(&[
                (program + 4, "2026-11-28T12:00:00.123456Z ERROR agent::daemon: as successor: no interface appeared"),
                (program + 4, "2026-11-28T12:00:00.123456Z ERROR agent::daemon: and more"),
                (program + 5, "baton-init: batond (pid 70) ended"),
            ]),
            "its agent reported: as successor: no interface appeared; its last message: baton-init: batond (pid 70) ended"
        );
        assert_eq!(
            told(&[(program + 3, "baton-init: /etc/baton/config.toml: no such file"), (6, "reboot: Power down")]),
            "its first program gave up: /etc/baton/config.toml: no such file; its last message: reboot: Power down"
        );
    }

    #[test]
    fn an_agent_gives_up_by_its_last_error_only() {
        let program = 8;
        let gave_up = |lines: &[(u8, &str)]| agent_gave_up(&log(lines)).map(str::to_owned);
        let ended = "2026-11-28T12:00:00.123456Z ERROR batond: the control block cannot be read: no magic";
        let other = "2026-11-28T12:00:00.123456Z ERROR agent::services::access: there is no user x here";
        let part = "2026-11-28T12:00:00.123456Z ERROR agent::daemon: as successor: no interface appeared";
        assert_eq!(gave_up(&[(program + 4, other)]), None);
        assert_eq!(gave_up(&[(program + 4, other), (program + 4, part)]).as_deref(), Some("no interface appeared"));
        assert_eq!(gave_up(&[(program + 4, ended)]).as_deref(), Some("the control block cannot be read: no magic"));
        assert_eq!(gave_up(&[(4, ended)]), None, "the kernel does not speak for it");
    }

    #[test]
    fn each_complaint_of_the_kernels_own_is_told_once() {
        let told = |lines: &[(u8, &str)], most| {
            complaints(&log(lines), most).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let program = 8;
        let lines = [
            (6, "Speculative Return Stack Overflow: WARNING: See https://kernel.org/"),
            (program, "WARNING: from a program"),
            (4, "WARNING: CPU: 0 PID: 1 at mm/slub.c:7 kfree+0x1/0x2"),
            (4, "RIP: 0010:kfree+0x1/0x2"),
            (4, "WARNING: possible circular locking dependency detected"),
            (1, "BUG: unable to handle page fault for address: 0"),
            (1, "Oops: Oops: 0002 [#1] PREEMPT SMP PTI"),
            (6, "x86/mm: Checked W+X mappings: passed, no W+X pages found."),
            (4, "UBSAN: array-index-out-of-bounds in a.c:1"),
        ];
        assert_eq!(
            told(&lines, 9),
            [
                "its kernel warned: WARNING: CPU: 0 PID: 1 at mm/slub.c:7 kfree+0x1/0x2, in kfree+0x1/0x2",
                "its kernel had a fault: BUG: unable to handle page fault for address: 0",
                "its kernel warned: UBSAN: array-index-out-of-bounds in a.c:1",
            ]
        );
        assert_eq!(told(&lines, 1).len(), 1);
        assert!(told(&[(6, "smp: Brought up 1 node, 1 CPU"), (3, "mce: no")], 9).is_empty());
    }

    #[test]
    fn the_tail_has_as_many_lines_as_asked_for() {
        let records = log(&[(6, "a"), (6, "b\nc\nd"), (6, "")]);
        let lines =
            |count| LogTail::of(&records, count).lines.iter().map(|line| line[15..].to_owned()).collect::<Vec<_>>();
        assert_eq!(lines(3), ["c", "d", ""]);
        assert_eq!(lines(9), ["a", "b", "c", "d", ""]);
        assert_eq!(lines(0), [""; 0]);
    }
}
