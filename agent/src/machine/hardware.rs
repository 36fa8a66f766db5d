//! What an update moves of a machine beside the module and the network, and what it looks up while it does: CPUs, drivers, memory.
//! [`Live`] is this machine, by sysfs and procfs; a test plays another.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kexec_core::memory_map::RangeSet;

use crate::machine::clock::Moment;
use crate::machine::facts;
use crate::machine::liveupdate;
use crate::machine::sysfs::{self, Bdf, Function, Translated, Unbound};

/// Where the module lists its instances.
pub const INSTANCES: &str = "/proc/multikernel";

/// A machine's hardware. Some of these calls may hang with the hardware: see [`crate::machine::bounded`].
pub trait Hardware: Send + Sync {
    /// Takes a CPU offline; [`Hardware::online_cpu`] is the undo.
    fn offline_cpu(&self, cpu: u32) -> Result<()>;
    /// Brings a CPU online.
    fn online_cpu(&self, cpu: u32) -> Result<()>;

    /// The PCI function behind a network interface, and its folder.
    fn function_of(&self, interface: &str) -> Result<(Bdf, PathBuf)>;
    /// Takes the driver off a PCI function, which stops it; nothing when it has none. [`Hardware::bind`] is the undo.
    fn unbind(&self, folder: &Path) -> Result<Option<Unbound>>;
    /// Gives a device back to its driver.
    fn bind(&self, unbound: &Unbound) -> Result<()>;
    /// How an IOMMU translates a function's DMA; nothing where none does.
    fn translated(&self, function: &Path) -> Result<Option<Translated>>;
    /// Has its DMA go where it says; it has no driver. [`Hardware::translate_again`] is the undo.
    fn pass_through(&self, translated: &Translated) -> Result<()>;
    /// As it was; the function is stopped first.
    fn translate_again(&self, translated: &Translated) -> Result<()>;
    /// Lets the kernel look for drivers of PCI functions that have none.
    fn probe_drivers(&self) -> Result<()>;
    /// A function as this kernel sees it; nothing when it does not.
    fn function(&self, bdf: Bdf) -> Result<Option<Function>>;
    /// Stops a PCI function: driver off, bus mastering off.
    fn stop_function(&self, folder: &Path) -> Result<()>;

    /// RAM that this kernel manages now.
    fn managed_memory(&self) -> Result<RangeSet>;
    /// Of `ram`, what could be taken out of this kernel's allocator.
    fn movable_memory(&self, ram: &RangeSet) -> Result<RangeSet>;
    /// Of `named`, what was set aside on this kernel's command line and is still there.
    fn memory_set_aside(&self, named: &RangeSet) -> Result<RangeSet>;
    /// How hot-added memory is onlined from now on.
    fn set_auto_online(&self, policy: &str) -> Result<()>;

    /// The text of [`INSTANCES`]; nothing where the module is not loaded.
    fn instances(&self) -> Result<Option<String>>;
    /// Sets the wall clock by a moment at so many counts of the TSC a millisecond.
    fn set_clock(&self, moment: Moment, khz: u64) -> Result<()>;
    /// Keeps everybody else from the kernel's sessions: see [`liveupdate::hold`].
    fn hold_sessions(&self) -> Result<Option<File>>;
    /// No kernel is started by kexec from here on: see [`sysfs::hold_kexec`].
    fn hold_kexec(&self) -> Result<()>;
    /// What the operator wants after a panic counts from now on: see [`sysfs::grant_panic_wish`].
    fn grant_panic_wish(&self) -> Result<()>;
    /// Writes everything to the disks.
    fn sync(&self);
    /// Stops watchdogs, and every PCI function but these; says which.
    fn quiesce(&self, granted: &[Bdf]) -> Result<Vec<String>>;
    /// Where the I/O APICs are.
    fn io_apics(&self) -> Vec<u32>;
}

/// This machine.
#[derive(Debug, Clone, Copy)]
pub struct Live;

impl Hardware for Live {
    fn offline_cpu(&self, cpu: u32) -> Result<()> {
        sysfs::offline_cpu(cpu)
    }

    fn online_cpu(&self, cpu: u32) -> Result<()> {
        sysfs::online_cpu(cpu)
    }

    fn function_of(&self, interface: &str) -> Result<(Bdf, PathBuf)> {
        sysfs::pci_function_of(interface)
    }

    fn unbind(&self, folder: &Path) -> Result<Option<Unbound>> {
        sysfs::unbind(folder)
    }

    fn bind(&self, unbound: &Unbound) -> Result<()> {
        unbound.bind()
    }

    fn translated(&self, function: &Path) -> Result<Option<Translated>> {
        sysfs::translated(function)
    }

    fn pass_through(&self, translated: &Translated) -> Result<()> {
        translated.pass_through()
    }

    fn translate_again(&self, translated: &Translated) -> Result<()> {
        translated.translate_again()
    }

    fn probe_drivers(&self) -> Result<()> {
        sysfs::probe_drivers()
    }

    fn function(&self, bdf: Bdf) -> Result<Option<Function>> {
        sysfs::function(bdf)
    }

    fn stop_function(&self, folder: &Path) -> Result<()> {
        sysfs::stop_function(folder)
    }

    fn managed_memory(&self) -> Result<RangeSet> {
        facts::managed_memory()
    }

    fn movable_memory(&self, ram: &RangeSet) -> Result<RangeSet> {
        facts::movable_memory(ram)
    }

    fn memory_set_aside(&self, named: &RangeSet) -> Result<RangeSet> {
        facts::memory_set_aside(named)
    }

    fn set_auto_online(&self, policy: &str) -> Result<()> {
        sysfs::set_auto_online(policy)
    }

    fn instances(&self) -> Result<Option<String>> {
        match fs::read_to_string(INSTANCES) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {INSTANCES}")),
        }
    }

    fn set_clock(&self, moment: Moment, khz: u64) -> Result<()> {
        moment.set_clock(khz)
    }

    fn hold_sessions(&self) -> Result<Option<File>> {
        liveupdate::hold()
    }

    fn hold_kexec(&self) -> Result<()> {
        sysfs::hold_kexec()
    }

    fn grant_panic_wish(&self) -> Result<()> {
        sysfs::grant_panic_wish()
    }

    fn sync(&self) {
        nix::unistd::sync();
    }

    fn quiesce(&self, granted: &[Bdf]) -> Result<Vec<String>> {
        // Whoever pets a watchdog ends with this kernel.
        let mut stopped = sysfs::quiesce_watchdogs();
        stopped.extend(sysfs::quiesce_pci(granted)?);
        Ok(stopped)
    }

    fn io_apics(&self) -> Vec<u32> {
        facts::io_apics()
    }
}
