//! What one service does, or does not do, is no other one's end. One is stopped before the freeze, one is killed while the successor boots, some come
//! in the middle of an update, one becomes two processes: each time the update is undone or holds, whoever was told to serve serves on, and nothing
//! that a client was told is lost.

use agent::daemon::outcome::Class;
use anyhow::{Context, Result, bail, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::strangers::{self, ROOT, Stranger};
use baton_tests::{NEW, OLD, agents, console, kernel, memo, open, upgrade};
use demos::lab::guest::Ran;
use demos::story::stage::{Shape, Stage, Upgraded, cmdline};

const MEMO: &str = "memo-sdk";
/// Latecomers come one each 50 ms from a moment on: before, during and after stand-by, freeze and commit.
const LATECOMERS: &str = "60";

/// `baton upgrade` with a script that runs beside it in the guest from the moment on at which the command says a word.
fn upgrade_with(stage: &Stage, word: &str, script: &str) -> Result<Ran> {
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let line = format!("{} panic=0", cmdline(1 - stage.serving));
    let watch = "rm -f /run/said; (until grep -q \"$1\" /run/said 2>/dev/null; do usleep 10000; [ -e /run/over ] && exit; done; eval \"$2\") \
                 >/dev/null 2>&1 & rm -f /run/over; \
                 baton upgrade --kernel $3 --cmdline \"$4\" 2>/run/said; code=$?; touch /run/over; wait; cat /run/said >&2; exit $code";
    let words = ["sh", "-c", watch, "sh", word, script, &image, &line];
    Ok(stage.guest().command(&words).timeout(std::time::Duration::from_secs(300)).run()?)
}

/// A service that is stopped before the freeze and goes on later: the other one serves at once, it itself after that.
fn one_is_stopped(stage: &Stage, clients: &Clients) -> Result<()> {
    let guest = stage.guest();
    let before = memo::report(stage, MEMO, memo::is_kept)?;
    guest.check(&["kill", "-STOP", &before.pid.to_string()])?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let ran = baton(&guest, &["upgrade", "--kernel", &image, "--cmdline", &cmdline(1 - stage.serving)])?;
    assert_refused("a service that is stopped", &ran, Class::RolledBack, &[MEMO])?;
    clients.await_more(40).context("the other one serves while that one is still stopped")?;
    guest.check(&["kill", "-CONT", &before.pid.to_string()])?;
    let after = memo::report(stage, MEMO, |found| found.writes > before.writes)?;
    assert_eq!((after.pid, &after.physical), (before.pid, &before.physical));
    stage.await_serving().context("both serve")
}

/// A service that dies while the successor boots: noticed in the trial, when nobody is frozen yet. In the successor it stands by, so nothing but
/// its death here can be the reason.
fn one_is_killed_while_it_boots(stage: &Stage, clients: &Clients) -> Result<()> {
    let guest = stage.guest();
    let before = memo::report(stage, MEMO, memo::is_kept)?;
    let ran = upgrade_with(stage, "^booting", &format!("kill -9 {}", before.pid))?;
    ensure!(ran.exit.code == Some(4), "{}", said(&ran));
    ensure!(said(&ran).contains(MEMO), "the service is named: {}", said(&ran));
    let progress = String::from_utf8_lossy(&ran.stderr).into_owned();
    ensure!(!progress.contains("cutover"), "nobody is frozen for it: {progress}");
    clients.await_more(40)?;
    let exec = memo::service(MEMO, true).exec.join(" ");
    guest.check(&["sh", "-c", &format!("rm /run/{MEMO}.json; {exec} >/dev/kmsg 2>&1 </dev/null &")])?;
    stage.await_serving().context("it comes again")?;
    let after = memo::report(stage, MEMO, memo::is_kept)?;
    ensure!(after.pid != before.pid && after.bad == 0, "{before:?}, then {after:?}");
    Ok(())
}

/// Services that come while an update runs: told to wait, or the update is undone. None is told to serve and lost.
fn some_come_late(stage: &mut Stage, clients: &Clients) -> Result<bool> {
    let port = 1 - stage.serving;
    let come = format!(
        "/run/stranger 0 latecomers late {LATECOMERS} >/run/late.log 2>&1 </dev/null & \
                        (tail -f /run/late.log | while read line; do echo \"$line\" > /dev/kmsg; done) >/dev/null 2>&1 &"
    );
    let from = stage.machine.serial(stage.serving).position();
    let release = kernel(NEW).release.clone();
    let mut begun = false;
    let (guest, shell) = (stage.guest(), come);
    let ended = stage.upgrade_telling(&["--kernel", &format!("/boot/vmlinuz-{release}")], &[], &mut |line| {
        if !begun && line.starts_with("trial") {
            begun = true;
            // A failure shows: nobody comes.
            let _ = guest.check(&["sh", "-c", &shell]);
        }
    })?;
    ensure!(begun, "the update had no trial");
    let heard = stage.machine.serial(1 - port).text_from(from);
    ensure!(heard.contains("late-0: "), "nobody came late: {heard}");
    match ended {
        Upgraded::Refused(ran) => {
            ensure!(ran.exit.code == Some(4), "{}", said(&ran));
            clients.await_more(40)?;
            // Whoever was let in serves on here.
            let status = stage.status()?;
            for service in status.services.iter().filter(|service| service.name.starts_with("late-")) {
                ensure!(
                    ["serving", "standby"].contains(&service.state.to_string().as_str()),
                    "{service:?} after {}",
                    said(&ran)
                );
            }
            guest.check(&[
                "sh",
                "-c",
                "kill -9 $(pidof stranger tail); while pidof stranger; do usleep 50000; done",
            ])?;
            for service in status.services.iter().filter(|service| service.name.starts_with("late-")) {
                ensure!(baton(&guest, &["release", &service.name])?.success(), "{service:?}");
            }
            Ok(false)
        }
        Upgraded::Drained(_) => {
            let served: Vec<&str> =
                heard.lines().filter(|line| line.contains("late-") && line.contains("serves in epoch")).collect();
            ensure!(served.is_empty(), "told to serve, and gone with the old kernel: {served:?}");
            clients.await_more(40)?;
            Ok(true)
        }
    }
}

/// A service whose known process leaves while its child goes on: after batond was started again nobody else gets its arena.
fn one_becomes_two(stage: &Stage) -> Result<()> {
    let first = Stranger::start(stage, "fork", ROOT, &["fork", "two"])?;
    first.await_word(stage, &["first process leaves"])?;
    agents::kill(stage)?;
    agents::start(stage)?;
    let second = strangers::ask(stage, ROOT, &["hello", "two", "4"])?;
    ensure!(second.contains("two: refused"), "its child still has that arena: {second}\n{}", first.said(stage)?);
    let released = baton(&stage.guest(), &["release", "two"])?;
    ensure!(!released.success(), "memory that a process has is not given away: {}", said(&released));
    stage.guest().check(&["sh", "-c", "kill -9 $(pidof stranger); while pidof stranger; do usleep 50000; done"])?;
    let released = baton(&stage.guest(), &["release", "two"])?;
    ensure!(released.success(), "{}", said(&released));
    Ok(())
}

#[test]
fn no_service_ends_another() -> Result<()> {
    let mut shape = Shape::default();
    shape.services.push(memo::service(MEMO, true));
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    strangers::bring(stage)?;
    let clients = Clients::start(stage, 40)?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    ensure!(baton(&stage.guest(), &["check", "--kernel", &image])?.success());

    let mut wrong = Vec::new();
    let mut judge = |what: &str, ended: Result<()>| {
        eprintln!("{what}: {}", if ended.is_ok() { "well" } else { "not well" });
        wrong.extend(ended.err().map(|why| format!("{what}: {why:#}")));
    };
    judge("one is killed while the successor boots", one_is_killed_while_it_boots(stage, &clients));
    judge("one becomes two processes", one_becomes_two(stage));
    judge("one is stopped before the freeze", one_is_stopped(stage, &clients));
    let updated = some_come_late(stage, &clients);
    if !wrong.is_empty() {
        bail!("{}\n(late: {updated:?})\n{}", wrong.join("\n"), stage.machine.logs(40));
    }
    if !updated? {
        upgrade(stage, NEW, &[])?;
    }
    clients.await_more(40)?;
    memo::report(stage, MEMO, memo::is_kept)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
