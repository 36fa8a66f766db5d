//! Files that are not what they should be cost a line, and nothing else: FIFOs, devices and folders where an image is wanted, odd entries in `/boot`,
//! initrds that no kernel could unpack, a signature that no longer fits, command lines that cannot work. `check` and `upgrade` say the same, at once,
//! and the good kernel beside them works.

use std::io::Write;

use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, agents, console, kernel, lab, open, upgrade};
use demos::story::stage::{Shape, Stage};

/// Words that no successor can have on its command line, and what is named.
const LINES: [(&str, &str); 16] = [
    ("maxcpus=4", "maxcpus"),
    ("\"maxcpus=4\"", "maxcpus"),
    ("pci=noacpi", "pci="),
    ("nosmp", "nosmp"),
    ("acpi=off", "acpi"),
    ("nolapic", "nolapic"),
    ("nr_cpus=1", "nr_cpus"),
    ("nr-cpus=1", "nr-cpus"),
    ("possible_cpus=1", "possible_cpus"),
    ("mem=512M", "mem="),
    ("memmap=64M$0x10000000", "memmap"),
    ("hugepages=100000", "hugepages"),
    ("baton.control=0x0", "baton.control"),
    ("rdinit=\"/init", "quote"),
    ("quiet\nloglevel=1", "line"),
    ("nox2apic", "nox2apic"),
];

fn image() -> String {
    format!("/boot/vmlinuz-{}", kernel(NEW).release)
}

fn lay(stage: &Stage) -> Result<()> {
    let guest = stage.guest();
    guest.check(&["sh", "-c", "mkfifo /tmp/fifo && mkdir /boot/vmlinuz-dir && ln -s /boot/vmlinuz-gone /boot/vmlinuz.old && mkfifo /boot/vmlinuz-fifo"])?;
    let good = std::fs::read(lab().tree().vmlinuz(kernel(NEW)))?;
    let mut flipped = good.clone();
    // In the middle of the packed kernel, far from every header.
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    guest.put("/tmp/flipped", 0o644, &flipped)?;
    let mut archive = Initrd::new();
    archive.file("/note", 0o644, "x".repeat(100_000));
    let plain = archive.bytes()?;
    guest.put("/tmp/plain.cpio", 0o644, &plain)?;
    guest.put("/tmp/truncated.cpio", 0o644, &plain[..plain.len() / 2])?;
    guest.put("/tmp/garbage.cpio", 0o644, &[plain.as_slice(), &[0xa5; 4096]].concat())?;
    guest.put("/tmp/text.cpio", 0o644, "no archive at all\n".repeat(1000).as_bytes())?;
    let mut packed = Vec::new();
    let gzip = std::process::Command::new("gzip")
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut gzip = gzip.context("starting gzip")?;
    gzip.stdin.take().context("its input")?.write_all(&plain)?;
    std::io::Read::read_to_end(&mut gzip.stdout.take().context("its output")?, &mut packed)?;
    gzip.wait()?;
    guest.put("/tmp/cut.gz", 0o644, &packed[..packed.len() - 20])?;
    guest.put("/tmp/good.gz", 0o644, &packed)?;
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
    for (what, path, words) in [
        ("a FIFO", "/tmp/fifo", ["/tmp/fifo", "not a regular file"]),
        ("an endless device", "/dev/zero", ["/dev/zero", "not a regular file"]),
        ("a folder", "/boot/vmlinuz-dir", ["/boot/vmlinuz-dir", "not a regular file"]),
        ("a dangling link", "/boot/vmlinuz.old", ["/boot/vmlinuz.old", "No such file"]),
    ] {
        judge(both(stage, what, &["--kernel", path], &words));
        judge(status_is_answered(stage, what));
    }
    // Initrds.
    for (what, path, word) in [
        ("a truncated archive", "/tmp/truncated.cpio", "truncated"),
        ("garbage behind an archive", "/tmp/garbage.cpio", "garbage"),
        ("a text", "/tmp/text.cpio", "text"),
        ("a truncated packed archive", "/tmp/cut.gz", "cut.gz"),
        ("a FIFO", "/tmp/fifo", "/tmp/fifo"),
        ("an endless device", "/dev/zero", "/dev/zero"),
        ("a kernel", &good, "vmlinuz"),
    ] {
        judge(both(stage, what, &["--kernel", &good, "--initrd", path], &[word, "initrd"]));
    }
    for path in ["/tmp/plain.cpio", "/tmp/good.gz"] {
        let ran = baton(&guest, &["check", "--kernel", &good, "--initrd", path])?;
        judge(if ran.success() { Ok(()) } else { Err(anyhow::anyhow!("{path}: {}", said(&ran))) });
    }
    // Command lines.
    for (line, word) in LINES {
        judge(both(stage, line, &["--kernel", &good, "--cmdline", line], &[word]));
    }
    let long = "x".repeat(4096);
    judge(both(stage, "a line of 4096 bytes", &["--kernel", &good, "--cmdline", &long], &["2048"]).or_else(|_| {
        // The limit that is named depends on what else is on the line; that one is named does not.
        both(stage, "a line of 4096 bytes", &["--kernel", &good, "--cmdline", &long], &["bytes"])
    }));
    // The list shows each bad entry in a line, and every good one.
    judge(kernels_are_listed(stage));
    judge(a_signature_that_does_not_fit(stage));

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

/// One byte changed: whoever asks for signatures must not get it.
fn a_signature_that_does_not_fit(stage: &Stage) -> Result<()> {
    let guest = stage.guest();
    let was = guest.check(&["cat", "/etc/baton/config.toml"])?;
    let strict = was.replace("require_signature = false", "require_signature = true");
    ensure!(strict != was, "the configuration says nothing of signatures: {was}");
    let restart = |config: &str| -> Result<()> {
        agents::kill(stage)?;
        guest.put("/etc/baton/config.toml", 0o644, config.as_bytes())?;
        agents::start(stage)?;
        stage.await_serving()
    };
    restart(&strict)?;
    let ended = both(stage, "one byte changed", &["--kernel", "/tmp/flipped"], &["signature"]);
    restart(&was)?;
    ended
}
