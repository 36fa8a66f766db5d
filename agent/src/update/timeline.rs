//! When each step of an update began and ended, on the one clock that goes on counting across it: the TSC.

use serde::{Deserialize, Serialize};
use state_schemas::latest::handover_record::PhaseMark;

pub use crate::machine::sys::tsc;

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

/// Where the spans' zero is on the TSC, for whoever lays another clock beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zero {
    /// What the TSC read at the beginning of the first step.
    pub tsc: u64,
    /// How fast it counts.
    pub khz: u64,
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

    /// From where the spans count.
    pub fn zero(&self, tsc_khz: u64) -> Zero {
        Zero { tsc: self.marks.iter().map(|mark| mark.start_tsc).min().unwrap_or(0), khz: tsc_khz.max(1) }
    }

    /// For people.
    pub fn spans(&self, tsc_khz: u64) -> Vec<Span> {
        let Zero { tsc: first, khz } = self.zero(tsc_khz);
        let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / khz as f64;
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
        assert_eq!(timeline.zero(1_000), Zero { tsc: 1_000, khz: 1_000 });
    }
}
