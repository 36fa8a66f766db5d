//! Several runs of one figure.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Values in ascending order, with the figures that describe them. There is no mean: one bad run would hide in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(into = "Written", try_from = "Written")]
pub struct Distribution {
    sorted: Vec<f64>,
}

/// As JSON: the figures, and every value behind them.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Written {
    n: usize,
    min: f64,
    median: f64,
    p90: f64,
    max: f64,
    values: Vec<f64>,
}

impl Distribution {
    /// Of these values; `None` when there are none, or one is not a number.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        if sorted.is_empty() || sorted.iter().any(|v| !v.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        Some(Self { sorted })
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sorted.len()
    }

    /// All of them, ascending.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.sorted
    }

    /// The smallest.
    #[must_use]
    pub fn min(&self) -> f64 {
        self.sorted[0]
    }

    /// The middle one, or halfway between the middle two.
    #[must_use]
    pub fn median(&self) -> f64 {
        let (low, high) = (self.sorted[(self.count() - 1) / 2], self.sorted[self.count() / 2]);
        low + (high - low) / 2.0
    }

    /// The smallest value that nine tenths of all do not exceed.
    #[must_use]
    pub fn p90(&self) -> f64 {
        self.sorted[(self.count() * 9).div_ceil(10) - 1]
    }

    /// The largest.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.sorted[self.count() - 1]
    }
}

impl From<Distribution> for Written {
    fn from(of: Distribution) -> Self {
        Self { n: of.count(), min: of.min(), median: of.median(), p90: of.p90(), max: of.max(), values: of.sorted }
    }
}

impl TryFrom<Written> for Distribution {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        Self::of(written.values).ok_or("a distribution has at least one value, and all are numbers")
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (min, median, p90, max) = (self.min(), self.median(), self.p90(), self.max());
        write!(f, "median {median:.1} (min {min:.1}, p90 {p90:.1}, max {max:.1}, n {})", self.count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_the_values_own() {
        let d = Distribution::of([9.0, 1.0, 3.0, 2.0]).expect("values");
        assert_eq!((d.min(), d.median(), d.p90(), d.max()), (1.0, 2.5, 9.0, 9.0));
        let d = Distribution::of((1..=10).map(f64::from)).expect("values");
        assert_eq!((d.median(), d.p90()), (5.5, 9.0));
        let d = Distribution::of([4.0]).expect("a value");
        assert_eq!((d.min(), d.median(), d.p90(), d.max()), (4.0, 4.0, 4.0, 4.0));
        assert_eq!(d.to_string(), "median 4.0 (min 4.0, p90 4.0, max 4.0, n 1)");
        assert_eq!(Distribution::of([]), None);
        assert_eq!(Distribution::of([1.0, f64::NAN]), None);
    }

    #[test]
    fn json_holds_every_value() {
        let d = Distribution::of([2.0, 1.0]).expect("values");
        let json = serde_json::to_string(&d).expect("written");
        assert_eq!(json, r#"{"n":2,"min":1.0,"median":1.5,"p90":2.0,"max":2.0,"values":[1.0,2.0]}"#);
        assert_eq!(serde_json::from_str::<Distribution>(&json).expect("read"), d);
        assert!(serde_json::from_str::<Distribution>(&json.replace("[1.0,2.0]", "[]")).is_err());
    }
}
