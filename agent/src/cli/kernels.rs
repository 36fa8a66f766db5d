//! `baton kernels`: those that run, and the images that could.

use std::process::ExitCode;

use super::output::print_json;
use crate::daemon::outcome::Failure;
use crate::userland::kernels;

/// Lists them.
pub fn run(json: bool) -> Result<ExitCode, Failure> {
    let list = kernels::list().map_err(|e| Failure::from_error(&e))?;
    if json {
        print_json(&list);
    } else {
        print!("{list}");
    }
    Ok(ExitCode::SUCCESS)
}
