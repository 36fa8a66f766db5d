//! What the successor is placed in: its memory is taken and divided, its kernel and the handover record are written into
//! it, and all of it is given back where the update ends early.

use anyhow::{Context, Result, bail};
use kexec_core::device::{Access, DeviceError, InfoFlags, Mapping, TakeMemory};
use kexec_core::image::BzImage;
use kexec_core::layout::{LOW_MEMORY_END, LowSlot, PAGE, SIPI_PAGE};
use kexec_core::memory_map::division::Division;
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates};
use kexec_core::placement::{Mapped, Placement, PlacementRequest};
use kexec_core::registry::State;
use state_schemas::Payload;
use state_schemas::control_block::{self, words};
use state_schemas::latest::handover_record as record;
use state_schemas::shared::SharedMemory;

use super::{Hands, Placed};
use crate::daemon::config::Cidr;
use crate::daemon::outcome::Failure;
use crate::daemon::successor_log::Instance;
use crate::machine::clock::Moment;
use crate::machine::cpuid::gigabyte_pages;
use crate::machine::facts::{affinity, firmware_platform};
use crate::services::files::Numbered;
use crate::takeover::birth::phys;
use crate::update::kho::{self, HandedOver, Spoken};
use crate::update::line::Line;

/// How far apart the places are that are tried for the cap.
const CAP_STEP: u64 = 256 << 10;

/// A successor's memory, from its taking to its giving back.
pub(super) struct Site {
    pub(super) instance: u32,
    pub(super) region: Range,
    /// Only who places it has to know.
    pub(super) low_slot: Option<LowSlot>,
    /// Which memory reaches it by which road. Only who places it has to know.
    pub(super) division: Option<Division>,
    /// Pages below 1 MiB that are written: the SIPI page, and the slot's first. (The whole slot is taken.)
    pub(super) low: Vec<(Range, Mapping)>,
}

impl Site {
    fn division(&self) -> Result<&Division> {
        self.division.as_ref().context("the successor's memory is divided already")
    }

    pub(super) fn low_slot(&self) -> Result<LowSlot> {
        self.low_slot.context("which slot below 1 MiB it has is not known")
    }

    /// The page at which CPUs start.
    pub(super) fn sipi(&self) -> Result<&Mapping> {
        Ok(&self.low.first().context("it does not have the page at which CPUs start")?.1)
    }
}

/// Nothing is touched yet: who is told so may ask again.
fn not_now(error: anyhow::Error) -> anyhow::Error {
    Failure::precondition(format!("{error:#}"), "wait until every service serves (`baton status`), and ask again")
        .into()
}

impl Hands<'_> {
    /// Takes the successor's memory: a range reserved at boot if there is one, else out of the allocator.
    pub(super) fn take_memory(&mut self) -> Result<()> {
        let instance = self.device.create_instance("successor", &self.target.release, State::Created)?;
        // From here on no arena comes or goes: what is divided now is what the successor is told of.
        let listed = self.kernel.services.list(self.kernel).map_err(not_now).map(|listed| self.listed = listed);
        let settled = listed.and_then(|()| self.kernel.files.close(self.device, &self.kernel.services.ranges()));
        let taken = settled.and_then(|_| self.take_region(instance)).and_then(|region| {
            let division = Some(self.divide(instance, region)?);
            let sipi = Range::new(SIPI_PAGE, SIPI_PAGE + PAGE);
            self.take_low(instance, sipi).context("the page where CPUs start is not free")?;
            let low_slot = self.take_slot(instance)?;
            let mut low = Vec::new();
            for page in [sipi, low_slot.root_page()] {
                low.push((page, self.device.map(page, Access::ReadWrite)?));
            }
            Ok(Site { instance, region, low_slot: Some(low_slot), division, low })
        });
        match taken {
            Ok(site) => {
                tracing::info!(region = %site.region, "memory for the successor");
                self.site = Some(site);
                Ok(())
            }
            Err(error) => {
                self.kernel.files.open();
                let Err(kept) = self.device.destroy_instance(instance) else { return Err(error) };
                self.undestroyed = Some(instance);
                Err(error.context(format!("and what had been taken cannot be given back: {kept}")))
            }
        }
    }

    /// The undo of [`Hands::take_memory`].
    pub(super) fn give_back_memory(&mut self) -> Result<()> {
        self.kernel.files.open();
        // Mappings first: the module gives back nothing that is in use.
        self.kernel.successor_log.close();
        if let Some(site) = &mut self.site {
            site.low.clear();
        }
        let instances = self.site.iter().map(|site| site.instance).chain(self.undestroyed);
        for instance in instances {
            self.device.destroy_instance(instance).context("cannot give the successor's memory back")?;
        }
        (self.site, self.undestroyed) = (None, None);
        Ok(())
    }

    fn take_region(&self, instance: u32) -> Result<Range> {
        let (len, grain) = (self.plan()?.region_len, self.plan()?.block_size);
        let avoid = self.not_for_a_region();
        // What the operator has named only: other memory that this kernel does not manage is somebody else's.
        let set_aside = self
            .kernel
            .hardware
            .memory_set_aside(&self.kernel.config.update.reserved())?
            .intersect(&self.target.facts.ram);
        let wish = Wish { size: len, grain };
        if let Some(range) = candidates(&set_aside, &avoid, &wish)?.next() {
            self.device.take_memory(instance, range, TakeMemory::Outside)?;
            return Ok(range);
        }
        // A successor is told of the memory that the firmware listed; what was hot-added since cannot be its region.
        let avoid = avoid.union(&self.kernel.hardware.managed_memory()?.subtract(&self.target.facts.ram));
        self.kernel.take_contiguous(instance, len, grain, &avoid)
    }

    /// Which memory reaches the successor by which road; takes the cap if one is needed.
    fn divide(&self, instance: u32, region: Range) -> Result<Division> {
        let arenas: RangeSet = self.arenas().collect();
        let hypervisor = runs_under_hypervisor();
        let ram = &self.target.facts.ram;
        let division = Division::for_successor(ram, region, &arenas, self.plan()?.block_size, hypervisor)?;
        let Some(room) = division.room_for_cap() else { return Ok(division) };
        for place in room.iter().rev() {
            let mut end = place.end();
            while end > place.start() {
                let page = Range::new(end - PAGE, end);
                if !division.allows_cap(page, hypervisor) {
                    end = end.saturating_sub(CAP_STEP);
                    continue;
                }
                match self.device.take_memory(instance, page, TakeMemory::Alloc) {
                    Ok(()) => return Ok(division.with_cap(page)),
                    // The page is in use, or is no memory of this kernel's: try a little lower.
                    Err(DeviceError::Busy { .. } | DeviceError::Exists { .. } | DeviceError::Refused { .. }) => {
                        end = end.saturating_sub(CAP_STEP);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        bail!("no page above {region} can be freed for the successor's end of memory (tried in {room})")
    }

    /// What this kernel's own firmware lies in, and the arenas.
    fn not_for_a_region(&self) -> RangeSet {
        let own = self.kernel.birth.iter().map(|birth| Range::new(birth.base, birth.base + control_block::SIZE));
        own.chain(self.arenas()).chain([Range::new(0, LOW_MEMORY_END)]).collect()
    }

    fn arenas(&self) -> impl Iterator<Item = Range> + use<> {
        let files: Vec<Range> = self.kernel.files.ranges().iter().collect();
        let arenas: Vec<Range> = self.listed.iter().flat_map(|crossing| crossing.ranges.clone()).collect();
        arenas.into_iter().chain(files)
    }

    /// A whole slot, every page of it: the successor's kernel gets it as RAM.
    fn take_slot(&self, instance: u32) -> Result<LowSlot> {
        let own = self.kernel.birth.as_ref().map(|birth| birth.record.grant.low_slot.start);
        let mut refused = Vec::new();
        for slot in LowSlot::free_in(&self.target.facts.ram, own) {
            match self.take_low(instance, slot.range()) {
                Ok(()) => return Ok(slot),
                Err(error) => refused.push(format!("{error:#}")),
            }
        }
        bail!(
            "no slot below 1 MiB is free: firmware, `memmap=` or another kernel has a page of each [{}]",
            refused.join("; ")
        )
    }

    /// Below 1 MiB Linux reserves everything: RAM of this kernel is borrowed; what it has never seen, a successor that knows of no
    /// low memory but its own, is just taken, if the machine says that it is RAM.
    fn take_low(&self, instance: u32, range: Range) -> Result<()> {
        let how = if self.kernel.hardware.managed_memory()?.contains(range) {
            TakeMemory::Borrow
        } else {
            TakeMemory::Outside
        };
        if !self.target.facts.ram.contains(range) {
            bail!("{range} is not, or not wholly, RAM that may be used: firmware or `memmap=` keeps it");
        }
        Ok(self.device.take_memory(instance, range, how)?)
    }

    /// Writes kernel, initrd, firmware and handover record into the region.
    pub(super) fn place(&mut self) -> Result<()> {
        let site = self.site()?;
        let plan = self.plan()?;
        let facts = &self.target.facts;
        let info = self.device.info()?;
        let tsc_khz = Moment::raw()?.khz_since(self.began, info.tsc_khz);
        let image = BzImage::parse(&plan.image)?;
        let division = site.division()?;
        // First, since printk cuts long lines: see `Hands::mark`.
        let cmdline = format!("{} {}", self.mark(), plan.cmdline);
        let others: Vec<u32> = plan.moves.iter().map(|(cpu, _)| cpu.apic_id).collect();
        let first = 1 + self.listed.len() as u32;
        let kept = Numbered { files: self.kernel.files.crossings()?, first, luo: self.takes_sessions() };
        let mut record = self.record(site, tsc_khz, &kept)?;
        let platform = match facts.platform {
            Some(platform) => platform,
            None => firmware_platform(self.device)?,
        };
        // An older agent over there has no words for it: its kernel can power off, the next one cannot.
        record.carry(Some(&platform).filter(|_| plan.record_version >= 2))?;
        let spoken = plan.kho;
        let handover = spoken.map(|spoken| self.hand_over(spoken, site, &image, &mut record, &kept)).transpose()?;
        let nodes = affinity();
        let placement = Placement::new(&PlacementRequest {
            image: &image,
            initrd: &plan.initrd,
            cmdline: cmdline.trim_end(),
            region: site.region,
            low_slot: site.low_slot()?,
            boot_cpu: plan.spare.apic_id,
            other_cpus: &others,
            phantom: None,
            reserved_ram: division.reserved_in_successor(),
            cap: division.cap,
            identity: facts.ram.clone(),
            gigabyte_pages: gigabyte_pages(),
            tsc_khz,
            platform,
            affinity: &nodes,
            kho: handover.as_ref().map(|handed| handed.setup_data.clone()),
        })?;
        // What was read of this memory until now was another kernel's.
        self.kernel.successor_log.open(Instance {
            id: site.instance,
            release: self.target.release.clone(),
            mark: self.mark(),
            region: site.region,
        });
        let region = self.device.map(site.region, Access::ReadWrite)?;
        let low = site.low.iter().map(|(page, mapping)| Mapped { range: *page, memory: mapping });
        placement.write(&low.chain([Mapped { range: site.region, memory: &region }]).collect::<Vec<_>>())?;
        for (at, bytes) in handover.iter().flat_map(|handed| handed.segments.iter()) {
            region.write(at - site.region.start(), bytes);
        }
        // Nothing is given back that is still mapped.
        drop(region);
        let control = self.device.map(placement.control_block, Access::ReadWrite)?;
        let frame = record.to_frame(plan.record_version)?;
        if frame.len() as u64 > control_block::HANDOVER.size {
            bail!("the handover record has {} bytes, {} fit", frame.len(), control_block::HANDOVER.size);
        }
        control.write(control_block::HANDOVER.offset, &frame);
        control.store(words::EPOCH_AT, self.epoch());
        let line = Line::open(self.device, control, placement.control_block.start(), site.instance)?;
        let root = if info.flags.contains(InfoFlags::LA57) { placement.root_5level } else { placement.root_4level };
        self.device.update_instance(site.instance, State::Loaded, None)?;
        self.placed = Some(Placed { boot: placement.boot, park: placement.park, root, line });
        Ok(())
    }

    /// The word of the successor's command line by which its log is told from that of a kernel that was in this memory before.
    pub(super) fn mark(&self) -> String {
        format!("baton.update={}", self.id)
    }

    /// What a kernel with KHO is told of the memory that it must keep, and where the record says that it is.
    fn hand_over(
        &self,
        spoken: Spoken,
        site: &Site,
        image: &BzImage<'_>,
        record: &mut record::HandoverRecord,
        kept: &Numbered,
    ) -> Result<HandedOver> {
        let known = site.region.len() + site.division()?.reserved_in_successor().total();
        let places = kho::Places::new(image, self.plan()?.initrd.len() as u64, site.region, known)?;
        let handed = kho::write(spoken, places, record, kept)?;
        // An older agent over there finds it by the kernel alone.
        record.kho = (self.plan()?.record_version >= 2).then(|| handed.places.clone());
        tracing::info!(abi = handed.places.abi, scratch = %places.scratch, "kexec handover for the successor");
        Ok(handed)
    }

    /// Whether the successor's kernel gives sessions back by itself.
    pub(super) fn takes_sessions(&self) -> bool {
        self.plan.is_some_and(|plan| plan.kho.is_some_and(|spoken| spoken.luo.is_some()))
    }

    /// The undo of [`Hands::place`]: nothing of it is in use any more, and whoever was stopped is back.
    pub(super) fn unplace(&mut self) -> Result<()> {
        self.placed = None;
        let stopped = self.stopped.clone();
        // All of them, whatever becomes of one.
        stopped.into_iter().map(|apic_id| self.bring_home(apic_id)).fold(Ok(()), Result::and)
    }

    /// What the successor's agent must know.
    fn record(&self, site: &Site, tsc_khz: u32, kept: &Numbered) -> Result<record::HandoverRecord> {
        let division = site.division()?;
        let now = Moment::now()?;
        let facts = &self.target.facts;
        let crossings = &self.listed;
        let all = |set: &RangeSet| set.iter().map(phys).collect::<Vec<_>>();
        let plan = self.plan()?;
        let boot_cpus = plan.moves.iter().map(|(cpu, _)| cpu).chain([&plan.spare]);
        let numbered = || crossings.iter().zip(1u32..);
        Ok(record::HandoverRecord {
            update: self.id,
            hop: facts.hops + 1,
            epoch: self.epoch(),
            incumbent: record::Program {
                release: self.kernel.release().to_owned(),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            clock: record::ClockPair { tsc: now.tsc, unix_ns: now.unix_ns, tsc_khz: tsc_khz.into() },
            machine: record::Machine {
                ram: all(&facts.ram),
                memory_block: division.block_size,
                cpus: boot_cpus
                    .map(|cpu| record::Cpu { apic_id: cpu.apic_id, firmware_boot: cpu.firmware_bsp })
                    .collect(),
            },
            grant: record::Grant {
                instance: site.instance,
                boot_cpu: plan.spare.apic_id,
                region: phys(site.region),
                low_slot: phys(site.low_slot()?.range()),
                fragments: all(&division.reserved_in_successor()),
                blocks: division.blocks.iter().map(phys).collect(),
            },
            arenas: numbered()
                .map(|(crossing, id)| record::Arena {
                    id,
                    name: crossing.name.clone(),
                    ranges: crossing.ranges.iter().copied().map(phys).collect(),
                    len: crossing.ranges.iter().map(|range| range.len()).sum(),
                })
                .chain(kept.arenas())
                .collect(),
            services: numbered()
                .map(|(crossing, arena)| record::Service {
                    name: crossing.name.clone(),
                    schema_kind: crossing.schema_kind,
                    schema_version: crossing.schema_version,
                    arenas: vec![arena],
                    port: 0,
                })
                .collect(),
            files: kept.files().collect(),
            network: self.network_record(),
            ecam: facts.ecam.map(|ecam| record::Ecam { address: ecam.base, segment: 0, bus_end: ecam.bus_end }),
            retired: Vec::new(),
            journal: self.timeline.marks().to_vec(),
            kho: None,
            carried: self.kernel.birth.as_ref().map(|birth| birth.record.carried.clone()).unwrap_or_default(),
        })
    }

    fn network_record(&self) -> record::Network {
        let net =
            |cidr: Cidr| record::IpNet { address: std::net::IpAddr::V4(cidr.address).into(), prefix: cidr.prefix };
        let granted = self.target.nic.as_ref();
        record::Network {
            service: granted.and(self.kernel.config.network.service_address).map(net),
            gateway: None,
            management: granted.map(|granted| net(granted.nic.address)),
            functions: self
                .target
                .facts
                .nics
                .iter()
                .map(|(mac, bdf)| record::PciFunction {
                    bus: (bdf >> 8) as u8,
                    devfn: *bdf as u8,
                    role: if granted.is_some_and(|g| g.bdf == *bdf) {
                        record::Role::Service
                    } else {
                        record::Role::Other
                    },
                    mac: Some(*mac),
                })
                .collect(),
        }
    }
}

/// What Linux asks as well when it chooses its memory block size.
fn runs_under_hypervisor() -> bool {
    raw_cpuid::CpuId::new().get_feature_info().is_some_and(|features| features.has_hypervisor())
}
