//! `cargo demo compare`: Baton, kexec and reboot beside each other.

use std::process::ExitCode;

use clap::Args;
use demos::lab::{Lab, Progress};
use demos::story::compare::{self, Options};
use demos::story::report::{self, Comparison};

use super::upgrade::MachineArguments;

#[derive(Debug, Args)]
pub struct CompareArguments {
    /// Live updates, there and back in one machine
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Runs of kexec, and of reboot
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    other_runs: u16,
    /// Print one JSON object on stdout and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArguments,
}

pub fn run(arguments: &CompareArguments) -> anyhow::Result<ExitCode> {
    let options = Options {
        runs: arguments.runs.into(),
        other_runs: arguments.other_runs.into(),
        machine: arguments.machine.options(),
    };
    let told = Lab::set_up(Progress::auto()).map_err(Into::into).and_then(|lab| compare::run(&lab, &options));
    let comparison = match told {
        Ok(comparison) => comparison,
        // Whoever asked for JSON gets it in any case.
        Err(why) if arguments.json => Comparison::without_runs(options.machine.machine(), format!("{why:#}")),
        Err(why) => return Err(why),
    };
    if arguments.json {
        // The same figures for people go where the progress went.
        eprint!("{}", report::comparison_for_people(&comparison));
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print!("{}", report::comparison_for_people(&comparison));
    }
    Ok(if comparison.failure.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
