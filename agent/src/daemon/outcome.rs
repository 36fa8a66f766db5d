//! How a command ends: exit codes by class, and failures that say what is wrong and what to do.
//!
//! The classes are the exit codes; `agent/README.md` has them as a table.

use serde::{Deserialize, Serialize};

/// The class of a failure, which is its exit code. 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Failed in a way that has no class of its own, or an undo failed: the advice says what is left.
    Failed = 1,
    /// Wrong arguments.
    Usage = 2,
    /// This machine or this image cannot; nothing was touched.
    Precondition = 3,
    /// Failed on the way and was undone: CPUs, memory, devices and services are where they were.
    RolledBack = 4,
    /// Another update runs.
    Busy = 5,
    /// batond does not answer.
    Unreachable = 6,
    /// The connection ended before the outcome was known.
    Unknown = 7,
    /// The candidate of a trial (`baton canary`) failed it; everything was given back.
    TrialFailed = 8,
}

impl Class {
    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        self as u8
    }
}

/// Why something did not work, for the person who asked for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{cause}")]
pub struct Failure {
    /// Which kind.
    pub class: Class,
    /// What is wrong, with the numbers.
    pub cause: String,
    /// What to do about it; empty when there is nothing to say.
    pub advice: String,
    /// The last lines of the kernel that failed, if there was one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
}

impl Failure {
    /// A failure of `class` with its cause and advice.
    pub fn new(class: Class, cause: impl Into<String>, advice: impl Into<String>) -> Failure {
        Failure { class, cause: cause.into(), advice: advice.into(), log: Vec::new() }
    }

    /// Something this machine or image cannot do; nothing was touched.
    pub fn precondition(cause: impl Into<String>, advice: impl Into<String>) -> Failure {
        Failure::new(Class::Precondition, cause, advice)
    }

    /// Whatever error it was, with its chain of causes; a [`Failure`] inside stays what it is.
    pub fn from_error(error: &anyhow::Error) -> Failure {
        match error.downcast_ref::<Failure>() {
            Some(failure) => failure.clone(),
            None => Failure::new(Class::Failed, format!("{error:#}"), ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table for people is made of these classes: each with its code, its name in JSON, and its comment above.
    #[test]
    fn the_documents_have_each_class() {
        use Class::{Busy, Failed, Precondition, RolledBack, TrialFailed, Unknown, Unreachable, Usage};
        let source = include_str!("outcome.rs");
        let readme = include_str!("../../README.md");
        for class in [Failed, Usage, Precondition, RolledBack, Busy, Unreachable, Unknown, TrialFailed] {
            let line = format!("    {class:?} = {},\n", class.exit_code());
            let comment = source[..source.find(&line).unwrap()].trim_end().rsplit("/// ").next().unwrap();
            let name = serde_json::to_value(class).unwrap();
            let row =
                format!("| {} | `{}` | {} |", class.exit_code(), name.as_str().unwrap(), comment.trim_end_matches('.'));
            let found = readme.lines().any(|line| line.to_lowercase() == row.to_lowercase());
            assert!(found, "agent/README.md has no row {row:?}");
        }
    }

    #[test]
    fn a_failure_keeps_its_class_through_context() {
        let inner = Failure::precondition("image is for 32 bit", "choose an amd64 image");
        let error = anyhow::Error::new(inner.clone()).context("while checking");
        assert_eq!(Failure::from_error(&error), inner);
        assert_eq!(inner.class.exit_code(), 3);
    }
}
