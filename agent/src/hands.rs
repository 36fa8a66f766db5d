//! The incumbent's hands: each effect of an update, and its undo, as one small function. What is decided is decided
//! elsewhere ([`crate::plan`], [`crate::upgrade`]); what is held is held here, so that an undo always knows what there is
//! to undo, and does nothing where there is nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kexec_core::cpus::{CpuFacts, Move, ParkedCpus};
use kexec_core::device::{Access, Device, DeviceError, GiveCpu, InfoFlags, Mapping, TakeCpu, TakeMemory, Yield};
use kexec_core::image::BzImage;
use kexec_core::layout::{LowSlot, PAGE, SIPI_PAGE};
use kexec_core::memory_map::division::Division;
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates};
use kexec_core::placement::{Placement, PlacementRequest};
use kexec_core::registry::State;
use kexec_core::trampoline::{SipiArgs, YieldArgs, sipi_page, yield_command};
use state_schemas::Payload;
use state_schemas::control_block::{self, Piece, words};
use state_schemas::latest::handover_record as record;
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::SharedMemory;
use zerocopy::IntoBytes;

use crate::birth::phys;
use crate::facts::managed_memory;
use crate::kernel::{Kernel, Order};
use crate::line::{Incumbent, Line};
use crate::plan::Plan;
use crate::sysfs;
use crate::timeline::{Timeline, tsc};

/// How long a CPU may take to reach the park page, once it was sent there.
const PARK_PATIENCE: Duration = Duration::from_secs(10);
/// How far apart the places are that are tried for the cap.
const CAP_STEP: u64 = 256 << 10;

/// A successor's memory, from its taking to its giving back.
struct Site {
    instance: u32,
    region: Range,
    low_slot: LowSlot,
    division: Division,
    /// Pages below 1 MiB that are written: the SIPI page, and the slot's first.
    low: Vec<(Range, Mapping)>,
}

/// What the successor's CPUs need to know, once it is placed.
struct Placed {
    boot: SipiArgs,
    park: SipiArgs,
    root: u64,
    line: Line<Incumbent>,
}

/// The hands.
pub struct Hands<'k> {
    kernel: &'k Kernel,
    device: &'k Device,
    plan: &'k Plan,
    /// When each step was made.
    pub timeline: Timeline,
    id: record::UpdateId,
    site: Option<Site>,
    placed: Option<Placed>,
    spare_taken: bool,
    started: bool,
    unbound: Option<sysfs::Unbound>,
    frozen: bool,
    address_released: bool,
    /// CPUs that the successor has, by APIC id.
    moved: Vec<u32>,
}

impl<'k> Hands<'k> {
    /// Holding nothing yet.
    pub fn new(kernel: &'k Kernel, plan: &'k Plan, id: record::UpdateId) -> Result<Hands<'k>> {
        Ok(Hands {
            kernel,
            device: kernel.device()?,
            plan,
            timeline: Timeline::default(),
            id,
            site: None,
            placed: None,
            spare_taken: false,
            started: false,
            unbound: None,
            frozen: false,
            address_released: false,
            moved: Vec::new(),
        })
    }

    fn site(&self) -> Result<&Site> {
        self.site.as_ref().context("the successor has no memory yet")
    }

    fn placed(&mut self) -> Result<&mut Placed> {
        self.placed.as_mut().context("the successor is not placed yet")
    }

    fn epoch(&self) -> u64 {
        self.plan.facts.epoch
    }

    // ---- granted ----------------------------------------------------------------------------------------------

    /// Takes the successor's memory: a range reserved at boot if there is one, else out of the allocator.
    pub fn take_memory(&mut self) -> Result<()> {
        let instance = self.device.create_instance("successor", &self.plan.release, State::Created)?;
        let taken = self.take_region(instance).and_then(|region| {
            let division = self.divide(instance, region)?;
            let mut low = Vec::new();
            let low_slot = self.free_slot()?;
            for page in [Range::new(SIPI_PAGE, SIPI_PAGE + PAGE), low_slot.root_page()] {
                low.push((page, self.take_low_page(instance, page)?));
            }
            Ok(Site { instance, region, low_slot, division, low })
        });
        match taken {
            Ok(site) => {
                tracing::info!(region = %site.region, "memory for the successor");
                self.site = Some(site);
                Ok(())
            }
            Err(error) => {
                self.device.destroy_instance(instance)?;
                Err(error)
            }
        }
    }

    /// The undo of [`Hands::take_memory`] and [`Hands::place`].
    pub fn give_back_memory(&mut self) -> Result<()> {
        // Mappings first: the module gives back nothing that is in use.
        self.placed = None;
        let Some(mut site) = self.site.take() else { return Ok(()) };
        site.low.clear();
        self.device.destroy_instance(site.instance).context("cannot give the successor's memory back")
    }

    fn take_region(&self, instance: u32) -> Result<Range> {
        let (len, grain) = (self.plan.region_len, self.plan.block_size);
        let avoid = self.not_for_a_region();
        let reserved_at_boot = self.plan.facts.ram.subtract(&managed_memory()?);
        let wish = Wish { size: len, grain, below: None };
        if let Some(range) = candidates(&reserved_at_boot, &avoid, &wish)?.next() {
            self.device.take_memory(instance, range, TakeMemory::Outside)?;
            return Ok(range);
        }
        self.kernel.take_contiguous(instance, len, grain, &avoid, Order::HighestFirst)
    }

    /// Which memory reaches the successor by which road; takes the cap if one is needed.
    fn divide(&self, instance: u32, region: Range) -> Result<Division> {
        let arenas: RangeSet = self.arenas().collect();
        let division = Division::new(&self.plan.facts.ram, region, &arenas, self.plan.block_size)?;
        let Some(room) = division.room_for_cap() else { return Ok(division) };
        for place in room.iter().rev() {
            let mut end = place.end();
            while end > place.start() {
                let page = Range::new(end - PAGE, end);
                match self.device.take_memory(instance, page, TakeMemory::Alloc) {
                    Ok(()) => return Ok(division.with_cap(page)),
                    // In use, or none of this kernel's: a little lower.
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
        own.chain(self.arenas()).chain([Range::new(0, kexec_core::layout::LOW_MEMORY_END)]).collect()
    }

    fn arenas(&self) -> impl Iterator<Item = Range> + use<> {
        self.kernel.services.crossings().into_iter().map(|crossing| crossing.range)
    }

    fn free_slot(&self) -> Result<LowSlot> {
        let own = self.kernel.birth.as_ref().map(|birth| birth.record.grant.low_slot.start);
        LowSlot::all()
            .find(|slot| own.is_none_or(|own| !slot.range().contains(Range::new(own, own + 1))))
            .context("no slot below 1 MiB is free")
    }

    /// Below 1 MiB Linux reserves everything: RAM of this kernel is borrowed, other memory just taken.
    fn take_low_page(&self, instance: u32, page: Range) -> Result<Mapping> {
        let how = if managed_memory()?.contains(page) { TakeMemory::Borrow } else { TakeMemory::Outside };
        self.device.take_memory(instance, page, how)?;
        Ok(self.device.map(page, Access::ReadWrite)?)
    }

    /// Takes the interface that the successor gets off this kernel's driver.
    pub fn release_nic(&mut self) -> Result<()> {
        let Some(granted) = &self.plan.nic else { return Ok(()) };
        if let Some(link) = self.kernel.netlink.find(granted.mac)? {
            let (_, folder) = sysfs::pci_function_of(&link.name)?;
            self.unbound = sysfs::unbind(&folder)?;
        }
        Ok(())
    }

    /// The undo of [`Hands::release_nic`].
    pub fn take_nic_back(&mut self) -> Result<()> {
        let (Some(unbound), Some(granted)) = (self.unbound.take(), &self.plan.nic) else { return Ok(()) };
        unbound.bind()?;
        let link = self.kernel.netlink.find(granted.mac)?.context("the interface did not come back")?;
        self.kernel.netlink.link_up(&link)?;
        self.kernel.netlink.add(&link, granted.nic.address)
    }

    /// Takes the spare CPU offline.
    pub fn offline_spare(&mut self) -> Result<()> {
        let spare = self.plan.spare;
        if spare.online {
            sysfs::offline_cpu(spare.cpu).with_context(|| format!("{spare} cannot be taken offline"))?;
        }
        self.spare_taken = true;
        Ok(())
    }

    /// After a fence: a kernel that was itself a successor onlines its CPUs through its mailbox, and waits there without
    /// limit. So what was fenced goes back to this kernel's own park page first.
    fn park_here(&self, apic_id: u32) -> Result<()> {
        let (Some(birth), Some(site)) = (&self.kernel.birth, &self.site) else { return Ok(()) };
        let own = ParkedCpus::new(&*birth.control, control_block::MAILBOX.offset);
        let slot = LowSlot::holding(birth.record.grant.low_slot.start).context("this kernel has no low slot")?;
        let args = SipiArgs {
            cr3: slot.root_page().start(),
            entry: birth.base + control_block::PARK_PAGE.offset,
            arg: 0,
            stack: birth.base + control_block::STACK.end(),
        };
        site.low[0].1.write(0, &sipi_page(&args));
        self.device.give_cpu(site.instance, apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
        let deadline = Instant::now() + PARK_PATIENCE;
        let mut arrived = true;
        while arrived && !own.is_parked(apic_id) {
            arrived = pause(deadline);
        }
        self.device.take_cpu(site.instance, apic_id, TakeCpu::Record)?;
        if !arrived {
            bail!("CPU with APIC id {apic_id} did not come back to this kernel's park page in {PARK_PATIENCE:?}");
        }
        Ok(())
    }

    /// The undo of [`Hands::offline_spare`].
    pub fn online_spare(&mut self) -> Result<()> {
        if std::mem::take(&mut self.spare_taken) && self.plan.spare.online {
            sysfs::online_cpu(self.plan.spare.cpu)?;
        }
        Ok(())
    }

    // ---- booting ----------------------------------------------------------------------------------------------

    /// Writes kernel, initrd, firmware and handover record into the region.
    pub fn place(&mut self) -> Result<()> {
        let site = self.site()?;
        let facts = &self.plan.facts;
        let info = self.device.info()?;
        let image = BzImage::parse(&self.plan.image)?;
        let division = &site.division;
        let others: Vec<u32> = self.plan.moves.iter().map(|(cpu, _)| cpu.apic_id).collect();
        let placement = Placement::new(&PlacementRequest {
            image: &image,
            initrd: &self.plan.initrd,
            cmdline: &self.plan.cmdline,
            region: site.region,
            low_slot: site.low_slot,
            boot_cpu: self.plan.spare.apic_id,
            other_cpus: &others,
            phantom: None,
            reserved_ram: division.reserved_in_successor(),
            cap: division.cap,
            identity: facts.ram.clone(),
            gigabyte_pages: raw_cpuid::CpuId::new()
                .get_extended_processor_and_feature_identifiers()
                .is_some_and(|features| features.has_1gib_pages()),
            tsc_khz: info.tsc_khz,
            extra_setup_data: Vec::new(),
        })?;
        self.write(site, &placement)?;
        let control = self.device.map(placement.control_block, Access::ReadWrite)?;
        let frame = self.record(site, info.tsc_khz).to_frame(record::HandoverRecord::VERSION)?;
        if frame.len() as u64 > control_block::HANDOVER.size {
            bail!("the handover record has {} bytes, {} fit", frame.len(), control_block::HANDOVER.size);
        }
        control.write(control_block::HANDOVER.offset, &frame);
        control.store(words::EPOCH_AT, self.epoch());
        let line = Line::open(control, placement.control_block.start())?;
        let root = if info.flags.contains(InfoFlags::LA57) { placement.root_5level } else { placement.root_4level };
        self.device.update_instance(site.instance, State::Loaded, None)?;
        self.placed = Some(Placed { boot: placement.boot, park: placement.park, root, line });
        Ok(())
    }

    fn write(&self, site: &Site, placement: &Placement<'_>) -> Result<()> {
        let region = self.device.map(site.region, Access::ReadWrite)?;
        // What lies there is zero when it comes from the allocator, and anything when it was reserved at boot.
        region.write(0, &vec![0; usize::try_from(control_block::SIZE)?]);
        for segment in &placement.segments {
            let at = segment.range();
            if site.region.contains(at) {
                region.write(at.start() - site.region.start(), &segment.bytes);
            } else {
                let (page, mapping) = site
                    .low
                    .iter()
                    .find(|(page, _)| page.contains(at))
                    .with_context(|| format!("{} at {at} is outside of what was taken", segment.what))?;
                mapping.write(at.start() - page.start(), &segment.bytes);
            }
        }
        Ok(())
    }

    /// What the successor's agent must know.
    fn record(&self, site: &Site, tsc_khz: u32) -> record::HandoverRecord {
        let division = &site.division;
        let facts = &self.plan.facts;
        let crossings = self.kernel.services.crossings();
        let all = |set: &RangeSet| set.iter().map(phys).collect::<Vec<_>>();
        let boot_cpus = self.plan.moves.iter().map(|(cpu, _)| cpu).chain([&self.plan.spare]);
        let numbered = || crossings.iter().zip(1u32..);
        record::HandoverRecord {
            update: self.id,
            hop: facts.hops + 1,
            epoch: self.epoch(),
            incumbent: record::Program {
                release: self.kernel.release().to_owned(),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            clock: record::ClockPair { tsc: tsc(), unix_ns: unix_ns(), tsc_khz: tsc_khz.into() },
            machine: record::Machine {
                ram: all(&facts.ram),
                memory_block: division.block_size,
                cpus: boot_cpus
                    .map(|cpu| record::Cpu { apic_id: cpu.apic_id, firmware_boot: cpu.firmware_bsp })
                    .collect(),
            },
            grant: record::Grant {
                instance: site.instance,
                boot_cpu: self.plan.spare.apic_id,
                region: phys(site.region),
                low_slot: phys(site.low_slot.range()),
                fragments: all(&division.reserved_in_successor()),
                blocks: division.blocks.iter().map(phys).collect(),
            },
            arenas: numbered()
                .map(|(crossing, id)| record::Arena {
                    id,
                    name: crossing.name.clone(),
                    ranges: vec![phys(crossing.range)],
                    len: crossing.range.len(),
                })
                .collect(),
            services: numbered()
                .map(|(crossing, arena)| record::Service {
                    name: crossing.name.clone(),
                    schema_kind: crossing.schema_kind,
                    schema_version: crossing.schema_version,
                    arena,
                    port: 0,
                })
                .collect(),
            network: self.network_record(),
            ecam: facts.ecam.map(|ecam| record::Ecam { address: ecam.base, segment: 0, bus_end: ecam.bus_end }),
            retired: Vec::new(),
            journal: self.timeline.marks().to_vec(),
        }
    }

    fn network_record(&self) -> record::Network {
        let net = |cidr: crate::config::Cidr| record::IpNet {
            address: std::net::IpAddr::V4(cidr.address).into(),
            prefix: cidr.prefix,
        };
        let granted = self.plan.nic.as_ref();
        record::Network {
            service: granted.and(self.kernel.config.network.service_address).map(net),
            gateway: None,
            management: granted.map(|granted| net(granted.nic.address)),
            functions: self
                .plan
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

    /// Starts the spare CPU in the successor's kernel.
    pub fn start(&mut self) -> Result<()> {
        let apic_id = self.plan.spare.apic_id;
        let boot = self.placed()?.boot;
        let site = self.site()?;
        site.low[0].1.write(0, &sipi_page(&boot));
        self.device.give_cpu(site.instance, apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
        self.forget_parked(apic_id);
        self.started = true;
        let instance = self.site()?.instance;
        self.device.update_instance(instance, State::Booting, None)?;
        Ok(())
    }

    /// The undo of [`Hands::start`] and of every CPU moved: nothing runs in the successor any more.
    pub fn fence(&mut self) -> Result<()> {
        let Some(site) = &self.site else { return Ok(()) };
        let mut first_error = Ok(());
        let started = std::mem::take(&mut self.started).then_some(self.plan.spare.apic_id);
        for apic_id in started.into_iter().chain(std::mem::take(&mut self.moved)) {
            let fenced = self.device.take_cpu(site.instance, apic_id, TakeCpu::Fence);
            let parked = fenced.map_err(anyhow::Error::from).and_then(|()| self.park_here(apic_id));
            first_error = first_error.and(parked);
        }
        first_error.context("cannot stop the successor")
    }

    /// A CPU that INIT took out of this kernel's own park page waits there no longer.
    fn forget_parked(&self, apic_id: u32) {
        if let Some(birth) = &self.kernel.birth {
            ParkedCpus::new(&*birth.control, control_block::MAILBOX.offset).forget(apic_id);
        }
    }

    /// Waits for the successor's agent.
    pub fn await_hello(&mut self) -> Result<()> {
        let patience = Duration::from_secs(self.kernel.config.update.boot_timeout_s);
        let line = &mut self.placed()?.line;
        match line.receive(patience).context("the successor's agent has not answered")? {
            ToIncumbent::Hello { program, .. } => {
                tracing::info!(release = program.release, "the successor's agent answers");
                let instance = self.site()?.instance;
                self.device.update_instance(instance, State::Running, None)?;
                Ok(())
            }
            other => bail!("the successor began with {other:?}"),
        }
    }

    // ---- trial ------------------------------------------------------------------------------------------------

    fn ask<T>(
        &mut self,
        message: &ToSuccessor,
        patience: Duration,
        answer: impl Fn(ToIncumbent) -> Option<T>,
    ) -> Result<T> {
        self.placed()?.line.ask(message, patience, answer)
    }

    fn step_patience(&self) -> Duration {
        Duration::from_secs(self.kernel.config.update.step_timeout_s)
    }

    /// Lets the successor's services attach and wait.
    pub fn stand_by(&mut self) -> Result<()> {
        let expected: Vec<String> = self.kernel.services.crossings().into_iter().map(|c| c.name).collect();
        let standing = self.ask(&ToSuccessor::StandBy, self.step_patience(), |answer| match answer {
            ToIncumbent::Standing { services } => Some(services),
            _ => None,
        })?;
        if let Some(missing) = expected.iter().find(|name| !standing.contains(name)) {
            bail!("service {missing} does not stand by in the successor (standing: {})", standing.join(", "));
        }
        Ok(())
    }

    /// Asks the successor how it is.
    pub fn check_health(&mut self) -> Result<()> {
        self.ask(&ToSuccessor::CheckHealth, self.step_patience(), |answer| {
            matches!(answer, ToIncumbent::Healthy).then_some(())
        })
    }

    // ---- cutover: between freeze and activate nobody serves ------------------------------------------------------

    fn cutover_patience(&self) -> Duration {
        Duration::from_millis(self.kernel.config.update.cutover_timeout_ms)
    }

    /// Stops the services at a request boundary, and seals their arenas.
    pub fn freeze(&mut self) -> Result<()> {
        self.frozen = true;
        self.kernel.services.freeze(self.epoch(), self.cutover_patience())?;
        Ok(())
    }

    /// The undo of [`Hands::freeze`]: an epoch later, so that no late word of the successor counts.
    pub fn unfreeze(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.frozen) {
            return Ok(());
        }
        let epoch = self.epoch() + 2;
        self.kernel.services.unfreeze(epoch, self.cutover_patience())?;
        self.kernel.state().facts.epoch = epoch;
        Ok(())
    }

    /// Takes the service address off this kernel's interface.
    pub fn release_address(&mut self) -> Result<()> {
        let Some(cidr) = self.kernel.config.network.service_address else { return Ok(()) };
        self.address_released = true;
        self.kernel.netlink.withdraw(cidr)
    }

    /// The undo of [`Hands::release_address`].
    pub fn take_address_back(&mut self) -> Result<()> {
        let Some(cidr) = self.kernel.config.network.service_address else { return Ok(()) };
        if !std::mem::take(&mut self.address_released) {
            return Ok(());
        }
        self.kernel.netlink.restore(cidr)
    }

    /// Gives the epoch to the successor, and waits until its services answer.
    pub fn activate(&mut self) -> Result<()> {
        let epoch = self.epoch() + 1;
        let patience = self.cutover_patience();
        self.placed()?.line.memory().store(words::EPOCH_AT, epoch);
        self.ask(&ToSuccessor::Activate { epoch }, patience, |answer| match answer {
            ToIncumbent::Activated { epoch: reached, .. } if reached == epoch => Some(()),
            _ => None,
        })?;
        let instance = self.site()?.instance;
        self.device.update_instance(instance, State::Serving, None)?;
        Ok(())
    }

    // ---- probation: CPUs follow one by one ------------------------------------------------------------------------

    /// Moves one CPU: offline here, parked there, online there.
    pub fn move_cpu(&mut self, cpu: CpuFacts, how: Move) -> Result<()> {
        if cpu.online {
            sysfs::offline_cpu(cpu.cpu).with_context(|| format!("{cpu} cannot be taken offline"))?;
        }
        self.send_to_park(cpu, how)?;
        self.moved.push(cpu.apic_id);
        let apic_id = cpu.apic_id;
        self.ask(&ToSuccessor::CpuParked { apic_id }, self.step_patience(), |answer| match answer {
            ToIncumbent::CpuOnline { apic_id: online, .. } if online == apic_id => Some(()),
            _ => None,
        })
    }

    /// Sends an offline CPU to the successor's park page: from our own park page if it waits there, else by SIPI.
    fn send_to_park(&mut self, cpu: CpuFacts, how: Move) -> Result<()> {
        let park = self.placed()?.park;
        let site = self.site()?;
        let own = self.kernel.birth.as_ref().map(|b| ParkedCpus::new(&*b.control, control_block::MAILBOX.offset));
        match own {
            Some(own) if own.is_parked(cpu.apic_id) => {
                self.device.give_cpu(site.instance, cpu.apic_id, GiveCpu::Record)?;
                let deadline = Instant::now() + PARK_PATIENCE;
                own.wake(cpu.apic_id, park.entry, || pause(deadline))?;
            }
            _ if how == Move::MailboxOnly => {
                bail!("{cpu} booted the machine and waits at no mailbox: it cannot be moved")
            }
            _ => {
                site.low[0].1.write(0, &sipi_page(&park));
                self.device.give_cpu(site.instance, cpu.apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
            }
        }
        let deadline = Instant::now() + PARK_PATIENCE;
        let control = self.placed()?.line.memory();
        let parked = ParkedCpus::new(control, control_block::MAILBOX.offset);
        while !parked.is_parked(cpu.apic_id) {
            if !pause(deadline) {
                bail!("{cpu} was sent to the park page and has not arrived after {PARK_PATIENCE:?}");
            }
        }
        Ok(())
    }

    // ---- commit ---------------------------------------------------------------------------------------------------

    /// Passes the point of no return.
    pub fn commit(&mut self) -> Result<()> {
        let timeline = self.timeline.marks().to_vec();
        self.ask(&ToSuccessor::Commit { timeline }, self.step_patience(), |answer| {
            matches!(answer, ToIncumbent::Committed).then_some(())
        })
    }

    /// Stops everything in this kernel that could still write memory by itself.
    pub fn quiesce(&mut self) -> Result<()> {
        self.kernel.services.stop();
        nix::unistd::sync();
        let granted: Vec<_> = self.plan.nic.iter().map(|granted| granted.bdf).collect();
        let stopped = sysfs::quiesce_pci(&granted)?;
        tracing::info!("quiesced: {}", stopped.join(" "));
        Ok(())
    }

    /// Hands over the last CPU, and with it the machine. Comes back only if it could not leave.
    pub fn leave(&mut self) -> Result<()> {
        let (last, _) = self.plan.moves.last().context("there is no last CPU")?;
        let base = self.site()?.region.start();
        let at = |piece: Piece| base + piece.offset;
        let root = self.placed()?.root;
        let mut arguments = YieldArgs::new(at(control_block::PARK_PAGE));
        arguments.command = yield_command::PARK;
        let line = &mut self.placed()?.line;
        line.memory().write(control_block::YIELD_ARGS.offset, arguments.as_bytes());
        line.send(&ToSuccessor::LastCpu { apic_id: last.apic_id })?;
        self.device.yield_last_cpu(Yield {
            entry: at(control_block::YIELD_PAGE),
            arg: at(control_block::YIELD_ARGS),
            table: at(control_block::TRANSITION_TABLE),
            identity: root,
        })?;
        bail!("the last CPU came back")
    }
}

/// Looks away for a moment; says whether there is time left. What is waited for is a word that another CPU writes, with
/// no interrupt to announce it.
fn pause(deadline: Instant) -> bool {
    std::thread::sleep(Duration::from_micros(50));
    Instant::now() < deadline
}

fn unix_ns() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
