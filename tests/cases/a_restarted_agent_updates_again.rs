//! batond is killed in a kernel that was itself a successor, and started again. The services come to it by themselves, with what they
//! have; the next update is like any other. Then a service is ended and started anew: it finds its memory. Nothing that was
//! acknowledged is lost.

use agent::daemon::outcome::Class;
use agent::recovery::ledger;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::memo::{self, assert_crossed, is_kept, report};
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::{NEW, OLD, agents, console, kernel, open, snapshot, upgrade};
use demos::story::stage::{Shape, Stage};

/// It keeps a file by the library.
const MEMO: &str = "memo-sdk";
const ANOTHER_SERVICE: &str = "/usr/sbin/baton-kv --listen 10.77.0.10:6379 >/dev/kmsg 2>&1 </dev/null &";

/// How many separate memories are written down for kept files.
fn memories_of_files(stage: &Stage) -> Result<usize> {
    let pages: ledger::Pages = serde_json::from_str(&stage.guest().check(&["cat", ledger::PATH])?)?;
    Ok(pages.files.len())
}

#[test]
fn a_batond_started_again_in_a_successor_makes_the_next_update() -> Result<()> {
    let mut shape = Shape::default();
    shape.services.push(memo::service(MEMO, true));
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;
    let arena = snapshot::arena_of_service(&stage.guest())?;
    report(stage, MEMO, is_kept)?;
    upgrade(stage, NEW, &[])?;
    stage.await_serving()?;
    let before = stage.status()?;

    agents::kill(stage)?;
    clients.await_more(40).context("the service needs no agent to serve")?;
    agents::start(stage)?;
    stage.await_serving().context("all come back by themselves")?;
    let after = stage.status()?;
    assert_eq!((after.role.to_string().as_str(), after.hops, after.epoch), ("incumbent", 1, before.epoch));
    assert_eq!(after.services, before.services);
    assert_eq!(memories_of_files(stage)?, 1, "the file has been kept again, and its earlier pages are given back");
    clients.await_more(40)?;
    let wrote = report(stage, MEMO, is_kept)?.writes;
    let kept = report(stage, MEMO, |found| found.writes > wrote)?;

    upgrade(stage, OLD, &[])?;
    clients.await_more(40)?;
    assert_crossed(stage, MEMO, &kept)?;
    assert_eq!(snapshot::arena_of_service(&stage.guest())?, arena, "it has the memory that it had");

    agents::kill(stage)?;
    agents::end(stage, "baton-kv", "TERM")?;
    agents::start(stage)?;
    // Its data would not cross: refused, and said why.
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let refused = baton(&stage.guest(), &["upgrade", "--kernel", &image])?;
    assert_refused("an update without its service", &refused, Class::Precondition, &["service baton-kv is absent"])?;
    stage.guest().check(&["sh", "-c", ANOTHER_SERVICE])?;
    stage.await_serving()?;
    clients.await_more(40).context("the service goes on with what it had")?;
    assert_eq!(snapshot::arena_of_service(&stage.guest())?, arena, "it has the memory that it had");

    upgrade(stage, NEW, &[])?;
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(snapshot::arena_of_service(&stage.guest())?, arena, "and so has the next kernel's");
    assert_eq!(stage.status()?.hops, 3);
    let after = snapshot::of(stage)?;
    assert_eq!((after.online.as_str(), after.instances.len()), ("0-3", 1));
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
