//! How a successor came to be: its control block and the handover record in it, found by `baton.control=` on the
//! command line.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use handover::update::phase::Phase;
use kexec_core::device::{Access, Device, DeviceError, Mapping, SELF, TakeMemory};
use kexec_core::memory_map::{Range, RangeSet};
use state_schemas::Payload;
use state_schemas::control_block::{self, words};
use state_schemas::latest::handover_record::{HandoverRecord, PhysRange, Role};
use state_schemas::latest::message::ToIncumbent;
use state_schemas::platform::Platform;
use state_schemas::shared::SharedMemory;

use crate::daemon::control::{Stage, UpdateStatus};
use crate::machine::facts::{Ecam, Facts};
use crate::machine::sysfs;
use crate::update::line::{Line, Successor};
use crate::update::timeline::Timeline;

/// The predecessor's part of this kernel's life.
pub struct Birth {
    /// The whole control block.
    pub control: Arc<Mapping>,
    /// Where it lies.
    pub base: u64,
    /// What the predecessor wrote there; checked.
    pub record: HandoverRecord,
}

/// As `kexec_core` says it.
pub fn range(phys: PhysRange) -> Range {
    Range::new(phys.start, phys.start.saturating_add(phys.len))
}

/// As the schemas say it.
pub fn phys(range: Range) -> PhysRange {
    PhysRange { start: range.start(), len: range.len() }
}

impl Birth {
    /// Reads and checks the control block at `base`, which the command line names, and the record in it. `again`: an earlier
    /// batond of this kernel has taken the control block already.
    pub fn read(device: &Device, base: u64, again: bool) -> Result<Birth> {
        let block = Range::with_len(base, control_block::SIZE).context("the control block passes the end of memory")?;
        match device.take_memory(SELF, block, TakeMemory::Outside) {
            Err(DeviceError::Exists { .. }) if again => {}
            taken => taken.context("cannot take the control block")?,
        }
        let control = Arc::new(device.map(block, Access::ReadWrite).context("cannot map the control block")?);
        let magic = control.load(words::MAGIC_AT);
        if magic != words::MAGIC {
            bail!("there is no control block at {base:#x}: its first word is {magic:#x}");
        }
        let version = control.load(words::VERSION_AT);
        if version != u64::from(words::VERSION) {
            bail!("the control block has version {version}, this batond speaks {}", words::VERSION);
        }
        match read_record(&control, base) {
            Ok(record) => Ok(Birth { control, base, record }),
            Err(error) => {
                tell(device, control, base, &error);
                Err(error)
            }
        }
    }

    /// The machine, as the predecessor described it.
    pub fn facts(&self) -> Facts {
        let record = &self.record;
        Facts {
            ram: record.machine.ram.iter().map(|ram| range(*ram)).collect::<RangeSet>(),
            apic_ids: record.machine.cpus.iter().map(|cpu| cpu.apic_id).collect(),
            bsp: record.machine.cpus.iter().find(|cpu| cpu.firmware_boot).map(|cpu| cpu.apic_id),
            // A predecessor that did not say, or said nonsense, leaves this kernel without.
            platform: Some(
                record.carried_payload::<Platform>().and_then(|told| told.check(&()).ok()).unwrap_or_default(),
            ),
            ecam: record.ecam.map(|ecam| Ecam { base: ecam.address, bus_end: ecam.bus_end }),
            nics: record
                .network
                .functions
                .iter()
                .filter_map(|f| Some((f.mac?, u16::from(f.bus) << 8 | u16::from(f.devfn))))
                .collect(),
            hops: record.hop,
            epoch: record.epoch,
        }
    }

    /// What there is to tell of the update at the beginning, or long after it.
    pub fn update_status(&self, release: &str, drained: bool) -> UpdateStatus {
        let record = &self.record;
        let cpus_total = u32::try_from(record.machine.cpus.len()).unwrap_or(u32::MAX);
        UpdateStatus {
            id: record.update.to_string(),
            phase: Stage::In(if drained { Phase::Drained } else { Phase::Booting }),
            incumbent_release: record.incumbent.release.clone(),
            successor_release: release.to_owned(),
            cpus_total,
            cpus_moved: if drained { cpus_total } else { 1 },
            left_undone: Vec::new(),
            timeline: Timeline::continue_from(record.journal.clone()).spans(record.clock.tsc_khz),
            zero: None,
            last_words: None,
        }
    }

    /// The function on which the service address will be, if any.
    pub fn service_function(&self) -> Option<(sysfs::Bdf, [u8; 6])> {
        self.record
            .network
            .functions
            .iter()
            .find(|f| f.role == Role::Service)
            .and_then(|f| Some((u16::from(f.bus) << 8 | u16::from(f.devfn), f.mac?)))
    }

    /// The service address, if any.
    pub fn service_address(&self) -> Option<crate::daemon::config::Cidr> {
        let net = self.record.network.service?;
        match IpAddr::from(net.address) {
            IpAddr::V4(address) => Some(crate::daemon::config::Cidr { address, prefix: net.prefix }),
            IpAddr::V6(_) => None,
        }
    }
}

/// The record, believed.
fn read_record(control: &Mapping, base: u64) -> Result<HandoverRecord> {
    let mut frame = vec![0; usize::try_from(control_block::HANDOVER.size)?];
    control.read(control_block::HANDOVER.offset, &mut frame);
    let received = HandoverRecord::from_frame(&frame).context("the handover record cannot be read")?;
    let region = region_around(base, received.alleged().grant.region)?;
    received.check(&region).context("the handover record is not credible")
}

/// The incumbent need not wait until its patience ends: the channel needs nothing of the record.
fn tell(device: &Device, control: Arc<Mapping>, base: u64, error: &anyhow::Error) {
    let word = ToIncumbent::Failed { what: "take over".into(), cause: format!("{error:#}").into() };
    let told = Line::<Successor>::attach(device, control, base).and_then(|mut line| line.send(&word));
    if let Err(untold) = told {
        tracing::error!("cannot even say so to the incumbent: {untold:#}");
    }
}

/// This kernel's own region as the record alleges it, once it is seen to begin with our control block and to be RAM of
/// this kernel from there on. (Its end cannot be seen: a fragment may touch it.)
fn region_around(base: u64, alleged: PhysRange) -> Result<PhysRange> {
    let region = Range::with_len(base, alleged.len).context("the region passes the end of memory")?;
    if region.len() <= control_block::SIZE {
        bail!("a region of {:#x} bytes at {base:#x} has no room behind its control block", region.len());
    }
    let rest = Range::new(base + control_block::SIZE, region.end());
    if !crate::machine::facts::managed_memory()?.contains(rest) {
        bail!("the record says that {rest} is this kernel's region, but not all of it is RAM here");
    }
    Ok(phys(region))
}
