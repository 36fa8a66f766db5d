//! `cargo demo lab`: only the setting up.

use clap::Args;
use demos::lab::{Lab, Progress, tree};

#[derive(Debug, Args)]
pub struct LabArguments {
    /// Remove everything that the lab keeps in the cache folder
    #[arg(long)]
    clean: bool,
}

pub fn run(arguments: &LabArguments) -> anyhow::Result<()> {
    if arguments.clean {
        return Ok(tree::clean(Progress::auto())?);
    }
    let lab = Lab::set_up(Progress::auto())?;
    println!("tree: {}", lab.tree().root().display());
    for kernel in lab.tree().kernels() {
        println!("kernel: {} ({})", kernel.release, kernel.version);
    }
    Ok(())
}
