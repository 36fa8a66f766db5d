//! `baton mkinitrd`: the successor's initrd, to a file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::daemon::config::{self, Config};
use crate::daemon::outcome::Failure;
use crate::userland::mkinitrd;

/// For which kernel, and whereto.
#[derive(Debug, Args)]
pub struct MkinitrdArgs {
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

/// Makes it.
pub fn run(args: &MkinitrdArgs) -> Result<ExitCode, Failure> {
    let make = || -> anyhow::Result<usize> {
        let config = Config::load(&args.config)?;
        let bytes = mkinitrd::build(&config, &args.config, &args.release, BTreeMap::new())?;
        std::fs::write(&args.output, &bytes)?;
        Ok(bytes.len())
    };
    let size = make().map_err(|e| Failure::from_error(&e))?;
    println!("{} ({size} bytes)", args.output.display());
    Ok(ExitCode::SUCCESS)
}
