//! CPUs, NUMA nodes, clocks, translation of DMA and interrupts, and what the machine itself runs on.

use kexec_core::cpus::parse_cpu_list;
use kexec_core::firmware::affinity;

use super::accept::Accept;
use super::item::{Item, counted, listed};
use crate::machine::world::World;

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// CPUs that are there.
    pub present: Vec<u32>,
    /// CPUs that run this kernel.
    pub online: Vec<u32>,
    /// Whether and how second threads are switched off (`/sys/devices/system/cpu/smt/control`).
    pub smt: Option<String>,
    /// CPUs that are kept free of other work.
    pub isolated: Vec<u32>,
    /// NUMA nodes that have CPUs or memory.
    pub nodes: Vec<String>,
    /// Whether the firmware's tables say which they are.
    pub nodes_in_tables: bool,
    /// What time is counted by.
    pub clocksource: Option<String>,
    /// IOMMUs that are in use.
    pub iommus: Vec<String>,
    /// Whether groups of devices are translated (`DMA`, `DMA-FQ`) or passed through (`identity`).
    pub domains: Vec<String>,
    /// Whether interrupts are remapped.
    pub remapping: bool,
    /// What the hypervisor calls itself.
    pub hypervisor: Option<String>,
    /// Signs of a guest whose memory the host cannot read, or of memory that is encrypted.
    pub encrypted: Vec<String>,
}

const CPUS: &str = "/sys/devices/system/cpu";
const GROUPS: &str = "/sys/kernel/iommu_groups";

/// Looks.
pub fn read(world: &dyn World) -> Seen {
    let cpus = |file: &str| {
        world.text(&format!("{CPUS}/{file}")).and_then(|text| parse_cpu_list(&text).ok()).unwrap_or_default()
    };
    let mut isolated = cpus("isolated");
    isolated.extend(cpus("nohz_full"));
    isolated.sort_unstable();
    isolated.dedup();
    let nodes = world.text("/sys/devices/system/node/has_memory").unwrap_or_default();
    let mut nodes = parse_cpu_list(&nodes).unwrap_or_default();
    nodes.extend(
        world.text("/sys/devices/system/node/has_cpu").and_then(|text| parse_cpu_list(&text).ok()).unwrap_or_default(),
    );
    nodes.sort_unstable();
    nodes.dedup();
    let mut domains: Vec<String> =
        world.names(GROUPS).iter().filter_map(|group| world.text(&format!("{GROUPS}/{group}/type"))).collect();
    domains.sort();
    domains.dedup();
    let flags = world.text("/proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default().to_owned();
    let command_line = world.text("/proc/cmdline").unwrap_or_default();
    let mut encrypted = Vec::new();
    for device in ["sev-guest", "tdx_guest"] {
        if world.exists(&format!("/sys/devices/virtual/misc/{device}")) {
            encrypted.push(device.to_owned());
        }
    }
    if flags.split(' ').any(|flag| flag == "tdx_guest") && encrypted.is_empty() {
        encrypted.push("tdx_guest".to_owned());
    }
    if command_line.split_whitespace().any(|word| word == "mem_encrypt=on") {
        encrypted.push("mem_encrypt=on".to_owned());
    }
    Seen {
        present: cpus("present"),
        online: cpus("online"),
        smt: world.text(&format!("{CPUS}/smt/control")),
        isolated,
        nodes: (nodes.iter())
            .map(|node| {
                let list = world.text(&format!("/sys/devices/system/node/node{node}/cpulist")).unwrap_or_default();
                format!("node {node} (CPUs {})", if list.is_empty() { "none" } else { &list })
            })
            .collect(),
        nodes_in_tables: {
            let table = |name: &str| world.bytes(&format!("/sys/firmware/acpi/tables/{name}")).ok();
            !affinity(table("SRAT"), table("SLIT")).is_empty()
        },
        clocksource: world.text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        iommus: world.names("/sys/class/iommu"),
        domains,
        // The interrupt controllers of remapped interrupts are called IR-PCI-MSI, IR-IO-APIC and so on.
        remapping: world.text("/proc/interrupts").unwrap_or_default().contains(" IR-"),
        hypervisor: world.hypervisor(),
        encrypted,
    }
}

/// Judges.
pub fn judge(seen: &Seen) -> Vec<Item> {
    vec![platform(seen), offline(seen), isolation(seen), numa(seen), clock(seen), iommu(seen)]
}

fn platform(seen: &Seen) -> Item {
    const CHECK: &str = "platform";
    /// Their guests have pages and interrupts of which there is one per machine, which two kernels would take from each other.
    const ONE_KERNEL: [(&str, &str); 2] = [("Microsoft Hv", "Hyper-V"), ("XenVMMXenVMM", "Xen")];
    if !seen.encrypted.is_empty() {
        return Item::forbids(
            CHECK,
            listed(&seen.encrypted),
            "the memory of this machine is encrypted, and another kernel could not read what this one hands over",
            "update this machine by a reboot",
        );
    }
    let Some(name) = &seen.hypervisor else { return Item::fine(CHECK, "no hypervisor") };
    match ONE_KERNEL.iter().find(|(signature, _)| name.starts_with(signature)) {
        Some((_, who)) => Item::forbids(
            CHECK,
            format!("{who} ({name})"),
            "this hypervisor keeps one set of shared pages and interrupts for each machine: two kernels cannot both have it",
            "under KVM, switch off the enlightenments for Windows (libvirt: <hyperv>, QEMU: -cpu hv-*); elsewhere, update by a reboot",
        ),
        None => Item::fine(CHECK, if name.is_empty() { "a hypervisor without a name" } else { name }),
    }
}

fn numbers(cpus: &[u32]) -> String {
    listed(&cpus.iter().map(u32::to_string).collect::<Vec<_>>())
}

fn offline(seen: &Seen) -> Item {
    const CHECK: &str = "offline cpus";
    let offline: Vec<u32> = seen.present.iter().filter(|cpu| !seen.online.contains(cpu)).copied().collect();
    if offline.is_empty() {
        let last = seen.present.last().map_or(0, |last| *last as usize + 1);
        let holes = if last > seen.present.len() { ", with holes: the successor numbers them anew" } else { "" };
        return Item::fine(CHECK, format!("none; {} online{holes}", counted(seen.online.len(), "CPU")));
    }
    let why = match seen.smt.as_deref() {
        Some(off @ ("off" | "forceoff")) => format!(" (second threads are switched off: {off})"),
        _ => String::new(),
    };
    Item::fine(CHECK, format!("CPU {}{why}: offline in the successor, too", numbers(&offline)))
}

fn isolation(seen: &Seen) -> Item {
    const CHECK: &str = "isolation";
    if seen.isolated.is_empty() {
        return Item::fine(CHECK, "no CPU is isolated");
    }
    Item::asks(
        CHECK,
        Accept::Isolation,
        format!("CPU {}", numbers(&seen.isolated)),
        "the successor isolates no CPU by itself, and numbers them anew: words like isolcpus= mean other ones there",
        "",
    )
}

fn numa(seen: &Seen) -> Item {
    const CHECK: &str = "numa";
    if seen.nodes.len() < 2 {
        return Item::fine(CHECK, "one node");
    }
    if seen.nodes_in_tables {
        return Item::fine(CHECK, format!("{}, in the successor, too", listed(&seen.nodes)));
    }
    Item::asks(
        CHECK,
        Accept::Numa,
        listed(&seen.nodes),
        "these NUMA nodes are in no table (SRAT) that could be handed on: the successor has one node with all CPUs and all memory until \
         a reboot",
        "",
    )
}

fn clock(seen: &Seen) -> Item {
    const CHECK: &str = "clock";
    match seen.clocksource.as_deref() {
        Some(tsc @ ("tsc" | "tsc-early")) => Item::fine(CHECK, tsc),
        other => Item::asks(
            CHECK,
            Accept::Clock,
            other.unwrap_or("unknown"),
            "this kernel does not count time by the TSC, because that is missing or cannot be trusted here; the successor has no other clock",
            "",
        ),
    }
}

fn iommu(seen: &Seen) -> Item {
    const CHECK: &str = "iommu";
    if seen.iommus.is_empty() && !seen.remapping {
        return Item::fine(CHECK, "none in use");
    }
    let mut found = listed(&seen.iommus);
    if !seen.domains.is_empty() {
        found = format!("{found} (domains: {})", listed(&seen.domains));
    }
    if seen.remapping {
        found = format!("{found}{}interrupts are remapped", if found.is_empty() { "" } else { ", " });
        return Item::forbids(
            CHECK,
            found,
            "the IOMMU lets through only interrupts that are in this kernel's table: those of the successor's devices are blocked",
            "boot this kernel with intremap=off on its command line; its IOMMU may go on translating",
        );
    }
    let protects = seen.domains.iter().any(|domain| domain != "identity");
    if !protects {
        return Item::comes_back(
            CHECK,
            found,
            "the IOMMU passes DMA through, and is switched off when this kernel leaves: the successor has none until a reboot",
        );
    }
    Item::asks(
        CHECK,
        Accept::Iommu,
        found,
        "the IOMMU keeps devices from memory that is not theirs, and is switched off when this kernel leaves: the successor has none \
         until a reboot",
        "boot this kernel with iommu=pt",
    )
}

#[cfg(test)]
mod tests {
    use super::super::item::Weight;
    use super::*;
    use crate::machine::world::played::Played;

    fn plain() -> Played {
        let mut world = Played::default()
            .file("/sys/devices/system/cpu/present", "0-3\n")
            .file("/sys/devices/system/cpu/online", "0-3\n")
            .file("/sys/devices/system/cpu/isolated", "\n")
            .file("/sys/devices/system/cpu/nohz_full", "(null)\n")
            .file("/sys/devices/system/cpu/smt/control", "notsupported\n")
            .file("/sys/devices/system/node/has_memory", "0\n")
            .file("/sys/devices/system/node/has_cpu", "0\n")
            .file("/sys/devices/system/node/node0/cpulist", "0-3\n")
            .file("/sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n")
            .file("/proc/interrupts", "  24:   0  PCI-MSIX-0000:00:03.0   0-edge      virtio1-config\n")
            .file("/proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme tsc hypervisor\n");
        world.hypervisor = Some("TCGTCGTCGTCG".into());
        world
    }

    fn of(world: &Played) -> Vec<Item> {
        judge(&read(world))
    }

    fn only(world: &Played) -> Item {
        let mut items: Vec<Item> = of(world).into_iter().filter(|item| item.weight != Weight::Fine).collect();
        assert_eq!(items.len(), 1, "{items:#?}");
        items.remove(0)
    }

    #[test]
    fn an_ordinary_machine_loses_nothing() {
        let items = of(&plain());
        assert!(items.iter().all(|item| item.weight == Weight::Fine), "{items:#?}");
    }

    #[test]
    fn cpus_that_are_offline_on_purpose_are_named() {
        let offline = |world: &Played| of(world).into_iter().find(|item| item.check == "offline cpus").unwrap();
        let item = offline(&plain().file("/sys/devices/system/cpu/online", "0,2-3\n"));
        assert_eq!((item.found.as_str(), item.weight), ("CPU 1: offline in the successor, too", Weight::Fine));
        let nosmt = plain()
            .file("/sys/devices/system/cpu/online", "0-1\n")
            .file("/sys/devices/system/cpu/smt/control", "forceoff\n");
        let found = "CPU 2, 3 (second threads are switched off: forceoff): offline in the successor, too";
        assert_eq!(offline(&nosmt).found, found);
        let holes = plain()
            .file("/sys/devices/system/cpu/present", "0-1,4-5\n")
            .file("/sys/devices/system/cpu/online", "0-1,4-5\n");
        assert!(of(&holes).iter().any(|item| item.found.contains("holes")));
    }

    #[test]
    fn isolation_nodes_and_clocks_are_named() {
        let item = only(
            &plain().file("/sys/devices/system/cpu/isolated", "2-3\n").file("/sys/devices/system/cpu/nohz_full", "3\n"),
        );
        assert_eq!((item.found.as_str(), item.weight), ("CPU 2, 3", Weight::Asks(Accept::Isolation)));
        let two = plain()
            .file("/sys/devices/system/node/has_memory", "0-1\n")
            .file("/sys/devices/system/node/node0/cpulist", "0-1\n")
            .file("/sys/devices/system/node/node1/cpulist", "2-3\n");
        let item = only(&two);
        assert_eq!(item.found, "node 0 (CPUs 0-1), node 1 (CPUs 2-3)");
        assert!(item.cause.contains("NUMA"));
        // 36 bytes of header, and the sum is right.
        let mut srat = *b"SRAT\x24\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        srat[9] = srat.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        let mut two = two;
        two.files.insert("/sys/firmware/acpi/tables/SRAT".into(), srat.to_vec());
        assert!(of(&two).iter().all(|item| item.weight == Weight::Fine), "they cross by their table");
        for clock in ["kvm-clock", "hpet", "acpi_pm"] {
            let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
            assert_eq!(only(&plain().file(path, clock)).weight, Weight::Asks(Accept::Clock));
        }
    }

    #[test]
    fn an_iommu_is_named_with_the_words_that_help() {
        let translating = plain()
            .file("/sys/class/iommu/dmar0/intel-iommu/cap", "x")
            .file("/sys/kernel/iommu_groups/0/type", "DMA-FQ\n")
            .file("/sys/kernel/iommu_groups/1/type", "DMA-FQ\n")
            .file("/proc/interrupts", "  24:   0   IR-PCI-MSIX-0000:00:03.0   0-edge   virtio1\n");
        let item = only(&translating);
        assert_eq!(item.found, "dmar0 (domains: DMA-FQ), interrupts are remapped");
        assert!(item.weight == Weight::Forbids && item.advice.contains("intremap=off"), "{item:?}");
        let item =
            only(&translating.file("/proc/interrupts", "  24:   0   PCI-MSIX-0000:00:03.0   0-edge   virtio1\n"));
        assert_eq!((item.found.as_str(), item.weight), ("dmar0 (domains: DMA-FQ)", Weight::Asks(Accept::Iommu)));
        let passing =
            plain().file("/sys/class/iommu/dmar0/devices/x", "").file("/sys/kernel/iommu_groups/0/type", "identity\n");
        assert_eq!(only(&passing).weight, Weight::ComesBack);
    }

    #[test]
    fn machines_that_cannot_hold_two_kernels_are_refused() {
        for name in ["Microsoft Hv", "XenVMMXenVMM"] {
            let world = Played { hypervisor: Some(name.into()), ..plain() };
            assert_eq!(only(&world).weight, Weight::Forbids, "{name}");
        }
        for name in [Some("KVMKVMKVM".to_owned()), Some("VMwareVMware".to_owned()), Some(String::new()), None] {
            let world = Played { hypervisor: name, ..plain() };
            assert!(of(&world).iter().all(|item| item.weight == Weight::Fine));
        }
        for (path, text) in [
            ("/sys/devices/virtual/misc/sev-guest/dev", "10:1"),
            ("/proc/cpuinfo", "flags\t\t: fpu tdx_guest\n"),
            ("/proc/cmdline", "quiet mem_encrypt=on"),
        ] {
            assert_eq!(only(&plain().file(path, text)).weight, Weight::Forbids, "{path}");
        }
    }
}
