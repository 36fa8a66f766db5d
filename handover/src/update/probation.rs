//! What happens between the successor's first answer and the point of no return.
//!
//! While the incumbent watches, it runs on its last CPU as it always did: with its timers, its agent and its own way of stopping the
//! other kernel. So a successor that dies, hangs or fails its checks is undone by the same list as one that fails at any other step, and
//! the time away costs the incumbent nothing (no stalled clock, no watchdog of its own that fires). A CPU parked in a page of ours would
//! cost the machine the same one CPU, and could do less. The successor, which cannot have that CPU before the commit, runs on all others.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What happens between activation and commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbationPolicy {
    /// The CPUs move; then the update commits, without watching the successor for any time. Until then whatever fails
    /// is a reverse cutover.
    CommitAtOnce,
    /// The CPUs move, all but the incumbent's last. On that one the incumbent goes on running and watches the successor serve
    /// ([`Effect::Watch`](super::effect::Effect::Watch)) before it commits.
    Watch {
        /// For how long. [`WATCH_LIMITS`] says what is possible.
        period: Duration,
        /// What is done when this time is over and nobody has said anything.
        then: WhenWatched,
        /// How many of the CPUs that follow, counted from the last, follow only after the watch: those which INIT must not meet, because
        /// it would reset the machine (the CPU that firmware booted). Under a successor that has died they could not be stopped.
        held_back: usize,
    },
}

/// What a watch ends with, unless an operator ends it before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenWatched {
    /// The update commits: all was well.
    Commit,
    /// The update turns back: only an operator commits it.
    RollBack,
}

/// How long a successor can be watched: shorter than the shortest, the incumbent would not have asked it twice how it is; longer than
/// the longest, the machine would be without one of its CPUs for days, and nobody would be there to see why.
pub const WATCH_LIMITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(24 * 3600));
