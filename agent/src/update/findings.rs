//! What checks find, collected.

use anyhow::Result;

use crate::daemon::control::Finding;
use crate::daemon::outcome::{Class, Failure};

/// Collects findings; the first refusal counts.
#[derive(Default)]
pub struct Findings {
    list: Vec<Finding>,
}

impl Findings {
    /// Notes what a check found; its value, if it does not refuse.
    pub fn check<T>(&mut self, what: &str, result: Result<(T, String)>) -> Option<T> {
        let (value, found, refusal) = match result {
            Ok((value, found)) => (Some(value), found, None),
            Err(error) => {
                let mut failure = Failure::from_error(&error);
                if failure.class == Class::Failed {
                    failure.class = Class::Precondition;
                }
                (None, String::new(), Some(failure))
            }
        };
        self.list.push(Finding { check: what.to_owned(), found, refusal });
        value
    }

    /// All of them, in order.
    pub fn into_list(self) -> Vec<Finding> {
        self.list
    }

    /// The first refusal.
    pub fn refusal(&self) -> Option<Failure> {
        self.list.iter().find_map(|finding| finding.refusal.clone())
    }
}
