//! Programs of a machine that are ended, and batond started again, as an administrator or a package does it.

use std::time::Duration;

use anyhow::{Context, Result};
use demos::story::stage::Stage;

const START: &str = "batond >/dev/kmsg 2>&1 </dev/null & \
                     for n in $(seq 600); do baton status >/dev/null 2>&1 && exit 0; usleep 50000; done; exit 1";
/// How long batond may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends a program by a signal; it is gone when this returns.
pub fn end(stage: &Stage, program: &str, signal: &str) -> Result<()> {
    let script =
        format!("p=$(pidof {program}); kill -{signal} $p; while kill -0 $p 2>/dev/null; do usleep 20000; done");
    stage.guest().check(&["sh", "-c", &script])?;
    Ok(())
}

/// Ends batond without a chance to do anything.
pub fn kill(stage: &Stage) -> Result<()> {
    end(stage, "batond", "KILL")
}

/// Starts another; it answers.
pub fn start(stage: &Stage) -> Result<()> {
    let started = stage.guest().command(&["sh", "-c", START]).timeout(PATIENCE).check();
    started.with_context(|| stage.machine.logs(40)).map(drop)
}
