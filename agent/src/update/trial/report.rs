//! What is told of a trial: `baton canary --json` is this object.

use serde::{Deserialize, Serialize};

/// All that came of it. `schema_version` is 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this object.
    pub schema_version: u32,
    /// The candidates, one by one.
    pub candidates: Vec<Candidate>,
    /// What clients of the incumbent's services saw. Only who has clients can say: `baton` leaves it empty, `cargo demo canary` fills it.
    pub client_gap_ms: ClientGap,
    /// What is back.
    pub returned: Returned,
}

/// One candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The module's number of its instance, for `baton dmesg ID`.
    pub id: u32,
    /// Its kernel's release.
    pub release: String,
    /// Whether it passed.
    pub verdict: Verdict,
    /// Why not, in one line; `null` where it passed.
    pub cause: Option<String>,
    /// From the start of its CPU to the first word of its agent; `null` where there was none.
    pub boot_ms: Option<f64>,
    /// In the order in which they were made. After one that ends the trial come those that were not made.
    pub checks: Vec<Check>,
    /// The last lines of its kernel's log.
    pub dmesg_tail: Vec<String>,
}

/// Of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All checks passed.
    Pass,
    /// One did not, or the candidate ended before.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Its name; of the operator's, the command.
    pub name: String,
    /// What came of it.
    pub verdict: CheckVerdict,
    /// In words, with the numbers; of the operator's, the exit code and the end of what the command wrote.
    pub detail: String,
    /// How long it took.
    pub ms: f64,
}

/// Of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckVerdict {
    /// Good.
    Pass,
    /// Not good.
    Fail,
    /// It did not end in its time.
    TimedOut,
    /// There is no such command in the candidate.
    Missing,
    /// The trial ended before it was its turn.
    NotMade,
}

/// The longest time for which a client had no answer, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientGap {
    /// Before the trial.
    pub before: Option<f64>,
    /// While it ran.
    pub during: Option<f64>,
    /// After it.
    pub after: Option<f64>,
}

/// Whether the incumbent has again what it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returned {
    /// Every CPU that was online is online.
    pub cpus: bool,
    /// All memory is this kernel's: the candidate's instance is gone, and its memory given back.
    pub memory: bool,
}

impl Check {
    /// A check that passed.
    pub fn pass(name: &str, detail: impl Into<String>, ms: f64) -> Check {
        Check { name: name.to_owned(), verdict: CheckVerdict::Pass, detail: detail.into(), ms }
    }

    /// One that did not.
    pub fn fail(name: &str, detail: impl Into<String>, ms: f64) -> Check {
        Check { name: name.to_owned(), verdict: CheckVerdict::Fail, detail: detail.into(), ms }
    }

    /// Nothing is against the candidate.
    pub fn is_passed(&self) -> bool {
        self.verdict == CheckVerdict::Pass
    }

    /// What is told of it where it failed.
    pub fn complaint(&self) -> String {
        let how = match self.verdict {
            CheckVerdict::Pass => "passed",
            CheckVerdict::Fail => "failed",
            CheckVerdict::TimedOut => "did not end in time",
            CheckVerdict::Missing => "does not exist in the candidate",
            CheckVerdict::NotMade => "was not made",
        };
        let first = self.detail.lines().next().unwrap_or_default();
        format!("check `{}` {how}: {first}", self.name)
    }
}

impl Report {
    /// Of one candidate.
    pub fn of(candidate: Candidate, returned: Returned) -> Report {
        Report { schema_version: 1, candidates: vec![candidate], client_gap_ms: ClientGap::default(), returned }
    }

    /// All candidates passed, and everything is back.
    pub fn is_passed(&self) -> bool {
        self.is_returned() && self.candidates.iter().all(|candidate| candidate.verdict == Verdict::Pass)
    }

    /// Everything is back.
    pub fn is_returned(&self) -> bool {
        self.returned.cpus && self.returned.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_is_the_one_that_is_promised() {
        let check = Check { verdict: CheckVerdict::TimedOut, ..Check::pass("sleep 9", "killed after 1.0 s", 1000.0) };
        let candidate = Candidate {
            id: 3,
            release: "7.3".into(),
            verdict: Verdict::Fail,
            cause: Some(check.complaint()),
            boot_ms: Some(2000.0),
            checks: vec![check],
            dmesg_tail: vec!["[    1.0] last".into()],
        };
        let report = Report::of(candidate, Returned { cpus: true, memory: true });
        assert!(!report.is_passed() && report.is_returned());
        let json = serde_json::to_string(&report).unwrap();
        let expected = r#"{"schema_version":1,"candidates":[{"id":3,"release":"7.3","verdict":"fail","cause":"check `sleep 9` did not end in time: killed after 1.0 s","boot_ms":2000.0,"checks":[{"name":"sleep 9","verdict":"timed_out","detail":"killed after 1.0 s","ms":1000.0}],"dmesg_tail":["[    1.0] last"]}],"client_gap_ms":{"before":null,"during":null,"after":null},"returned":{"cpus":true,"memory":true}}"#;
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
}
