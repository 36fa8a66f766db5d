//! A successor that serves is watched before it stays. Until then it is taken back: by an operator, at the end of its time, and when it
//! dies or stops answering, with every CPU that had moved; the next update works. And an operator can let it stay at once.

use agent::daemon::outcome::Class;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::share::is_chosen;
use baton_tests::snapshot::{self, Snapshot, assert_untouched};
use baton_tests::{NEW, OLD, kernel, open, upgrade};
use demos::story::rollback::operator;
use demos::story::stage::{Shape, Stage};
use demos::story::traps;

/// Why a watch ends badly.
struct TakenBack {
    what: &'static str,
    /// Words of `baton upgrade`.
    words: &'static [&'static str],
    /// An operator of the incumbent says this.
    by: Option<&'static str>,
    said: &'static str,
}

const ROLLED_BACK: TakenBack = TakenBack {
    what: "an operator who takes it back",
    words: &["--probation", "10m"],
    by: Some("rollback"),
    said: "called off by the operator in the phase probation",
};
const NOT_COMMITTED: TakenBack = TakenBack {
    what: "a time that is over without a commit",
    words: &["--probation", "2s", "--require-commit"],
    by: None,
    said: "nobody committed it within 2 s",
};
const PANICS: TakenBack = TakenBack {
    what: "a kernel that panics when it is watched",
    words: &["--probation", "10m", "--initrd", "/tmp/panics"],
    by: None,
    said: "the successor panicked",
};
const HANGS: TakenBack = TakenBack {
    what: "a kernel whose agent does not answer any more",
    words: &["--probation", "10m", "--initrd", "/tmp/hangs"],
    by: None,
    said: "the successor was silent for 2.000 s",
};

#[test]
fn a_successor_is_taken_back_until_it_is_committed() -> Result<()> {
    let mut shape = Shape::default();
    (shape.update.boot_timeout_s, shape.update.step_timeout_s) = (60, 30);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;
    let before = ready(stage, 3)?;

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
    for back in [&ROLLED_BACK, &NOT_COMMITTED, &PANICS, &HANGS].into_iter().filter(|back| is_chosen(back.what)) {
        last = is_taken_back(stage, NEW, back, &last, &clients)?;
    }
    // It stays because somebody says so, long before its time is over.
    stage.guest().check(&["sh", "-c", &operator("commit")])?;
    upgrade(stage, NEW, &["--probation", "10m", "--require-commit"])?;
    clients.await_more(20)?;

    // This one was a successor itself: the CPU that the firmware booted is kept back until the watch is over.
    let mut last = ready(stage, 2)?;
    for back in [&PANICS, &ROLLED_BACK].into_iter().filter(|back| is_chosen(&format!("once more: {}", back.what))) {
        last = is_taken_back(stage, OLD, back, &last, &clients)?;
    }
    // It stays because its time is over, and nobody had to say so.
    upgrade(stage, OLD, &["--probation", "2s"])?;

    clients.await_more(20)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    Ok(())
}

/// What an update leaves to the agent (memory, caches) is there from the first check on. `successors`: CPUs that the successor has when it
/// is watched.
fn ready(stage: &Stage, successors: u32) -> Result<Snapshot> {
    let guest = stage.guest();
    guest.put("/tmp/panics", 0o644, &traps::once_it_has(successors, "echo c > /proc/sysrq-trigger")?)?;
    guest.put("/tmp/hangs", 0o644, &traps::once_it_has(successors, "kill -STOP $(pidof batond)")?)?;
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
    let TakenBack { what, words, by, said } = back;
    let guest = stage.guest();
    if let Some(verb) = by {
        guest.check(&["sh", "-c", &operator(verb)])?;
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
