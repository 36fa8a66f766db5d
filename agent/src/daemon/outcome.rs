//! How a command ends: exit codes by class, and failures that say what is wrong and what to do.
//!
//! | code | class | meaning |
//! |---|---|---|
//! | 0 | | done |
//! | 1 | `failed` | failed, and not in one of the ways below |
//! | 2 | `usage` | wrong arguments (clap's own) |
//! | 3 | `precondition` | this machine or this image cannot; nothing was touched |
//! | 4 | `rolled_back` | failed on the way; the incumbent goes on with its CPUs, memory, devices and services |
//! | 5 | `busy` | another update runs |
//! | 6 | `unreachable` | batond does not answer |
//! | 7 | `unknown` | the connection ended before the outcome was known |

use serde::{Deserialize, Serialize};

/// The class of a failure, which is its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Anything that has no class of its own.
    Failed = 1,
    /// Wrong arguments.
    Usage = 2,
    /// This machine or this image cannot; nothing was touched.
    Precondition = 3,
    /// Undone; the incumbent goes on.
    RolledBack = 4,
    /// Another update runs.
    Busy = 5,
    /// batond does not answer.
    Unreachable = 6,
    /// Nobody knows how it ended.
    Unknown = 7,
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
}

impl Failure {
    /// A failure of `class` with its cause and advice.
    pub fn new(class: Class, cause: impl Into<String>, advice: impl Into<String>) -> Failure {
        Failure { class, cause: cause.into(), advice: advice.into() }
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

    #[test]
    fn a_failure_keeps_its_class_through_context() {
        let inner = Failure::precondition("image is for 32 bit", "choose an amd64 image");
        let error = anyhow::Error::new(inner.clone()).context("while checking");
        assert_eq!(Failure::from_error(&error), inner);
        assert_eq!(inner.class.exit_code(), 3);
    }
}
