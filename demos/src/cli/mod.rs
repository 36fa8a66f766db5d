//! The command line of `cargo demo`: which stories there are, and how their ends become exit codes.

mod lab;
mod shell;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Replaces the Linux kernel of a running machine, in a machine made for the purpose, and measures what its clients notice.
#[derive(Debug, Parser)]
#[command(name = "cargo demo", bin_name = "cargo demo", version)]
struct Arguments {
    #[command(subcommand)]
    story: Option<Story>,
}

#[derive(Debug, Subcommand)]
enum Story {
    /// Sets up what the other commands need (or, with --clean, removes it).
    Lab(lab::LabArguments),
    /// Starts a machine and attaches a shell to it (or, with --attach, enters one that runs).
    Shell(shell::ShellArguments),
}

pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let end = match arguments.story {
        Some(Story::Lab(arguments)) => lab::run(&arguments),
        Some(Story::Shell(arguments)) => shell::run(&arguments),
        None => Err(anyhow::anyhow!("no story yet")),
    };
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
