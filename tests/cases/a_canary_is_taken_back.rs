//! `baton canary`: a kernel is tried beside the one that serves, and everything is taken back, whatever it shows: one that passes, one
//! whose check fails, hangs or does not exist, one that panics before its agent and one that panics in a check, one whose service does
//! not come up. Clients notice nothing. Afterwards an update works.

use agent::daemon::outcome::Class;
use agent::update::trial::report::{Candidate, Check, CheckVerdict, Report, Verdict};
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{baton, said};
use baton_tests::share::is_chosen;
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, kernel, open, upgrade};
use demos::story::stage::{Shape, Stage, cmdline};
use demos::story::traps;

/// One trial.
struct Tried {
    what: &'static str,
    /// On the candidate's command line.
    words: &'static str,
    /// More words for `baton canary`.
    more: &'static [&'static str],
    exit: u8,
    /// In the cause; nothing of one that passes.
    cause: &'static [&'static str],
    /// A check of its, what came of it, and what is said of it.
    check: (&'static str, CheckVerdict, &'static str),
    /// In the last lines of its log.
    tail: &'static str,
}

const FAILED: u8 = Class::TrialFailed as u8;

const TRIALS: [Tried; 7] = [
    Tried {
        what: "a candidate that passes",
        words: "",
        more: &[
            "--cpus",
            "2",
            "--for",
            "3s",
            "--check",
            "test -x /usr/sbin/baton-kv",
            "--check",
            "grep -c ^processor /proc/cpuinfo",
        ],
        exit: 0,
        cause: &[],
        check: ("grep -c ^processor /proc/cpuinfo", CheckVerdict::Pass, "exit code 0\n2"),
        tail: "",
    },
    Tried {
        what: "a check that fails",
        words: "",
        more: &["--check", "printf 'not \\033[31mgood\\n' >&2; exit 7", "--check", "true"],
        exit: FAILED,
        cause: &["trial failed, because of the successor", "failed: exit code 7"],
        check: ("printf 'not \\033[31mgood\\n' >&2; exit 7", CheckVerdict::Fail, "exit code 7\nnot \\u{1b}[31mgood"),
        tail: "",
    },
    Tried {
        what: "checks that hang, and that do not exist",
        words: "",
        more: &["--check-limit", "2s", "--check", "echo begun; sleep 1000", "--check", "no-such-program"],
        exit: FAILED,
        cause: &["check `echo begun; sleep 1000` did not end in time"],
        check: ("no-such-program", CheckVerdict::Missing, "exit code 127"),
        tail: "",
    },
    Tried {
        what: "a check that leaves a child with its output",
        words: "",
        more: &["--check", "sleep 1000 & echo over"],
        exit: 0,
        cause: &[],
        check: ("sleep 1000 & echo over", CheckVerdict::Pass, "exit code 0\nover"),
        tail: "",
    },
    Tried {
        what: "a panic before the agent",
        words: "initcall_blacklist=populate_rootfs panic=0",
        more: &["--check", "true"],
        exit: FAILED,
        cause: &[
            "booting failed, because of the successor",
            "its kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0), in mount_root_generic+0x",
        ],
        check: ("true", CheckVerdict::NotMade, "the trial ended before"),
        tail: "Kernel panic - not syncing: VFS: Unable to mount root fs",
    },
    Tried {
        what: "a panic in a check",
        words: "",
        more: &["--check", "echo c > /proc/sysrq-trigger", "--check", "true"],
        exit: FAILED,
        cause: &[
            "trial failed, because of the successor",
            "its kernel panicked: sysrq triggered crash",
            "sysrq_handle_crash+0x",
        ],
        check: ("echo c > /proc/sysrq-trigger", CheckVerdict::Fail, "panicked"),
        // The stack and the registers behind the panic's own line may be longer than what is quoted; the cause has that line.
        tail: "",
    },
    Tried {
        what: "a service that does not come up",
        words: "rdinit=/trap",
        more: &["--initrd", "/tmp/trap"],
        exit: FAILED,
        cause: &["trial failed, because of the successor", "baton-kv"],
        check: ("services", CheckVerdict::Fail, "baton-kv"),
        tail: "baton-init: baton-kv",
    },
];

#[test]
fn a_canary_is_taken_back_whatever_it_shows() -> Result<()> {
    let mut shape = Shape::default();
    // What the machine needs on an idle host is 6 s; the trap's service is waited for as long as a step lasts.
    (shape.update.boot_timeout_s, shape.update.step_timeout_s) = (120, 40);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    stage.guest().put("/tmp/trap", 0o644, &traps::service("exit 1")?)?;
    let clients = Clients::start(stage, 200)?;
    for tried in TRIALS.iter().filter(|tried| is_chosen(tried.what)) {
        try_one(stage, &clients, tried).with_context(|| format!("{}\n{}", tried.what, stage.machine.logs(20)))?;
    }
    refuse(stage)?;
    let load = clients.finish()?;
    eprintln!("{} writes acknowledged, {} lost", load.acknowledged, load.lost);
    ensure!(load.lost == 0 && load.contradictions == 0, "{load:?}");
    let connections = &load.connections;
    ensure!(connections.reset == 0 && connections.timed_out == 0, "connections ended: {connections:?}");
    upgrade(stage, NEW, &[])?;
    Ok(())
}

fn try_one(stage: &Stage, clients: &Clients, tried: &Tried) -> Result<()> {
    let guest = stage.guest();
    let release = &kernel(NEW).release;
    let image = format!("/boot/vmlinuz-{release}");
    let line = format!("{} {}", cmdline(1), tried.words);
    let before = (snapshot::of(stage)?, free_kib(stage)?);
    let acknowledged = clients.acknowledged();
    let words = ["canary", "--json", "--kernel", &image, "--for", "1s", "--cmdline", &line];
    let words: Vec<&str> = match tried.more.contains(&"--for") {
        false => words.iter().chain(tried.more).copied().collect(),
        true => words.iter().filter(|word| !["--for", "1s"].contains(*word)).chain(tried.more).copied().collect(),
    };
    let ran = baton(&guest, &words)?;
    ensure!(clients.acknowledged() > acknowledged, "no client was answered while it ran");
    clients.await_more(20)?;
    ensure!(ran.exit.code == Some(tried.exit.into()), "exit {:?}: {}", ran.exit, said(&ran));
    let report: Report = serde_json::from_slice(&ran.stdout).with_context(|| said(&ran))?;
    let after = (snapshot::of(stage)?, free_kib(stage)?);
    assert_untouched(tried.what, &before.0, &after.0);
    let [Candidate { id, verdict, cause, boot_ms, checks, dmesg_tail, .. }] = &report.candidates[..] else {
        anyhow::bail!("{report:?}");
    };
    eprintln!(
        "{}: instance {id}, booted in {boot_ms:?} ms, {} KiB more in use afterwards; {}",
        tried.what,
        before.1.cast_signed() - after.1.cast_signed(),
        cause.as_deref().unwrap_or("passed")
    );
    ensure!(report.returned.cpus && report.returned.memory, "{report:?}");
    ensure!(*verdict == if tried.exit == 0 { Verdict::Pass } else { Verdict::Fail }, "{report:?}");
    ensure!(cause.is_none() == tried.cause.is_empty(), "{cause:?}");
    for word in tried.cause {
        ensure!(cause.as_ref().is_some_and(|cause| cause.contains(word)), "{word:?} is not in {cause:?}");
    }
    let (name, expected, told) = tried.check;
    let check = checks.iter().find(|check| check.name == name).with_context(|| format!("no {name:?} in {checks:?}"))?;
    ensure!(check.verdict == expected && check.detail.contains(told), "{check:?}");
    if tried.exit == 0 {
        ensure!(checks.iter().all(Check::is_passed) && boot_ms.is_some(), "{checks:?}");
        for built_in in agent::update::trial::judge::BUILT_IN {
            ensure!(checks.iter().any(|check| check.name == built_in), "{built_in} is missing in {checks:?}");
        }
    }
    ensure!(dmesg_tail.len() == 30, "{} lines: {dmesg_tail:#?}", dmesg_tail.len());
    ensure!(dmesg_tail.iter().any(|line| line.contains(tried.tail)), "{:?} is not in {dmesg_tail:#?}", tried.tail);
    // Afterwards its log can still be read.
    let log = guest.check(&["baton", "dmesg", &id.to_string()])?;
    ensure!(log.contains("Linux version ") && log.contains(release), "{log}");
    Ok(())
}

/// What cannot be asked is refused before anything is touched.
fn refuse(stage: &Stage) -> Result<()> {
    let guest = stage.guest();
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let before = snapshot::of(stage)?;
    let long = "x".repeat(1025);
    let asked: [(&[&str], u8, &str); 5] = [
        (&["--cpus", "4"], 3, "4 CPUs are asked for, and 3 can be given"),
        (&["--memory", "64M"], 3, "a region of"),
        (&["--memory", "1T"], 2, "write it as 512M or 2G"),
        (&["--check", &long], 2, "a check of 1025 bytes"),
        (&["--for", "soon"], 2, "soon"),
    ];
    for (more, exit, told) in asked {
        let words: Vec<&str> = ["canary", "--kernel", &image].iter().chain(more).copied().collect();
        let ran = baton(&guest, &words)?;
        ensure!(ran.exit.code == Some(exit.into()) && said(&ran).contains(told), "{:?}: {}", ran.exit, said(&ran));
    }
    assert_untouched("what was refused", &before, &snapshot::of(stage)?);
    Ok(())
}

/// Free pages, once what can be dropped is dropped: KiB.
fn free_kib(stage: &Stage) -> Result<u64> {
    let script = "sync; echo 3 > /proc/sys/vm/drop_caches; awk '$1 == \"MemFree:\" { print $2 }' /proc/meminfo; \
                  awk '$1 == \"count:\" { n += $2 } END { print 4 * n }' /proc/zoneinfo";
    let text = stage.guest().check(&["sh", "-c", script])?;
    text.split_whitespace().map(|number| Ok(number.parse::<u64>()?)).sum::<Result<u64>>().context(text)
}
