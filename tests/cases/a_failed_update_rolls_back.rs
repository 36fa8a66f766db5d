//! An update that fails before the cutover gives everything back: the old kernel serves on, with its CPUs, memory and interfaces,
//! and the next update works. From a kernel that the firmware booted, and from one that was itself a successor.

use agent::initrd::Initrd;
use agent::outcome::Class;
use anyhow::{Context, Result, bail, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::snapshot::{self, Snapshot, assert_untouched};
use baton_tests::{NEW, OLD, console, kernel, open};
use demos::story::stage::{Shape, Stage, Upgraded};

/// Runs before `baton-init`, in the successor only: the service that it will start does this instead.
fn trap(service: &str) -> Result<Vec<u8>> {
    let mut initrd = Initrd::new();
    let script = format!(
        "#!/bin/sh\nrm /usr/sbin/baton-kv\n\
         printf '#!/bin/sh\\n{service}\\n' > /usr/sbin/baton-kv\nchmod 755 /usr/sbin/baton-kv\nexec /init\n"
    );
    initrd.file("/trap", 0o755, script);
    Ok(initrd.bytes()?)
}

/// What goes wrong, the words on the successor's command line and its initrd, and what is said of it.
const FAILURES: [(&str, &str, Option<&str>, &str); 3] = [
    ("a successor that never answers", "rdinit=/nonexistent", None, "booting failed"),
    (
        "a service that does not come up",
        "rdinit=/trap",
        Some("/tmp/exits"),
        "services do not stand by after 15s: baton-kv",
    ),
    ("a successor that panics under its agent", "rdinit=/trap", Some("/tmp/panics"), "the successor panicked"),
];

#[test]
fn a_failed_update_gives_everything_back_and_the_next_one_works() -> Result<()> {
    let mut shape = Shape::default();
    (shape.update.boot_timeout_s, shape.update.step_timeout_s) = (25, 20);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let clients = Clients::start(stage, 40)?;

    let mut before = ready(stage)?;
    for failure in &FAILURES {
        before = fail(stage, NEW, failure, &before, &clients)?;
    }
    succeed(stage, NEW)?;
    // The kernel that serves now was a successor: its CPUs come back through a mailbox, its memory was adopted.
    before = ready(stage)?;
    for failure in &FAILURES[..2] {
        before = fail(stage, OLD, failure, &before, &clients)?;
    }
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
    guest.put("/tmp/exits", 0o644, &trap("exit 1")?)?;
    guest.put("/tmp/panics", 0o644, &trap("echo c > /proc/sysrq-trigger")?)?;
    let release = &kernel(OLD).release;
    let checked = baton(&guest, &["check", "--kernel", &format!("/boot/vmlinuz-{release}")])?;
    ensure!(checked.success(), "{} {}", checked.text(), String::from_utf8_lossy(&checked.stderr));
    snapshot::of(stage)
}

fn fail(
    stage: &Stage,
    series: &str,
    (what, words, initrd, said): &(&str, &str, Option<&str>, &str),
    before: &Snapshot,
    clients: &Clients,
) -> Result<Snapshot> {
    let image = format!("/boot/vmlinuz-{}", kernel(series).release);
    // Not Stage's command line: a successor that panics must wait to be fenced.
    let line = format!("console=ttyS{},115200 printk.devkmsg=on panic=0 {words}", 1 - stage.serving);
    let mut arguments = vec!["upgrade", "--kernel", &image, "--cmdline", &line];
    arguments.extend(initrd.iter().flat_map(|path| ["--initrd", path]));
    let began = std::time::Instant::now();
    let ran = baton(&stage.guest(), &arguments).with_context(|| format!("{what}\n{}", stage.machine.logs(40)))?;
    assert_refused(what, &ran, Class::RolledBack, &[said]).map_err(|why| why.context(stage.machine.logs(40)))?;
    clients.await_more(20)?;
    let after = snapshot::of(stage)?;
    assert_untouched(what, before, &after);
    eprintln!(
        "rolled back in {:.0} s: {what} ({} KiB available)",
        began.elapsed().as_secs_f64(),
        after.mem_available_kib
    );
    Ok(after)
}

fn succeed(stage: &mut Stage, series: &str) -> Result<()> {
    let release = &kernel(series).release;
    match stage.upgrade(release, &[])? {
        Upgraded::Drained(status) => {
            let update = status.update.context("an update brought this kernel here")?;
            ensure!(update.left_undone.is_empty(), "{:?}", update.left_undone);
            Ok(())
        }
        Upgraded::Refused(ran) => bail!("{} {}", ran.text(), String::from_utf8_lossy(&ran.stderr)),
    }
}
