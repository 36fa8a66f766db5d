//! What this machine is, as plain data: found out on a kernel that the firmware booted, handed over on every later one.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, anyhow};
use kexec_core::memory_map::RangeSet;
use kexec_core::memory_map::iomem::{firmware_ram, parse_firmware_memmap, parse_iomem, system_ram};

use crate::daemon::config::Config;
use crate::machine::net::{Mac, Netlink, parse_mac};
use crate::machine::sysfs::{self, Bdf};

/// Where the memory-mapped PCI configuration space is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ecam {
    /// Address of bus 0.
    pub base: u64,
    /// Last bus.
    pub bus_end: u8,
}

/// The machine.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// All RAM that the firmware reported.
    pub ram: RangeSet,
    /// APIC ids of all CPUs; empty on a kernel that the firmware booted: ask the module.
    pub apic_ids: Vec<u32>,
    /// APIC id of the CPU that the firmware booted: INIT would reset the machine there. Nothing on a kernel that the
    /// firmware booted: there it is Linux's CPU 0.
    pub bsp: Option<u32>,
    /// Nothing on a machine without PCIe.
    pub ecam: Option<Ecam>,
    /// The configured interfaces that exist, by MAC, and their PCI functions.
    pub nics: BTreeMap<Mac, Bdf>,
    /// How many updates this machine has behind it.
    pub hops: u32,
    /// Epoch in which this kernel's services answer.
    pub epoch: u64,
}

impl Facts {
    /// Finds out what can be known without the module, on a kernel that the firmware booted.
    pub fn explore(config: &Config, netlink: &Netlink) -> Result<Facts> {
        let mut nics = BTreeMap::new();
        for nic in &config.network.nic {
            let mac = parse_mac(&nic.mac)?;
            if let Some(link) = netlink.find(mac)? {
                nics.insert(mac, sysfs::pci_function_of(&link.name)?.0);
            }
        }
        Ok(Facts {
            ram: own_memory(&firmware_memory()?, &managed_memory()?, &config.update.reserved()),
            apic_ids: Vec::new(),
            bsp: None,
            ecam: sysfs::ecam().ok().map(|(base, bus_end)| Ecam { base, bus_end }),
            nics,
            hops: 0,
            epoch: 1,
        })
    }
}

/// RAM as the firmware reported it.
fn firmware_memory() -> Result<RangeSet> {
    let root = "/sys/firmware/memmap";
    let mut texts = Vec::new();
    for entry in fs::read_dir(root).with_context(|| format!("cannot list {root}"))? {
        let folder = entry?.path();
        let read = |name: &str| fs::read_to_string(folder.join(name));
        texts.push([read("start")?, read("end")?, read("type")?]);
    }
    let entries =
        parse_firmware_memmap(texts.iter().map(|[start, end, kind]| (start.as_str(), end.as_str(), kind.as_str())))?;
    Ok(firmware_ram(&entries))
}

/// What of the firmware's RAM this kernel may give away: what it manages itself, and what the operator kept for a successor. All
/// else (above `mem=`, behind `memmap=`) is somebody else's.
fn own_memory(firmware: &RangeSet, managed: &RangeSet, reserved: &RangeSet) -> RangeSet {
    firmware.intersect(&managed.union(reserved))
}

/// RAM that this kernel manages now.
pub fn managed_memory() -> Result<RangeSet> {
    let text = fs::read_to_string("/proc/iomem").context("cannot read /proc/iomem")?;
    Ok(system_ram(&parse_iomem(&text)?))
}

/// What Linux says could be had without swapping.
pub fn available_memory() -> Result<u64> {
    let mut system = sysinfo::System::new().map_err(|e| anyhow!("cannot read this system's memory: {e}"))?;
    system.refresh_memory();
    Ok(system.available_memory())
}

#[cfg(test)]
mod tests {
    use kexec_core::memory_map::Range;

    use super::*;

    #[test]
    fn memory_of_others_is_not_given_away() {
        const GIB: u64 = 1 << 30;
        let firmware =
            RangeSet::from(vec![Range::new(0, 0x9_fc00), Range::new(1 << 20, 2 * GIB), Range::new(4 * GIB, 5 * GIB)]);
        // mem=4G, memmap=256M!1G, memmap=128M$0x60000000
        let managed = RangeSet::from(vec![
            Range::new(0x1000, 0x9_fc00),
            Range::new(1 << 20, GIB),
            Range::new(GIB + (256 << 20), 0x6000_0000),
            Range::new(0x6800_0000, 2 * GIB),
        ]);
        assert_eq!(own_memory(&firmware, &managed, &RangeSet::new()), managed);
        let reserved = RangeSet::from(Range::new(0x6000_0000, 0x6800_0000));
        assert_eq!(own_memory(&firmware, &managed, &reserved), managed.union(&reserved));
        let nowhere = RangeSet::from(Range::new(3 * GIB, 4 * GIB));
        assert_eq!(own_memory(&firmware, &managed, &nowhere), managed, "what the firmware does not call RAM is none");
    }
}
