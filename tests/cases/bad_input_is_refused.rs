//! Whatever is wrong with an image, an initrd, a CPU, the memory or the moment: the update is refused in words that help, with the
//! exit code of its class, and the machine is as it was. All on one machine, under load, which is updated at the end: nothing that
//! was refused has spoiled it.

use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use agent::daemon::config::{Config, Service, Update};
use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, Turn, agents, console, images, kernel, lab, open};
use demos::lab::net::NICS;
use demos::lab::{MachineSpec, Patience, incumbent, kmod};
use demos::story::stage::{Shape, Stage, Upgraded};

/// What to ask for, and what must be said to it.
type Case<'a> = (&'a str, Vec<&'a str>, &'a [&'a str]);

#[test]
fn bad_input_is_refused_and_leaves_everything_as_it_was() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let release = &kernel(NEW).release;
    let good = format!("/boot/vmlinuz-{release}");
    lay_traps(stage, release)?;
    let clients = Clients::start(stage, 40)?;
    // A good one is not refused; and from here on the agent has what memory it keeps for such work.
    stage.guest().command(&["baton", "check", "--kernel", &good]).timeout(Duration::from_secs(240)).check()?;
    let before = snapshot::of(stage)?;

    let image = |path| vec!["--kernel", path];
    let with = |more: [&'static str; 2]| [vec!["--kernel", good.as_str()], more.to_vec()].concat();
    let long: &'static str = "x".repeat(4000).leak();
    let cases: Vec<Case<'_>> = vec![
        ("absent image", image("/tmp/absent"), &["/tmp/absent", "No such file", "vmlinuz"]),
        ("truncated image", image("/tmp/truncated"), &["truncated", "/tmp/truncated", "vmlinuz"]),
        ("no Linux image", image("/tmp/text"), &["not a Linux kernel image", "bzImage"]),
        ("ELF file", image("/bin/busybox"), &["ELF", "bzImage"]),
        ("32-bit image", image("/tmp/only-32-bit"), &["32-bit only", "64-bit"]),
        ("too large an image", image("/tmp/large"), &["300 MiB is too large", "at most 256 MiB"]),
        ("no ACPI wakeup", image("/tmp/without-wakeup"), &["older than 6.10", "CONFIG_ACPI_MADT_WAKEUP", "choose"]),
        ("unspoken KHO", image("/tmp/unspoken-kho"), &["kho-v99", "this baton speaks kho-v4", "update baton first"]),
        ("absent initrd", with(["--initrd", "/tmp/no-initrd"]), &["/tmp/no-initrd", "No such file", "intact initrd"]),
        ("text as initrd", with(["--initrd", "/tmp/text"]), &["/tmp/text", "text?", "intact initrd"]),
        ("initrd that is cut off", with(["--initrd", "/tmp/cut-off"]), &["cut off", "a lacks", "intact initrd"]),
        ("first program that is not there", with(["--cmdline", "rdinit=/nonexistent"]), &["rdinit=/nonexistent"]),
        ("FIFO", image("/tmp/fifo"), &["/tmp/fifo", "a FIFO, not a file"]),
        ("device", image("/dev/zero"), &["/dev/zero", "a device, not a file"]),
        ("folder", image("/boot"), &["/boot", "a folder, not a file"]),
        ("CPUs in quotes", with(["--cmdline", "\"maxcpus=4\""]), &["`\"maxcpus=4\"`", "one by one", "--cmdline"]),
        ("one CPU", with(["--cmdline", "quiet nr-cpus=1"]), &["`nr-cpus=1`", "never take over"]),
        ("no ACPI", with(["--cmdline", "acpi=off"]), &["`acpi=off`", "through ACPI"]),
        ("less memory", with(["--cmdline", "mem=512M"]), &["`mem=512M`", "leave it out"]),
        ("huge pages", with(["--cmdline", "hugepages=100000"]), &["`hugepages=100000`", "200000 MiB", "sysctl"]),
        ("Baton's own word", with(["--cmdline", "baton.control=0x0"]), &["`baton.control=0x0`", "Baton's own"]),
        ("odd quote", with(["--cmdline", "a=\"b"]), &["odd number of double quotes"]),
        ("newline", with(["--cmdline", "a\nb"]), &["control character 0x0a"]),
        ("long line", with(["--cmdline", long]), &["is too long: this kernel takes 2047"]),
        ("CPU that is not there", with(["--cpu", "9"]), &["CPU 9 does not exist", "0, 1, 2, 3", "--cpu"]),
        ("boot CPU", with(["--cpu", "0"]), &["CPU 0", "moves last", "--cpu"]),
    ];
    for (what, arguments, words) in cases {
        for verb in ["check", "upgrade"] {
            let ran = baton(&stage.guest(), &[&[verb], arguments.as_slice()].concat())?;
            assert_refused(&format!("{verb}: {what}"), &ran, Class::Precondition, words)?;
        }
        let after = snapshot::of(stage)?;
        assert_untouched(what, &before, &after);
        eprintln!("refused: {what} ({} KiB available)", after.mem_available_kib);
    }

    // One bad entry in /boot costs one line, and a task that is bound to the CPU is moved.
    let listed = baton(&stage.guest(), &["kernels"])?;
    ensure!(
        listed.success()
            && listed.text().contains("/boot/vmlinuz.old: No such file")
            && listed.text().contains(release.as_str()),
        "{}",
        listed.text()
    );
    let bound = baton(&stage.guest(), &["check", "--kernel", &good, "--cpu", "2"])?;
    ensure!(bound.success() && bound.text().contains("tasks are bound to it"), "{}", bound.text());

    last_cpu(stage, &good)?;
    assert_untouched("last CPU", &before, &snapshot::of(stage)?);
    other_configurations(stage, &good)?;
    assert_untouched("other configurations", &before, &snapshot::of(stage)?);

    second_update(stage, release)?;
    clients.await_more(20)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    assert_eq!(console::complaints(&stage.machine), [""; 0]);
    Ok(())
}

/// Bad images, and a task that is bound to CPU 2: that is no reason to refuse.
fn lay_traps(stage: &Stage, release: &str) -> Result<()> {
    let guest = stage.guest();
    let good = std::fs::read(lab().tree().vmlinuz(kernel(NEW))).context("the new kernel's image")?;
    ensure!(good.len() > 4 << 20, "{release} has an image of {} bytes", good.len());
    guest.put("/tmp/truncated", 0o644, &good[..1 << 20])?;
    guest.put("/tmp/text", 0o644, "no kernel at all\n".repeat(4096).as_bytes())?;
    guest.put("/tmp/only-32-bit", 0o644, &images::only_32_bit(&good))?;
    guest.put("/tmp/without-wakeup", 0o644, &images::without_wakeup(&good)?)?;
    guest.put("/tmp/unspoken-kho", 0o644, &images::of_unspoken_kho(&good)?)?;
    guest.put("/tmp/unsigned", 0o644, &images::unsigned(&good)?)?;
    guest.check(&["truncate", "-s", "300M", "/tmp/large"])?;
    let mut flipped = std::fs::read(lab().tree().vmlinuz(kernel(OLD))).context("the old kernel's image")?;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    guest.put("/tmp/flipped", 0o644, &flipped)?;
    let mut tree = Initrd::new();
    tree.file("/a", 0o644, vec![1; 5000]);
    guest.put("/tmp/cut-off", 0o644, &tree.bytes()?[..4000])?;
    guest.check(&["sh", "-c", "mkfifo /tmp/fifo && ln -s gone /boot/vmlinuz.old && mkdir /boot/vmlinuz-dir"])?;
    guest.check(&["sh", "-c", "taskset 0x4 sleep 100000 >/dev/null 2>&1 &"])?;
    Ok(())
}

/// With all others offline, the last one cannot be given away; and the last one is the boot CPU.
fn last_cpu(stage: &Stage, good: &str) -> Result<()> {
    let guest = stage.guest();
    let switch = |to: &str| -> Result<()> {
        let script = format!("for n in 1 2 3; do echo {to} > /sys/devices/system/cpu/cpu$n/online || exit 1; done");
        guest.check(&["sh", "-c", &script])?;
        Ok(())
    };
    switch("0")?;
    let ran = baton(&guest, &["upgrade", "--kernel", good, "--cpu", "0"])?;
    switch("1")?;
    assert_refused("last CPU", &ran, Class::Precondition, &["CPU 0 is the last one online", "second one"])
}

/// What depends on the configuration: agents that read another one, each instead of the first, which is started again at the
/// end. (Beside the first none would start: that is tried, too.)
fn other_configurations(stage: &Stage, good: &str) -> Result<()> {
    let update = |change: fn(&mut Update)| {
        let mut config = Config::default();
        change(&mut config.update);
        config
    };
    let absent = Service { name: "absent".into(), exec: vec!["/usr/sbin/baton-kv".into()], ..Service::default() };
    let cases: [(&str, Config, &str, &[&str]); 6] = [
        (
            "one changed bit",
            update(|update| update.require_signature = true),
            "/tmp/flipped",
            &["is not what was signed", "require_signature"],
        ),
        (
            "unsigned image",
            update(|update| update.require_signature = true),
            "/tmp/unsigned",
            &["no signature", "require_signature"],
        ),
        (
            "region that is too small",
            update(|update| update.region_mib = 16),
            good,
            &["region of 128 MiB is too small", "set update.region_mib to"],
        ),
        (
            "more memory than there is",
            update(|update| update.region_mib = 64 << 10),
            good,
            &["65536 MiB are needed", "available", "update.region_mib"],
        ),
        // Of the machine's 3 GiB two lie below 4 GiB, with holes at both ends, and one above: wherever KASLR has put the kernel, no place has
        // that much. (1792 MiB can be had when the kernel lies above.)
        (
            "not enough contiguous memory",
            update(|update| update.region_mib = 2048),
            good,
            &["no 2048 MiB of contiguous memory", "places tried", "memmap="],
        ),
        (
            "service that is not there",
            Config { service: vec![absent], ..Config::default() },
            good,
            &["service absent is configured and not connected", "start it"],
        ),
    ];
    let guest = stage.guest();
    let second = guest.run(&["sh", "-c", "unshare -m sh -c 'mount -t tmpfs own /run/baton && exec batond' 2>&1"])?;
    ensure!(!second.success() && second.text().contains("another batond has this machine"), "{}", said(&second));
    agents::kill(stage)?;
    for (what, config, image, words) in cases {
        guest.put("/tmp/other.toml", 0o644, toml::to_string(&config)?.as_bytes())?;
        let daemon = "batond --config /tmp/other.toml --socket /run/other.sock --services /run/other-services.sock";
        // With a folder of its own for what a batond leaves to the next one: it is none of the first one's.
        let alone = format!("unshare -m sh -c 'mount -t tmpfs own /run/baton && exec {daemon}'");
        guest.check(&["sh", "-c", &format!("{alone} >/tmp/other.log 2>&1 & echo $! > /tmp/other.pid")])?;
        let ready = "until grep -q 'batond is ready' /tmp/other.log; do kill -0 $(cat /tmp/other.pid) || exit 1; done";
        guest.check(&["sh", "-c", ready]).context("a second agent")?;
        let ran = baton(&guest, &["--socket", "/run/other.sock", "upgrade", "--kernel", image])?;
        let end = "kill $(cat /tmp/other.pid); while kill -0 $(cat /tmp/other.pid) 2>/dev/null; do sleep 0.1; done";
        guest.check(&["sh", "-c", end])?;
        assert_refused(what, &ran, Class::Precondition, words)?;
        eprintln!("refused: {what}");
    }
    guest.check(&["rm", "-f", "/tmp/other.toml", "/tmp/other.log", "/tmp/other.pid"])?;
    agents::start(stage)?;
    stage.await_serving()
}

/// A second update while one runs is refused, and the first one succeeds.
fn second_update(stage: &mut Stage, release: &str) -> Result<()> {
    let good = format!("/boot/vmlinuz-{release}");
    let guest = stage.guest();
    let (begun, beginning) = mpsc::channel();
    let asked = good.clone();
    let second = std::thread::spawn(move || -> Result<_> {
        beginning.recv().context("the first update does not begin")?;
        baton(&guest, &["upgrade", "--kernel", &asked])
    });
    let first = stage.upgrade_telling(&["--kernel", &good], &[], &mut |_| {
        // It waits for the first word only.
        let _ = begun.send(());
    })?;
    // If nothing was said, nothing is waited for.
    drop(begun);
    let second = second.join().expect("it does not panic")?;
    assert_refused("second update", &second, Class::Busy, &["another update runs", "baton status"])?;
    let Upgraded::Drained(status) = first else { anyhow::bail!("the first update failed") };
    assert_eq!(&status.kernel_release, release);
    Ok(())
}

/// What runs instead of `baton-init` where the module is the subject: drivers and the lab's hand, no module, no agent.
const BARE: &str = "#!/bin/sh
export PATH=/usr/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
mount -t securityfs none /sys/kernel/security
for m in $(cat /etc/baton/modules.$(uname -r)); do case $m in *baton.ko) ;; *) insmod $m;; esac; done
for n in /sys/class/net/eth*; do
  case $(cat $n/address) in *:0b) ip addr add 10.77.0.11/24 dev ${n##*/}; ip link set ${n##*/} up;; esac
done
labd
";

/// The module absent, of another version, right, and under lockdown: on a machine of its own, because an agent that has opened the
/// module keeps it.
#[test]
fn a_module_that_is_missing_other_or_locked_down_is_named() -> Result<()> {
    let _turn = Turn::take();
    let (lab, old) = (lab(), kernel(OLD));
    let mut initrd = Initrd::new();
    // No services and no addresses, but the drivers of every machine of the lab.
    let config = Config { initrd: incumbent::configuration().initrd, ..Config::default() };
    incumbent::fill(&mut initrd, lab, &config, &[])?;
    initrd.file("/bare", 0o755, BARE);
    let other = other_version()?;
    initrd.file("/other.ko", 0o644, std::fs::read(kmod::module_from(lab.tree(), old, other.path(), lab.progress())?)?);
    let mut spec = MachineSpec::new(lab.tree().vmlinuz(old), incumbent::write(&initrd)?);
    spec.memory_mib = 3072;
    spec.cmdline = "console=ttyS0,115200 panic=-1 rdinit=/bare".into();
    let machine = lab.start(&spec)?;
    let guest = machine.guest(NICS[0].address);
    guest.wait_ready(Patience::BOOT.total).with_context(|| machine.logs(40))?;
    let own = format!("/lib/modules/{}/updates/dkms/baton.ko", old.release);
    let good = format!("/boot/vmlinuz-{}", kernel(NEW).release);

    let ask = |verb: &str| baton(&guest, &[verb, "--kernel", &good]);
    assert_refused(
        "no agent",
        &ask("upgrade")?,
        Class::Unreachable,
        &["/run/baton/control.sock", "is batond running?"],
    )?;
    assert_refused("no verb", &baton(&guest, &["upgarde"])?, Class::Usage, &["upgarde", "upgrade"])?;
    // The agent has nothing to say of the module until it is asked for something.
    guest.check(&["sh", "-c", "batond >/tmp/log 2>&1 & until baton status >/dev/null 2>&1; do sleep 0.1; done"])?;
    let refused = |what: &str, words: &[&str]| -> Result<()> {
        for verb in ["check", "upgrade"] {
            assert_refused(&format!("{verb}: {what}"), &ask(verb)?, Class::Precondition, words)?;
        }
        let online = guest.check(&["cat", "/sys/devices/system/cpu/online"])?;
        ensure!(online.trim() == "0-3", "{what}: CPUs {online}");
        eprintln!("refused: {what}");
        Ok(())
    };
    refused("no module", &["module is not loaded", "modprobe baton"])?;
    guest.check(&["insmod", "/other.ko"])?;
    refused("other module", &["version 4711", "this program", "install"])?;
    guest.check(&["rmmod", "baton"])?;
    guest.check(&["insmod", &own])?;
    // Neither its address nor labd would be there afterwards: this machine's configuration knows nothing of them.
    let lost = "addresses,processes,listeners";
    refused("what is not in the configuration", &["10.77.0.11", "labd", &format!("--accept {lost}")])?;
    let ran = baton(&guest, &["check", "--kernel", &good, "--accept", lost])?;
    ensure!(ran.success(), "with the right module: {}", said(&ran));
    guest.check(&["sh", "-c", "echo integrity > /sys/kernel/security/lockdown"])?;
    refused("lockdown", &["lockdown forbids", "boot without"])?;
    assert_eq!(console::complaints(&machine), [""; 0]);
    Ok(())
}

/// The module's sources with another version of the interface.
fn other_version() -> Result<tempfile::TempDir> {
    const VERSION: &str = "#define BATON_ABI_VERSION\t";
    let folder = tempfile::tempdir()?;
    let copied = Command::new("cp").arg("-r").arg(kmod::sources().join(".")).arg(folder.path()).status()?;
    ensure!(copied.success(), "copying the module's sources: {copied}");
    let header = folder.path().join("uapi/baton.h");
    let text = std::fs::read_to_string(&header)?;
    let line = text.lines().find(|line| line.starts_with(VERSION)).context("the header has no version")?;
    std::fs::write(&header, text.replace(line, &format!("{VERSION}4711")))?;
    Ok(folder)
}
