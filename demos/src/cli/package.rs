//! `cargo demo package`: the Debian packages.

use std::path::PathBuf;

use clap::Args;
use demos::lab::Progress;
use demos::package;

#[derive(Debug, Args)]
pub struct PackageArguments {
    /// The folder to put them into
    #[arg(long, default_value = "target/debian")]
    output: PathBuf,
}

pub fn run(arguments: &PackageArguments) -> anyhow::Result<()> {
    let packages = package::build(&arguments.output, Progress::auto())?;
    println!("{}", packages.baton.display());
    println!("{}", packages.dkms.display());
    Ok(())
}
