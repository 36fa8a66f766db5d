//! `cargo demo kho`: memory, data and a memfd that cross to kernels with kexec handover, and what those say of it.

use std::process::ExitCode;

use clap::Args;
use demos::lab::{Lab, Progress};
use demos::story::kho;

#[derive(Debug, Args)]
pub struct KhoArguments {
    /// Updates, one after the other: from 6.12 to a 7.x with KHO, to it again, to the stock 7.x, to the one with KHO, and so on
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1000))]
    hops: u16,
    /// Print one JSON object on stdout and nothing else
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &KhoArguments) -> anyhow::Result<ExitCode> {
    let mut lab = Lab::set_up(Progress::auto())?;
    let report = kho::run(&mut lab, arguments.hops.into())?;
    if arguments.json {
        // The same for people goes where the progress went.
        eprint!("{}", kho::for_people(&report));
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", kho::for_people(&report));
    }
    Ok(if report.objections.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
