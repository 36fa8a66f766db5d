//! `cargo demo upgrade`, which is also `cargo demo`: a machine changes its kernel under load.

use std::process::ExitCode;

use agent::daemon::outcome::Class;
use clap::Args;
use demos::lab::{Lab, Progress};
use demos::story::report::{self, Outcome, Report};
use demos::story::upgrade::{self, Options};

/// For a successor that cannot work: a kernel without a program to run. It panics, and must stay where it is until it is stopped.
const BROKEN: &str = "initcall_blacklist=populate_rootfs panic=0";
/// How long it is waited for. One that works needs 2 to 10 s.
const BROKEN_FOR_S: u64 = 25;

#[derive(Debug, Args)]
pub struct UpgradeArguments {
    /// Updates, one after the other: from 6.12 to 7.x, back to 6.12, and so on
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    hops: u16,
    /// Show an update that fails: the successor's agent never comes up, and everything is given back
    #[arg(long)]
    broken: bool,
    /// Print one JSON object on stdout and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArguments,
}

/// The machine, and how closely it is watched.
#[derive(Debug, Args)]
pub struct MachineArguments {
    /// Virtual CPUs
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=8))]
    vcpus: u8,
    /// Memory of the machine
    #[arg(long, default_value_t = 3072, value_parser = clap::value_parser!(u32).range(1024..))]
    memory_mib: u32,
    /// UDP probes a second
    #[arg(long, value_name = "HZ", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
}

impl MachineArguments {
    /// As the stories want them.
    pub fn options(&self) -> Options {
        let mut options = Options { probe_hz: self.rate, ..Options::default() };
        (options.shape.vcpus, options.shape.memory_mib) = (self.vcpus, self.memory_mib);
        options
    }
}

pub fn run(arguments: &UpgradeArguments) -> anyhow::Result<ExitCode> {
    let mut options = Options { hops: arguments.hops.into(), ..arguments.machine.options() };
    if arguments.broken {
        BROKEN.clone_into(&mut options.shape.successor_cmdline);
        options.shape.update.boot_timeout_s = BROKEN_FOR_S;
    }
    let told = Lab::set_up(Progress::auto()).map_err(Into::into).and_then(|lab| upgrade::run(&lab, &options));
    let report = match told {
        Ok(report) => report,
        // Whoever asked for JSON gets it in any case.
        Err(why) if arguments.json => Report::without_updates(options.machine(), format!("{why:#}")),
        Err(why) => return Err(why),
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report::for_people(&report));
    }
    Ok(match report.outcome {
        Outcome::Committed => ExitCode::SUCCESS,
        Outcome::RolledBack => Class::RolledBack.exit_code().into(),
        Outcome::Failed => ExitCode::FAILURE,
    })
}
