//! How long it takes to say what is kept, and to read that again: `cargo run --release -p handover --example kho_scale`.
//!
//! Memory is described here, never touched: what is measured is our part of an update, which is done before the freeze.
//! The sizes are the task's; single pages are the worst case (a memfd, or memory that was never contiguous), large
//! orders the usual one (an arena).

use std::time::{Duration, Instant};

use handover::kho::{Abi, Incoming, Limits, Machine, Memory, Outgoing, PAGE, Written};
use handover::luo::{File, Memfd, Orchestration, Session};
use state_schemas::handover_record::PhysRange;

const MIB: u64 = 1 << 20;
const FIRST: u64 = 1 << 32;

fn main() {
    let limits = Limits { vmalloc_pages: 1 << 20, ..Limits::default() };
    println!("memory      as                       describe     in KiB   read and check");
    for size in [16 * MIB, 1 << 30, 16 << 30] {
        let content = PhysRange { start: FIRST, len: size };
        let (took, written) = best(|out| out.preserve(content).unwrap());
        report(size, "one range", took, &written, &limits);
        let (took, written) = best(|out| out.preserve_folios(FIRST, 9, size >> 21).unwrap());
        report(size, "pages of 2 MiB", took, &written, &limits);
        let (took, written) = best(|out| out.preserve_folios(FIRST, 0, size / PAGE).unwrap());
        report(size, "pages of 4 KiB", took, &written, &limits);
        let (took, written) = best(|out| {
            (0..size / PAGE).for_each(|page| out.preserve_folios(FIRST + 2 * page * PAGE, 0, 1).unwrap());
        });
        report(size, "4 KiB, each by itself", took, &written, &limits);
        let (took, written) = best(|out| {
            let memfd = File::memfd(1, Memfd::over(content, size, 0).write(out).unwrap());
            let sessions = vec![Session { name: "kv".to_owned(), files: vec![memfd] }];
            Orchestration { update: 1, sessions, ..Orchestration::default() }.write(out).unwrap();
        });
        report(size, "a memfd of 4 KiB pages", took, &written, &limits);
    }
}

/// The best of three: the machine has other things to do.
fn best(fill: impl Fn(&mut Outgoing)) -> (Duration, Written) {
    let run = || {
        let begun = Instant::now();
        let mut out = Outgoing::new(Abi::V4, PhysRange { start: 256 * MIB, len: 256 * MIB }).unwrap();
        out.scratch(PhysRange { start: 1024 * MIB, len: 256 * MIB });
        fill(&mut out);
        let written = out.write().unwrap();
        (begun.elapsed(), written)
    };
    (0..3).map(|_| run()).min_by_key(|(took, _)| *took).expect("three runs")
}

fn report(size: u64, what: &str, describe: Duration, written: &Written, limits: &Limits) {
    let machine = Machine { ram: vec![PhysRange { start: MIB, len: 1 << 40 }] };
    let begun = Instant::now();
    match read(&written.segments, written, limits, &machine) {
        Ok(()) => {
            let took = begun.elapsed();
            println!(
                "{:>5} MiB   {what:<22} {describe:>10.2?} {:>10}   {took:>10.2?}",
                size / MIB,
                written.used.len >> 10
            );
        }
        Err(why) => println!(
            "{:>5} MiB   {what:<22} {describe:>10.2?} {:>10}   refused: {why}",
            size / MIB,
            written.used.len >> 10
        ),
    }
}

fn read(memory: &impl Memory, written: &Written, limits: &Limits, machine: &Machine) -> Result<(), String> {
    let received = Incoming::read(memory, written.handed, limits).map_err(|error| error.to_string())?;
    let incoming = received.check(machine).map_err(|error| error.to_string())?;
    if let Some(luo) = Orchestration::read(memory, &incoming, limits).map_err(|error| error.to_string())? {
        let luo = luo.check(&incoming).map_err(|error| error.to_string())?;
        for file in luo.sessions.iter().flat_map(|session| &session.files) {
            let memfd = Memfd::read(memory, &incoming, file.data, limits).map_err(|error| error.to_string())?;
            memfd.check(&()).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}
