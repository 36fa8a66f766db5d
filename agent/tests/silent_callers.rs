//! A real `batond`, whose `/run` is a file system of its own, and 5000 connections that say nothing. Needs root, as `batond` does, and no
//! module.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// No wait is as long: it is for what never comes.
const FAR: Duration = Duration::from_secs(60);

/// A `batond` in a mount namespace of its own, and its folder of sockets as it is seen from here.
struct Daemon {
    child: Child,
    sockets: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(descriptors: u32) -> Result<Daemon> {
        let script = format!(
            "set -e; mount -t tmpfs none /run; mkdir -p /run/baton /var/lib/baton; mount -t tmpfs none /var/lib/baton; \
             : > /run/config.toml; ulimit -n {descriptors}; exec {} --config /run/config.toml",
            env!("CARGO_BIN_EXE_batond")
        );
        let child = Command::new("unshare")
            .args(["--mount", "--", "sh", "-c", &script])
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run unshare (util-linux), which needs root")?;
        let sockets = PathBuf::from(format!("/proc/{}/root/run/baton", child.id()));
        let mut daemon = Daemon { child, sockets };
        let until = Instant::now() + FAR;
        // The last one that it makes.
        while !daemon.sockets.join("arenas.sock").exists() {
            ensure!(daemon.child.try_wait()?.is_none(), "batond has ended");
            ensure!(Instant::now() < until, "batond makes no sockets");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(name)
    }

    /// How long `baton status` takes.
    fn status(&self) -> Result<Duration> {
        let began = Instant::now();
        let mut baton = Command::new(env!("CARGO_BIN_EXE_baton"));
        let output = baton.arg("--socket").arg(self.socket("control.sock")).arg("status").output()?;
        ensure!(output.status.success(), "baton status: {}", String::from_utf8_lossy(&output.stderr));
        Ok(began.elapsed())
    }
}

fn fill(path: &Path, count: usize, held: &mut std::collections::VecDeque<UnixStream>) -> Result<()> {
    for _ in 0..count {
        held.push_back(UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?);
        // This program may not have all of them open; the others were closed by batond long ago.
        if held.len() > 400 {
            held.pop_front();
        }
    }
    Ok(())
}

#[test]
fn silent_callers_do_not_keep_batond_from_answering() -> Result<()> {
    for descriptors in [1024, 48] {
        let daemon = Daemon::start(descriptors)?;
        daemon.status()?;
        let mut held = std::collections::VecDeque::new();
        for name in ["services.sock", "control.sock", "files.sock", "arenas.sock"] {
            let meta = std::fs::metadata(daemon.socket(name))?;
            let mode = meta.mode() & 0o777;
            ensure!(meta.uid() == 0 && mode & 0o007 == 0, "{name} has owner {} and mode {mode:o}", meta.uid());
            ensure!(mode == 0o600 || name == "services.sock" && mode == 0o660, "{name} has mode {mode:o}");
            fill(&daemon.socket(name), if name == "services.sock" { 5000 } else { 300 }, &mut held)?;
        }
        // Others that say something wrong are closed, and cost no more.
        let mut liar = UnixStream::connect(daemon.socket("services.sock"))?;
        liar.write_all(b"\xff\xff\xff\xff")?;
        let took = [daemon.status()?, daemon.status()?, daemon.status()?];
        // A thousand times what it takes: without a place for it, it would have to wait until silent callers are given up.
        ensure!(took.iter().all(|took| *took < Duration::from_secs(15)), "with {descriptors} descriptors: {took:?}");
    }
    Ok(())
}
