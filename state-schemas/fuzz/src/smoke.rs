//! A fuzzer for `cargo test`: no coverage, no nightly compiler, the same every time. Each corpus file as it is, cut, and with a few
//! bytes changed to what breaks parsers. Every crate's `tests/fuzz_smoke.rs` includes this file.

use std::path::Path;
use std::time::{Duration, Instant};

/// No single input may take longer, emulated disks and busy hosts included: what takes longer loops.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `entry` over everything in `corpus/TARGET` of a fuzz folder, and `rounds` changes of each.
pub fn run(fuzz: &Path, target: &str, rounds: u32, entry: fn(&[u8])) {
    let folder = fuzz.join("corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for file in &files {
        let original = std::fs::read(file).unwrap();
        timed(file, &original, entry);
        for _ in 0..rounds {
            timed(file, &random.changed(&original), entry);
        }
    }
}

fn timed(file: &Path, bytes: &[u8], entry: fn(&[u8])) {
    let began = Instant::now();
    entry(bytes);
    let took = began.elapsed();
    assert!(took < PATIENCE, "a change of {} took {took:?}: {bytes:02x?}", file.display());
}

/// xorshift64 (Marsaglia, 2003): the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn changed(&mut self, original: &[u8]) -> Vec<u8> {
        /// Numbers at which bounds break.
        const ABSURD: [u64; 8] = [0, 1, u64::MAX, 1 << 63, i64::MAX as u64, u32::MAX as u64, 1 << 31, 4096];
        let mut bytes = original.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(6) {
                0 => bytes.truncate(at),
                1 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                2 if !bytes.is_empty() => bytes[at] = self.next() as u8,
                3 => {
                    let width = [1, 2, 4, 8][self.below(4)].min(bytes.len() - at);
                    let number = ABSURD[self.below(ABSURD.len())].to_le_bytes();
                    bytes[at..at + width].copy_from_slice(&number[..width]);
                }
                4 => {
                    // Something of it once more, somewhere else.
                    let len = self.below(64).min(bytes.len() - at);
                    let part = bytes[at..at + len].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, part);
                }
                _ => {
                    let end = (at + self.below(16)).min(bytes.len());
                    bytes.drain(at..end);
                }
            }
        }
        bytes
    }
}
