//! The host's part: running its programs so that none outlives the lab, and making sure that they are there.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::error::{Doing, LabError, Result, last_lines};
use super::progress::Task;

/// The keyring with which trixie's archive is signed.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What the lab needs from the host: a file that shows it is there, and the Debian or Ubuntu package that brings it.
const NEEDS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("ip", "iproute2"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
    ("chroot", "coreutils"),
    ("dpkg-deb", "dpkg"),
    ("mke2fs", "e2fsprogs"),
    ("mkswap", "util-linux"),
    (KEYRING, "debian-archive-keyring"),
];

/// A command that the host's kernel kills when the thread that starts it ends, however it ends: no signal handler, no leftovers after
/// kill -9. So the starting thread must live as long as the program is wanted.
#[must_use]
pub fn leashed(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// Runs a command to its end; its output, or an error with the end of what it said.
pub fn run(program: &str, command: &mut Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output().doing(format_args!("starting {program}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(LabError::Program { program: program.into(), status: output.status, output: last_lines(&said, 15) })
}

/// Whether the lab may make namespaces, mounts and devices.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Makes sure of the host's part: as root on a machine with apt it installs what is missing, else it says what to do, in one line.
pub fn prepare(task: &Task) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        return Err(LabError::Prerequisite(
            "the lab's machines are x86-64, and so must be the host (its programs run inside them)".into(),
        ));
    }
    let missing = missing_packages();
    if !is_root() {
        let install = if missing.is_empty() {
            String::new()
        } else {
            format!("`sudo apt-get install {}`, then ", missing.join(" "))
        };
        return Err(LabError::Prerequisite(format!(
            "the lab makes network namespaces and mounts, so it needs root: {install}run this again under `sudo -E env PATH=$PATH`"
        )));
    }
    if missing.is_empty() {
        return Ok(());
    }
    if !on_path("apt-get") {
        return Err(LabError::Prerequisite(format!("please install (by their Debian names): {}", missing.join(" "))));
    }
    task.step(&format!("installing {}", missing.join(" ")));
    // Not leashed: killing dpkg halfway would leave the host worse than it was.
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive");
        run("apt-get install", &mut command)
    };
    // A machine whose package lists are fresh enough needs no update, which is the slower half.
    if install().is_err() {
        task.step("updating apt's package lists");
        run("apt-get update", Command::new("apt-get").args(["update", "-q"]))?;
        install()?;
    }
    match missing_packages() {
        left if left.is_empty() => Ok(()),
        left => Err(LabError::Prerequisite(format!(
            "apt installed {} but it is still not to be found; is PATH complete?",
            left.join(" ")
        ))),
    }
}

fn missing_packages() -> Vec<&'static str> {
    let mut missing: Vec<_> = NEEDS.iter().filter(|(need, _)| !on_path(need)).map(|(_, package)| *package).collect();
    missing.dedup();
    missing
}

fn on_path(program: &str) -> bool {
    if program.starts_with('/') {
        return Path::new(program).exists();
    }
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_what_the_program_said() {
        let error =
            run("sh", Command::new("sh").args(["-c", "echo first; echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
    }

    #[test]
    fn path_is_searched() {
        assert!(on_path("sh") && on_path("/bin/sh"));
        assert!(!on_path("no-such-program-of-ours") && !on_path("/no/such/file"));
    }
}
