//! Programs that know nothing of an update: they are stopped and let go as a whole, by the freezer of their cgroup
//! (Documentation/admin-guide/cgroup-v2.rst, `cgroup.freeze`), because nobody can ask them to stop by themselves.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Where cgroups (version 2) are mounted, as everywhere.
const ROOT: &str = "/sys/fs/cgroup";

/// One program.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its cgroup's path, as `/proc/PID/cgroup` has it.
    cgroup: PathBuf,
    /// It has not started yet.
    pub waiting: bool,
}

/// The cgroup of a process.
pub fn cgroup_of(pid: i32) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).with_context(|| format!("process {pid} has gone"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(line.context("this machine has no cgroups of version 2 (mount -t cgroup2)")?.into())
}

fn folder(cgroup: &Path) -> PathBuf {
    Path::new(ROOT).join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

impl Program {
    /// The program that process `pid` is about to become. It keeps its cgroup if that is its own (a systemd unit's); one
    /// that it shares with batond is not, and then it gets a new one.
    pub fn adopt(name: &str, pid: i32) -> Result<Program> {
        let mut cgroup = cgroup_of(pid)?;
        if cgroup == cgroup_of(std::process::id().cast_signed())? || cgroup == Path::new("/") {
            cgroup = cgroup.join(format!("baton-{name}"));
            let folder = folder(&cgroup);
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            fs::write(folder.join("cgroup.procs"), pid.to_string()).context("cannot move the program there")?;
        }
        if !folder(&cgroup).join("cgroup.freeze").exists() {
            bail!("cgroup {} cannot be frozen: is {ROOT} mounted?", cgroup.display());
        }
        Ok(Program { cgroup, waiting: true })
    }

    /// Whether a process of this cgroup is its.
    pub fn holds(&self, cgroup: &Path) -> bool {
        cgroup.starts_with(&self.cgroup)
    }

    /// Whether any process of it lives. Its first one may have ended, and others of its cgroup serve on.
    pub fn lives(&self) -> bool {
        match fs::read_to_string(folder(&self.cgroup).join("cgroup.events")) {
            Ok(text) => text.lines().any(|line| line == "populated 1"),
            // Only a cgroup that is gone, or is just going, says that nobody is in it.
            Err(error) => error.kind() != ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENODEV),
        }
    }

    /// Stops all its processes; they have stopped when this returns.
    pub fn freeze(&self, until: Instant) -> Result<()> {
        let folder = folder(&self.cgroup);
        fs::write(folder.join("cgroup.freeze"), "1")?;
        let events = fs::File::open(folder.join("cgroup.events"))?;
        loop {
            // Read from the start: a read also arms the next notice.
            let text = fs::read_to_string(folder.join("cgroup.events"))?;
            if text.lines().any(|line| line == "frozen 1") {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("its processes have not stopped in time");
            }
            let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], limit)?;
        }
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<()> {
        Ok(fs::write(folder(&self.cgroup).join("cgroup.freeze"), "0")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_whose_cgroup_is_gone_has_ended() {
        assert!(!Program { cgroup: "/no-such-cgroup-of-batons".into(), waiting: false }.lives());
    }

    #[test]
    fn a_program_holds_its_cgroup_and_what_is_below() {
        let program = Program { cgroup: "/baton-memo".into(), waiting: false };
        for (cgroup, is_its) in [("/baton-memo", true), ("/baton-memo/x", true), ("/baton-memo2", false), ("/", false)]
        {
            assert_eq!(program.holds(Path::new(cgroup)), is_its, "{cgroup}");
        }
        assert_eq!(folder(&program.cgroup), Path::new("/sys/fs/cgroup/baton-memo"));
    }
}
