//! `baton commit` and `baton rollback`: what becomes of the successor on probation.

use std::process::ExitCode;

use super::output::{print_json, unexpected};
use crate::daemon::control::Reply;
use crate::daemon::outcome::Failure;

/// Prints that batond has heard it.
pub fn run(json: bool, reply: &Reply) -> Result<ExitCode, Failure> {
    let (outcome, told) = match reply {
        Reply::Committing => ("committing", "the successor stays: whoever asked for the update is told how it ends"),
        Reply::CalledOff => {
            ("called_off", "the successor hands everything back: whoever asked for the update is told how it ends")
        }
        other => return Err(unexpected(other)),
    };
    if json {
        print_json(&serde_json::json!({ "schema_version": 1, "outcome": outcome }));
    } else {
        println!("{told} (`baton status`)");
    }
    Ok(ExitCode::SUCCESS)
}
