//! The command line of `baton`: arguments in, a request to batond, its answer printed, an exit code. A file for each command.
//!
//! Results go to stdout (a table for people, one JSON object with `--json`), progress and errors to stderr.

mod canary;
mod cancel;
mod check;
mod config;
mod dmesg;
pub mod handover;
mod interrupt;
mod kernels;
pub mod launch;
mod mkinitrd;
mod newest;
mod output;
mod probation;
mod release;
mod setup;
mod status;
mod upgrade;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::daemon::control::{self, Request};
use crate::daemon::outcome::Failure;
use output::{complain, print_json};
use upgrade::Meant;

/// Replaces the kernel of this running machine without stopping its services.
#[derive(Debug, Parser)]
#[command(name = "baton", version, about)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// The agent's socket.
    #[arg(long, global = true, env = "BATON_SOCKET", default_value = control::SOCKET)]
    socket: PathBuf,
    /// Print one JSON object on stdout and nothing else.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Replace the running kernel.
    Upgrade(upgrade::UpgradeArgs),
    /// Try a kernel beside the running one, check it, and take everything back.
    Canary(canary::CanaryArgs),
    /// Call off the update or the trial that runs: it is undone, if it can still be.
    Cancel,
    /// The new kernel, which is on probation, stays: there is no way back from here.
    Commit,
    /// The new kernel, which is on probation, hands everything back: the old one goes on.
    Rollback,
    /// Say whether an upgrade would be started, and why not; touches nothing.
    Check(upgrade::UpgradeArgs),
    /// Say how things stand: role, services, the last or running update.
    Status,
    /// Give the memory of a service that has left for good back to the kernel; what is in it is lost.
    Release {
        /// The service's name, as `baton status` shows it.
        service: String,
    },
    /// Show the log of the successor, read out of its memory: while it runs, or of the last one that failed.
    Dmesg(dmesg::Args),
    /// List the kernels of this machine: those that run (instances), and the images that could, with what was found of each.
    Kernels(kernels::KernelsArgs),
    /// Show what was found of this machine (interfaces, disks, root, services), and what an update would do with each.
    Setup(setup::SetupArgs),
    /// Check the configuration, or show what holds with it.
    #[command(subcommand)]
    Config(config::Verb),
    /// Become a program that keeps memfds as under systemd (FDSTORE=1, LISTEN_FDS), once it may run on this kernel.
    Run(RunArgs),
    /// Make the successor's initrd: the agent, the module and drivers for one kernel, the services' programs.
    Mkinitrd(mkinitrd::MkinitrdArgs),
    /// Show what crosses from kernel to kernel, and whether it could cross to another one.
    #[command(subcommand)]
    Handover(handover::Verb),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The program is written for the Live Update Orchestrator: answer for /dev/liveupdate, so that its sessions cross.
    #[arg(long)]
    liveupdate: bool,
    /// The service's name, under which its files are kept.
    name: String,
    /// Program and arguments.
    #[arg(last = true, required = true)]
    exec: Vec<String>,
}

/// Does what the arguments say.
pub fn run(cli: Cli) -> ExitCode {
    let json = cli.json;
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => {
            if json {
                print_json(&Failed { schema_version: 1, outcome: "failed", failure: &failure });
            }
            for line in &failure.log {
                eprintln!("  | {line}");
            }
            complain(&failure.cause, &failure.advice);
            ExitCode::from(failure.class.exit_code())
        }
    }
}

#[derive(Serialize)]
struct Failed<'a> {
    schema_version: u32,
    outcome: &'a str,
    #[serde(flatten)]
    failure: &'a Failure,
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let ask = |request: &Request| {
        control::ask(&cli.socket, request, |phase, text| {
            eprintln!("{phase:<10} {text}");
        })
    };
    match cli.verb {
        Verb::Upgrade(args) => {
            let wish = match args.meant(ask)? {
                Meant::This(wish) => wish,
                Meant::Refused(findings) => return Ok(upgrade::refused(cli.json, &findings)),
                Meant::RunsAlready => return Ok(upgrade::runs_already(cli.json)),
            };
            interrupt::heed(&cli.socket);
            upgrade::run(cli.json, ask(&Request::Upgrade(wish))?)
        }
        Verb::Canary(args) => {
            interrupt::heed(&cli.socket);
            canary::run(cli.json, ask(&Request::Canary(args.into()))?)
        }
        Verb::Cancel => cancel::run(cli.json, &ask(&Request::Cancel)?),
        Verb::Commit => probation::run(cli.json, &ask(&Request::Commit)?),
        Verb::Rollback => probation::run(cli.json, &ask(&Request::RollBack)?),
        Verb::Check(args) => match args.meant(ask)? {
            Meant::This(wish) => check::run(cli.json, ask(&Request::Check(wish))?),
            Meant::Refused(findings) => Ok(check::print(&findings, cli.json)),
            Meant::RunsAlready => Ok(upgrade::runs_already(cli.json)),
        },
        Verb::Status => status::run(cli.json, ask(&Request::Status)?),
        Verb::Release { service } => release::run(cli.json, ask(&Request::Release { service })?),
        Verb::Dmesg(args) => dmesg::run(&args, &cli.socket, cli.json),
        Verb::Kernels(args) => kernels::run(&args, ask, cli.json),
        Verb::Setup(args) => setup::run(&args, cli.json),
        Verb::Config(verb) => config::run(&verb, cli.json),
        Verb::Mkinitrd(args) => mkinitrd::run(&args),
        Verb::Handover(verb) => handover::run(verb, &cli.socket, cli.json),
        Verb::Run(args) => match launch::become_program(&args.name, &args.exec, args.liveupdate) {
            Ok(never) => match never {},
            Err(error) => Err(Failure::from_error(&error)),
        },
    }
}
