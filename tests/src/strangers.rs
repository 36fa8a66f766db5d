//! Programs in a machine that are none of its services (`stranger`), started by a test and asked afterwards what they were told.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use demos::lab::guest_programs;
use demos::story::stage::Stage;

use crate::lab;

/// Who is nobody on every Linux.
pub const NOBODY: &str = "65534";
/// The same in the group to which the services' socket is open (`baton`): who gets as far as batond, and is none of its services all the same.
pub const MEMBER: &str = "65534:991";
/// The line of `/etc/group` that makes it so.
pub const GROUP: &str = "baton:x:991:";
/// Who may be any service.
pub const ROOT: &str = "0";
const PROGRAM: &str = "/run/stranger";
/// How long one may take to say something.
const PATIENCE: Duration = Duration::from_secs(60);

/// Brings the program into the machine.
pub fn bring(stage: &Stage) -> Result<()> {
    let programs = guest_programs::build(&["stranger"], lab().progress())?;
    let bytes = std::fs::read(programs.join("stranger")).context("reading the stranger")?;
    Ok(stage.guest().put(PROGRAM, 0o755, &bytes)?)
}

/// Runs it to its end; what it said.
pub fn ask(stage: &Stage, user: &str, words: &[&str]) -> Result<String> {
    let ran = stage.guest().command(&[&[PROGRAM, user], words].concat()).run()?;
    Ok(format!("{}{}", ran.text(), String::from_utf8_lossy(&ran.stderr)))
}

/// One that goes on beside the test.
#[derive(Debug)]
pub struct Stranger {
    log: String,
}

impl Stranger {
    /// Starts it; its name is the log's.
    pub fn start(stage: &Stage, name: &str, user: &str, words: &[&str]) -> Result<Stranger> {
        let log = format!("/run/stranger-{name}.log");
        let script = "log=$1; shift; ulimit -n 20000; \"$@\" >$log 2>&1 </dev/null & echo $! >$log.pid";
        stage.guest().check(&[&["sh", "-c", script, "sh", &log, PROGRAM, user], words].concat())?;
        Ok(Stranger { log })
    }

    /// What it has said so far.
    pub fn said(&self, stage: &Stage) -> Result<String> {
        Ok(stage.guest().check(&["cat", &self.log])?)
    }

    /// Waits until it has said one of these.
    pub fn await_word(&self, stage: &Stage, wanted: &[&str]) -> Result<String> {
        let until = Instant::now() + PATIENCE;
        loop {
            let said = self.said(stage)?;
            if wanted.iter().any(|word| said.contains(word)) {
                return Ok(said);
            }
            ensure!(Instant::now() < until, "{}: none of {wanted:?} in {said:?}\n{}", self.log, stage.machine.logs(40));
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends it; it is gone when this returns.
    pub fn end(self, stage: &Stage) -> Result<()> {
        let script = "p=$(cat $1.pid); kill -9 $p 2>/dev/null; while kill -0 $p 2>/dev/null; do sleep 0.05; done";
        stage.guest().check(&["sh", "-c", script, "sh", &self.log])?;
        Ok(())
    }
}
