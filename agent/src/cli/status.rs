//! `baton status`: how things stand.

use std::process::ExitCode;

use super::output::{print_json, unexpected};
use crate::daemon::control::{Reply, Status};
use crate::daemon::outcome::Failure;

/// Prints what batond says.
pub fn run(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let Reply::Status(status) = reply else {
        return Err(unexpected(&reply));
    };
    if json {
        print_json(&status);
    } else {
        print(&status);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(status: &Status) {
    println!("kernel    {}", status.kernel_release);
    println!("role      {}", status.role);
    println!("epoch     {}", status.epoch);
    println!("updates   {} since the firmware booted", status.hops);
    for service in &status.services {
        println!("service   {} {} ({} KiB)", service.name, service.state, service.arena_bytes / 1024);
    }
    let Some(update) = &status.update else { return };
    println!(
        "update    {}: {} -> {}, {}; {} of {} CPUs moved",
        update.id,
        update.incumbent_release,
        update.successor_release,
        update.phase,
        update.cpus_moved,
        update.cpus_total
    );
    for span in &update.timeline {
        println!("          {:<20} {:>10.3} ms", span.name, span.ms);
    }
    for left in &update.left_undone {
        println!("          left undone: {left}");
    }
    if let Some(log) = &update.last_words {
        println!("          the successor's end: {log}");
        for line in &log.lines {
            println!("          | {line}");
        }
    }
}
