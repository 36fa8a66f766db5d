//! `baton-memo`: a program whose memory is kept. See `demos::memo` for what it is.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use demos::memo::{Options, ask_for_the_impossible, run};

/// Keeps a memfd in the fd store that it was started with, and writes to it for ever.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where it says what it found
    #[arg(long, default_value = "/run/memo.json")]
    report: PathBuf,
    /// How many pages it keeps
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    pages: u64,
    /// Keep it by the service's library, as the service of this name
    #[arg(long)]
    sdk: Option<String>,
    /// When this file is there, remove it and keep one more memfd (fd store)
    #[arg(long, default_value = "/run/memo.late")]
    late: PathBuf,
    /// Only ask for what must be refused, and print the answers
    #[arg(long)]
    impossible: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Arguments { report, pages, sdk, late, impossible } = arguments;
    let ended = if impossible { ask_for_the_impossible() } else { run(&Options { report, pages, sdk, late }) };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baton-memo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
