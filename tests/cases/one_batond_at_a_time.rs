//! There is one batond, whatever happens to it. A second one beside it refuses to start, and the update under way goes on. One that cannot write its
//! journal begins nothing. One that is killed in probation, when the successor serves already and CPUs are moving, is followed by one that finishes
//! the update or undoes it: never two kernels that serve, never memory of one given away by the other, nothing that a client was told lost.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{baton, said};
use baton_tests::share::is_chosen;
use baton_tests::snapshot::{self, Snapshot};
use baton_tests::{NEW, OLD, agents, console, kernel, memo, open, upgrade};
use demos::lab::Patience;
use demos::story::stage::{Shape, Stage, Upgraded, cmdline};

const MEMO: &str = "memo";
/// The second one, with sockets of its own.
const SECOND: &str = "batond --socket /run/second.sock --services /run/second-services.sock >/run/second.log 2>&1; echo $? >/run/second.code";
/// How long the machine may take to settle after batond was killed, on a busy host.
const SETTLE: Duration = Duration::from_secs(150);

fn image() -> String {
    format!("/boot/vmlinuz-{}", kernel(NEW).release)
}

/// The machine's own things, without what comes and goes.
fn of_machine(snapshot: &Snapshot) -> (String, u64, usize, Vec<String>, Vec<(String, String)>) {
    let Snapshot { online, mem_total_kib, instances, links, services, .. } = snapshot;
    (online.clone(), *mem_total_kib, instances.len(), links.clone(), services.clone())
}

/// A journal that cannot be written: nothing is begun, or, if batond dies on the way, everything comes back all the same.
#[test]
fn a_full_disk_under_the_journal_costs_nothing() -> Result<()> {
    if !is_chosen("a full disk under the journal") {
        return Ok(());
    }
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let clients = Clients::start(stage, 40)?;
    ensure!(baton(&guest, &["check", "--kernel", &image()])?.success());
    agents::kill(stage)?;
    guest.check(&["sh", "-c", "mkdir -p /var/lib/baton && mount -t tmpfs -o size=64k full /var/lib/baton"])?;
    agents::start(stage)?;
    stage.await_serving()?;
    // Filled when batond runs, to the last byte, as disks do.
    guest.check(&[
        "sh",
        "-c",
        "cat /dev/zero > /var/lib/baton/rubbish 2>/dev/null; ! echo more > /var/lib/baton/more 2>/dev/null",
    ])?;
    let before = snapshot::of(stage)?;
    let line = format!("{} panic=0", cmdline(1));
    let said_by = stage.machine.serial(1).position();
    // The disk itself is one more thing that ends with this kernel.
    let accept = ["--accept", "mounts"];
    let image = image();
    let words = [&["baton", "upgrade", "--kernel", &image, "--cmdline", &line], accept.as_slice()].concat();
    let ran = guest.command(&words);
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(ran.timeout(Duration::from_secs(200)).run()));
    // It ends at once, or its successor boots, and then batond dies.
    let until = Instant::now() + SETTLE;
    let refused = loop {
        if let Ok(ended) = ended.try_recv() {
            break Some(ended?);
        }
        if stage.machine.serial(1).text_from(said_by).contains("Linux version") {
            agents::kill(stage)?;
            agents::start(stage)?;
            break None;
        }
        ensure!(Instant::now() < until, "neither refused nor begun\n{}", stage.machine.logs(40));
        std::thread::sleep(Duration::from_millis(50));
    };
    if let Some(ran) = &refused {
        ensure!(ran.exit.code == Some(3), "{}", said(ran));
        ensure!(said(ran).contains("/var/lib/baton"), "what is full is named: {}", said(ran));
    }
    stage.await_serving()?;
    assert_eq!(of_machine(&snapshot::of(stage)?), of_machine(&before), "refused: {}", refused.is_some());
    clients.await_more(40)?;
    // With room again, it works.
    guest.check(&["rm", "/var/lib/baton/rubbish"])?;
    upgrade(stage, NEW, &accept)?;
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

/// A second batond in the middle of an update; and what it says when none runs an update.
#[test]
fn a_second_batond_refuses_to_start_and_harms_no_update() -> Result<()> {
    if !is_chosen("a second batond") {
        return Ok(());
    }
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let clients = Clients::start(stage, 40)?;
    let mut begun = false;
    let beside = guest.clone();
    let ended = stage.upgrade_telling(&["--kernel", &image()], &[], &mut |line| {
        if !begun && line.starts_with("booting") {
            begun = true;
            // How it ended is read below.
            let _ = beside.command(&["sh", "-c", &format!("({SECOND}) </dev/null >/dev/null 2>&1 &")]).run();
        }
    })?;
    ensure!(begun, "the update had no phase booting");
    match ended {
        Upgraded::Drained(status) => ensure!(status.update.is_some_and(|update| update.left_undone.is_empty())),
        Upgraded::Refused(ran) => bail!("the update: {}\n{}", said(&ran), stage.machine.logs(60)),
    }
    clients.await_more(40)?;
    // In the kernel that has the machine now: it says who is there.
    stage.await_serving()?;
    let ran = stage.guest().command(&["sh", "-c", SECOND]).timeout(Duration::from_secs(60)).run();
    let log = stage.guest().check(&["sh", "-c", "cat /run/second.log; echo; cat /run/second.code"])?;
    ensure!(ran.is_ok_and(|ran| ran.success()), "it goes on: {log}");
    ensure!(log.contains("another batond") && !log.trim().ends_with('0'), "{log}");
    let snapshot = snapshot::of(stage)?;
    assert_eq!((snapshot.online.as_str(), snapshot.instances.len()), ("0-3", 1));
    upgrade(stage, OLD, &[])?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

/// Killed as soon as the command says that CPUs move. Eight of them: there is time.
#[test]
fn a_batond_killed_in_probation_is_followed_by_one_that_ends_the_update() -> Result<()> {
    let mut shape = Shape { vcpus: 8, ..Shape::default() };
    shape.services.push(memo::service(MEMO, false));
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let clients = Clients::start(stage, 40)?;
    let kept = memo::report(stage, MEMO, memo::is_kept)?;
    ensure!(baton(&guest, &["check", "--kernel", &image()])?.success());
    let before = snapshot::of(stage)?;

    let line = cmdline(1);
    let from = stage.machine.serial(1).position();
    let script = "baton upgrade --kernel $1 --cmdline \"$2\" 2>&1 | while read -r line; do echo \"$line\"; \
                  case $line in probation*) [ -e /run/killed ] || { kill -9 $(pidof batond); touch /run/killed; };; esac; done; \
                  [ -e /run/killed ]";
    let ran = guest.command(&["sh", "-c", script, "sh", &image(), &line]).timeout(SETTLE).run()?;
    ensure!(ran.success(), "batond was not killed in probation: {}", said(&ran));
    // The next one. From its first moment on the operator must not be able to do harm with what `check` advises elsewhere.
    guest.check(&["sh", "-c", "batond >/dev/kmsg 2>&1 </dev/null &"])?;
    let harm = "for n in $(seq 200); do baton release $1 >/run/released 2>&1 && exit 1; baton status >/dev/null 2>&1 && break; usleep 50000; done; \
                ! baton release $1 >/run/released 2>&1";
    for name in ["baton-kv", MEMO] {
        match guest.command(&["sh", "-c", harm, "sh", name]).timeout(SETTLE).run() {
            Ok(ran) => ensure!(ran.success(), "memory that the other kernel serves from was given away: {name}"),
            // The update was finished meanwhile, and this kernel has left.
            Err(why) => eprintln!("not asked: {why}"),
        }
    }
    let (serves, finished) = settled(stage, from)?;
    if finished {
        stage.serving = 1;
    }
    eprintln!("the update was {}", if finished { "finished" } else { "undone" });
    clients.await_more(40).with_context(|| format!("{serves}\n{}", stage.machine.logs(60)))?;
    stage.await_serving()?;
    let after = snapshot::of(stage)?;
    assert_eq!(after.online, before.online, "every CPU is there");
    assert_eq!(after.instances.len(), 1, "{:?}", after.instances);
    ensure!(after.mem_total_kib * 100 >= before.mem_total_kib * 97, "{before:?}, then {after:?}");
    let found = memo::report(stage, MEMO, |found| found.writes > kept.writes)?;
    ensure!(found.bad == 0 && found.physical == kept.physical, "{kept:?}, then {found:?}");
    // And the next update works. Had two kernels written that memory, it would show in what the next program finds.
    let next = if finished { OLD } else { NEW };
    let kept = memo::report(stage, MEMO, |found| found.writes > kept.writes)?;
    upgrade(stage, next, &[])?;
    memo::assert_crossed(stage, MEMO, &kept)?;
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

/// Waits until the update is over one way or the other: the successor says that the machine is its own, or the incumbent has all CPUs and no
/// second instance.
fn settled(stage: &Stage, from: usize) -> Result<(String, bool)> {
    let until = Instant::now() + SETTLE;
    let mut last = String::new();
    loop {
        let drained = "drained: this kernel has the machine";
        if stage.machine.serial(1).wait_for(drained, from, Patience::of(Duration::from_millis(200))).is_ok() {
            return Ok((last, true));
        }
        let look =
            stage.guest().command(&["sh", "-c", "cat /sys/devices/system/cpu/online; grep -c . /proc/multikernel"]);
        if let Ok(ran) = look.timeout(Duration::from_secs(10)).run() {
            last = ran.text();
            let serving =
                stage.status().is_ok_and(|status| status.services.iter().all(|one| one.state.to_string() == "serving"));
            if last.starts_with("0-7\n") && serving {
                return Ok((last, false));
            }
        }
        ensure!(Instant::now() < until, "neither finished nor undone: {last}\n{}", stage.machine.logs(80));
    }
}
