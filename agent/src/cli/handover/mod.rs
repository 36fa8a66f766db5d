//! `baton handover`: what crosses from kernel to kernel, readably; and whether it could cross to another one.

pub mod check;
mod kho;
mod live;
mod render;
pub mod show;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::cli::check as findings;
use crate::cli::output::print_json;
use crate::daemon::outcome::{Class, Failure};
use crate::update::versions::Versions;
use show::{INPUT_LIMIT, Piece};

/// What to do with a handover.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show what a file holds, or what this kernel was handed: record, messages, arena header, control block, journal, report.
    Show(ShowArgs),
    /// Say whether a kernel, and the agent on it, would understand what this one hands over; touches nothing.
    Check(CheckArgs),
    /// Say which versions of the formats this program speaks.
    Versions,
}

/// What to show.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ShowArgs {
    /// A file; its first bytes say what it is.
    file: Option<PathBuf>,
    /// What this kernel was handed, or what an update under way hands over.
    #[arg(long)]
    live: bool,
}

/// What to check.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The kernel image (bzImage).
    #[arg(long)]
    kernel: PathBuf,
}

/// Does what the arguments say.
pub fn run(verb: Verb, socket: &Path, json: bool) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Show(args) => {
            let pieces = match &args.file {
                Some(file) => of_file(file)?,
                None => live::pieces().map_err(|error| Failure::from_error(&error))?,
            };
            Ok(show(&pieces, json))
        }
        Verb::Check(args) => Ok(findings::print(&check::findings(&args.kernel, socket), json)),
        Verb::Versions => {
            versions(json);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn of_file(path: &Path) -> Result<Vec<Piece>, Failure> {
    let advice = "files are recognised by their first bytes: a handover record or message (BATONMSG), an arena (BATONAR), a \
                  dump of a control block, an update's journal or report (JSON)";
    let failed = |why: String| Failure::new(Class::Failed, format!("{}: {why}", path.display()), advice);
    let read = || -> std::io::Result<(Vec<u8>, u64)> {
        let file = File::open(path)?;
        let total = file.metadata()?.len();
        let mut bytes = Vec::new();
        file.take(INPUT_LIMIT).read_to_end(&mut bytes)?;
        Ok((bytes, total))
    };
    let (bytes, total) = read().map_err(|error| failed(error.to_string()))?;
    show::pieces(&path.display().to_string(), &bytes, total).map_err(|error| failed(error.to_string()))
}

/// Prints them. What no kernel would believe is a failure, although it was shown.
fn show(pieces: &[Piece], json: bool) -> ExitCode {
    #[derive(Serialize)]
    struct Shown<'a> {
        schema_version: u32,
        pieces: &'a [Piece],
    }
    if json {
        print_json(&Shown { schema_version: 1, pieces });
    } else {
        let texts: Vec<String> = pieces.iter().map(render::piece).collect();
        print!("{}", texts.join("\n"));
    }
    match pieces.iter().all(|piece| piece.problem.is_none()) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(Class::Failed.exit_code()),
    }
}

fn versions(json: bool) {
    let ours = Versions::OURS;
    if json {
        print_json(&ours);
    } else {
        println!("control block    {}", ours.control_block);
        println!("handover record  1 to {}", ours.handover_record);
        println!("to successor     1 to {}", ours.to_successor);
        println!("to incumbent     1 to {}", ours.to_incumbent);
    }
}
