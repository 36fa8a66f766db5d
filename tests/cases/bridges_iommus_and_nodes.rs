//! How a machine's devices and memory hang together: NICs behind PCI Express root ports, as in machines made by libvirt and on nearly all metal; an
//! IOMMU between devices and memory; two NUMA nodes with memory above 4 GiB. The update is made as on any machine; where it cannot be, `check` says so
//! first, in words that help, and nothing is touched.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::findings::Checked;
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::share::is_chosen;
use baton_tests::{NEW, OLD, console, kernel, open, snapshot, upgrade};
use demos::lab::Hardware;
use demos::lab::hardware::Iommu;
use demos::story::stage::{Shape, Stage};
use kexec_core::cpus::parse_cpu_list;

fn image(series: &str) -> String {
    format!("/boot/vmlinuz-{}", kernel(series).release)
}

/// (One update of such a machine was seen to commit.) And back, with a CPU that somebody has taken offline meanwhile.
#[test]
fn nics_behind_root_ports_and_a_cpu_that_is_offline() -> Result<()> {
    if !is_chosen("nics_behind_root_ports_and_a_cpu_that_is_offline") {
        return Ok(());
    }
    let hardware = Hardware { root_ports: true, ..Hardware::default() };
    let mut played = open(OLD, &Shape { hardware, ..Shape::default() })?;
    let stage = &mut played.stage;
    let before = snapshot::of(stage)?;
    let began = Instant::now();
    let checked = baton(&stage.guest(), &["check", "--kernel", &image(NEW)])?;
    ensure!(checked.success(), "{}", said(&checked));
    let cpu = "cat /proc/$(pidof batond)/stat | awk '{print $14 + $15}'";
    let ticks = |stage: &Stage| -> Result<u64> { Ok(stage.guest().check(&["sh", "-c", cpu])?.trim().parse()?) };
    let (first, used) = (began.elapsed(), ticks(stage)?);
    ensure!(baton(&stage.guest(), &["check", "--kernel", &image(NEW)])?.success());
    // A figure, not a promise: the host may be busy, and the CPU is emulated.
    eprintln!("check took {first:.1?}; a second one {} ms of the emulated CPU", (ticks(stage)? - used) * 10);

    upgrade(stage, NEW, &[])?;
    let after = snapshot::of(stage)?;
    assert_eq!((&after.online, &after.services), (&before.online, &before.services));
    // Where they were: bus, device and function of a NIC are what the machine's owner knows it by.
    let place = "for n in /sys/class/net/*/device; do readlink -f $n/..; done | sed 's/.*://' | sort";
    let places = stage.guest().check(&["sh", "-c", place])?;
    assert_eq!(places, "00.0\n", "the successor has the one function behind its port: {places}");

    stage.guest().check(&["sh", "-c", "echo 0 > /sys/devices/system/cpu/cpu2/online"])?;
    upgrade(stage, OLD, &[])?;
    let cpus = "cat /sys/devices/system/cpu/present; cat /sys/devices/system/cpu/offline";
    let cpus = stage.guest().check(&["sh", "-c", cpus])?;
    let offline: u32 =
        cpus.strip_prefix("0-3\n").with_context(|| cpus.clone())?.trim().parse().with_context(|| cpus.clone())?;
    // It can be brought back by whoever took it.
    stage.guest().check(&["sh", "-c", &format!("echo 1 > /sys/devices/system/cpu/cpu{offline}/online")])?;
    assert_eq!(snapshot::of(stage)?.online, before.online);
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

/// A machine with an IOMMU that is in use, and what it says of devices that write where they must not.
fn with_iommu(interrupts: bool, words: &str) -> Result<baton_tests::Played> {
    let hardware = Hardware { iommu: Some(Iommu { interrupts }), ..Hardware::default() };
    let played = open(OLD, &Shape { hardware, cmdline: words.into(), ..Shape::default() })?;
    ensure!(!groups(&played.stage)?.is_empty(), "this machine is meant to have an IOMMU that is in use");
    Ok(played)
}

/// How each group of devices is translated.
fn groups(stage: &Stage) -> Result<String> {
    Ok(stage.guest().check(&["sh", "-c", "cat /sys/kernel/iommu_groups/*/type 2>/dev/null || true"])?)
}

#[track_caller]
fn assert_quiet(stage: &Stage) {
    let folder = stage.machine.folder().display().to_string();
    let faults = (0..2).map(|port| console::count(&stage.machine, port, "DMAR: [DMA")).sum::<usize>();
    assert_eq!(faults, 0, "a device wrote where it must not: logs in {folder}");
    let complaints = console::complaints(&stage.machine).into_iter();
    // The successor that was made to panic has these three lines, and no others.
    let others: Vec<_> =
        complaints.filter(|line| !line.contains("sysrq triggered crash") && !line.ends_with("Call Trace:")).collect();
    assert_eq!(others, [""; 0], "logs in {folder}");
}

/// The interface's group passes through while the successor has it, and translates again after an update that failed. After two updates most of the
/// memory that the tables lay in has been written over.
#[test]
fn an_iommu_that_translates() -> Result<()> {
    if !is_chosen("an_iommu_that_translates") {
        return Ok(());
    }
    let mut played = with_iommu(false, "intel_iommu=on")?;
    let stage = &mut played.stage;
    let translated = groups(stage)?;
    ensure!(translated.lines().all(|kind| kind.starts_with("DMA")), "{translated}");
    Checked::ask(&stage.guest(), &image(NEW), &[])?.assert_refuses("an IOMMU", "iommu", &["dmar0", "DMA"])?;

    // It has the interface already when it dies.
    let mut initrd = Initrd::new();
    initrd.file("/trap", 0o755, "#!/bin/sh\nmkdir -p /proc\nmount -t proc proc /proc\necho c > /proc/sysrq-trigger\n");
    stage.guest().put("/tmp/panics", 0o644, &initrd.bytes()?)?;
    let before = snapshot::of(stage)?;
    let words = [
        "upgrade",
        "--kernel",
        &image(NEW),
        "--accept",
        "iommu",
        "--cmdline",
        "rdinit=/trap",
        "--initrd",
        "/tmp/panics",
    ];
    assert_refused("a successor that panics", &baton(&stage.guest(), &words)?, Class::RolledBack, &["panicked"])?;
    snapshot::assert_untouched("an update that failed", &before, &snapshot::of(stage)?);
    assert_eq!(groups(stage)?, translated);

    upgrade(stage, NEW, &["--accept", "iommu"])?;
    assert_eq!(groups(stage)?, "", "the successor knows of no IOMMU");
    upgrade(stage, OLD, &[])?;
    let after = snapshot::of(stage)?;
    assert_eq!((&after.online, &after.services), (&before.online, &before.services));
    let fill = "mkdir -p /mnt && mount -t tmpfs -o size=90% tmpfs /mnt && dd if=/dev/zero of=/mnt/x bs=1M count=1500 2>&1 && rm /mnt/x && umount /mnt";
    stage.guest().check(&["sh", "-c", fill])?;
    stage.await_serving()?;
    assert_quiet(stage);
    Ok(())
}

/// With `iommu=pt` the kernel's own devices are not translated: nothing is lost that would have to be accepted.
#[test]
fn an_iommu_that_passes_through() -> Result<()> {
    if !is_chosen("an_iommu_that_passes_through") {
        return Ok(());
    }
    let mut played = with_iommu(false, "intel_iommu=on iommu=pt")?;
    let stage = &mut played.stage;
    let before = snapshot::of(stage)?;
    upgrade(stage, NEW, &[])?;
    let after = snapshot::of(stage)?;
    assert_eq!((&after.online, &after.services), (&before.online, &before.services));
    assert_quiet(stage);
    Ok(())
}

/// Remapped interrupts are refused, and not for the asking.
#[test]
fn an_iommu_that_remaps_interrupts() -> Result<()> {
    if !is_chosen("an_iommu_that_remaps_interrupts") {
        return Ok(());
    }
    let mut played = with_iommu(true, "intel_iommu=on")?;
    let stage = &mut played.stage;
    let before = snapshot::of(stage)?;
    for verb in ["check", "upgrade"] {
        let ran = baton(&stage.guest(), &[verb, "--kernel", &image(NEW), "--accept", "iommu"])?;
        assert_refused(verb, &ran, Class::Precondition, &["interrupts are remapped", "intremap=off"])?;
    }
    snapshot::assert_untouched("remapped interrupts", &before, &snapshot::of(stage)?);
    assert_quiet(stage);
    Ok(())
}

/// A node: its CPUs by APIC id, how far others are, and its memory in MiB.
type Node = (BTreeSet<u32>, String, u64);

fn nodes(stage: &Stage) -> Result<BTreeMap<u32, Node>> {
    let ids = stage.guest().check(&["sh", "-c", "sed -n 's/^apicid.*: //p' /proc/cpuinfo"])?;
    let ids: Vec<u32> = ids.lines().map(str::parse).collect::<Result<_, _>>()?;
    let script = "for n in /sys/devices/system/node/node[0-9]*; do \
                  echo ${n##*node}/$(cat $n/cpulist)/$(cat $n/distance)/$(awk '/MemTotal/{print $4}' $n/meminfo); done";
    let mut nodes = BTreeMap::new();
    for line in stage.guest().check(&["sh", "-c", script])?.lines() {
        let [node, cpus, distances, kib] = line.split('/').collect::<Vec<_>>()[..] else {
            anyhow::bail!("the guest says {line:?}");
        };
        let cpus = parse_cpu_list(cpus)?.into_iter().filter_map(|cpu| ids.get(cpu as usize).copied()).collect();
        nodes.insert(node.parse()?, (cpus, distances.to_owned(), kib.parse::<u64>()? >> 10));
    }
    Ok(nodes)
}

/// Both nodes are there after an update, and after another one; so is the memory by which devices of 32 bits are served.
#[test]
fn two_numa_nodes_and_memory_above_4_gib() -> Result<()> {
    if !is_chosen("two_numa_nodes_and_memory_above_4_gib") {
        return Ok(());
    }
    let hardware = Hardware { numa_nodes: 2, ..Hardware::default() };
    // A node is a socket: Linux complains of CPUs that share a cache and not a node.
    let smp = "sockets=2,cores=2,threads=1".to_owned();
    let mut played = open(OLD, &Shape { hardware, smp, memory_mib: 4096, ..Shape::default() })?;
    let stage = &mut played.stage;
    let swiotlb = |stage: &Stage| stage.guest().check(&["sh", "-c", "dmesg | grep -c 'software IO TLB: mapped'"]);
    let (before, bounce) = (nodes(stage)?, swiotlb(stage)?);
    eprintln!("{before:?}");
    let cpus: Vec<_> = before.values().map(|node| node.0.clone()).collect();
    assert_eq!(cpus, [[0, 1].into(), [2, 3].into()], "the machine is what it is meant to be");
    assert_eq!(bounce, "1\n", "the machine is what it is meant to be");
    for series in [NEW, OLD] {
        // Linux does not trust the TSCs of several sockets of an emulated machine to be one clock.
        upgrade(stage, series, &["--accept", "clock"])?;
        let after = nodes(stage)?;
        eprintln!("{after:?}");
        for (number, (cpus, distances, mib)) in &before {
            let found = after.get(number).with_context(|| format!("{before:?} became {after:?}"))?;
            assert_eq!((&found.0, &found.1), (cpus, distances), "node {number}");
            ensure!(found.2.abs_diff(*mib) * 100 <= mib * 5, "node {number} had {mib} MiB, and has {}", found.2);
        }
        assert_eq!(swiotlb(stage)?, bounce);
    }
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
