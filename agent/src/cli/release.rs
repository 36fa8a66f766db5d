//! `baton release`: the memory of a service that has left for good.

use std::process::ExitCode;

use super::output::{print_json, unexpected};
use crate::daemon::control::Reply;
use crate::daemon::outcome::Failure;

/// Prints how much it was.
pub fn run(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Released { bytes } = reply else {
        return Err(unexpected(&reply));
    };
    if json {
        print_json(&serde_json::json!({ "schema_version": 1, "outcome": "released", "bytes": bytes }));
    } else {
        println!("released {} KiB", bytes >> 10);
    }
    Ok(ExitCode::SUCCESS)
}
