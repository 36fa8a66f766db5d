//! Who is to blame, for what, and how an update can end.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::blame::Blame;
use super::effect::Effect;
use super::phase::Phase;

/// What the cause is, as far as the machine has to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// An effect could not be carried out.
    Broken,
    /// Time ran out.
    Deadline,
    /// The successor panicked, or its heart stopped: nothing can be agreed with it any more.
    SuccessorDied,
    /// The operator called it off.
    CalledOff,
    /// It was not tried, because after what had failed it would have done harm.
    Kept,
}

/// The one readable cause of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{what}")]
pub struct Cause {
    /// Who is to blame.
    pub blame: Blame,
    /// Which sort of failure.
    pub sort: Sort,
    /// What happened, for a human: lowercase, with the numbers.
    pub what: String,
}

impl Cause {
    /// An effect could not be carried out.
    pub fn broken(blame: Blame, what: impl Into<String>) -> Cause {
        Cause { blame, sort: Sort::Broken, what: what.into() }
    }

    /// The successor is dead.
    pub fn successor_died(what: impl Into<String>) -> Cause {
        Cause { blame: Blame::Successor, sort: Sort::SuccessorDied, what: what.into() }
    }

    /// The operator called it off: `by` says how, as "`baton cancel`" or "^C at `baton upgrade`".
    pub fn called_off(by: &str) -> Cause {
        Cause { blame: Blame::Operator, sort: Sort::CalledOff, what: format!("called off by {by}") }
    }

    /// Its time on probation is over, and nobody has committed it.
    pub fn not_committed(period: std::time::Duration) -> Cause {
        let what = format!("nobody committed it within {} s, as was required", period.as_secs_f64());
        Cause { blame: Blame::Operator, sort: Sort::Deadline, what }
    }

    /// It was not tried, because something before it failed. Who is to blame for that has to act first.
    pub fn kept(blame: Blame, why: &str) -> Cause {
        Cause { blame, sort: Sort::Kept, what: format!("kept, because it may still be in use ({why})") }
    }

    /// Time ran out while this effect was carried out. Whom it asked is to blame.
    pub fn deadline(phase: Phase, effect: &Effect, limit: std::time::Duration) -> Cause {
        Cause {
            blame: effect.carried_out_by(),
            sort: Sort::Deadline,
            what: format!("{phase} took longer than {:.3} s, at {}", limit.as_secs_f64(), effect.name()),
        }
    }
}

/// Something that was to be done or undone, and was not: it failed, or ([`Sort::Kept`]) it was not tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// What.
    pub effect: Effect,
    /// Why not.
    pub cause: Cause,
}

/// How an update ends. There is no other way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// The successor stays.
    Committed {
        /// What was not handed over, and why.
        left: Vec<Left>,
    },
    /// The incumbent goes on as if nothing had happened, but for what is left.
    RolledBack {
        /// Why.
        cause: Cause,
        /// In which phase.
        phase: Phase,
        /// What could not be undone, and why. Empty: everything is as it was.
        left: Vec<Left>,
    },
    /// Only the trial was asked for, and it passed. Everything was given back.
    TrialPassed {
        /// What could not be undone, and why.
        left: Vec<Left>,
    },
}

/// An event that cannot be in this state: a mistake of the driver, which changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("event {event} in state {state}")]
pub struct OutOfOrder {
    /// What came.
    pub event: &'static str,
    /// What it met.
    pub state: String,
}
