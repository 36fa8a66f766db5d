//! Memory that the successor does not get, or gets in another state than this kernel has it.

use super::accept::Accept;
use super::asked::Asked;
use super::item::{Item, counted, listed, size};
use crate::machine::world::World;
use kexec_core::layout::{LowSlot, PAGE, SIPI_PAGE};
use kexec_core::memory_map::iomem::{Resource, parse_iomem, system_ram};
use kexec_core::memory_map::{Range, RangeSet};

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// `/proc/iomem`, or why it cannot be read.
    pub iomem: Option<Vec<Resource>>,
    /// Numbers of memory blocks that are offline.
    pub offline_blocks: Vec<String>,
    /// Bytes of a memory block.
    pub block: u64,
    /// Bytes in pages that the hardware has lost.
    pub corrupted: u64,
    /// Bytes that a balloon has lent to the host.
    pub lent: u64,
    /// Drivers by which a host changes how much memory there is, with their devices.
    pub balloons: Vec<String>,
    /// Pools of huge pages: size and how many.
    pub hugepages: Vec<(String, u64)>,
    /// Pages that are shared by KSM.
    pub merged: u64,
}

/// Looks.
pub fn read(world: &dyn World) -> Seen {
    const BLOCKS: &str = "/sys/devices/system/memory";
    const POOLS: &str = "/sys/kernel/mm/hugepages";
    let iomem = world
        .bytes("/proc/iomem")
        .ok()
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .and_then(|text| parse_iomem(&text).ok());
    let offline = world
        .names(BLOCKS)
        .into_iter()
        .filter(|name| world.text(&format!("{BLOCKS}/{name}/state")).is_some_and(|s| s == "offline"));
    let meminfo = world.text("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let vmstat = world.text("/proc/vmstat").unwrap_or_default();
    let pages = |name: &str| {
        let line = vmstat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|line| line.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    // Newer kernels say how much it is; older ones count what came and went.
    let counted = pages("balloon_inflate").saturating_sub(pages("balloon_deflate")).saturating_mul(PAGE);
    let drivers = ["virtio/drivers/virtio_balloon", "virtio/drivers/virtio_mem", "vmbus/drivers/hv_balloon"];
    let balloons = drivers.iter().flat_map(|driver| {
        let name = driver.rsplit('/').next().unwrap_or_default();
        let devices = world.names(&format!("/sys/bus/{driver}"));
        devices
            .into_iter()
            .filter(|device| device.starts_with("virtio") || device.contains('-'))
            .map(move |_| name.to_owned())
    });
    Seen {
        iomem,
        offline_blocks: offline.collect(),
        block: world
            .text(&format!("{BLOCKS}/block_size_bytes"))
            .and_then(|hex| u64::from_str_radix(&hex, 16).ok())
            .unwrap_or(0),
        corrupted: kib("HardwareCorrupted").saturating_mul(1024),
        lent: kib("Balloon").saturating_mul(1024).max(counted),
        balloons: balloons.collect(),
        hugepages: (world.names(POOLS).into_iter())
            .filter_map(|pool| {
                let pages = world.number(&format!("{POOLS}/{pool}/nr_hugepages")).filter(|pages| *pages > 0)?;
                Some((pool.trim_start_matches("hugepages-").to_owned(), pages))
            })
            .collect(),
        merged: world.number("/sys/kernel/mm/ksm/pages_sharing").unwrap_or(0),
    }
}

/// Judges.
pub fn judge(seen: &Seen, asked: &Asked<'_>) -> Vec<Item> {
    let mut items = memory(seen, asked);
    items.push(hugepages(seen));
    items
}

fn memory(seen: &Seen, asked: &Asked<'_>) -> Vec<Item> {
    const CHECK: &str = "memory map";
    let Some(iomem) = &seen.iomem else {
        return vec![Item::forbids(
            CHECK,
            "",
            "/proc/iomem cannot be read, or hides its addresses: which memory is whose cannot be known",
            "run batond as root",
        )];
    };
    let mut items = Vec::new();
    let ram = &asked.facts.ram;
    let managed = system_ram(iomem);
    let asks = |found: String, cause: &str, advice: &str| Item::asks(CHECK, Accept::Memory, found, cause, advice);

    // Below 1 MiB the places are fixed, whoever else has them.
    let sipi = Range::new(SIPI_PAGE, SIPI_PAGE + PAGE);
    if !ram.contains(sipi) {
        items.push(Item::forbids(
            CHECK,
            format!("page {SIPI_PAGE:#x}"),
            "CPUs start there, and it is reserved for somebody else (firmware, or memmap= on the command line)",
            "take it out of memmap=, if that names it",
        ));
    }
    if !LowSlot::all().any(|slot| ram.contains(slot.range())) {
        let slots: Vec<String> = LowSlot::all().map(|slot| slot.range().to_string()).collect();
        items.push(Item::forbids(
            CHECK,
            listed(&slots),
            "none of these places below 1 MiB is free, and the successor needs one of them",
            "take them out of memmap=, if that names them",
        ));
    }
    // Other memory that this kernel has, and the firmware never listed: a successor is told of what the firmware listed.
    let added = managed.subtract(ram).subtract(&RangeSet::from(Range::new(0, 1 << 20))).shrink_to(PAGE);
    let added_by: Vec<String> = (iomem.iter())
        .filter(|resource| resource.name.starts_with("System RAM (") && resource.name != "System RAM (baton)")
        .map(|resource| resource.name.clone())
        .collect();
    if added.total() >= seen.block.max(1 << 20) {
        let by = if added_by.is_empty() { String::new() } else { format!(", {}", listed(&added_by)) };
        items.push(asks(
            format!("{} in {added}{by}", size(added.total())),
            "this memory came after the firmware's list was made (hot-added, virtio-mem): the successor does not get it",
            "take it out of the machine again",
        ));
    }
    let persistent: Vec<String> = (iomem.iter())
        .filter(|resource| resource.depth == 0 && resource.name.starts_with("Persistent Memory"))
        .map(|resource| format!("{} at {}", size(resource.range.len()), resource.range))
        .collect();
    if !persistent.is_empty() {
        items.push(Item::comes_back(
            CHECK,
            format!("persistent memory: {}", listed(&persistent)),
            "it is left as it is; the successor does not see it until a reboot",
        ));
    }
    if !seen.offline_blocks.is_empty() {
        let bytes = (seen.offline_blocks.len() as u64).saturating_mul(seen.block);
        items.push(asks(
            format!("{} offline: {}", size(bytes), listed(&seen.offline_blocks)),
            "memory blocks were taken offline on purpose, and the successor would use them",
            "bring them online",
        ));
    }
    if seen.corrupted > 0 {
        items.push(asks(
            format!("{} in pages that the hardware has lost", size(seen.corrupted)),
            "the successor does not know these pages, and would use them",
            "reboot, so that the firmware takes them out",
        ));
    }
    if seen.lent > 0 {
        items.push(asks(
            format!("{} lent to the host by {}", size(seen.lent), listed(&seen.balloons)),
            "the successor would take this memory as its own",
            "have the host give it back (deflate the balloon)",
        ));
    } else if !seen.balloons.is_empty() {
        let cause = "the host cannot change the size of this machine until a reboot";
        items.push(Item::comes_back(CHECK, listed(&seen.balloons), cause));
    }
    if seen.merged > 0 {
        let found = format!("KSM shares {}", counted(usize::try_from(seen.merged).unwrap_or(usize::MAX), "page"));
        items.push(Item::comes_back(CHECK, found, "the successor starts without KSM, and needs that much more"));
    }
    if items.is_empty() {
        items.push(Item::fine(CHECK, format!("{} in {}", size(ram.total()), counted(ram.count(), "range"))));
    }
    items
}

fn hugepages(seen: &Seen) -> Item {
    const CHECK: &str = "hugepages";
    if seen.hugepages.is_empty() {
        return Item::fine(CHECK, "no pools");
    }
    let pools: Vec<String> = seen.hugepages.iter().map(|(size, pages)| format!("{pages} of {size}")).collect();
    Item::asks(
        CHECK,
        Accept::Hugepages,
        listed(&pools),
        "the successor has no pools of huge pages until somebody makes them",
        "",
    )
}

#[cfg(test)]
mod tests {
    use super::super::item::Weight;
    use super::*;
    use crate::daemon::config::Config;
    use crate::machine::facts::Facts;
    use crate::machine::world::played::Played;

    const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000f0000-000fffff : Reserved
00100000-7ffddfff : System RAM
  1b400000-1c3fffff : Kernel code
100000000-13fffffff : System RAM
";

    fn facts() -> Facts {
        let ram =
            vec![Range::new(0x1000, 0x9_fc00), Range::new(0x10_0000, 0x7ffd_e000), Range::new(1 << 32, 0x1_4000_0000)];
        Facts { ram: ram.into(), ..Facts::default() }
    }

    fn of(world: &Played, facts: &Facts) -> Vec<Item> {
        let config = Config::default();
        judge(&read(world), &Asked { config: &config, facts, own: 1, asker: None })
    }

    fn plain() -> Played {
        Played::default()
            .file("/proc/iomem", IOMEM)
            .file("/sys/devices/system/memory/block_size_bytes", "8000000\n")
            .file("/sys/devices/system/memory/memory0/state", "online\n")
            .file("/proc/meminfo", "MemTotal: 3000000 kB\nHardwareCorrupted:     0 kB\n")
    }

    #[test]
    fn an_ordinary_machine_loses_nothing() {
        let items = of(&plain(), &facts());
        assert!(items.iter().all(|item| item.weight == Weight::Fine), "{items:#?}");
    }

    #[test]
    fn what_is_in_another_state_is_named() {
        let world = plain()
            .file("/sys/devices/system/memory/memory7/state", "offline\n")
            .file("/proc/meminfo", "HardwareCorrupted:     8 kB\nBalloon:  524288 kB\n")
            .file("/sys/bus/virtio/drivers/virtio_balloon/virtio3/uevent", "")
            .file("/sys/bus/virtio/drivers/virtio_balloon/bind", "")
            .file("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n")
            .file("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n")
            .file("/sys/kernel/mm/ksm/pages_sharing", "77\n");
        let items = of(&world, &facts());
        let told: Vec<(&str, &Weight)> = items.iter().map(|item| (item.found.as_str(), &item.weight)).collect();
        let memory = Weight::Asks(Accept::Memory);
        assert_eq!(
            told,
            [
                ("128 MiB offline: memory7", &memory),
                ("8 KiB in pages that the hardware has lost", &memory),
                ("512 MiB lent to the host by virtio_balloon", &memory),
                ("KSM shares 77 pages", &Weight::ComesBack),
                ("512 of 2048kB", &Weight::Asks(Accept::Hugepages)),
            ]
        );
        let idle = plain()
            .file("/sys/bus/virtio/drivers/virtio_balloon/virtio3/uevent", "")
            .file("/proc/vmstat", "balloon_inflate 700\nballoon_deflate 700\n");
        assert_eq!(of(&idle, &facts())[0].weight, Weight::ComesBack);
        let counted = idle.file("/proc/vmstat", "balloon_inflate 700\nballoon_deflate 444\n");
        assert_eq!(of(&counted, &facts())[0].found, "1 MiB lent to the host by virtio_balloon");
    }

    #[test]
    fn memory_that_came_later_is_lost_and_persistent_memory_is_left_alone() {
        let iomem = format!(
            "{IOMEM}140000000-15fffffff : System RAM (virtio_mem)\n40000000-5fffffff : Persistent Memory (legacy)\n"
        );
        let items = of(&plain().file("/proc/iomem", &iomem), &facts());
        assert_eq!(items[0].weight, Weight::Asks(Accept::Memory));
        assert!(
            items[0].found.starts_with("512 MiB in ") && items[0].found.contains("virtio_mem"),
            "{}",
            items[0].found
        );
        assert_eq!(items[1].weight, Weight::ComesBack);
        assert!(items[1].found.starts_with("persistent memory: 512 MiB"));
    }

    #[test]
    fn low_pages_of_somebody_else_are_not_overwritten() {
        let without = |range: Range| Facts { ram: facts().ram.subtract(&range.into()), ..facts() };
        let items = of(&plain(), &without(Range::new(0x8000, 0x9000)));
        assert_eq!((items[0].weight.clone(), items[0].found.as_str()), (Weight::Forbids, "page 0x8000"));
        assert_eq!(
            of(&plain(), &without(Range::new(0x1_0000, 0x1_1000)))[0].weight,
            Weight::Fine,
            "another slot will do"
        );
        let items = of(&plain(), &without(Range::new(0x1_0000, 0x8_0000)));
        assert_eq!(items[0].weight, Weight::Forbids);
    }

    #[test]
    fn hidden_addresses_are_no_answer() {
        let hidden = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n";
        for iomem in [hidden, "rubbish\n"] {
            assert_eq!(of(&plain().file("/proc/iomem", iomem), &facts())[0].weight, Weight::Forbids);
        }
    }
}
