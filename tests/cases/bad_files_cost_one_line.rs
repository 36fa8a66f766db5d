//! Files that are not what they should be cost a line, and nothing else: nobody is held up by a FIFO or an endless device, neither now nor
//! afterwards, batond does not grow with them, initrds that no kernel could unpack are refused before anything is touched, and odd entries in `/boot`
//! keep neither the good kernels beside them from working nor a batond from recovering. (Each kind of bad image, and most command lines:
//! `bad_input_is_refused`.)

use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, agents, console, kernel, open, upgrade};
use demos::story::stage::{Shape, Stage};

/// Words that no successor can have on its command line, and what is named.
const LINES: [(&str, &str); 6] = [
    ("pci=noacpi", "pci=noacpi"),
    ("nosmp", "nosmp"),
    ("nolapic", "nolapic"),
    ("possible_cpus=1", "possible_cpus=1"),
    ("memmap=64M$0x10000000", "memmap=64M$0x10000000"),
    ("rdinit=\"/init", "quote"),
];

fn image() -> String {
    format!("/boot/vmlinuz-{}", kernel(NEW).release)
}

fn lay(stage: &Stage) -> Result<()> {
    let guest = stage.guest();
    guest.check(&["sh", "-c", "mkfifo /tmp/fifo && mkdir /boot/vmlinuz-dir && ln -s /boot/vmlinuz-gone /boot/vmlinuz.old && mkfifo /boot/vmlinuz-fifo"])?;
    let mut archive = Initrd::new();
    archive.file("/note", 0o644, "x".repeat(100_000));
    let plain = archive.bytes()?;
    guest.put("/tmp/plain.cpio", 0o644, &plain)?;
    guest.put("/tmp/garbage.cpio", 0o644, &[plain.as_slice(), &[0xa5; 4096]].concat())?;
    let pack = "gzip -c /tmp/plain.cpio > /tmp/good.gz && n=$(stat -c %s /tmp/good.gz) && head -c $((n - 20)) /tmp/good.gz > /tmp/cut.gz";
    guest.check(&["sh", "-c", pack])?;
    Ok(())
}

/// Both verbs refuse it in the same class and words.
fn both(stage: &Stage, what: &str, arguments: &[&str], words: &[&str]) -> Result<()> {
    for verb in ["check", "upgrade"] {
        let ran = baton(&stage.guest(), &[&[verb], arguments].concat())?;
        assert_refused(&format!("{verb}: {what}"), &ran, Class::Precondition, words)?;
    }
    Ok(())
}

fn high_water_kib(stage: &Stage) -> Result<u64> {
    let text = stage.guest().check(&["sh", "-c", "awk '/VmHWM/{print $2}' /proc/$(pidof batond)/status"])?;
    Ok(text.trim().parse()?)
}

#[test]
fn what_is_wrong_with_a_file_is_said_in_a_line_and_stops_nothing_else() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let clients = Clients::start(stage, 40)?;
    lay(stage)?;
    let good = image();
    let checked = baton(&guest, &["check", "--kernel", &good])?;
    ensure!(checked.success(), "a good kernel beside bad entries of /boot: {}", said(&checked));
    let before = snapshot::of(stage)?;
    let memory = high_water_kib(stage)?;

    let mut wrong: Vec<String> = Vec::new();
    let mut judge = |ended: Result<()>| wrong.extend(ended.err().map(|why| format!("{why:#}")));

    // Images.
    for path in ["/tmp/fifo", "/dev/zero", "/boot/vmlinuz-dir"] {
        judge(both(stage, path, &["--kernel", path], &[path, "not a file"]));
        judge(status_is_answered(stage, path));
    }
    // Initrds.
    for (what, path, words) in [
        ("garbage behind an archive", "/tmp/garbage.cpio", ["/tmp/garbage.cpio", "intact initrd"]),
        ("a packed archive that is cut off", "/tmp/cut.gz", ["/tmp/cut.gz", "intact initrd"]),
        ("a FIFO", "/tmp/fifo", ["/tmp/fifo", "not a file"]),
        ("an endless device", "/dev/zero", ["/dev/zero", "not a file"]),
        ("a kernel", &good, ["vmlinuz", "intact initrd"]),
    ] {
        judge(both(stage, what, &["--kernel", &good, "--initrd", path], &words));
        judge(status_is_answered(stage, what));
    }
    for path in ["/tmp/plain.cpio", "/tmp/good.gz"] {
        let ran = baton(&guest, &["check", "--kernel", &good, "--initrd", path])?;
        judge(if ran.success() { Ok(()) } else { Err(anyhow::anyhow!("{path}: {}", said(&ran))) });
    }
    // Command lines.
    for (line, word) in LINES {
        judge(both(stage, line, &["--kernel", &good, "--cmdline", line], &[word]));
    }
    // The list shows each bad entry in a line, and every good one.
    judge(kernels_are_listed(stage));

    ensure!(wrong.is_empty(), "{} things are not as they should be:\n{}", wrong.len(), wrong.join("\n"));
    let more = high_water_kib(stage)? - memory;
    ensure!(more < 600 << 10, "batond took {more} KiB more for files that it refused");
    assert_untouched("all of it", &before, &snapshot::of(stage)?);

    // Recovery is not stopped by a bad entry either.
    agents::kill(stage)?;
    agents::start(stage)?;
    stage.await_serving()?;
    upgrade(stage, NEW, &["--initrd", "/tmp/good.gz"])?;
    clients.await_more(40)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

/// Nothing that was refused holds anybody up.
fn status_is_answered(stage: &Stage, after: &str) -> Result<()> {
    let update = stage.status().with_context(|| after.to_owned())?.update;
    ensure!(update.is_none(), "{after}: an update is said to run: {update:?}");
    Ok(())
}

fn kernels_are_listed(stage: &Stage) -> Result<()> {
    let ran = baton(&stage.guest(), &["kernels"])?;
    ensure!(ran.success(), "kernels: {}", said(&ran));
    let all = said(&ran);
    for entry in ["vmlinuz.old", "vmlinuz-dir", "vmlinuz-fifo", &kernel(OLD).release, &kernel(NEW).release] {
        ensure!(all.contains(entry), "{entry} is not in {all}");
    }
    Ok(())
}
