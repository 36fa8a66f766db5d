//! What can go wrong while a lab is set up or a machine runs, in words that say what to do about it.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Result of whatever the lab does.
pub type Result<T> = std::result::Result<T, LabError>;

/// Why the lab could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The host lacks something that only its owner can supply.
    #[error("{0}")]
    Prerequisite(String),
    /// The host's kernel or file system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, with the name of the file or address.
        doing: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// A program that the lab started did not succeed.
    #[error("{program} failed ({status}){}", tail_of(.output))]
    Program {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        output: String,
    },
    /// Something that must happen in bounded time did not.
    #[error("{what} did not happen within {:.1} s; logs are in {}{}", .waited.as_secs_f64(), .logs.display(), tail_of(.tail))]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// Folder with the machine's logs.
        logs: PathBuf,
        /// The end of the machine's logs.
        tail: String,
    },
    /// The machine's QEMU went away while it was needed.
    #[error("the machine stopped while {doing} ({status}); logs are in {}{}", .logs.display(), tail_of(.tail))]
    MachineGone {
        /// What it was needed for.
        doing: String,
        /// How QEMU ended.
        status: String,
        /// Folder with the machine's logs.
        logs: PathBuf,
        /// The end of the machine's logs.
        tail: String,
    },
    /// A reply (of QEMU, labd, apt, ...) does not read as it must.
    #[error("{from} answered in a way that does not read: {problem}")]
    Reply {
        /// Who answered.
        from: String,
        /// What is wrong with it.
        problem: String,
    },
    /// labd, QEMU or the request itself says no.
    #[error("{who} refused: {why}")]
    Refused {
        /// Who refused.
        who: String,
        /// Its reason.
        why: String,
    },
}

fn tail_of(text: &str) -> String {
    if text.trim().is_empty() { String::new() } else { format!("; it ended with:\n{}", text.trim_end()) }
}

/// Says what was being done when the host refused.
pub trait Doing<T> {
    /// Wraps the error, so that the message names the deed and its object.
    fn doing(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|e| LabError::Io { doing: what.to_string(), source: e.into() })
    }
}

/// The last lines of a text, for messages.
#[must_use]
pub fn last_lines(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
