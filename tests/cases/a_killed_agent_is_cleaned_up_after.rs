//! batond is killed in mid-update, while the successor boots. The service serves on; the next batond takes CPU, memory and interface
//! back and says so in the journal; and once the service has been started again, which finds its arena as it was, an update works, and
//! nothing that was acknowledged before, between or after is lost.

use std::time::Duration;

use agent::outcome::Class;
use anyhow::{Context, Result, bail, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::snapshot::{self, Snapshot};
use baton_tests::{NEW, OLD, console, kernel, open};
use demos::lab::Patience;
use demos::story::stage::{Shape, Upgraded};

const RESTART: &str = "batond >/dev/kmsg 2>&1 </dev/null & \
                       for n in $(seq 600); do baton status >/dev/null 2>&1 && exit 0; usleep 50000; done; exit 1";

/// The first has to be gone: both want the same port.
const ANOTHER_SERVICE: &str = "p=$(pidof baton-kv); kill $p; while kill -0 $p 2>/dev/null; do usleep 20000; done; \
                               /usr/sbin/baton-kv --listen 10.77.0.10:6379 >/dev/kmsg 2>&1 </dev/null &";

#[test]
fn a_batond_killed_in_mid_update_leaves_nothing_that_the_next_one_does_not_take_back() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let guest = stage.guest();
    // What an update leaves to the agent is there from the first check on.
    ensure!(baton(&guest, &["check", "--kernel", &image])?.success());
    let before = snapshot::of(stage)?;

    let line = "console=ttyS1,115200 printk.devkmsg=on panic=0";
    let begun = guest.command(&["baton", "upgrade", "--kernel", &image, "--cmdline", line]).begin()?;
    stage.machine.wait_for(1, "Linux version", 0, Patience::BOOT)?;
    guest.check(&["sh", "-c", "kill -9 $(pidof batond)"])?;
    drop(begun);
    clients.await_more(40).context("the service needs no agent to serve")?;
    guest
        .command(&["sh", "-c", RESTART])
        .timeout(Duration::from_secs(60))
        .check()
        .with_context(|| stage.machine.logs(40))?;

    let after = snapshot::of(stage)?;
    let absent = [("baton-kv".to_owned(), "absent".to_owned())];
    assert_eq!(after.services, absent, "the service does not come back by itself");
    let of_machine = |snapshot: &Snapshot| {
        (snapshot.online.clone(), snapshot.mem_total_kib, snapshot.instances.clone(), snapshot.links.clone())
    };
    assert_eq!(of_machine(&after), of_machine(&before), "logs in {}", stage.machine.folder().display());
    let journal = guest.check(&["tail", "-n", "1", "/var/lib/baton/journal.jsonl"])?;
    ensure!(journal.contains("rolled_back") && journal.contains("batond died during `await hello`"), "{journal}");
    clients.await_more(40)?;

    // Its data would not cross: refused, and said why.
    let refused = baton(&guest, &["upgrade", "--kernel", &image])?;
    assert_refused("an update without its service", &refused, Class::Precondition, &["service baton-kv is absent"])?;
    let refused = baton(&guest, &["release", "baton-kv"])?;
    assert_refused("the arena of a service that runs", &refused, Class::Failed, &["still has the arena", "no agent"])?;

    guest.check(&["sh", "-c", ANOTHER_SERVICE])?;
    stage.await_serving()?;
    clients.await_more(40).context("the service goes on with what it had")?;
    match stage.upgrade(&kernel(NEW).release, &[])? {
        Upgraded::Drained(status) => assert_eq!(status.update.context("an update")?.left_undone, [""; 0]),
        Upgraded::Refused(ran) => bail!("{} {}", ran.text(), String::from_utf8_lossy(&ran.stderr)),
    }
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(snapshot::of(stage)?.online, before.online);
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
