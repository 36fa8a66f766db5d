//! What a machine of the lab has besides the plain ones' CPUs, memory and NICs: the shapes in which users' machines differ. Each part is
//! off unless it is asked for, and each becomes a few words of QEMU's command line.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{Doing, LabError, Result};
use super::host;
use super::net::Nic;

/// Slots of PCI bus 0, away from those that QEMU's chipset and the NICs have.
const FIRST_DISK_SLOT: usize = 8;
const BALLOON_SLOT: usize = 0x10;
const WATCHDOG_SLOT: usize = 0x11;
/// As many disks as there are slots for.
const MOST_DISKS: usize = BALLOON_SLOT - FIRST_DISK_SLOT;

/// The parts. `Hardware::default()` has none of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// Each NIC is behind a PCI Express root port of its own, as in machines made by libvirt and on nearly all metal.
    pub root_ports: bool,
    /// An IOMMU of Intel's, for all devices. Kernels use it when their command line says `intel_iommu=on`.
    pub iommu: Option<Iommu>,
    /// How many NUMA nodes share the CPUs and the memory evenly. 0 and 1: none are told of.
    pub numa_nodes: u8,
    /// Disks, in the order of their names in the guest.
    pub disks: Vec<Disk>,
    /// A memory balloon (virtio).
    pub balloon: bool,
    /// A watchdog (i6300esb). When it barks, QEMU resets the machine; a machine that may not reboot ends.
    pub watchdog: bool,
}

/// How the IOMMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iommu {
    /// Whether it remaps interrupts, too.
    pub interrupts: bool,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What it is plugged into.
    pub bus: DiskBus,
    /// What is on it when the machine starts.
    pub content: DiskContent,
}

/// What a disk is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskBus {
    /// `vda`, `vdb`, …; driver `virtio_blk`.
    Virtio,
    /// `nvme0n1`, …; its driver is built into Debian's cloud kernels.
    Nvme,
    /// `sda`, …, on a controller of its own; drivers `virtio_scsi` and `sd_mod`.
    Scsi,
    /// `sda`, …, on a port of the chipset's controller; drivers `ahci` and `sd_mod`.
    Sata,
}

/// What is on a disk when its machine starts. Whatever the machine writes is gone with the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskContent {
    /// Zeros, this many MiB.
    Blank(u32),
    /// An empty ext4 file system of this many MiB.
    Ext4(u32),
    /// A swap space.
    Swap {
        /// Its size.
        mib: u32,
        /// Its UUID.
        uuid: String,
    },
    /// What is in this raw image, which stays as it is.
    Image(PathBuf),
}

impl Hardware {
    /// Makes the disks' files in a run's folder.
    pub(super) fn lay_out(&self, folder: &Path) -> Result<()> {
        for (index, disk) in self.disks.iter().enumerate() {
            let path = folder.join(file_name(index));
            let blank = |mib: u32| {
                File::create(&path)
                    .and_then(|file| file.set_len(u64::from(mib) << 20))
                    .doing(format_args!("making a disk at {}", path.display()))
            };
            match &disk.content {
                DiskContent::Blank(mib) => blank(*mib)?,
                DiskContent::Ext4(mib) => {
                    blank(*mib)?;
                    host::run("mke2fs", Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&path))?;
                }
                DiskContent::Swap { mib, uuid } => {
                    blank(*mib)?;
                    host::run("mkswap", Command::new("mkswap").args(["-q", "-U", uuid]).arg(&path))?;
                }
                DiskContent::Image(image) => super::machine::link_or_copy(image, &path)?,
            }
        }
        Ok(())
    }

    /// Says what cannot be made.
    pub(super) fn check(&self, vcpus: u8) -> Result<()> {
        let refuse = |why: String| Err(LabError::Refused { who: "the lab".into(), why });
        if self.disks.len() > MOST_DISKS {
            return refuse(format!("a machine has at most {MOST_DISKS} disks, not {}", self.disks.len()));
        }
        if self.numa_nodes > vcpus || (self.numa_nodes > 1 && !vcpus.is_multiple_of(self.numa_nodes)) {
            return refuse(format!("{vcpus} CPUs cannot be shared evenly by {} nodes", self.numa_nodes));
        }
        Ok(())
    }

    /// QEMU's arguments that must come before those of other devices.
    pub(super) fn first(&self, vcpus: u8, memory_mib: u32) -> Vec<String> {
        let mut words = Vec::new();
        let mut add = |line: String| words.extend(line.split(' ').map(str::to_owned));
        if let Some(Iommu { interrupts }) = self.iommu {
            add(format!("-device intel-iommu,intremap={}", if interrupts { "on" } else { "off" }));
        }
        if self.numa_nodes > 1 {
            let (cpus, mib) = (vcpus / self.numa_nodes, memory_mib / u32::from(self.numa_nodes));
            for node in 0..self.numa_nodes {
                let (first, last) = (node * cpus, (node + 1) * cpus - 1);
                add(format!("-object memory-backend-ram,id=node{node},size={mib}M"));
                add(format!("-numa node,nodeid={node},cpus={first}-{last},memdev=node{node}"));
            }
        }
        words
    }

    /// How a NIC is plugged in: its port, if it has one of its own, and QEMU's words for where it is.
    pub(super) fn plug(&self, nic: &Nic) -> (Option<String>, String) {
        let Nic { tap, slot, .. } = nic;
        let mut place = format!("bus=pcie.0,addr={slot:#x}");
        let mut port = None;
        if self.root_ports {
            port = Some(format!("pcie-root-port,id=port-{tap},chassis={slot},slot={slot},{place}"));
            place = format!("bus=port-{tap}");
        }
        if self.iommu.is_some() {
            place += ",iommu_platform=on";
        }
        (port, place)
    }

    /// QEMU's arguments for everything that comes after the NICs.
    pub(super) fn devices(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut add = |line: String| words.extend(line.split(' ').map(str::to_owned));
        let platform = if self.iommu.is_some() { ",iommu_platform=on" } else { "" };
        let mut sata = 0;
        for (index, disk) in self.disks.iter().enumerate() {
            // What is written goes to a file of QEMU's own, without a name: an image can be many machines' at a time.
            let file = file_name(index);
            add(format!("-drive file=/mnt/{file},if=none,id=disk{index},format=raw,snapshot=on"));
            let place = format!("bus=pcie.0,addr={:#x}", FIRST_DISK_SLOT + index);
            let drive = format!("drive=disk{index}");
            match disk.bus {
                DiskBus::Virtio => add(format!("-device virtio-blk-pci,disable-legacy=on,{drive},{place}{platform}")),
                DiskBus::Nvme => add(format!("-device nvme,serial=lab{index},{drive},{place}")),
                DiskBus::Scsi => {
                    add(format!("-device virtio-scsi-pci,id=scsi{index},disable-legacy=on,{place}{platform}"));
                    add(format!("-device scsi-hd,{drive},bus=scsi{index}.0"));
                }
                DiskBus::Sata => {
                    add(format!("-device ide-hd,{drive},bus=ide.{sata}"));
                    sata += 1;
                }
            }
        }
        if self.balloon {
            add(format!("-device virtio-balloon-pci,disable-legacy=on,bus=pcie.0,addr={BALLOON_SLOT:#x}{platform}"));
        }
        if self.watchdog {
            add(format!("-device i6300esb,bus=pcie.0,addr={WATCHDOG_SLOT:#x}"));
        }
        words
    }
}

fn file_name(disk: usize) -> String {
    format!("disk{disk}.raw")
}

#[cfg(test)]
mod tests {
    use super::super::net::NICS;
    use super::*;

    #[test]
    fn a_plain_machine_has_none_of_it() {
        let plain = Hardware::default();
        assert!(plain.first(4, 2048).is_empty() && plain.devices().is_empty());
        assert_eq!(plain.plug(&NICS[0]), (None, "bus=pcie.0,addr=0x3".to_owned()));
    }

    #[test]
    fn nodes_share_evenly_or_are_refused() {
        let nodes = |numa_nodes| Hardware { numa_nodes, ..Hardware::default() };
        let words = nodes(2).first(4, 2048).join(" ");
        assert!(words.contains("nodeid=1,cpus=2-3,memdev=node1") && words.contains("id=node0,size=1024M"), "{words}");
        assert!(nodes(2).check(4).is_ok());
        assert!(nodes(3).check(4).unwrap_err().to_string().contains("4 CPUs cannot be shared evenly by 3 nodes"));
    }

    #[test]
    fn every_device_has_a_slot_of_its_own() {
        let disk = Disk { bus: DiskBus::Virtio, content: DiskContent::Blank(1) };
        let disks = vec![disk; MOST_DISKS];
        let all = Hardware { disks, balloon: true, watchdog: true, ..Hardware::default() };
        assert!(all.check(4).is_ok());
        let words = all.devices();
        let mut slots: Vec<_> = words.iter().filter_map(|word| word.split("addr=").nth(1)).collect();
        let named = slots.len();
        slots.extend(["0x3", "0x4"]);
        slots.sort_unstable();
        slots.dedup();
        assert_eq!((named, slots.len()), (MOST_DISKS + 2, MOST_DISKS + 4));
    }
}
