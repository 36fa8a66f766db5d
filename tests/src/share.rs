//! Which part of a long matrix a run makes.
//!
//! A matrix (shapes of machines, lies between kernels) grows with every case that somebody meets, and each case costs a boot or an
//! update. Without `BATON_SEED` a run makes all of them. With it, as in CI, it makes about a third, chosen by the seed, says which it
//! leaves out, and can be repeated.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::skip;

/// One case in so many is made.
const SHARE: u64 = 3;

/// Whether this run makes the case. One that it does not make is among what it skipped.
#[must_use]
pub fn is_chosen(case: &str) -> bool {
    let Ok(seed) = std::env::var("BATON_SEED") else { return true };
    let chosen = is_among(&seed, case);
    if !chosen {
        skip(&format!("{case}: not chosen by BATON_SEED={seed}; without it every case is made"));
    }
    chosen
}

fn is_among(seed: &str, case: &str) -> bool {
    let mut hasher = DefaultHasher::new();
    (seed, case).hash(&mut hasher);
    hasher.finish().is_multiple_of(SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_choose_different_thirds_and_leave_nothing_out_for_ever() {
        let cases: Vec<String> = (0..30).map(|n| format!("case {n}")).collect();
        let seeds: Vec<String> = (0..60).map(|n| n.to_string()).collect();
        let chosen = |seed: &String| cases.iter().filter(|case| is_among(seed, case)).count();
        let counts: Vec<usize> = seeds.iter().map(chosen).collect();
        let mean = counts.iter().sum::<usize>() as f64 / counts.len() as f64;
        assert!((7.0..13.0).contains(&mean), "{mean} of 30");
        assert!(cases.iter().all(|case| seeds.iter().any(|seed| is_among(seed, case))));
        assert_eq!(is_among("7", "case 1"), is_among("7", "case 1"));
    }
}
