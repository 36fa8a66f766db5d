//! A successor that serves is watched before it stays. Until then it is taken back: by an operator, at the end of its time, and when it
//! dies or stops answering, with every CPU that had moved; the next update works. And an operator can let it stay at once.

use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::snapshot::{self, Snapshot, assert_untouched};
use baton_tests::{NEW, OLD, kernel, open, upgrade};
use demos::story::stage::{Shape, Stage};

/// Runs in the successor only, beside everything else there: waits until a second CPU is its own, and then for the watch to have begun.
fn trap(then: &str) -> Result<Vec<u8>> {
    let mut initrd = Initrd::new();
    let script = format!(
        "#!/bin/sh\n(\n\
         until [ \"$(grep -c ^processor /proc/cpuinfo 2> /dev/null)\" -ge 2 ] 2> /dev/null; do sleep 0.2; done\n\
         sleep 1\n{then}\n) &\nexec /init\n"
    );
    initrd.file("/trap", 0o755, script);
    Ok(initrd.bytes()?)
}

/// Why a watch ends badly.
struct TakenBack {
    what: &'static str,
    /// Words of `baton upgrade`.
    words: &'static [&'static str],
    /// A program of the incumbent says this again and again, until batond heeds it.
    operator: Option<&'static str>,
    said: &'static str,
}

const ROLLED_BACK: TakenBack = TakenBack {
    what: "an operator who takes it back",
    words: &["--probation", "10m"],
    operator: Some("rollback"),
    said: "probation failed, because of the operator: called off by the operator",
};
const NOT_COMMITTED: TakenBack = TakenBack {
    what: "a time that is over without a commit",
    words: &["--probation", "2s", "--require-commit"],
    operator: None,
    said: "nobody committed it within 2 s",
};
const PANICS: TakenBack = TakenBack {
    what: "a kernel that panics when it is watched",
    words: &["--probation", "10m", "--initrd", "/tmp/panics"],
    operator: None,
    said: "the successor panicked",
};
const HANGS: TakenBack = TakenBack {
    what: "a kernel whose agent does not answer any more",
    words: &["--probation", "10m", "--initrd", "/tmp/hangs"],
    operator: None,
    said: "the successor was silent for 2.000 s",
};

#[test]
fn a_successor_is_taken_back_until_it_is_committed() -> Result<()> {
    let mut shape = Shape::default();
    (shape.update.boot_timeout_s, shape.update.step_timeout_s) = (60, 30);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;
    let before = ready(stage)?;

    for verb in ["commit", "rollback"] {
        let ran = baton(&stage.guest(), &[verb])?;
        assert_refused(verb, &ran, Class::Precondition, &["no successor is on probation"])?;
    }
    for (words, said) in [
        (&["--probation", "365days"][..], "a probation of 31536000 s"),
        (&["--probation", "10ms"], "a probation of 0.01 s"),
        (&["--probation", "0s", "--require-commit"], "no time in which it could be said"),
    ] {
        let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
        let ran = baton(&stage.guest(), &[&["upgrade", "--kernel", &image], words].concat())?;
        assert_refused(&words.join(" "), &ran, Class::Precondition, &[said])?;
    }
    assert_untouched("what was refused", &before, &snapshot::of(stage)?);

    let mut last = before;
    for back in [&ROLLED_BACK, &NOT_COMMITTED, &PANICS, &HANGS] {
        last = is_taken_back(stage, NEW, back, &last, &clients)?;
    }
    // It stays because somebody says so, long before its time is over.
    let committed = "(until baton commit; do sleep 0.3; done) < /dev/null > /dev/null 2>&1 &";
    stage.guest().check(&["sh", "-c", committed])?;
    upgrade(stage, NEW, &["--probation", "10m", "--require-commit"])?;
    clients.await_more(20)?;

    // This one was a successor itself: the CPU that the firmware booted is kept back until the watch is over.
    let mut last = ready(stage)?;
    for back in [&PANICS, &ROLLED_BACK] {
        last = is_taken_back(stage, OLD, back, &last, &clients)?;
    }
    // It stays because its time is over, and nobody had to say so.
    upgrade(stage, OLD, &["--probation", "2s"])?;

    clients.await_more(20)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    Ok(())
}

/// What an update leaves to the agent (memory, caches) is there from the first check on.
fn ready(stage: &Stage) -> Result<Snapshot> {
    let guest = stage.guest();
    guest.put("/tmp/panics", 0o644, &trap("echo c > /proc/sysrq-trigger")?)?;
    guest.put("/tmp/hangs", 0o644, &trap("kill -STOP $(pidof batond)")?)?;
    let image = format!("/boot/vmlinuz-{}", kernel(OLD).release);
    baton(&guest, &["check", "--kernel", &image])?;
    snapshot::of(stage)
}

fn is_taken_back(
    stage: &Stage,
    series: &str,
    back: &TakenBack,
    before: &Snapshot,
    clients: &Clients,
) -> Result<Snapshot> {
    let TakenBack { what, words, operator, said } = back;
    let guest = stage.guest();
    if let Some(verb) = operator {
        let script = format!("(until baton {verb}; do sleep 0.3; done) < /dev/null > /dev/null 2>&1 &");
        guest.check(&["sh", "-c", &script])?;
    }
    let image = format!("/boot/vmlinuz-{}", kernel(series).release);
    let rdinit = if words.contains(&"--initrd") { "rdinit=/trap" } else { "" };
    // A successor that panics must wait to be fenced.
    let line = format!("console=ttyS{},115200 printk.devkmsg=on panic=0 {rdinit}", 1 - stage.serving);
    let ran = baton(&guest, &[&["upgrade", "--kernel", &image, "--cmdline", &line], *words].concat())
        .with_context(|| format!("{what}\n{}", stage.machine.logs(40)))?;
    assert_refused(what, &ran, Class::RolledBack, &["watch for", said])
        .map_err(|why| why.context(stage.machine.logs(40)))?;
    clients.await_more(20)?;
    let after = snapshot::of(stage)?;
    assert_untouched(what, before, &after);
    Ok(after)
}
