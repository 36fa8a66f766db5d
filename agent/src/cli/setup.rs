//! `baton setup`: what was found of this machine, and what an update would do with each. Touches nothing, and needs no batond.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::output::print_json;
use crate::daemon::config::{self, Config};
use crate::daemon::outcome::Failure;
use crate::machine::net::Netlink;
use crate::machine::world::Live;
use crate::update::setup::Setup;

/// With which configuration.
#[derive(Debug, Args)]
pub struct SetupArgs {
    /// The configuration.
    #[arg(long, env = "BATON_CONFIG", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

/// Looks, and prints.
pub fn run(args: &SetupArgs, json: bool) -> Result<ExitCode, Failure> {
    let look = || -> anyhow::Result<Setup> {
        let config = Config::load(&args.config)?;
        Setup::of(&Live(&Netlink::open()?), &config)
    };
    let setup = look().map_err(|e| Failure::from_error(&e))?;
    if json {
        print_json(&setup);
    } else {
        print!("{setup}");
    }
    Ok(ExitCode::SUCCESS)
}
