//! `cargo demo scale`: updates with small and with large arenas beside each other.

use std::process::ExitCode;

use clap::Args;
use demos::lab::{Lab, Progress};
use demos::story::report;
use demos::story::scale::{self, Options};

#[derive(Debug, Args)]
pub struct ScaleArguments {
    /// Live updates for each size, there and back in one machine
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Sizes of the arena, MiB
    #[arg(long, value_delimiter = ',', default_values_t = [16, 256, 1024])]
    sizes: Vec<u64>,
    /// Virtual CPUs
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(2..=8))]
    vcpus: u8,
    /// Memory of the machine
    #[arg(long, default_value_t = 6144, value_parser = clap::value_parser!(u32).range(1024..))]
    memory_mib: u32,
    /// Print one JSON object on stdout and nothing else
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &ScaleArguments) -> anyhow::Result<ExitCode> {
    let mut options = Options { runs: arguments.runs.into(), sizes_mib: arguments.sizes.clone(), ..Options::default() };
    let shape = &mut options.machine.shape;
    (shape.vcpus, shape.memory_mib) = (arguments.vcpus, arguments.memory_mib);
    let lab = Lab::set_up(Progress::auto())?;
    let scale = scale::run(&lab, &options)?;
    if arguments.json {
        // The same figures for people go where the progress went.
        eprint!("{}", report::scale_for_people(&scale));
        println!("{}", serde_json::to_string_pretty(&scale)?);
    } else {
        print!("{}", report::scale_for_people(&scale));
    }
    Ok(if scale.failure.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
