//! `cargo demo`: shows a live update. Arguments in, exit code out; the stories are in `cli/`.

#[path = "../cli/mod.rs"]
mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
