//! `baton.ko` does what `uapi/baton.h` says, on both kernels: its own self-test (TAP) as process 1 of a small machine, with everything
//! that the test can be given; and ordinary kexec and kdump can be loaded beside it.

use agent::userland::initrd::Initrd;
use anyhow::{Result, ensure};
use baton_tests::console::{self, NO_WX};
use baton_tests::{NEW, OLD, Turn, kernel, lab, selftest, skip};
use demos::lab::{Kernel, Machine, MachineSpec, Patience, incumbent, kmod};
use serde_json::json;

const MIB: u64 = 1 << 20;
/// What machines have, and what their kernel is told (`mem=`): the rest is memory that it does not know, but for what is set aside
/// there, for us (`$`) and as persistent memory (`!`). One low page is set aside, too; it is another's.
const MEMORY_MIB: u32 = 2048;
const KNOWN: &str =
    "mem=1G memmap=2M$0x50000000 memmap=16M!0x52000000 memmap=4K$0x64000000 memmap=4K$0x12000 init_on_alloc=0";
const SET_ASIDE: u64 = 0x5000_0000;
const PERSISTENT: u64 = 0x5200_0000;
const TO_ADOPT: u64 = 1408 * MIB;
const NOTICE: u64 = 0x6400_0000;
const LOW_PAGE: u64 = 0x1_2000;
/// A bridge, and behind it a function: the firmware gives its bus the number 1.
const BEHIND_A_BRIDGE: [&str; 4] = [
    "-device",
    "pcie-root-port,id=rp0,bus=pcie.0,addr=0x10,chassis=1",
    "-device",
    "virtio-rng-pci,bus=rp0,disable-legacy=on",
];

const END: &str = "SELFTEST ENDED";

/// The kernel's words go to the second port, the test's to the first.
fn script(before: &str, options: &str) -> String {
    format!(
        "#!/bin/sh\nexport PATH=/usr/sbin:/bin\nmount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         mount -t securityfs none /sys/kernel/security\nexec >/dev/ttyS0 2>&1\n\
         insmod /baton.ko || echo 'not ok 0 - insmod'\n{before}\n/selftest {options}\necho {END} $?\n\
         rmmod baton && echo UNLOADED\npoweroff -f\n"
    )
}

/// Loading is all that is asked: the crash kernel's memory is given back, because the self-test takes it.
const KEXEC: &str = "for how in -l -p; do\n\
     kexec -s $how /vmlinuz --command-line=quiet && echo \"ok 0 - kexec $how\" || echo \"not ok 0 - kexec $how\"\ndone\n\
     cat /sys/kernel/kexec_loaded /sys/kernel/kexec_crash_loaded | tr '\\n' ' ' | grep -q '1 1' || echo 'not ok 0 - loaded'\n\
     kexec -s -u; kexec -s -p -u";

fn machine(kernel: &Kernel, script: &str, cmdline: &str) -> Result<Machine> {
    let lab = lab();
    let mut initrd = Initrd::new();
    incumbent::skeleton(&mut initrd);
    incumbent::busybox(&mut initrd, lab.tree())?;
    incumbent::program_of_tree(&mut initrd, lab.tree(), "/usr/sbin/kexec")?;
    initrd.file("/baton.ko", 0o644, std::fs::read(kmod::module_for(lab.tree(), kernel, lab.progress())?)?);
    initrd.file("/selftest", 0o755, selftest::build()?);
    initrd.file("/vmlinuz", 0o644, std::fs::read(lab.tree().vmlinuz(kernel))?);
    initrd.file("/init", 0o755, script);
    let mut spec = MachineSpec::new(lab.tree().vmlinuz(kernel), incumbent::write(&initrd)?);
    spec.memory_mib = MEMORY_MIB;
    spec.extra = BEHIND_A_BRIDGE.map(str::to_owned).to_vec();
    spec.cmdline = format!("console=ttyS1,115200 panic=0 crashkernel=128M {cmdline}");
    Ok(lab.start(&spec)?)
}

/// Every line of the self-test says ok; what it skipped is said. Gives how many there were.
fn judge(name: &str, machine: &Machine) -> Result<usize> {
    let text = machine.serial(0).text_from(0);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let failed: Vec<_> = lines.iter().filter(|line| line.starts_with("not ok")).collect();
    ensure!(failed.is_empty(), "{name}: {failed:#?}\nlogs in {}", machine.folder().display());
    for line in lines.iter().filter(|line| line.contains("# SKIP")) {
        eprintln!("{name}: {line}");
    }
    let good = lines.iter().filter(|line| line.starts_with("ok ")).count();
    eprintln!("{name}: {good} ok");
    // At the boot this many stand there; a self-test that broke off early would have fewer.
    ensure!(good > 100, "{name}: only {good} results:\n{}", machine.logs(60));
    Ok(good)
}

fn whole(name: &str, kernel: &Kernel, script: &str, cmdline: &str) -> Result<()> {
    let mut machine = machine(kernel, script, cmdline)?;
    let ended = machine.wait_for(0, END, 0, Patience::BOOT)?;
    machine.wait_end(Patience::BOOT)?;
    judge(name, &machine)?;
    let last = machine.serial(0).text_from(ended);
    ensure!(last.trim_start().starts_with('0'), "{name}: it ended with {last:?}");
    ensure!(console::count(&machine, 1, NO_WX) == 1, "{name}: no verdict on W+X mappings");
    assert_eq!(console::complaints(&machine), [""; 0], "{name}: logs in {}", machine.folder().display());
    if script.contains("--lockdown") {
        return Ok(());
    }
    ensure!(last.contains("UNLOADED"), "{name}: the module does not go: {last}");
    Ok(())
}

#[test]
fn memory_that_the_kernel_does_not_know() -> Result<()> {
    let _turn = Turn::take();
    let options =
        format!("--outside {SET_ASIDE:#x} --not-ours {PERSISTENT:#x} --not-ours {LOW_PAGE:#x} --adopt {TO_ADOPT:#x}");
    for series in [OLD, NEW] {
        whole(&format!("{series}, mem="), kernel(series), &script("", &options), KNOWN)?;
    }
    Ok(())
}

#[test]
fn pci_beside_kexec_and_under_lockdown() -> Result<()> {
    let _turn = Turn::take();
    // The machine's own table says where configuration space is; 0x18 is 00:03.0, a NIC, 0x80 the bridge, 0x100 what is behind it.
    let before = format!("{KEXEC}\necam=0x$(od -An -t x8 -j44 -N8 /sys/firmware/acpi/tables/MCFG | tr -d ' ')");
    for series in [OLD, NEW] {
        let script = script(&before, "--pci $ecam 0x18 --behind 0x80 0x100 --lockdown");
        whole(&format!("{series}, pci=off"), kernel(series), &script, "pci=off")?;
    }
    Ok(())
}

#[test]
fn a_panic_leaves_its_notice() -> Result<()> {
    let _turn = Turn::take();
    let options = format!("--outside {SET_ASIDE:#x} --panic {NOTICE:#x}");
    let mut machine = machine(kernel(NEW), &script("", &options), KNOWN)?;
    machine.wait_for(1, "end Kernel panic", 0, Patience::BOOT)?;
    judge("7, panic", &machine)?;
    let word = machine
        .qmp()
        .execute("human-monitor-command", json!({"command-line": format!("xp /1gx {:#x}", NOTICE + 8)}))?;
    ensure!(word.to_string().contains("0x00000000deadbea7"), "the notice reads {word}");
    skip(
        "kdump's crash kernel is loaded beside the module, not booted: a panic notice does not run then (kmod/README.md)",
    );
    Ok(())
}
