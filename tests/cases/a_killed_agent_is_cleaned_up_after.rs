//! batond is killed in mid-update, while the successor boots: once in a kernel that the firmware booted, once in one that was a successor
//! itself. The service serves on; the next batond takes CPU, memory and interface back and says so in the journal; the service presents
//! itself to it, an update works, and nothing that was acknowledged before, between or after is lost.

use agent::daemon::outcome::Class;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::snapshot::{self, Snapshot};
use baton_tests::{NEW, OLD, agents, console, kernel, open, upgrade};
use demos::lab::Patience;
use demos::story::stage::{Shape, Stage};

/// An update that would lead to a kernel which talks on this serial port.
fn kill_in_mid_update(stage: &Stage, clients: &Clients, image: &str, port: usize) -> Result<()> {
    let guest = stage.guest();
    // What an update leaves to the agent is there from the first check on.
    ensure!(baton(&guest, &["check", "--kernel", image])?.success());
    let before = snapshot::of(stage)?;

    let line = format!("console=ttyS{port},115200 printk.devkmsg=on panic=0");
    let said = stage.machine.serial(port).position();
    let begun = guest.command(&["baton", "upgrade", "--kernel", image, "--cmdline", &line]).begin()?;
    stage.machine.wait_for(port, "Linux version", said, Patience::BOOT)?;
    agents::kill(stage)?;
    drop(begun);
    clients.await_more(40).context("the service needs no agent to serve")?;
    agents::start(stage)?;
    stage.await_serving().context("the service comes back by itself")?;
    let after = snapshot::of(stage)?;
    let of_machine = |snapshot: &Snapshot| {
        let Snapshot { online, mem_total_kib, instances, links, services, .. } = snapshot;
        (online.clone(), *mem_total_kib, instances.clone(), links.clone(), services.clone())
    };
    assert_eq!(of_machine(&after), of_machine(&before), "logs in {}", stage.machine.folder().display());
    let journal = guest.check(&["tail", "-n", "1", "/var/lib/baton/journal.jsonl"])?;
    ensure!(journal.contains("rolled_back") && journal.contains("the agent died during `await hello`"), "{journal}");
    clients.await_more(40)
}

#[test]
fn a_batond_killed_in_mid_update_leaves_nothing_that_the_next_one_does_not_take_back() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;
    let online = snapshot::of(stage)?.online;
    for (series, port) in [(NEW, 1), (OLD, 0)] {
        let release = &kernel(series).release;
        kill_in_mid_update(stage, &clients, &format!("/boot/vmlinuz-{release}"), port)
            .with_context(|| format!("under way to {release}"))?;
        let refused = baton(&stage.guest(), &["release", "baton-kv"])?;
        assert_refused("the arena of a service that runs", &refused, Class::Failed, &["is connected"])?;
        upgrade(stage, series, &[])?;
        clients.await_more(40)?;
    }
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(snapshot::of(stage)?.online, online);
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
