//! The command line of `baton`: arguments in, a request to batond, its answer printed, an exit code.
//!
//! Results go to stdout (a table for people, one JSON object with `--json`), progress and errors to stderr.

pub mod handover;
mod interrupt;
pub mod launch;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::daemon::config::{self, Config};
use crate::daemon::control::{self, Reply, Request, Status, Upgrade};
use crate::daemon::outcome::{Class, Failure};
use crate::userland::{kernels, mkinitrd};

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
    Upgrade(UpgradeArgs),
    /// Call off the update that runs: it is undone, if it can still be.
    Cancel,
    /// Say whether an upgrade would be started, and why not; touches nothing.
    Check(UpgradeArgs),
    /// Say how things stand: role, services, the last or running update.
    Status,
    /// Give the memory of a service that has left for good back to the kernel; what is in it is lost.
    Release {
        /// The service's name, as `baton status` shows it.
        service: String,
    },
    /// List the kernels of this machine: those that run (instances) and the images that could.
    Kernels,
    /// Become a program that keeps memfds as under systemd (FDSTORE=1, LISTEN_FDS), once it may run on this kernel.
    Run(RunArgs),
    /// Make the successor's initrd: the agent, the module and drivers for one kernel, the services' programs.
    Mkinitrd(MkinitrdArgs),
    /// Show what crosses from kernel to kernel, and whether it could cross to another one.
    #[command(subcommand)]
    Handover(handover::Verb),
}

#[derive(Debug, Args)]
struct UpgradeArgs {
    /// The kernel image (bzImage), such as /boot/vmlinuz-7.3.4+deb13-cloud-amd64.
    #[arg(long)]
    kernel: PathBuf,
    /// An initrd to which the agent's is appended.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Added to the successor's command line.
    #[arg(long, allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// The CPU on which the successor boots (Linux's number); default: the last one that may.
    #[arg(long)]
    cpu: Option<u32>,
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

#[derive(Debug, Args)]
struct MkinitrdArgs {
    /// The kernel's release, such as 7.3.4+deb13-cloud-amd64; its modules are taken from /lib/modules.
    #[arg(long)]
    release: String,
    /// Where to write it.
    #[arg(long)]
    output: PathBuf,
    /// The agent's configuration.
    #[arg(long, env = "BATON_CONFIG", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

impl From<UpgradeArgs> for Upgrade {
    fn from(args: UpgradeArgs) -> Upgrade {
        Upgrade { kernel: args.kernel, initrd: args.initrd, cmdline: args.cmdline, cpu: args.cpu }
    }
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
            eprintln!("baton: {}", failure.cause);
            if !failure.advice.is_empty() {
                eprintln!("  {}", failure.advice);
            }
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
            interrupt::heed(&cli.socket);
            upgrade(cli.json, ask(&Request::Upgrade(absolute(args.into())))?)
        }
        Verb::Cancel => called_off(cli.json, &ask(&Request::Cancel)?),
        Verb::Check(args) => check(cli.json, ask(&Request::Check(absolute(args.into())))?),
        Verb::Status => status(cli.json, ask(&Request::Status)?),
        Verb::Release { service } => released(cli.json, ask(&Request::Release { service })?),
        Verb::Kernels => list_kernels(cli.json),
        Verb::Mkinitrd(args) => make_initrd(&args),
        Verb::Handover(verb) => handover::run(verb, &cli.socket, cli.json),
        Verb::Run(args) => match launch::become_program(&args.name, &args.exec, args.liveupdate) {
            Ok(never) => match never {},
            Err(error) => Err(Failure::from_error(&error)),
        },
    }
}

/// batond has a working directory of its own.
fn absolute(mut upgrade: Upgrade) -> Upgrade {
    fn fix(path: &Path) -> PathBuf {
        std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
    }
    upgrade.kernel = fix(&upgrade.kernel);
    upgrade.initrd = upgrade.initrd.as_deref().map(fix);
    upgrade
}

fn print_json(value: &impl Serialize) {
    let text = serde_json::to_string(value).expect("results are plain data");
    println!("{text}");
}

fn unexpected(reply: &Reply) -> Failure {
    Failure::new(
        Class::Unknown,
        format!("batond answered something else than was asked: {reply:?}"),
        "install the same version of baton and batond",
    )
}

fn upgrade(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Committed { release, timeline } = reply else {
        return Err(unexpected(&reply));
    };
    if json {
        #[derive(Serialize)]
        struct Committed<'a> {
            schema_version: u32,
            outcome: &'a str,
            successor_release: &'a str,
            timeline: &'a [crate::update::timeline::Span],
        }
        print_json(&Committed {
            schema_version: 1,
            outcome: "committed",
            successor_release: &release,
            timeline: &timeline,
        });
    } else {
        println!("committed: {release} serves; this kernel hands over its last CPU now");
    }
    Ok(ExitCode::SUCCESS)
}

fn check(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Checked { findings } = reply else {
        return Err(unexpected(&reply));
    };
    Ok(handover::print_findings(&findings, json))
}

fn status(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Status(status) = reply else {
        return Err(unexpected(&reply));
    };
    if json {
        print_json(&status);
    } else {
        print_status(&status);
    }
    Ok(ExitCode::SUCCESS)
}

fn released(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Released { bytes } = reply else {
        return Err(unexpected(&reply));
    };
    if json {
        print_json(&serde_json::json!({ "schema_version": 1, "outcome": "released", "bytes": bytes }));
    } else {
        println!("released {} KiB", bytes >> 10);
    }
    Ok(ExitCode::SUCCESS)
}

fn called_off(json: bool, reply: &Reply) -> Result<ExitCode, Failure> {
    let Reply::CalledOff = reply else {
        return Err(unexpected(reply));
    };
    if json {
        print_json(&serde_json::json!({ "schema_version": 1, "outcome": "called_off" }));
    } else {
        println!("the update is called off: whoever asked for it is told how it ends (`baton status`)");
    }
    Ok(ExitCode::SUCCESS)
}

fn print_status(status: &Status) {
    println!("kernel    {}", status.kernel_release);
    println!("role      {}", status.role);
    println!("epoch     {}", status.epoch);
    println!("updates   {} since the firmware booted", status.hops);
    for service in &status.services {
        println!("service   {} {} ({} KiB)", service.name, service.state, service.arena_bytes / 1024);
    }
    let Some(update) = &status.update else { return };
    println!(
        "update    {}: {} -> {}, {}; {} of {} CPUs moved",
        update.id,
        update.incumbent_release,
        update.successor_release,
        update.phase,
        update.cpus_moved,
        update.cpus_total
    );
    for span in &update.timeline {
        println!("          {:<20} {:>10.3} ms", span.name, span.ms);
    }
    for left in &update.left_undone {
        println!("          left undone: {left}");
    }
}

fn list_kernels(json: bool) -> Result<ExitCode, Failure> {
    let list = kernels::list().map_err(|e| Failure::from_error(&e))?;
    if json {
        print_json(&list);
    } else {
        print!("{list}");
    }
    Ok(ExitCode::SUCCESS)
}

fn make_initrd(args: &MkinitrdArgs) -> Result<ExitCode, Failure> {
    let make = || -> anyhow::Result<usize> {
        let config = Config::load(&args.config)?;
        let bytes = mkinitrd::build(&config, &args.config, &args.release)?;
        std::fs::write(&args.output, &bytes)?;
        Ok(bytes.len())
    };
    let size = make().map_err(|e| Failure::from_error(&e))?;
    println!("{} ({size} bytes)", args.output.display());
    Ok(ExitCode::SUCCESS)
}
