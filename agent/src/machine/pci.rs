//! PCI functions that a successor had, and that no driver of this kernel takes back (it was a successor itself, and sees only its own; or
//! it has no driver for them). When such a
//! successor has been stopped, its devices have not: what they still receive, they write to where its memory was. So they are stopped
//! before anybody gets that memory. A function whose driver this kernel has needs none of this: the driver takes it back, and resets it.

use anyhow::{Context, Result};
use kexec_core::device::{Device, PciFunction};

use crate::machine::facts::Ecam;
use crate::machine::hardware::Hardware;
use crate::machine::sysfs::{self, Bdf, Function};

/// Domain number of a root bus that is there only while a function is being stopped. Its own has [`crate::takeover::successor`].
const DOMAIN: u32 = 2;

/// As the module wants it.
pub fn of_bdf(bdf: Bdf) -> PciFunction {
    PciFunction { bus: (bdf >> 8) as u8, device: (bdf >> 3) as u8 & 0x1f, function: bdf as u8 & 7 }
}

/// Stops one that no driver of this kernel has. One that has a driver here needs none of this.
///
/// A function that this kernel sees is stopped where it is. For one that it does not see, a bus is made for the time: a driver takes the
/// function, which resets it, and leaves it again; then it masters no bus.
pub fn stop_without_driver(hardware: &dyn Hardware, device: &Device, ecam: Option<Ecam>, bdf: Bdf) -> Result<()> {
    let named = || format!("PCI function {} cannot be stopped", sysfs::bdf_name(bdf));
    match hardware.function(bdf)? {
        Some(Function { has_driver: true, .. }) => Ok(()),
        Some(Function { folder, .. }) => hardware.stop_function(&folder).with_context(named),
        None => {
            let ecam = ecam.context("this machine has no memory-mapped configuration space")?;
            device.add_pci(DOMAIN, ecam.base, ecam.bus_end, &[of_bdf(bdf)])?;
            let stopped = hardware.stop_function(&sysfs::function_folder(DOMAIN, bdf));
            let removed = device.remove_pci(DOMAIN);
            stopped.with_context(named)?;
            Ok(removed?)
        }
    }
}
