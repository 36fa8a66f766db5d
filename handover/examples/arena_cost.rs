//! What the undo record costs: `cargo run --release -p handover --example arena_cost`.
//!
//! The same operations on two stores in turn, round by round: one that saves what it changes, and one that does not. Told are the
//! medians over the rounds, and the ratio's, which is taken within each round: the machine has other things to do.

use std::hint::black_box;
use std::time::Instant;

use handover::arena::{Store, StoreError};

const ROUNDS: usize = 31;

fn main() -> Result<(), StoreError> {
    for (keys, size) in [(1000, 16), (1000, 64), (1000, 256), (1000, 1024), (100_000, 64), (100_000, 1024)] {
        let names: Vec<Vec<u8>> = (0..keys).map(|number| format!("key:{number:012}").into_bytes()).collect();
        let (mut with, mut without) = (vec![0; 256 << 20], vec![0; 256 << 20]);
        let mut rows: [Vec<[f64; 2]>; 3] = Default::default();
        for round in 0..ROUNDS {
            let mut both = [[0.0; 2]; 3];
            // Who is first changes from round to round.
            for which in [round % 2, 1 - round % 2] {
                let memory = if which == 0 { &mut with } else { &mut without };
                let took = once(memory, &names, size, which == 1)?;
                both.iter_mut().zip(took).for_each(|(pair, took)| pair[which] = took);
            }
            rows.iter_mut().zip(both).for_each(|(row, pair)| row.push(pair));
        }
        for (what, row) in ["SET, new key", "SET, again", "DEL"].iter().zip(rows) {
            let median = |of: &dyn Fn(&[f64; 2]) -> f64| {
                let mut values: Vec<f64> = row.iter().map(of).collect();
                values.sort_by(f64::total_cmp);
                values[ROUNDS / 2]
            };
            println!(
                "{keys:>7} keys, {size:>4} bytes, {what:<12}  {:>6.0} ns with, {:>6.0} ns without, ratio {:.3}",
                median(&|pair| pair[0]),
                median(&|pair| pair[1]),
                median(&|pair| pair[0] / pair[1]),
            );
        }
    }
    Ok(())
}

/// Nanoseconds of a SET of a new key, of a SET once more, and of a DEL.
fn once(memory: &mut [u8], names: &[Vec<u8>], size: usize, forgetful: bool) -> Result<[f64; 3], StoreError> {
    let value = vec![7; size];
    let mut store = Store::create(memory, "cost", 1, 42)?;
    if forgetful {
        store.forget();
    }
    let each = |began: Instant| began.elapsed().as_nanos() as f64 / names.len() as f64;
    let began = Instant::now();
    names.iter().try_for_each(|name| store.set(black_box(name), &value))?;
    let new = each(began);
    let began = Instant::now();
    names.iter().try_for_each(|name| store.set(black_box(name), &value))?;
    let again = each(began);
    let began = Instant::now();
    names.iter().try_for_each(|name| store.del(black_box(name)).map(drop))?;
    Ok([new, again, each(began)])
}
