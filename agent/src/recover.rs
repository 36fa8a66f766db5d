//! After a batond that died in the middle of an update: the module still accounts for what it held. What has not passed
//! the cutover is taken back, as an update that fails would; what serves is left alone, because only its own agent may
//! stop it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use kexec_core::device::{Device, TakeCpu};

use crate::config::Config;
use crate::kernels::{self, Instance};
use crate::net::{Netlink, parse_mac};
use crate::sysfs;

/// Takes back what an earlier batond left. Says what it found; nothing when there was nothing.
pub fn recover(device: &Device, netlink: &Netlink, config: &Config) -> Result<Option<String>> {
    let left: Vec<Instance> = kernels::list()?.instances.into_iter().filter(|instance| instance.id != 0).collect();
    if left.is_empty() {
        return Ok(None);
    }
    if let Some(serving) = left.iter().find(|instance| instance.state == "serving") {
        bail!(
            "instance {} ({}) serves, and the update that started it has lost its agent: its own agent has to finish it",
            serving.id,
            serving.image
        );
    }
    let cpus = device.cpus()?;
    for instance in &left {
        for apic_id in &instance.cpus {
            device.take_cpu(instance.id, *apic_id, TakeCpu::Fence)?;
        }
        device.destroy_instance(instance.id)?;
        for cpu in cpus.iter().filter(|cpu| !cpu.online && instance.cpus.contains(&cpu.apic_id)) {
            sysfs::online_cpu(cpu.cpu)?;
        }
    }
    for nic in &config.network.nic {
        if netlink.find(parse_mac(&nic.mac)?)?.is_none() {
            probe_drivers()?;
            break;
        }
    }
    let names: Vec<String> = left.iter().map(|i| format!("{} ({}, {})", i.id, i.image, i.state)).collect();
    Ok(Some(names.join(", ")))
}

/// Lets the kernel look for drivers of PCI functions that have none: an interface that was to be granted.
fn probe_drivers() -> Result<()> {
    let root = Path::new("/sys/bus/pci");
    for entry in fs::read_dir(root.join("devices")).context("cannot list PCI functions")? {
        let entry = entry?;
        if !entry.path().join("driver").exists() {
            // A function that no driver wants answers with an error, which is no news.
            let _ = fs::write(root.join("drivers_probe"), entry.file_name().to_string_lossy().as_bytes());
        }
    }
    Ok(())
}
