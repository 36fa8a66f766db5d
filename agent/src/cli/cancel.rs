//! `baton cancel`: the update that runs turns back.

use std::process::ExitCode;

use super::output::{print_json, unexpected};
use crate::daemon::control::Reply;
use crate::daemon::outcome::Failure;

/// Prints that batond has heard it.
pub fn run(json: bool, reply: &Reply) -> Result<ExitCode, Failure> {
    let Reply::CalledOff = reply else {
        return Err(unexpected(reply));
    };
    if json {
        print_json(&serde_json::json!({ "schema_version": 1, "outcome": "called_off" }));
    } else {
        println!("the update is called off: whoever asked for it is told how it ends (`baton status`)");
    }
    Ok(ExitCode::SUCCESS)
}
