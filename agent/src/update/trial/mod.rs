//! A trial that is taken back (`baton canary`): what it is asked for, what its checks mean, what is told of it.
//!
//! The candidate is a successor that never serves: it boots, its services stand by on the arenas, and then it is looked at. Three look:
//! its own agent at the kernel it runs on (`takeover::trial`), the incumbent at the candidate's log and clock, and whatever the operator
//! has run over there. All that is plain data when it comes here; [`judge`] makes verdicts of it and looks at nothing else.

pub mod judge;
pub mod report;

use serde::{Deserialize, Serialize};
use state_schemas::latest::message::TEXT_LIMIT;

use crate::daemon::outcome::{Class, Failure};

/// Most checks of the operator's.
pub const CHECK_LIMIT: usize = 64;
/// Longest time for which a candidate is watched, and longest time for a check: a day.
pub const LONGEST_MS: u64 = 24 * 3600 * 1000;

/// More memory than any machine has, in MiB: 16 TiB.
const MEMORY_LIMIT_MIB: u64 = 16 << 20;

/// What is done with a candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// CPUs that the candidate gets, the one on which it boots included.
    pub cpus: u32,
    /// Its memory in MiB; as the configuration says if nothing is asked for.
    pub memory_mib: Option<u64>,
    /// How long it is watched from its first check on, in milliseconds: the checks are made within that time.
    pub watch_ms: u64,
    /// Commands to be run by its shell.
    pub checks: Vec<String>,
    /// How long each of them may take, in milliseconds.
    pub check_limit_ms: u64,
}

impl Trial {
    /// Says whether this can be asked of a candidate.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), Failure> {
        let usage = |cause: String, advice: &str| Err(Failure::new(Class::Usage, cause, advice));
        if self.cpus == 0 {
            return usage("a candidate needs a CPU".into(), "ask for --cpus 1 or more");
        }
        if self.checks.len() > CHECK_LIMIT {
            return usage(
                format!("{} checks, at most {CHECK_LIMIT} can be made", self.checks.len()),
                "put several of them into a script in the candidate's initrd",
            );
        }
        if let Some(long) = self.checks.iter().find(|check| check.len() > TEXT_LIMIT) {
            return usage(
                format!("a check of {} bytes, at most {TEXT_LIMIT} cross to the candidate", long.len()),
                "put it into a script in the candidate's initrd (initrd.include)",
            );
        }
        if let Some(empty) = self.checks.iter().find(|check| check.trim().is_empty()) {
            return usage(format!("the check {empty:?} is no command"), "leave it out");
        }
        if self.memory_mib.is_some_and(|mib| mib == 0 || mib > MEMORY_LIMIT_MIB) {
            return usage(
                format!("{} MiB of memory", self.memory_mib.unwrap_or_default()),
                "ask for the MiB that the candidate is to have",
            );
        }
        for (what, ms) in [("the time for a check", self.check_limit_ms), ("the time to watch", self.watch_ms)] {
            if ms > LONGEST_MS {
                return usage(format!("{what} is {ms} ms, at most a day is possible"), "ask for less");
            }
        }
        if self.check_limit_ms == 0 {
            return usage("a check needs some time".into(), "ask for --check-limit 1s or more");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_asked_is_refused_with_its_number() {
        let good = Trial { cpus: 1, memory_mib: None, watch_ms: 0, checks: vec!["true".into()], check_limit_ms: 1 };
        good.check().unwrap();
        let refused = |change: &dyn Fn(&mut Trial)| {
            let mut trial = good.clone();
            change(&mut trial);
            let failure = trial.check().unwrap_err();
            assert_eq!(failure.class, Class::Usage);
            failure.cause
        };
        assert!(refused(&|t| t.cpus = 0).contains("needs a CPU"));
        assert!(refused(&|t| t.checks = vec!["x".into(); 65]).contains("65 checks"));
        assert!(refused(&|t| t.checks.push("x".repeat(1025))).contains("1025 bytes"));
        assert!(refused(&|t| t.checks.push(" \t".into())).contains("no command"));
        assert!(refused(&|t| t.memory_mib = Some(u64::MAX)).contains("18446744073709551615 MiB"));
        assert!(refused(&|t| t.memory_mib = Some(0)).contains("0 MiB"));
        assert!(refused(&|t| t.watch_ms = LONGEST_MS + 1).contains("86400001 ms"));
        assert!(refused(&|t| t.check_limit_ms = 0).contains("some time"));
    }
}
