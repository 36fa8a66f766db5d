//! `cargo demo rollback`: a successor that serves is taken back, for each reason.

use std::process::ExitCode;

use clap::Args;
use demos::lab::{Lab, Progress};
use demos::story::rollback::{self, Kind};
use demos::story::stage::Shape;

#[derive(Debug, Args)]
pub struct RollbackArguments {
    /// Why it is taken back, one update each; default: for every reason
    #[arg(long, value_delimiter = ',', value_name = "KINDS")]
    kinds: Vec<Kind>,
    /// UDP probes a second
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    probe_hz: u32,
    /// Print one JSON object on stdout and nothing else
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &RollbackArguments) -> anyhow::Result<ExitCode> {
    let all = [Kind::Operator, Kind::Health, Kind::Panic, Kind::Agent];
    let kinds = if arguments.kinds.is_empty() { all.to_vec() } else { arguments.kinds.clone() };
    let lab = Lab::set_up(Progress::auto())?;
    let options = rollback::Options { kinds, shape: Shape::default(), probe_hz: arguments.probe_hz };
    let told = rollback::run(&lab, &options)?;
    if arguments.json {
        // The same for people goes where the progress went.
        eprint!("{}", rollback::for_people(&told));
        println!("{}", serde_json::to_string_pretty(&told)?);
    } else {
        print!("{}", rollback::for_people(&told));
    }
    Ok(if told.objections.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
