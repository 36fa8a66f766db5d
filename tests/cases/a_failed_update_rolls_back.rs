//! An update that fails gives everything back: the old kernel serves on, with its CPUs, memory, interfaces, arenas and kept files,
//! and the next update works, and takes them along. So it does when the successor serves already, up to the commit; and when the
//! operator calls it off. From a kernel that the firmware booted, and from one that was itself a successor.

use agent::daemon::config::Service;
use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::share::is_chosen;
use baton_tests::snapshot::{self, Snapshot, assert_untouched};
use baton_tests::{NEW, OLD, console, kernel, memo, open, upgrade};
use demos::keeper;
use demos::story::stage::{Shape, Stage};
use demos::story::traps;
use handover::update::phase::Phase;

/// Runs before `baton-init`, in the successor only: the kernel itself makes a step of bringing that CPU up fail (Documentation/core-api/cpu_hotplug.rst, "fail").
fn third_cpu_fails() -> Result<Vec<u8>> {
    let mut initrd = Initrd::new();
    let script = "#!/bin/sh\nmkdir -p /sys\nmount -t sysfs sysfs /sys\ncd /sys/devices/system/cpu\n\
        sed -n 's/^ *\\([0-9]*\\): workqueue:prepare$/\\1/p' hotplug/states > cpu2/hotplug/fail\n\
        cd /\numount /sys\nexec /init\n";
    initrd.file("/trap", 0o755, script);
    Ok(initrd.bytes()?)
}

/// What goes wrong.
struct Failure {
    what: &'static str,
    /// On the successor's command line.
    words: &'static str,
    initrd: Option<&'static str>,
    /// A program of the incumbent does this in that phase.
    meanwhile: Option<(Phase, &'static str)>,
    /// What is said of it.
    said: &'static [&'static str],
}

const FAILURES: [Failure; 6] = [
    Failure {
        what: "a successor that never answers",
        words: "initcall_blacklist=populate_rootfs",
        initrd: None,
        meanwhile: None,
        said: &["booting failed"],
    },
    Failure {
        what: "a service that does not come up",
        words: "rdinit=/trap",
        initrd: Some("/tmp/exits"),
        meanwhile: None,
        said: &["services do not stand by after 15s: baton-kv"],
    },
    // Everybody is frozen when that is found.
    Failure {
        what: "a file that is to be kept too late",
        words: "",
        initrd: None,
        meanwhile: Some((Phase::Booting, "touch /run/memo.late")),
        said: &["it would be lost"],
    },
    // That is found when the successor serves already, and has one more: it gives that one back, and the cutover is made backwards.
    Failure {
        what: "a kernel that cannot take its third CPU online",
        words: "rdinit=/trap",
        initrd: Some("/tmp/third-cpu-fails"),
        meanwhile: None,
        said: &["cpu2/online"],
    },
    // It can be asked for nothing any more, and is stopped.
    Failure {
        what: "a successor that panics when it serves",
        words: "",
        initrd: Some("/tmp/serves-and-panics"),
        meanwhile: None,
        said: &["the successor panicked"],
    },
    Failure {
        what: "a successor that panics under its agent",
        words: "rdinit=/trap",
        initrd: Some("/tmp/panics"),
        meanwhile: None,
        said: &["the successor panicked"],
    },
];

/// By the command.
const CANCELLED: Failure = Failure {
    what: "an update that is cancelled while its successor boots",
    words: "",
    initrd: None,
    meanwhile: Some((Phase::Booting, "baton cancel > /run/cancelled 2>&1; echo $? >> /run/cancelled")),
    said: &["called off by the operator in the phase booting", "everything was undone"],
};
/// By ^C, twice, of whoever asked for it: the second is sent when the first was taken. The trial would last until the services' patience ends.
const INTERRUPTED: Failure = Failure {
    what: "an update that is interrupted twice in its trial",
    words: "rdinit=/trap",
    initrd: Some("/tmp/exits"),
    meanwhile: Some((
        Phase::Trial,
        "p=$(pidof baton); for n in 1 2; do kill -INT $p; while grep -q '^ShdPnd:.*[1-9a-f]' /proc/$p/status; do usleep 20000; done; done",
    )),
    said: &[
        "baton: the update goes on, batond makes it. ^C again calls it off (so does `baton cancel`)",
        "baton: called off; waiting for everything to be undone",
        "called off by the operator in the phase trial",
        "everything was undone",
    ],
};

/// A program with a memfd in the fd store.
const MEMO: &str = "memo";
/// The arena of a service that can be asked about each of its pages.
const KEPT_MIB: u64 = 16;

fn keeper() -> Service {
    let exec = ["/usr/sbin/labd", "keep", &KEPT_MIB.to_string()].map(str::to_owned).to_vec();
    Service { name: keeper::NAME.to_owned(), exec, ..Service::default() }
}

/// Every page of the arena is what it must be, says the service that has it now.
fn assert_arena_intact(stage: &Stage) -> Result<()> {
    let found: keeper::Found = serde_json::from_str(&stage.guest().check(&["labd", "kept"])?)?;
    assert_eq!(found, keeper::Found { pages: KEPT_MIB << 8, bad: 0 });
    Ok(())
}

#[test]
fn a_failed_update_gives_everything_back_and_the_next_one_works() -> Result<()> {
    let mut shape = Shape::default();
    (shape.update.boot_timeout_s, shape.update.step_timeout_s) = (25, 20);
    shape.services.extend([keeper(), memo::service(MEMO, false)]);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    memo::report(stage, MEMO, memo::is_kept)?;
    let clients = Clients::start(stage, 40)?;

    let mut before = ready(stage)?;
    for failure in FAILURES.iter().filter(|failure| is_chosen(&format!("to {NEW}: {}", failure.what))) {
        before = fail(stage, NEW, failure, &before, &clients)?;
    }
    nothing_to_cancel(stage)?;
    fail(stage, NEW, &CANCELLED, &before, &clients)?;
    let ended = "until grep -qx '[0-9]*' /run/cancelled; do usleep 20000; done; cat /run/cancelled";
    let heard = stage.guest().check(&["sh", "-c", ended])?;
    assert_eq!(heard, "the update is called off: whoever asked for it is told how it ends (`baton status`)\n0\n");
    succeed(stage, NEW)?;
    // The kernel that serves now was a successor: its CPUs come back through a mailbox, its memory was adopted.
    before = ready(stage)?;
    // What fails before it serves is undone alike, whatever it is.
    let failures = FAILURES[2..5].iter().chain([&INTERRUPTED]);
    for failure in failures.filter(|failure| is_chosen(&format!("to {OLD}: {}", failure.what))) {
        before = fail(stage, OLD, failure, &before, &clients)?;
    }
    nothing_to_cancel(stage)?;
    succeed(stage, OLD)?;

    clients.await_more(20)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    // Port 1 has the panics that were asked for; port 0 is the first kernel's alone until its own successors fail there.
    let first = stage.machine.serial(0).text_from(0);
    let first = first.split("Linux version").nth(1).unwrap_or_default();
    assert_eq!(console::complaints_in(first), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

/// What an update leaves to the agent (memory, caches) is there from the first check on.
fn ready(stage: &Stage) -> Result<Snapshot> {
    let guest = stage.guest();
    guest.put("/tmp/exits", 0o644, &traps::service("exit 1")?)?;
    guest.put("/tmp/panics", 0o644, &traps::service("echo c > /proc/sysrq-trigger")?)?;
    guest.put("/tmp/third-cpu-fails", 0o644, &third_cpu_fails()?)?;
    let mut initrd = Initrd::new();
    initrd.file(keeper::PANIC_WHEN_SERVING, 0o644, "");
    guest.put("/tmp/serves-and-panics", 0o644, &initrd.bytes()?)?;
    let release = &kernel(OLD).release;
    let checked = baton(&guest, &["check", "--kernel", &format!("/boot/vmlinuz-{release}")])?;
    ensure!(checked.success(), "{} {}", checked.text(), String::from_utf8_lossy(&checked.stderr));
    snapshot::of(stage)
}

fn fail(stage: &Stage, series: &str, failure: &Failure, before: &Snapshot, clients: &Clients) -> Result<Snapshot> {
    let Failure { what, words, initrd, meanwhile, said } = failure;
    let guest = stage.guest();
    let memo_before = memo::report(stage, MEMO, |_| true)?;
    if let Some((phase, meanwhile)) = meanwhile {
        // The status alone may be that of the update before.
        let script = format!(
            "(until grep -q ' successor ' /proc/multikernel && baton status | grep -q '^update .*, {phase};'; do sleep 0.2; done; \
             {meanwhile}) < /dev/null > /dev/null 2>&1 &"
        );
        guest.check(&["sh", "-c", &script])?;
    }
    let image = format!("/boot/vmlinuz-{}", kernel(series).release);
    // Not Stage's command line: a successor that panics must wait to be fenced.
    let line = format!("console=ttyS{},115200 printk.devkmsg=on panic=0 {words}", 1 - stage.serving);
    let mut arguments = vec!["upgrade", "--kernel", &image, "--cmdline", &line];
    arguments.extend(initrd.iter().flat_map(|path| ["--initrd", path]));
    let began = std::time::Instant::now();
    let ran = baton(&guest, &arguments).with_context(|| format!("{what}\n{}", stage.machine.logs(40)))?;
    assert_refused(what, &ran, Class::RolledBack, said).map_err(|why| why.context(stage.machine.logs(40)))?;
    clients.await_more(20)?;
    let after = snapshot::of(stage)?;
    assert_untouched(what, before, &after);
    assert_arena_intact(stage).with_context(|| (*what).to_owned())?;
    // The same process goes on, on the same pages. That nothing is lost there is seen when the next one looks at them all.
    let memo = memo::report(stage, MEMO, |found| found.writes > memo_before.writes)?;
    assert_eq!((memo.pid, &memo.physical), (memo_before.pid, &memo_before.physical), "{what}");
    eprintln!(
        "rolled back in {:.0} s: {what} ({} KiB available)",
        began.elapsed().as_secs_f64(),
        after.mem_available_kib
    );
    Ok(after)
}

/// There is no update that could be called off, also right after one was.
fn nothing_to_cancel(stage: &Stage) -> Result<()> {
    let ran = baton(&stage.guest(), &["cancel"])?;
    assert_refused("no update runs", &ran, Class::Precondition, &["no update runs in this kernel"])
}

fn succeed(stage: &mut Stage, series: &str) -> Result<()> {
    let memo = memo::report(stage, MEMO, |_| true)?;
    upgrade(stage, series, &[])?;
    memo::assert_crossed(stage, MEMO, &memo)?;
    assert_arena_intact(stage)
}
