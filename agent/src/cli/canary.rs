//! `baton canary`: a kernel is tried beside this one, and everything is taken back.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::output::{complain, print_json, unexpected};
use super::upgrade::{BootArgs, refused};
use crate::daemon::control::{Canary, Reply};
use crate::daemon::outcome::{Class, Failure};
use crate::update::trial::Trial;
use crate::update::trial::report::{Candidate, CheckVerdict, Report, Verdict};

/// What a trial is asked for.
#[derive(Debug, Args)]
pub struct CanaryArgs {
    /// The candidate's image (bzImage), such as /boot/vmlinuz-7.3.4+deb13-cloud-amd64.
    #[arg(long)]
    kernel: PathBuf,
    #[command(flatten)]
    boot: BootArgs,
    /// CPUs that the candidate gets, the one on which it boots included.
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: u32,
    /// The candidate's memory: 512M, 2G; default: update.region_mib of the configuration.
    #[arg(long, value_parser = memory_mib, value_name = "SIZE")]
    memory: Option<u64>,
    /// How long the candidate is watched from its first check on: 90s, 5m, 1h.
    #[arg(long = "for", value_parser = humantime::parse_duration, default_value = "60s", value_name = "TIME")]
    watch: Duration,
    /// A command that a shell runs in the candidate; exit code 0 is good. May be given more than once.
    #[arg(long = "check", value_name = "CMD", allow_hyphen_values = true)]
    checks: Vec<String>,
    /// How long each of these commands may take.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30s", value_name = "TIME")]
    check_limit: Duration,
}

impl From<CanaryArgs> for Canary {
    fn from(args: CanaryArgs) -> Canary {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Canary {
            candidate: args.boot.wish(&args.kernel),
            trial: Trial {
                cpus: args.cpus,
                memory_mib: args.memory,
                watch_ms: ms(args.watch),
                checks: args.checks,
                check_limit_ms: ms(args.check_limit),
            },
        }
    }
}

/// `512M`, `2G`; a number alone is MiB.
fn memory_mib(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let mib: u64 = match unit {
        "" | "M" | "MiB" => 1,
        "G" | "GiB" => 1 << 10,
        _ => return Err("write it as 512M or 2G".to_owned()),
    };
    let number: u64 = number.parse().map_err(|error| format!("{number:?}: {error}"))?;
    number.checked_mul(mib).ok_or_else(|| format!("{text} is more than there can be"))
}

/// Prints what the trial has shown; its exit code is 0 when all candidates passed.
pub fn run(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let report = match reply {
        Reply::Tried(report) => report,
        Reply::Refused { findings } => return Ok(refused(json, &findings)),
        other => return Err(unexpected(&other)),
    };
    if json {
        print_json(&report);
    } else {
        print!("{}", table(&report));
    }
    for candidate in &report.candidates {
        if let (Verdict::Fail, Some(cause)) = (candidate.verdict, &candidate.cause) {
            for line in &candidate.dmesg_tail {
                eprintln!("  | {line}");
            }
            let advice = "everything was taken back; `baton dmesg` shows what the candidate's kernel said";
            complain(cause, if report.is_returned() { advice } else { "" });
        }
    }
    if !report.is_returned() {
        complain(
            &format!("not everything is back: CPUs {}, memory {}", report.returned.cpus, report.returned.memory),
            "see `baton status` (left undone) and batond's log",
        );
    }
    Ok(ExitCode::from(exit_code(&report)))
}

/// What could not be taken back weighs more than what the trial has shown.
fn exit_code(report: &Report) -> u8 {
    match (report.is_returned(), report.is_passed()) {
        (false, _) => Class::Failed.exit_code(),
        (true, true) => 0,
        (true, false) => Class::TrialFailed.exit_code(),
    }
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    for Candidate { id, release, verdict, boot_ms, checks, .. } in &report.candidates {
        let verdict = if *verdict == Verdict::Pass { "passed" } else { "FAILED" };
        let boot = boot_ms.map(|ms| format!(", its agent answered after {:.1} s", ms / 1e3)).unwrap_or_default();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "candidate {id}, {release}: {verdict}{boot}");
        let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0).min(24);
        for check in checks {
            let verdict = match check.verdict {
                CheckVerdict::Pass => "ok",
                CheckVerdict::Fail => "FAILED",
                CheckVerdict::TimedOut => "TIMED OUT",
                CheckVerdict::Missing => "MISSING",
                CheckVerdict::NotMade => "not made",
            };
            let mut lines = check.detail.lines();
            let first = lines.next().unwrap_or_default();
            let _ = writeln!(text, "{verdict:<10} {:<width$}  {first}", check.name);
            for line in lines {
                let _ = writeln!(text, "{:<10} {:<width$}  | {line}", "", "");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::trial::report::{Check, Returned};

    #[test]
    fn sizes_are_read_or_refused() {
        assert_eq!((memory_mib("512M"), memory_mib("2G"), memory_mib("64")), (Ok(512), Ok(2048), Ok(64)));
        for bad in ["", "M", "1T", "18446744073709551615G"] {
            assert!(memory_mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_exit_code_says_what_weighs_most() {
        let report = |verdict, back| {
            let candidate = Candidate {
                id: 1,
                release: "7.3".into(),
                verdict,
                cause: None,
                boot_ms: None,
                checks: vec![Check::pass("boots", "yes\nand more", 1.0)],
                dmesg_tail: vec![],
            };
            Report::of(candidate, Returned { cpus: true, memory: back })
        };
        assert_eq!(exit_code(&report(Verdict::Pass, true)), 0);
        assert_eq!(exit_code(&report(Verdict::Fail, true)), 8);
        assert_eq!(exit_code(&report(Verdict::Pass, false)), 1);
        assert_eq!(exit_code(&report(Verdict::Fail, false)), 1);
        let text = table(&report(Verdict::Pass, true));
        assert_eq!(text, "candidate 1, 7.3: passed\nok         boots  yes\n                  | and more\n");
    }
}
