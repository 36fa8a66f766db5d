//! batond ended and started again, as an administrator or a package does it.

use std::time::{Duration, Instant};

use agent::control::Status;
use anyhow::{Context, Result, ensure};
use demos::story::stage::{Stage, status_of};

const KILL: &str = "p=$(pidof batond); kill -9 $p; while kill -0 $p 2>/dev/null; do usleep 20000; done";
const START: &str = "batond >/dev/kmsg 2>&1 </dev/null & \
                     for n in $(seq 600); do baton status >/dev/null 2>&1 && exit 0; usleep 50000; done; exit 1";
/// How long services may take to come back.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends it without a chance to do anything.
pub fn kill(stage: &Stage) -> Result<()> {
    stage.guest().check(&["sh", "-c", KILL]).map(drop).map_err(Into::into)
}

/// Starts another; it answers.
pub fn start(stage: &Stage) -> Result<()> {
    let started = stage.guest().command(&["sh", "-c", START]).timeout(PATIENCE).check();
    started.with_context(|| stage.machine.logs(40)).map(drop)
}

/// How things stand, once every service is in this state.
pub fn await_services(stage: &Stage, state: &str) -> Result<Status> {
    let until = Instant::now() + PATIENCE;
    loop {
        let status = status_of(&stage.guest())?;
        if status.services.iter().all(|service| service.state == state) {
            return Ok(status);
        }
        ensure!(Instant::now() < until, "not all {state}: {:?}\n{}", status.services, stage.machine.logs(60));
        std::thread::sleep(Duration::from_millis(50));
    }
}
