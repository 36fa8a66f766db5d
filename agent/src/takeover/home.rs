//! A former successor's own park page: where the CPUs wait that it takes offline, and where those that were stopped by INIT
//! are brought, because such a kernel onlines a CPU through its mailbox (ACPI's multiprocessor wakeup) and waits there without
//! limit. A kernel that the firmware booted starts CPUs by SIPI, wherever they are, and needs none of this.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kexec_core::cpus::ParkedCpus;
use kexec_core::device::{Device, GiveCpu, Mapping, TakeCpu};
use kexec_core::layout::{LowSlot, SIPI_PAGE};
use kexec_core::trampoline::{SipiArgs, sipi_page};
use state_schemas::control_block;
use state_schemas::shared::SharedMemory;

use crate::takeover::birth::Birth;

/// The park page of this kernel.
#[derive(Clone, Copy)]
pub struct Home<'b>(&'b Birth);

impl<'b> Home<'b> {
    /// It came with the birth.
    pub fn of(birth: &'b Birth) -> Home<'b> {
        Home(birth)
    }

    /// Who waits there.
    pub fn mailbox(self) -> ParkedCpus<'b, Mapping> {
        ParkedCpus::new(&self.0.control, control_block::MAILBOX.offset)
    }

    /// Where it is.
    pub fn entry(self) -> u64 {
        self.0.base + control_block::PARK_PAGE.offset
    }

    /// Sends a CPU there that got INIT, in the name of the instance it was stopped in; `sipi` is the page it starts at.
    pub fn bring(self, device: &Device, instance: u32, sipi: &Mapping, apic_id: u32, until: Instant) -> Result<()> {
        let slot = LowSlot::holding(self.0.record.grant.low_slot.start).context("this kernel has no low slot")?;
        let args = SipiArgs {
            cr3: slot.root_page().start(),
            entry: self.entry(),
            arg: 0,
            stack: self.0.base + control_block::STACK.end(),
        };
        sipi.write(0, &sipi_page(&args));
        device.give_cpu(instance, apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
        let arrived = await_parked(&self.mailbox(), apic_id, until);
        device.take_cpu(instance, apic_id, TakeCpu::Record)?;
        arrived.context("at this kernel's own park page")
    }
}

/// Waits until a CPU has arrived at a mailbox.
pub fn await_parked<M: SharedMemory + ?Sized>(mailbox: &ParkedCpus<'_, M>, apic_id: u32, until: Instant) -> Result<()> {
    while !mailbox.is_parked(apic_id) {
        if !pause(until) {
            bail!("CPU with APIC id {apic_id:#x} was sent there and has not arrived in time");
        }
    }
    Ok(())
}

/// Looks away for a moment; says whether there is time left. What is waited for is a word that another CPU writes, with
/// no interrupt to announce it.
pub fn pause(deadline: Instant) -> bool {
    std::thread::sleep(Duration::from_micros(50));
    Instant::now() < deadline
}
