//! The command line of `cargo demo`: which stories there are, and how their ends become exit codes.

mod canary;
mod compare;
mod kho;
mod lab;
mod package;
mod rollback;
mod scale;
mod shell;
mod upgrade;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Replaces the Linux kernel of a running machine, in a machine made for the purpose, and measures what its clients notice.
#[derive(Debug, Parser)]
#[command(name = "cargo demo", bin_name = "cargo demo", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    story: Option<Story>,
    /// Without a story: the main one.
    #[command(flatten)]
    upgrade: upgrade::UpgradeArguments,
}

#[derive(Debug, Subcommand)]
enum Story {
    /// Updates the kernel of a running machine under load, and says what its clients noticed (the default).
    Upgrade(upgrade::UpgradeArguments),
    /// Tries kernels beside the one that serves, one that is fit and two that are not, and says what clients noticed.
    Canary(canary::CanaryArguments),
    /// Measures the silence of a live update beside that of kexec and of a reboot.
    Compare(compare::CompareArguments),
    /// Updates to kernels with kexec handover (KHO), and asks them what they were given (builds such a kernel when there is none).
    Kho(kho::KhoArguments),
    /// Takes a successor back that serves on probation, for each reason, and says what its clients noticed.
    Rollback(rollback::RollbackArguments),
    /// Measures how an update's times depend on the amount of memory that crosses.
    Scale(scale::ScaleArguments),
    /// Sets up what the other commands need (or, with --clean, removes it).
    Lab(lab::LabArguments),
    /// Builds the Debian packages: baton, and baton-dkms with the module's source.
    Package(package::PackageArguments),
    /// Starts a machine and attaches a shell to it (or, with --attach, enters one that runs).
    Shell(shell::ShellArguments),
}

pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let end = match arguments.story {
        Some(Story::Upgrade(arguments)) => upgrade::run(&arguments),
        Some(Story::Canary(arguments)) => canary::run(&arguments),
        Some(Story::Compare(arguments)) => compare::run(&arguments),
        Some(Story::Kho(arguments)) => kho::run(&arguments),
        Some(Story::Rollback(arguments)) => rollback::run(&arguments),
        Some(Story::Scale(arguments)) => scale::run(&arguments),
        Some(Story::Lab(arguments)) => lab::run(&arguments).map(|()| ExitCode::SUCCESS),
        Some(Story::Package(arguments)) => package::run(&arguments).map(|()| ExitCode::SUCCESS),
        Some(Story::Shell(arguments)) => shell::run(&arguments).map(|()| ExitCode::SUCCESS),
        None => upgrade::run(&arguments.upgrade),
    };
    match end {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cargo demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
