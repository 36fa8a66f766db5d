//! `baton run NAME -- PROGRAM...`: becomes a program that keeps memfds in the fd store, when it may run on this kernel.
//!
//! The program finds what it kept as systemd would give it: `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID`
//! (sd_listen_fds_with_names(3)), from descriptor 3 on; and `NOTIFY_SOCKET`, to keep more.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, fcntl};

use crate::machine::sys::seccomp::divert_ioctls;
use crate::services::files::{notify, orchestrator};
use baton_sdk::files::{Keeper, KeptFile};

/// `SD_LISTEN_FDS_START`.
const FIRST: i32 = 3;

/// Becomes the program; comes back only with an error. With `liveupdate`, batond answers its calls of the Live Update Orchestrator.
pub fn become_program(name: &str, exec: &[String], liveupdate: bool) -> Result<std::convert::Infallible> {
    let (program, arguments) = exec.split_first().context("name a program to run")?;
    let keeper = Keeper::new(name);
    let files = keeper.start().context("batond does not let it start")?;
    if liveupdate {
        let listener =
            divert_ioctls(orchestrator::IOCTLS).context("cannot divert its calls (seccomp; are you root?)")?;
        keeper.divert(&listener).context("batond does not answer for /dev/liveupdate")?;
    }
    let mut command = Command::new(program);
    command.args(arguments).env("NOTIFY_SOCKET", notify::SOCKET);
    for variable in ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"] {
        command.env_remove(variable);
    }
    if !files.is_empty() {
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        command.env("LISTEN_FDS", files.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        // exec keeps the process, so this is the program's own number.
        command.env("LISTEN_PID", std::process::id().to_string());
        hand_on(files)?;
    }
    Err(command.exec()).with_context(|| format!("cannot run {program}"))
}

/// Puts the files where the program looks for them, open across exec.
fn hand_on(files: Vec<KeptFile>) -> Result<()> {
    let behind = FIRST + i32::try_from(files.len())?;
    // Out of the way first: one of them may have the number that another is to get.
    let aside = |file: &OwnedFd| -> Result<OwnedFd> {
        let mut copy = file.as_fd().try_clone_to_owned()?;
        let mut low = Vec::new();
        while copy.as_raw_fd() < behind {
            let higher = copy.as_fd().try_clone_to_owned()?;
            low.push(std::mem::replace(&mut copy, higher));
        }
        Ok(copy)
    };
    let aside: Vec<OwnedFd> = files.iter().map(|kept| aside(&kept.file)).collect::<Result<_>>()?;
    drop(files);
    for (file, number) in aside.iter().zip(FIRST..) {
        // The lowest free number from there on, and not closed by exec: nobody owns it any more but the program to be.
        let got = fcntl(file, FcntlArg::F_DUPFD(number))?;
        if got != number {
            bail!("descriptor {number} is in use: something has left it open to this program");
        }
    }
    Ok(())
}
