//! Verdicts, out of what was seen of a candidate. Pure: facts in, checks out.

use kexec_core::klog::Record;
use kexec_core::klog::cause::complaints;
use kexec_core::klog::record::escaped;
use state_schemas::latest::message::{Counted, Ending, Examination, LiveUpdate};

use super::report::{Check, CheckVerdict};
use crate::machine::clock::Moment;
use crate::services::Crossing;

/// The checks of which a trial consists beside the operator's, in their order.
pub const BUILT_IN: [&str; 13] = [
    "boots",
    "services",
    "health",
    "cpus",
    "arenas",
    "schemas",
    "clock",
    "taint",
    "modules",
    "drivers",
    "liveupdate",
    "answers",
    "log",
];
/// How far the candidate's wall clock may be from this kernel's, in milliseconds: an update sets it anew at the cutover, so what is
/// looked for is a clock that does not go at the TSC's rate at all.
const CLOCK_BOUND_MS: f64 = 250.0;
/// `/proc/sys/kernel/tainted`: a module from outside the kernel's tree, and one without a signature. Baton's own is both.
const TAINT_OF_BATON: u64 = 1 << 12 | 1 << 13;
/// The letters of the other bits, from bit 0 on (Documentation/admin-guide/tainted-kernels.rst).
const TAINT_LETTERS: &str = "PFSRMBUDAWCIOELKXTNJ";
/// So many complaints of a log are told.
const COMPLAINTS: usize = 5;
/// How a shell says that there is no such command (POSIX, 2.8.2).
const NOT_FOUND: u32 = 127;

/// What the candidate was given, and must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// APIC ids of its CPUs.
    pub cpus: Vec<u32>,
    /// The services whose arenas it was told of.
    pub services: Vec<Crossing>,
    /// PCI functions.
    pub functions: u32,
    /// This kernel's clock, read before the candidate was asked.
    pub clock: Moment,
    /// The TSC's counts a millisecond.
    pub tsc_khz: u64,
    /// The candidate's kernel was found to have the Live Update Orchestrator.
    pub live_update: bool,
}

/// What a candidate's agent says of its kernel, against what it was given.
pub fn examined(examination: &Examination, given: &Given, ms: f64) -> Vec<Check> {
    let checks = [
        cpus(examination, given),
        arenas(examination, given),
        schemas(examination, given),
        clock(examination, given),
        taint(examination.taint),
        counted("modules", "module", "loaded", &examination.modules, None),
        counted("drivers", "PCI function", "driven", &examination.functions, Some(given.functions)),
        live_update(examination.live_update, given.live_update),
    ];
    let made = |(name, judged): (&str, Result<String, String>)| match judged {
        Ok(detail) => Check::pass(name, detail, ms),
        Err(detail) => Check::fail(name, detail, ms),
    };
    checks.into_iter().map(made).collect()
}

type Judged = (&'static str, Result<String, String>);

fn cpus(examination: &Examination, given: &Given) -> Judged {
    let sorted = |ids: &[u32]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.dedup();
        ids
    };
    let (up, wanted) = (sorted(&examination.cpus), sorted(&given.cpus));
    let list = |ids: &[u32]| ids.iter().map(|id| format!("{id:#x}")).collect::<Vec<_>>().join(", ");
    (
        "cpus",
        match up == wanted {
            true => Ok(format!("{} of {} online", up.len(), wanted.len())),
            false => Err(format!("APIC ids {} were given, {} are online", list(&wanted), list(&up))),
        },
    )
}

fn arenas(examination: &Examination, given: &Given) -> Judged {
    let mut wrong = Vec::new();
    let mut bytes = 0;
    for crossing in &given.services {
        let len: u64 = crossing.ranges.iter().map(|range| range.len()).sum();
        match examination.services.iter().find(|service| service.name.as_str() == crossing.name) {
            None => wrong.push(format!("{}: the candidate does not know it", crossing.name)),
            Some(there) if !there.trouble.as_str().is_empty() => {
                wrong.push(format!("{}: {}", crossing.name, clean(there.trouble.as_str())));
            }
            Some(there) if there.mapped != len => {
                wrong.push(format!("{}: {} of {len} bytes could be mapped", crossing.name, there.mapped));
            }
            Some(_) => bytes += len,
        }
    }
    (
        "arenas",
        match wrong.is_empty() {
            true => Ok(format!("{} attached read-only, {} MiB", given.services.len(), bytes >> 20)),
            false => Err(wrong.join("; ")),
        },
    )
}

fn schemas(examination: &Examination, given: &Given) -> Judged {
    let mut wrong = Vec::new();
    for crossing in &given.services {
        let Some(there) = examination.services.iter().find(|service| service.name.as_str() == crossing.name) else {
            wrong.push(format!("{}: it has not come", crossing.name));
            continue;
        };
        let (kind, version) = (there.schema_kind, there.schema_version);
        // A newer program reads what an older one kept; of the same kind it must be.
        if kind != crossing.schema_kind || version < crossing.schema_version {
            wrong.push(format!(
                "{} keeps kind {} version {}, and reads kind {kind} version {version} there ({})",
                crossing.name,
                crossing.schema_kind,
                crossing.schema_version,
                clean(there.state.as_str())
            ));
        }
    }
    (
        "schemas",
        match wrong.is_empty() {
            true => Ok(format!("{} read what is kept", services(given.services.len()))),
            false => Err(wrong.join("; ")),
        },
    )
}

fn services(count: usize) -> String {
    if count == 1 { "1 service".to_owned() } else { format!("{count} services") }
}

fn clock(examination: &Examination, given: &Given) -> Judged {
    (
        "clock",
        match given.clock.unix_ns_at(examination.tsc, given.tsc_khz) {
            None => Err(format!("its TSC read {}, before this kernel's {}", examination.tsc, given.clock.tsc)),
            Some(here) => {
                let off_ms = (i128::from(examination.unix_ns) - i128::from(here)) as f64 / 1e6;
                match off_ms.abs() <= CLOCK_BOUND_MS {
                    true => Ok(format!("{off_ms:+.3} ms from this kernel's")),
                    false => {
                        Err(format!("{off_ms:+.3} ms from this kernel's, at most {CLOCK_BOUND_MS} ms are allowed"))
                    }
                }
            }
        },
    )
}

fn taint(taint: u64) -> Judged {
    let other = taint & !TAINT_OF_BATON;
    let letters: String =
        (0..64).filter(|bit| other >> bit & 1 == 1).map(|bit| TAINT_LETTERS.chars().nth(bit).unwrap_or('?')).collect();
    (
        "taint",
        match other {
            0 => Ok(format!("{taint:#x}: Baton's own module")),
            _ => Err(format!("{taint:#x}: {letters} (Documentation/admin-guide/tainted-kernels.rst)")),
        },
    )
}

fn counted(name: &'static str, what: &str, good: &str, seen: &Counted, expected: Option<u32>) -> Judged {
    let wrong: Vec<String> = seen.wrong.iter().map(|text| clean(text.as_str())).collect();
    (
        name,
        match expected {
            _ if !wrong.is_empty() => Err(format!("not {good}: {}", wrong.join(", "))),
            Some(expected) if expected != seen.count => {
                Err(format!("{expected} {what}s were given, the candidate has {}", seen.count))
            }
            _ => Ok(format!("{} of {} {what}s {good}", seen.count, seen.count)),
        },
    )
}

fn live_update(seen: LiveUpdate, expected: bool) -> Judged {
    (
        "liveupdate",
        match (seen, expected) {
            (LiveUpdate::Opened, _) => Ok("/dev/liveupdate opens".to_owned()),
            (LiveUpdate::Absent, false) => Ok("this kernel has no Live Update Orchestrator".to_owned()),
            (LiveUpdate::Absent, true) => {
                Err("the image was built with the Live Update Orchestrator, and there is no /dev/liveupdate".to_owned())
            }
        },
    )
}

/// How a command of the operator's ended.
pub fn command(command: &str, ending: &Ending, output: &str, took_ms: u32) -> Check {
    let (verdict, how) = match ending {
        Ending::Exited { code: 0 } => (CheckVerdict::Pass, "exit code 0".to_owned()),
        Ending::Exited { code: NOT_FOUND } => (CheckVerdict::Missing, format!("exit code {NOT_FOUND}")),
        Ending::Exited { code } => (CheckVerdict::Fail, format!("exit code {code}")),
        Ending::Killed { signal } => (CheckVerdict::Fail, format!("killed by signal {signal}")),
        Ending::TimedOut => (CheckVerdict::TimedOut, format!("killed after {:.1} s", f64::from(took_ms) / 1e3)),
        Ending::NotStarted { cause } => {
            (CheckVerdict::Missing, format!("it cannot be started: {}", clean(cause.as_str())))
        }
    };
    // Other kernel, other program: neither may write on this terminal what it likes.
    let output = escaped(output.trim_end().as_bytes());
    let detail = if output.is_empty() { how } else { format!("{how}\n{output}") };
    Check { name: clean(command), verdict, detail, ms: took_ms.into() }
}

/// What the candidate's kernel said of itself, as the incumbent reads it out of its memory.
pub fn log(records: &[Record], ms: f64) -> Check {
    const NAME: &str = "log";
    let found = complaints(records, COMPLAINTS);
    if records.is_empty() {
        return Check::fail(NAME, "it left no message that could be read", ms);
    }
    if !found.is_empty() {
        let all: Vec<String> = found.iter().map(ToString::to_string).collect();
        return Check::fail(NAME, all.join("\n"), ms);
    }
    let passed =
        |record: &Record| record.is_kernels() && record.text.starts_with("x86/mm: Checked W+X mappings: passed");
    let mappings = if records.iter().any(passed) { "; no W+X mapping" } else { "" };
    let missing = match records[0].seq {
        0 => String::new(),
        first => format!(" (from message {first} on: those before are overwritten)"),
    };
    Check::pass(
        NAME,
        format!("no WARN, BUG, oops, stall or lockdep report in {} messages{missing}{mappings}", records.len()),
        ms,
    )
}

/// All checks of a trial whatever became of it: those that were made, and those that were not.
pub fn all(made: Vec<Check>, commands: &[String]) -> Vec<Check> {
    let before_commands = BUILT_IN.len() - 2;
    let names = BUILT_IN[..before_commands].iter().map(|name| (*name).to_owned());
    let names = names.chain(commands.iter().map(|command| clean(command)));
    let names: Vec<String> = names.chain(BUILT_IN[before_commands..].iter().map(|name| (*name).to_owned())).collect();
    let mut left = made;
    let mut all = Vec::with_capacity(names.len());
    for name in names {
        all.push(match left.iter().position(|check| check.name == name) {
            Some(at) => left.remove(at),
            None => Check { name, verdict: CheckVerdict::NotMade, detail: "the trial ended before".into(), ms: 0.0 },
        });
    }
    all.extend(left);
    all
}

/// The other kernel's words on one line that a terminal shows and does not obey.
fn clean(text: &str) -> String {
    escaped(text.as_bytes()).replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kexec_core::klog::Caller;
    use kexec_core::memory_map::Range;
    use state_schemas::latest::message::Attached;

    fn given() -> Given {
        Given {
            cpus: vec![3, 1],
            services: vec![Crossing {
                name: "kv".into(),
                schema_kind: 7,
                schema_version: 2,
                ranges: vec![Range::new(0, 4 << 20), Range::new(8 << 20, 9 << 20)],
            }],
            functions: 1,
            clock: Moment { tsc: 1_000_000, unix_ns: 5_000_000_000 },
            tsc_khz: 1_000_000,
            live_update: false,
        }
    }

    /// As a good candidate answers, a millisecond later.
    fn good() -> Examination {
        Examination {
            cpus: vec![1, 3],
            tsc: 2_000_000,
            unix_ns: 5_001_000_000,
            taint: 0x3000,
            services: vec![Attached {
                name: "kv".into(),
                state: "standby".into(),
                schema_kind: 7,
                schema_version: 2,
                mapped: 5 << 20,
                trouble: "".into(),
            }],
            modules: Counted { count: 3, wrong: vec![] },
            functions: Counted { count: 1, wrong: vec![] },
            live_update: LiveUpdate::Absent,
        }
    }

    #[test]
    fn a_good_candidate_passes_each() {
        let checks = examined(&good(), &given(), 4.0);
        assert!(checks.iter().all(Check::is_passed), "{checks:?}");
        let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, BUILT_IN[3..11]);
    }

    /// The check that it fails, what is said, and what was changed.
    type Fault<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Examination));

    /// Each lie and each fault fails its own check, and no other.
    #[test]
    fn each_fault_fails_its_own_check() {
        let faults: [Fault<'_>; 15] = [
            ("cpus", "0x1, 0x3 were given, 0x1 are online", &|e| e.cpus = vec![1, 1]),
            ("cpus", "0x1, 0x3, 0x9 are online", &|e| e.cpus.push(9)),
            ("arenas", "does not know it", &|e| e.services[0].name = "vk".into()),
            ("arenas", "kv: no arena\\u{1b} here", &|e| e.services[0].trouble = "no arena\u{1b}\nhere".into()),
            ("arenas", "4096 of 5242880 bytes", &|e| e.services[0].mapped = 4096),
            ("schemas", "reads kind 8 version 2 there", &|e| e.services[0].schema_kind = 8),
            ("schemas", "reads kind 7 version 1 there", &|e| e.services[0].schema_version = 1),
            ("clock", "+251.000 ms", &|e| e.unix_ns += 251_000_000),
            ("clock", "-251.000 ms", &|e| e.unix_ns -= 251_000_000),
            ("clock", "before this kernel's", &|e| e.tsc = 0),
            ("taint", "0x3200: W", &|e| e.taint |= 1 << 9),
            ("taint", "D?", &|e| e.taint = 1 << 7 | 1 << 63),
            ("modules", "not loaded: virtio_net: EINVAL", &|e| e.modules.wrong = vec!["virtio_net: EINVAL".into()]),
            ("drivers", "1 PCI functions were given, the candidate has 0", &|e| e.functions.count = 0),
            ("drivers", "not driven: 0000:00:02.0", &|e| e.functions.wrong = vec!["0000:00:02.0".into()]),
        ];
        for (name, told, fault) in faults {
            let mut examination = good();
            fault(&mut examination);
            let checks = examined(&examination, &given(), 0.0);
            // One that is not there fails both checks of services.
            let failed: Vec<&Check> = checks.iter().filter(|check| !check.is_passed()).collect();
            let first = failed.first().unwrap_or_else(|| panic!("{name}: nothing failed"));
            assert_eq!(first.name, name);
            assert!(first.detail.contains(told), "{name}: {:?}", first.detail);
            assert!(failed.len() == 1 || told == "does not know it", "{failed:?}");
        }
        let with = Given { live_update: true, ..given() };
        assert!(examined(&good(), &with, 0.0).iter().any(|check| !check.is_passed() && check.name == "liveupdate"));
        let opened = Examination { live_update: LiveUpdate::Opened, ..good() };
        assert!(examined(&opened, &with, 0.0).iter().all(Check::is_passed));
    }

    #[test]
    fn each_ending_of_a_command_has_its_verdict() {
        let told = |ending: Ending, output: &str| {
            let check = command("it \u{1b}[1m", &ending, output, 1500);
            assert_eq!(check.name, "it \\u{1b}[1m");
            (check.verdict, check.detail)
        };
        use CheckVerdict::{Fail, Missing, Pass, TimedOut};
        assert_eq!(told(Ending::Exited { code: 0 }, ""), (Pass, "exit code 0".into()));
        assert_eq!(told(Ending::Exited { code: 1 }, "a\u{7}\n"), (Fail, "exit code 1\na\\u{7}".into()));
        assert_eq!(told(Ending::Exited { code: 127 }, "").0, Missing);
        assert_eq!(told(Ending::Killed { signal: 11 }, ""), (Fail, "killed by signal 11".into()));
        assert_eq!(told(Ending::TimedOut, ""), (TimedOut, "killed after 1.5 s".into()));
        assert_eq!(told(Ending::NotStarted { cause: "no shell".into() }, "").0, Missing);
    }

    fn record(seq: u64, facility: u8, text: &str) -> Record {
        let (ts_ns, level, caller) = (0, 4, Caller::Cpu(0));
        Record { seq, ts_ns, level, facility, caller, text: text.into(), subsystem: None, device: None }
    }

    #[test]
    fn a_log_passes_only_if_it_was_read_and_has_no_complaint() {
        assert!(!log(&[], 0.0).is_passed());
        let fine = [record(0, 0, "Linux version"), record(1, 1, "WARNING: says a program")];
        assert!(log(&fine, 0.0).is_passed());
        let late = log(&[record(9, 0, "on")], 0.0);
        assert!(late.is_passed() && late.detail.contains("from message 9 on"));
        let warned = log(&[record(0, 0, "WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2")], 0.0);
        assert!(!warned.is_passed() && warned.detail.contains("its kernel warned: WARNING: CPU: 0"), "{warned:?}");
    }

    #[test]
    fn what_was_not_made_is_listed_as_such() {
        let commands = ["true".to_owned(), "true".to_owned()];
        let made = vec![Check::pass("boots", "", 1.0), Check::fail("true", "exit code 1", 2.0)];
        let all = all(made, &commands);
        assert_eq!(all.len(), BUILT_IN.len() + 2);
        let verdicts: Vec<CheckVerdict> =
            all.iter().filter(|check| check.name == "true").map(|check| check.verdict).collect();
        assert_eq!(verdicts, [CheckVerdict::Fail, CheckVerdict::NotMade]);
        assert_eq!((all[0].name.as_str(), all[0].is_passed()), ("boots", true));
        assert_eq!((all[12].name.as_str(), all[14].name.as_str()), ("true", "log"));
        assert_eq!(all[13].verdict, CheckVerdict::NotMade);
    }
}
