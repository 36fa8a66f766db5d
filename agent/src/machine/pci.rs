//! PCI functions that a successor had, and that this kernel does not see (it was a successor itself, and sees its own). When such a
//! successor has been stopped, its devices have not: what they still receive, they write to where its memory was. So they are stopped
//! before anybody gets that memory. A function that this kernel sees needs none of this: its driver takes it back, and resets it.

use anyhow::{Context, Result};
use kexec_core::device::{Device, PciFunction};

use crate::machine::facts::Ecam;
use crate::machine::hardware::Hardware;
use crate::machine::sysfs::{self, Bdf};

/// Domain number of a root bus that is there only while a function is being stopped. Its own has [`crate::takeover::successor`].
const DOMAIN: u32 = 2;

/// As the module wants it.
pub fn of_bdf(bdf: Bdf) -> PciFunction {
    PciFunction { bus: (bdf >> 8) as u8, device: (bdf >> 3) as u8 & 0x1f, function: bdf as u8 & 7 }
}

/// Stops one, if this kernel does not see it: a driver takes it, which resets it, and leaves it again; then it masters no bus.
pub fn stop_unseen(hardware: &dyn Hardware, device: &Device, ecam: Option<Ecam>, bdf: Bdf) -> Result<()> {
    if hardware.sees_function(bdf)? {
        return Ok(());
    }
    let ecam = ecam.context("this machine has no memory-mapped configuration space")?;
    device.add_pci(DOMAIN, ecam.base, ecam.bus_end, &[of_bdf(bdf)])?;
    let stopped = hardware.stop_function(&sysfs::function_folder(DOMAIN, bdf));
    device.remove_pci(DOMAIN)?;
    stopped.with_context(|| format!("PCI function {} cannot be stopped", sysfs::bdf_name(bdf)))
}
