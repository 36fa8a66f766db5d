//! What `baton` and `batond` say to each other: JSON lines over a Unix socket that only root can open.
//!
//! One connection is one [`Request`] line, answered by any number of [`Reply::Progress`] lines and one last line.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use handover::update::phase::Phase;
use kexec_core::klog::LogTail;
use serde::{Deserialize, Serialize};

use crate::daemon::outcome::{Class, Failure};
use crate::daemon::successor_log::Log;
use crate::update::stock::accept::Accept;
use crate::update::timeline::{Span, Zero};
use crate::update::trial::{Trial, report::Report};

/// The agent's socket.
pub const SOCKET: &str = "/run/baton/control.sock";
/// No line is longer than this, in bytes.
pub const LINE_LIMIT: u64 = 1 << 20;

/// What an upgrade is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// The kernel image (bzImage).
    pub kernel: PathBuf,
    /// An initrd of the operator's, to which the agent's is appended.
    pub initrd: Option<PathBuf>,
    /// Added to the successor's command line.
    pub cmdline: Option<String>,
    /// The successor gets none of the incumbent's words.
    #[serde(default)]
    pub no_inherit: bool,
    /// The CPU (Linux's number) on which the successor boots.
    pub cpu: Option<u32>,
    /// What may end, change or be given up with this kernel, beside what the configuration accepts.
    #[serde(default)]
    pub accept: Vec<Accept>,
    /// Watch the successor serve for so long before it stays, instead of what the configuration says. 0: not at all.
    #[serde(default)]
    pub probation: Option<Duration>,
    /// When that time is over, the update turns back unless an operator has committed it.
    #[serde(default)]
    pub require_commit: bool,
    /// The process that asks: what it belongs to ends, and whoever asks knows that.
    #[serde(default)]
    pub asker: Option<u32>,
}

impl Upgrade {
    /// To this image, with no wish besides.
    pub fn of(kernel: PathBuf) -> Upgrade {
        Upgrade {
            kernel,
            initrd: None,
            cmdline: None,
            no_inherit: false,
            cpu: None,
            accept: Vec::new(),
            probation: None,
            require_commit: false,
            asker: Some(std::process::id()),
        }
    }
}

/// What a trial is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// The candidate, as an update would boot it.
    pub candidate: Upgrade,
    /// What is done with it.
    pub trial: Trial,
}

/// What `baton` asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// How things stand.
    Status,
    /// Replace the kernel.
    Upgrade(Upgrade),
    /// Boot a kernel beside this one, check it, and take everything back.
    Canary(Canary),
    /// Whether an upgrade would be started, and why not; touches nothing.
    Check(Upgrade),
    /// Undo the update that runs, if it can still be undone.
    Cancel,
    /// The successor on probation stays.
    Commit,
    /// The successor on probation hands everything back.
    RollBack,
    /// The arena of a service that has left for good goes back to the kernel.
    Release {
        /// Its name.
        service: String,
    },
    /// The log of the successor that runs, else of the last one that failed.
    Dmesg {
        /// Only of this instance.
        instance: Option<u32>,
        /// Only what is newer than this record.
        after: Option<u64>,
    },
}

/// What `batond` answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// The update goes on.
    Progress {
        /// The phase (DESIGN.md's names).
        phase: String,
        /// What is being done.
        text: String,
    },
    /// How things stand.
    Status(Box<Status>),
    /// What a check found.
    Checked {
        /// In the order of the checks.
        findings: Vec<Finding>,
    },
    /// The update is told to turn back. Whoever asked for it hears how it ends.
    CalledOff,
    /// The successor is told that it stays. Whoever asked for the update hears how it ends.
    Committing,
    /// An arena's memory is the kernel's again.
    Released {
        /// How much it was.
        bytes: u64,
    },
    /// A kernel's log.
    Log(Box<Log>),
    /// The update is past the point of no return; the successor finishes it.
    Committed {
        /// The successor's release.
        release: String,
        /// What was measured so far.
        timeline: Vec<Span>,
    },
    /// A trial has ended: what it showed.
    Tried(Box<Report>),
    /// The update, or the trial, was not begun: these are the checks, and some of them refuse.
    Refused {
        /// All, in order.
        findings: Vec<Finding>,
    },
    /// It did not work.
    Failed(Failure),
}

/// What a check means for the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing is lost.
    Ok,
    /// It ends or is absent afterwards, and that is accepted, or comes back by itself.
    Lost,
    /// There is no update because of it.
    Refused,
}

/// One check of `baton check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was checked.
    pub check: String,
    /// What it means.
    pub verdict: Verdict,
    /// What was found, with the numbers.
    pub found: String,
    /// What would become of it, or why there can be no update; empty when all is well.
    pub cause: String,
    /// What to do; empty when there is nothing to do.
    pub advice: String,
    /// The name by which it can be accepted, or was.
    pub accept: Option<Accept>,
    /// The class of a refusal, when it is not that this machine or image cannot ([`Class::Precondition`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<Class>,
}

impl Finding {
    /// The failure that a refusal is.
    pub fn refusal(&self) -> Option<Failure> {
        let class = self.class.unwrap_or(Class::Precondition);
        // What was found is the cause, where the machine is the subject.
        let cause = match (self.found.is_empty(), self.cause.is_empty()) {
            (true, _) => self.cause.clone(),
            (false, true) => self.found.clone(),
            (false, false) => format!("{}: {}", self.found, self.cause),
        };
        (self.verdict == Verdict::Refused).then(|| Failure::new(class, cause, self.advice.clone()))
    }
}

/// What a kernel is to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It has the machine.
    Incumbent,
    /// It takes the machine over, and has not finished.
    Successor,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Role::Incumbent => "incumbent",
            Role::Successor => "successor",
        })
    }
}

/// How far an update is, as `baton status` tells it: a phase, or one of four ends that are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The successor has the machine, and this kernel could not leave.
    Committed,
    /// This kernel goes on.
    #[serde(rename = "rolled back")]
    RolledBack,
    /// Only a trial was asked for. The candidate passed it, and everything was taken back.
    #[serde(rename = "trial passed")]
    TrialPassed,
    /// As a successor, this kernel could not go on.
    Failed,
    /// In the middle of it, or (drained) at its good end.
    #[serde(untagged)]
    In(Phase),
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stage::In(phase) => phase.fmt(f),
            Stage::Committed => f.pad("committed"),
            Stage::RolledBack => f.pad("rolled back"),
            Stage::TrialPassed => f.pad("trial passed"),
            Stage::Failed => f.pad("failed"),
        }
    }
}

/// How things stand.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Version of this object.
    pub schema_version: u32,
    /// This kernel's release.
    pub kernel_release: String,
    /// What this kernel is to the machine.
    pub role: Role,
    /// The epoch in which this kernel's services answer; 0 before the first update.
    pub epoch: u64,
    /// How many updates this machine has behind it since its firmware booted it.
    pub hops: u32,
    /// Services by name, and how they are.
    pub services: Vec<ServiceStatus>,
    /// The update that brought this kernel here, or that runs now.
    pub update: Option<UpdateStatus>,
}

/// How a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceState {
    /// It answers its clients.
    Serving,
    /// It waits, silent, for the order to serve.
    Standby,
    /// It was told to stop answering.
    Frozen,
    /// It has connected, and is not ready yet.
    Starting,
    /// It is not there; what it kept is.
    Absent,
    /// It serves, and has not kept again what an earlier batond kept for it.
    Bereft,
}

impl std::fmt::Display for ServiceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ServiceState::Serving => "serving",
            ServiceState::Standby => "standby",
            ServiceState::Frozen => "frozen",
            ServiceState::Starting => "starting",
            ServiceState::Absent => "absent",
            ServiceState::Bereft => "bereft",
        })
    }
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: ServiceState,
    /// Size of its arena in bytes, 0 without one.
    pub arena_bytes: u64,
    /// What it keeps there: kind of its state, 0 while it has not said.
    pub schema_kind: u32,
    /// And that kind's version.
    pub schema_version: u32,
}

/// An update, as far as it has come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UpdateStatus {
    /// Identifies the update in both kernels' logs.
    pub id: String,
    /// How far it is.
    pub phase: Stage,
    /// Release of the kernel that handed over, or hands over.
    pub incumbent_release: String,
    /// Release of the kernel that took over, or is to.
    pub successor_release: String,
    /// CPUs: how many there are, how many were moved.
    pub cpus_total: u32,
    /// See above.
    pub cpus_moved: u32,
    /// What was not done, and why: blocks not adopted, CPUs not onlined.
    pub left_undone: Vec<String>,
    /// Phases and steps with their times.
    pub timeline: Vec<Span>,
    /// Where on the TSC these times begin; nothing before the update is over.
    #[serde(default)]
    pub zero: Option<Zero>,
    /// How the successor's log ended, if it failed.
    #[serde(default)]
    pub last_words: Option<LogTail>,
}

/// Asks batond, shows progress through `progress`, and gives its last word.
pub fn ask(socket: &Path, request: &Request, mut progress: impl FnMut(&str, &str)) -> Result<Reply, Failure> {
    let unreachable = |what: &str, error: &std::io::Error| {
        Failure::new(
            Class::Unreachable,
            format!("cannot {what} {}: {error}", socket.display()),
            "is batond running? (`systemctl status batond`); only root may talk to it",
        )
    };
    let stream = UnixStream::connect(socket).map_err(|e| unreachable("connect to", &e))?;
    let mut line = serde_json::to_vec(request).expect("a request is plain data");
    line.push(b'\n');
    (&stream).write_all(&line).map_err(|e| unreachable("write to", &e))?;
    for line in BufReader::new(&stream).lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(Reply::Progress { phase, text }) => progress(&phase, &text),
            Ok(Reply::Failed(failure)) => return Err(failure),
            Ok(last) => return Ok(last),
            Err(error) => {
                return Err(Failure::new(
                    Class::Unknown,
                    format!("batond answered something that this baton cannot read: {error}"),
                    "install the same version of baton and batond",
                ));
            }
        }
    }
    Err(Failure::new(
        Class::Unknown,
        "batond closed the connection before it gave an outcome",
        "see `baton status` and batond's log",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts read these words.
    #[test]
    fn stages_and_roles_are_written_as_ever() {
        let stages = [
            (Stage::In(Phase::Trial), "\"trial\""),
            (Stage::In(Phase::Drained), "\"drained\""),
            (Stage::Committed, "\"committed\""),
            (Stage::RolledBack, "\"rolled back\""),
            (Stage::TrialPassed, "\"trial passed\""),
            (Stage::Failed, "\"failed\""),
        ];
        for (stage, text) in stages {
            assert_eq!(serde_json::to_string(&stage).unwrap(), text);
            assert_eq!(serde_json::from_str::<Stage>(text).unwrap(), stage);
            assert_eq!(format!("\"{stage}\""), text);
        }
        assert_eq!(serde_json::to_string(&Role::Successor).unwrap(), "\"successor\"");
    }

    /// `baton` and scripts read these words.
    #[test]
    fn states_are_written_as_they_are_shown() {
        use ServiceState as S;
        for state in [S::Serving, S::Standby, S::Frozen, S::Starting, S::Absent, S::Bereft] {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
        }
    }
}
