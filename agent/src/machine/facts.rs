//! What this machine is, as plain data: found out on a kernel that the firmware booted, handed over on every later one.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, anyhow};
use kexec_core::device::Device;
use kexec_core::memory_map::RangeSet;
use kexec_core::memory_map::iomem::{
    Resource, firmware_ram, movable, parse_firmware_memmap, parse_iomem, set_aside, system_ram, usable_ram,
};
use state_schemas::platform::Platform;

use crate::daemon::config::Config;
use crate::machine::net::{Mac, Net, parse_mac};
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
    /// The machine's own registers. Nothing on a kernel that the firmware booted: there they are looked up when they are needed
    /// ([`firmware_platform`]), since that takes the module.
    pub platform: Option<Platform>,
    /// The configured interfaces that exist, by MAC, and their PCI functions.
    pub nics: BTreeMap<Mac, Bdf>,
    /// How many updates this machine has behind it.
    pub hops: u32,
    /// Epoch in which this kernel's services answer.
    pub epoch: u64,
}

impl Facts {
    /// Finds out what can be known without the module, on a kernel that the firmware booted.
    pub fn explore(config: &Config, netlink: &dyn Net) -> Result<Facts> {
        let mut nics = BTreeMap::new();
        for nic in &config.network.nic {
            let mac = parse_mac(&nic.mac)?;
            if let Some(link) = netlink.find(mac)? {
                nics.insert(mac, sysfs::pci_function_of(&link.name)?.0);
            }
        }
        Ok(Facts {
            ram: usable_ram(&firmware_memory()?, &resources()?, &config.update.reserved()),
            apic_ids: Vec::new(),
            bsp: None,
            ecam: sysfs::ecam().ok().map(|(base, bus_end)| Ecam { base, bus_end }),
            platform: None,
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

fn resources() -> Result<Vec<Resource>> {
    let text = fs::read_to_string("/proc/iomem").context("cannot read /proc/iomem")?;
    Ok(parse_iomem(&text)?)
}

/// A table of the firmware's; for a successor, of its predecessor's making.
fn acpi_table(signature: &str) -> Result<Vec<u8>> {
    let path = format!("/sys/firmware/acpi/tables/{signature}");
    fs::read(&path).with_context(|| format!("cannot read {path}"))
}

/// The machine's own registers, as the firmware describes them. A machine without ACPI has none that are known.
pub fn firmware_platform(device: &Device) -> Result<Platform> {
    let Ok(fadt) = acpi_table("FACP") else { return Ok(Platform::default()) };
    let s5 = device.sleep_type(5)?.map(|(type_a, _)| type_a);
    Ok(kexec_core::firmware::platform(&fadt, s5))
}

/// The tables of this machine's NUMA nodes, for its successor: the firmware's own, or those that a predecessor handed on.
pub fn affinity() -> Vec<Vec<u8>> {
    kexec_core::firmware::affinity(acpi_table("SRAT").ok(), acpi_table("SLIT").ok())
}

/// Where this kernel's I/O APICs are; a successor has none.
pub fn io_apics() -> Vec<u32> {
    acpi_table("APIC").map(|madt| kexec_core::firmware::io_apics(&madt)).unwrap_or_default()
}

/// RAM that this kernel manages now.
pub fn managed_memory() -> Result<RangeSet> {
    Ok(system_ram(&resources()?))
}

/// Of `ram`, what could be taken out of this kernel's allocator.
pub fn movable_memory(ram: &RangeSet) -> Result<RangeSet> {
    Ok(movable(&resources()?, ram))
}

/// Of `named`, what was set aside on this kernel's command line and is still there.
pub fn memory_set_aside(named: &RangeSet) -> Result<RangeSet> {
    Ok(set_aside(&resources()?, named))
}

/// What Linux says could be had without swapping.
pub fn available_memory() -> Result<u64> {
    let mut system = sysinfo::System::new().map_err(|e| anyhow!("cannot read this system's memory: {e}"))?;
    system.refresh_memory();
    Ok(system.available_memory())
}
