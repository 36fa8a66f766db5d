//! `baton dmesg`: what the successor's kernel says, or said.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::output::{print_json, unexpected};
use crate::daemon::control::{self, Reply, Request};
use crate::daemon::outcome::{Class, Failure};
use crate::daemon::successor_log::Log;

/// How often a log that is followed is looked at. Another kernel writes it; nothing tells that it has.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What is asked for.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only of this instance (`baton kernels`), or nothing.
    id: Option<u32>,
    /// Show what comes, too, until that kernel has taken over or is gone. With --json: one message a line.
    #[arg(long, short)]
    follow: bool,
}

/// Shows it.
pub fn run(args: &Args, socket: &Path, json: bool) -> Result<ExitCode, Failure> {
    let get = |instance, after| match control::ask(socket, &Request::Dmesg { instance, after }, |_, _| {})? {
        Reply::Log(log) => Ok(*log),
        other => Err(unexpected(&other)),
    };
    let mut log = get(args.id, None)?;
    if !args.follow && json {
        print_json(&log);
        return Ok(ExitCode::SUCCESS);
    }
    let instance = log.instance;
    let mut after = None;
    loop {
        if let Err(error) = show(&log, json) {
            return match error.kind() {
                // The reader of a pipe has left (`| head`): no error.
                io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
                _ => Err(Failure::new(Class::Failed, format!("cannot print: {error}"), "")),
            };
        }
        after = log.records.last().map_or(after, |record| Some(record.seq));
        if !args.follow || !log.alive {
            break;
        }
        std::thread::sleep(LOOK_AGAIN);
        log = match get(Some(instance), after) {
            Ok(log) => log,
            // It has taken over, or its update was undone without a log to keep.
            Err(failure) if failure.class == Class::Failed => break,
            Err(failure) => return Err(failure),
        };
    }
    if let Some(cause) = &log.cause {
        eprintln!("baton: {cause}");
    }
    Ok(ExitCode::SUCCESS)
}

fn show(log: &Log, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for record in &log.records {
        if json {
            writeln!(out, "{}", serde_json::to_string(record).expect("a record is plain data"))?;
        } else {
            writeln!(out, "{record}")?;
        }
    }
    out.flush()
}
