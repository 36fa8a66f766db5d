//! `cargo demo canary`: kernels are tried beside the one that serves, and taken back.

use std::process::ExitCode;

use clap::Args;
use demos::lab::{Lab, Progress};
use demos::story::canary::{self, Options};

use super::upgrade::MachineArguments;

#[derive(Debug, Args)]
pub struct CanaryArguments {
    /// Print one JSON object on stdout and nothing else: that of `baton canary`, with all candidates and what clients saw
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArguments,
}

pub fn run(arguments: &CanaryArguments) -> anyhow::Result<ExitCode> {
    let mut options = Options::default();
    let machine = arguments.machine.options();
    (options.shape.vcpus, options.shape.memory_mib) = (machine.shape.vcpus, machine.shape.memory_mib);
    options.probe_hz = machine.probe_hz;
    let report = canary::run(&Lab::set_up(Progress::auto())?, &options)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", canary::for_people(&report));
    }
    Ok(if report.is_returned() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
