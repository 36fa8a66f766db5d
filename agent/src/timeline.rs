//! When each step of an update began and ended, on the one clock that goes on counting across it: the TSC.

use serde::{Deserialize, Serialize};
use state_schemas::latest::handover_record::PhaseMark;

pub use crate::sys::tsc;

/// One step, as it is reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Which step.
    pub name: String,
    /// When it began, in milliseconds from the first step.
    pub at_ms: f64,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// Steps in the order in which they ended.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    marks: Vec<PhaseMark>,
}

impl Timeline {
    /// Goes on from what the other kernel recorded.
    pub fn continue_from(marks: Vec<PhaseMark>) -> Timeline {
        Timeline { marks }
    }

    /// Runs `step` and records when.
    pub fn measure<T>(&mut self, name: &str, step: impl FnOnce() -> T) -> T {
        let start = tsc();
        let result = step();
        self.add(name, start, tsc());
        result
    }

    /// Records a step.
    pub fn add(&mut self, name: &str, start_tsc: u64, end_tsc: u64) {
        self.marks.push(PhaseMark { phase: name.to_owned(), start_tsc, end_tsc });
    }

    /// For the other kernel.
    pub fn marks(&self) -> &[PhaseMark] {
        &self.marks
    }

    /// For people.
    pub fn spans(&self, tsc_khz: u64) -> Vec<Span> {
        let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / tsc_khz.max(1) as f64;
        let first = self.marks.iter().map(|mark| mark.start_tsc).min().unwrap_or(0);
        self.marks
            .iter()
            .map(|mark| Span {
                name: mark.phase.clone(),
                at_ms: ms(first, mark.start_tsc),
                ms: ms(mark.start_tsc, mark.end_tsc),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_relative_to_the_first_and_in_milliseconds() {
        let mut timeline = Timeline::default();
        timeline.add("b", 3_000, 5_000);
        timeline.add("a", 1_000, 3_000);
        let spans = timeline.spans(1_000);
        assert_eq!((spans[0].at_ms, spans[0].ms), (2.0, 2.0));
        assert_eq!(spans[1].at_ms, 0.0);
    }
}
