//! batond is killed in a kernel that was itself a successor, and started again; its service, too. It finds what it had: the service goes on
//! with its arena, and the next update is like any other. Nothing that was acknowledged is lost.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use baton_tests::clients::Clients;
use baton_tests::{NEW, OLD, console, kernel, open, snapshot};
use demos::story::stage::{Shape, Stage, Upgraded, status_of};

const RESTART: &str = "p=$(pidof batond); kill -9 $p; while kill -0 $p 2>/dev/null; do usleep 20000; done; \
                       batond >/dev/kmsg 2>&1 </dev/null & \
                       for n in $(seq 600); do baton status >/dev/null 2>&1 && exit 0; usleep 50000; done; exit 1";

/// The first has to be gone: both want the same port.
const ANOTHER_SERVICE: &str = "p=$(pidof baton-kv); kill $p; while kill -0 $p 2>/dev/null; do usleep 20000; done; \
                               /usr/sbin/baton-kv --listen 10.77.0.10:6379 >/dev/kmsg 2>&1 </dev/null &";

fn upgrade(stage: &mut Stage, series: &str) -> Result<()> {
    let release = &kernel(series).release;
    match stage.upgrade(release, &[])? {
        Upgraded::Drained(status) => {
            assert_eq!(status.update.context("an update")?.left_undone, [""; 0], "to {release}");
            Ok(())
        }
        Upgraded::Refused(ran) => bail!("to {release}: {} {}", ran.text(), String::from_utf8_lossy(&ran.stderr)),
    }
}

#[test]
fn a_batond_started_again_in_a_successor_makes_the_next_update() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;
    let arena = snapshot::arena_of_service(&stage.guest())?;
    upgrade(stage, NEW)?;
    let before = status_of(&stage.guest())?;

    let restarted = stage.guest().command(&["sh", "-c", RESTART]).timeout(Duration::from_secs(60)).check();
    restarted.with_context(|| stage.machine.logs(40))?;
    clients.await_more(40).context("the service needs no agent to serve")?;
    let after = status_of(&stage.guest())?;
    assert_eq!((after.role.as_str(), after.hops, after.epoch), ("incumbent", 1, before.epoch));
    ensure!(after.services.iter().all(|service| service.state == "absent"), "{:?}", after.services);
    stage.guest().check(&["sh", "-c", ANOTHER_SERVICE])?;
    stage.await_serving()?;
    assert_eq!(snapshot::arena_of_service(&stage.guest())?, arena, "it has the memory that it had");
    clients.await_more(40)?;

    upgrade(stage, OLD)?;
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(snapshot::arena_of_service(&stage.guest())?, arena, "and so has the next kernel's");
    let after = snapshot::of(stage)?;
    assert_eq!((after.online.as_str(), after.instances.len()), ("0-3", 1));
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
