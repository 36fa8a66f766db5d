//! `cargo demo` as a program: what it prints and how it ends when things go wrong, and that ^C leaves nothing behind.
//! Needs root; one machine at a time.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use demos::lab::Progress;
use demos::lab::cache::{self, Lock};
use demos::story::report::{Comparison, Outcome, Report};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long what was killed may take to be gone from /proc.
const GONE: Duration = Duration::from_secs(10);

/// `cargo demo` under way.
struct Demo {
    child: Child,
    progress: BufReader<std::process::ChildStderr>,
    said: String,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("starting demo");
        let progress = BufReader::new(child.stderr.take().expect("piped"));
        Self { child, progress, said: String::new() }
    }

    /// Reads its progress until a line has these words.
    fn await_line(&mut self, words: &str) {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            let read = self.progress.read_line(&mut line).expect("reading its progress");
            self.said.push_str(&line);
            assert!(read > 0, "it ended before it said {words:?}:\n{}", self.said);
        }
    }

    /// The programs that it started, and theirs.
    fn descendants(&self) -> BTreeSet<u32> {
        let mut found = BTreeSet::from([self.child.id()]);
        loop {
            let more: Vec<u32> =
                parents().filter(|(pid, of)| found.contains(of) && !found.contains(pid)).map(|(pid, _)| pid).collect();
            if more.is_empty() {
                found.remove(&self.child.id());
                return found;
            }
            found.extend(more);
        }
    }

    fn qemu(&self) -> u32 {
        let is_qemu = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("qemu-system"))
        };
        self.descendants().into_iter().find(is_qemu).expect("it runs a machine")
    }

    /// Its end, and what it printed on stdout.
    fn end(mut self) -> (ExitStatus, String, String) {
        let mut out = String::new();
        let mut stdout = self.child.stdout.take().expect("piped");
        let reader = std::thread::spawn(move || stdout.read_to_string(&mut out).map(|_| out));
        self.progress.read_to_string(&mut self.said).expect("reading its progress");
        let out = reader.join().expect("reads").expect("text");
        (self.child.wait().expect("waiting"), out, self.said)
    }
}

/// Every process with its parent.
fn parents() -> impl Iterator<Item = (u32, u32)> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    pids.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name in parentheses may hold anything.
        Some((pid, stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?))
    })
}

fn turn() -> Lock {
    let folder = cache::root().expect("a cache folder");
    Lock::exclusive(&folder.join("machine.lock"), &Progress::auto().task("turn to run a machine")).expect("a lock")
}

/// What of the host a machine could leave behind: interfaces, and mounts of the first namespace.
fn host() -> (BTreeSet<String>, String) {
    let links = fs::read_dir("/sys/class/net").expect("/sys/class/net").flatten();
    let links = links.map(|link| link.file_name().to_string_lossy().into_owned()).collect();
    (links, fs::read_to_string("/proc/self/mounts").expect("mounts"))
}

/// ^C at the terminal: the whole process group gets it.
fn interrupt_when(arguments: &[&str], words: &str) {
    let before = host();
    let mut demo = Demo::start(arguments);
    demo.await_line(words);
    let qemu = demo.qemu();
    let network = fs::read_link(format!("/proc/{qemu}/ns/net")).expect("QEMU's network namespace");
    let all = demo.descendants();
    kill(Pid::from_raw(demo.child.id().cast_signed()), Signal::SIGINT).expect("SIGINT");
    let (status, out, said) = demo.end();
    // A shell says 130 of both.
    assert!(status.code() == Some(130) || status.signal() == Some(2), "{status}\n{said}");
    assert_eq!(out, "", "what was not finished has no result");

    let began = Instant::now();
    let left = || -> Vec<u32> {
        all.iter().copied().filter(|pid| fs::exists(format!("/proc/{pid}")).unwrap_or(true)).collect()
    };
    while !left().is_empty() && began.elapsed() < GONE {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(left(), [0; 0], "processes of `demo {}` are left", arguments.join(" "));
    // A namespace with bridge and TAPs lives as long as a process or an open file is in it.
    let users = parents().filter(|(pid, _)| fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|of| of == network));
    assert_eq!(users.count(), 0, "somebody is left in the machine's network");
    assert_eq!(host(), before);
}

#[test]
fn whoever_asks_for_json_gets_it_when_no_lab_can_be_set_up() {
    let cache = tempfile::tempdir().expect("a folder");
    for story in ["upgrade", "compare"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
        // Nobody listens on port 9.
        command.env("XDG_CACHE_HOME", cache.path()).env("BATON_DEBIAN_MIRROR", "http://127.0.0.1:9/debian");
        let output = command.args([story, "--json"]).output().expect("starting demo");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8(output.stdout).expect("text");
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|why| panic!("{why}: {text:?}"));
        assert_eq!((&json["schema_version"], &json["accelerator"]), (&1.into(), &Value::Null), "{json:#}");
        let why = json["failure"].as_str().expect("a reason");
        assert!(why.contains("127.0.0.1:9") && why.contains("name another in BATON_DEBIAN_MIRROR"), "{why}");
    }
}

#[test]
fn an_update_that_cannot_work_is_rolled_back_and_told_so() {
    let _turn = turn();
    let (status, out, said) = Demo::start(&["upgrade", "--broken", "--json"]).end();
    assert_eq!(status.code(), Some(4), "{said}\n{out}");
    let report: Report = serde_json::from_str(&out).unwrap_or_else(|why| panic!("{why}: {out}"));
    assert_eq!((report.outcome, report.hops.len()), (Outcome::RolledBack, 0), "{report:#?}");
    let unfinished = report.unfinished.expect("an update was begun");
    assert!(unfinished.writes.acknowledged > 0, "{unfinished:?}");
    assert_eq!((unfinished.writes.lost, unfinished.writes.unread, unfinished.connections.reset), (0, 0, 0));
    let why = report.failure.expect("a reason");
    assert!(why.starts_with("booting failed") && why.contains("its agent never came up"), "{why}");
}

#[test]
fn interrupting_an_update_leaves_nothing() {
    let _turn = turn();
    interrupt_when(&["upgrade", "--json"], "update 1 of 1: booting");
}

#[test]
fn interrupting_a_comparison_leaves_nothing() {
    let _turn = turn();
    interrupt_when(&["compare", "--json", "--runs", "1", "--other-runs", "1"], "update 1 of 1: trial");
}

/// kexec's only run loses its machine: no ratio, said so, and the reboot is measured all the same.
#[test]
fn a_run_that_loses_its_machine_is_recorded_and_the_comparison_goes_on() {
    let _turn = turn();
    let mut demo = Demo::start(&["compare", "--json", "--runs", "1", "--other-runs", "1"]);
    demo.await_line("kexec 1 of 1: the machine starts anew");
    kill(Pid::from_raw(demo.qemu().cast_signed()), Signal::SIGKILL).expect("killing QEMU");
    let (status, out, said) = demo.end();
    assert_eq!(status.code(), Some(1), "{said}\n{out}");
    let comparison: Comparison = serde_json::from_str(&out).unwrap_or_else(|why| panic!("{why}: {out}"));
    assert_eq!(comparison.ratio_kexec_over_baton, None);
    assert!(comparison.ratio_reboot_over_baton.is_some(), "{said}");
    let kexec = &comparison.methods.kexec;
    assert_eq!((kexec.runs.len(), kexec.failures.len(), kexec.failures[0].run), (0, 1, 1));
    assert!(kexec.failures[0].why.contains("the machine ended"), "{}", kexec.failures[0].why);
    assert!(kexec.failures[0].logs.is_some());
    assert_eq!((comparison.methods.baton.runs.len(), comparison.methods.baton.writes.lost), (1, 0));
    assert!(comparison.failure.is_some_and(|why| why.contains("none of 1 runs of kexec")));
    assert!(said.contains("FAILED: run 1 of 1 of kexec"), "{said}");
}
