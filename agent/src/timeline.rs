//! When each step of an update began and ended, on one clock for both kernels: the wall clock, which the successor
//! takes over with the handover record.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// One step, finished or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Which step.
    pub name: String,
    /// Unix time in nanoseconds.
    pub start_ns: u64,
    /// Unix time in nanoseconds.
    pub end_ns: u64,
}

impl Span {
    /// How long it took, in milliseconds.
    pub fn ms(&self) -> f64 {
        self.end_ns.saturating_sub(self.start_ns) as f64 / 1e6
    }
}

/// Unix time in nanoseconds.
pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// Steps in the order in which they began.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    spans: Vec<Span>,
}

impl Timeline {
    /// Goes on from what the other kernel recorded.
    pub fn continue_from(spans: Vec<Span>) -> Timeline {
        Timeline { spans }
    }

    /// Runs `step` and records when.
    pub fn measure<T>(&mut self, name: &str, step: impl FnOnce() -> T) -> T {
        let start_ns = now_ns();
        let result = step();
        self.add(name, start_ns, now_ns());
        result
    }

    /// Records a step.
    pub fn add(&mut self, name: &str, start_ns: u64, end_ns: u64) {
        self.spans.push(Span { name: name.to_owned(), start_ns, end_ns });
    }

    /// All of them.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }
}
