//! The operator's command; see [`agent::cli`].
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    agent::cli::run(agent::cli::Cli::parse())
}
