//! A user of the machine who is none of its services, and knows how services speak: gets no arena, neither a service's that is down nor memory of
//! his own, stops no update, and does not keep batond from answering. Once he cannot even open the socket, once he is in the group that can. What
//! he tries leaves nothing. Then the update works, and nothing that clients wrote is lost.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::baton;
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::strangers::{self, GROUP, MEMBER, NOBODY, ROOT, Stranger};
use baton_tests::{NEW, OLD, agents, console, kernel, open, upgrade};
use demos::story::stage::{Shape, Stage, status_of};

const ANOTHER_SERVICE: &str = "/usr/sbin/baton-kv --listen 10.77.0.10:6379 >/dev/kmsg 2>&1 </dev/null &";
/// More than batond can have been given of anything, at most.
const CROWDS: [(&str, &str); 2] = [("a full pool", "600"), ("more than descriptors", "5000")];

/// How long `baton status` takes.
fn status_time(stage: &Stage) -> Result<Duration> {
    let began = Instant::now();
    status_of(&stage.guest())?;
    Ok(began.elapsed())
}

#[test]
fn another_user_gets_nothing_keeps_nothing_and_stops_nothing() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    strangers::bring(stage)?;
    // The group is there before batond is, as a package makes it.
    guest.check(&["sh", "-c", "echo $1 >> /etc/group", "sh", GROUP])?;
    agents::kill(stage)?;
    agents::start(stage)?;
    stage.await_serving()?;
    let clients = Clients::start(stage, 40)?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    ensure!(baton(&guest, &["check", "--kernel", &image])?.success());
    let before = snapshot::of(stage)?;
    let agent = guest.check(&["pidof", "batond"])?;

    // Doors: whatever opens to him must be one behind which he is looked at. The operator's does not.
    let doors = strangers::ask(stage, NOBODY, &["knock"])?;
    ensure!(doors.contains("control.sock: refused"), "{doors}");

    for user in [NOBODY, MEMBER] {
        // Memory of his own: refused, and none is taken.
        let greedy = strangers::ask(stage, user, &["hello", "greedy", "1310720"])?;
        ensure!(greedy.contains("greedy: refused"), "{user}: {greedy}");
        assert_untouched("1.25 GiB that were asked for", &before, &snapshot::of(stage)?);

        // A service's that is down.
        agents::end(stage, "baton-kv", "TERM")?;
        let thief = strangers::ask(stage, user, &["hello", "baton-kv", "65536"])?;
        ensure!(thief.contains("baton-kv: refused"), "{user}: {thief}");
        guest.check(&["sh", "-c", ANOTHER_SERVICE])?;
        stage.await_serving().context("the service finds its arena as it left it")?;
        clients.await_more(40)?;

        // A name that would never answer the freeze.
        let mute = Stranger::start(stage, "mute", user, &["mute", "mute"])?;
        let heard = mute.await_word(stage, &["refused", "serves", "given"])?;
        ensure!(heard.contains("mute: refused"), "{user}: {heard}");
        mute.end(stage)?;
        let names: Vec<String> = stage.status()?.services.into_iter().map(|service| service.name).collect();
        assert_eq!(names, ["baton-kv"], "nobody else is known");
    }

    // Crowds that say nothing, of his and of root's: batond answers others meanwhile, and is the one that it was.
    let alone = status_time(stage)?;
    for user in [MEMBER, ROOT] {
        for (what, count) in CROWDS {
            let crowd = Stranger::start(stage, "crowd", user, &["crowd", count])?;
            let said = crowd.await_word(stage, &["crowd:"])?;
            let beside = status_time(stage).with_context(|| format!("{what} of user {user}: {said}"))?;
            eprintln!("{what} of user {user}: {}; status {alone:.1?} alone, {beside:.1?} beside it", said.trim());
            // Without a limit each silent connection is waited for: sixteen seconds and more were seen.
            ensure!(beside < 10 * alone + Duration::from_secs(3), "{what} of user {user}: status takes {beside:.1?}");
            ensure!(baton(&guest, &["check", "--kernel", &image])?.success(), "{what} of user {user}");
            crowd.end(stage)?;
        }
    }
    assert_eq!(guest.check(&["pidof", "batond"])?, agent, "the same batond");
    assert_untouched("all of it", &before, &snapshot::of(stage)?);

    // Even while he tries, the update works.
    let crowd = Stranger::start(stage, "crowd", MEMBER, &["crowd", "600"])?;
    crowd.await_word(stage, &["crowd:"])?;
    clients.await_more(20)?;
    upgrade(stage, NEW, &[])?;
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
