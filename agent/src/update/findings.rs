//! What checks find, collected.

use anyhow::Result;

use crate::daemon::control::{Finding, Verdict};
use crate::daemon::outcome::{Class, Failure};

/// Collects findings; the first refusal counts.
#[derive(Default)]
pub struct Findings {
    list: Vec<Finding>,
}

impl Findings {
    /// Notes what a check found; its value, if it does not refuse. What it refuses cannot be accepted.
    pub fn check<T>(&mut self, what: &str, result: Result<(T, String)>) -> Option<T> {
        let (check, accept) = (what.to_owned(), None);
        match result {
            Ok((value, found)) => {
                let (cause, advice) = (String::new(), String::new());
                self.list.push(Finding { check, verdict: Verdict::Ok, found, cause, advice, accept, class: None });
                Some(value)
            }
            Err(error) => {
                let Failure { class, cause, advice, .. } = Failure::from_error(&error);
                let class = Some(class).filter(|class| !matches!(class, Class::Failed | Class::Precondition));
                let (verdict, found) = (Verdict::Refused, String::new());
                self.list.push(Finding { check, verdict, found, cause, advice, accept, class });
                None
            }
        }
    }

    /// Adds what was found elsewhere.
    pub fn extend(&mut self, findings: Vec<Finding>) {
        self.list.extend(findings);
    }

    /// All of them, in order.
    pub fn into_list(self) -> Vec<Finding> {
        self.list
    }

    /// Whether one of them refuses.
    pub fn refuse(&self) -> bool {
        self.list.iter().any(|finding| finding.verdict == Verdict::Refused)
    }
}
