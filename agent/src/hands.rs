//! The incumbent's hands: each effect of an update, and its undo, as one small function ([`Hands::do_it`] is the table).
//! What is decided is decided elsewhere ([`crate::plan`], `handover`); what is held is held here, so that an undo always
//! knows what there is to undo, and does nothing where there is nothing.
//!
//! Every wait ends at the deadline of the effect under way, which the state machine gives.

use std::collections::BTreeSet;
use std::mem::offset_of;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::error::{Blame, Cause, Sort};
use handover::machine::Event;
use handover::plan::Cpu;
use handover::undo::Effect;
use kexec_core::cpus::ParkedCpus;
use kexec_core::device::{Access, Device, DeviceError, GiveCpu, InfoFlags, Mapping, TakeCpu, TakeMemory, Yield};
use kexec_core::image::BzImage;
use kexec_core::layout::{LowSlot, PAGE, SIPI_PAGE};
use kexec_core::memory_map::division::Division;
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates};
use kexec_core::placement::{Mapped, Placement, PlacementRequest};
use kexec_core::registry::State;
use kexec_core::trampoline::{Epitaph, SipiArgs, SipiPage, YieldArgs, sipi_page, step, yield_command};
use state_schemas::Payload;
use state_schemas::control_block::words::BootMark;
use state_schemas::control_block::{self, Piece, words};
use state_schemas::latest::handover_record as record;
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::SharedMemory;
use zerocopy::IntoBytes;

use crate::birth::phys;
use crate::config::Cidr;
use crate::facts::managed_memory;
use crate::files::{CrossingFile, Numbered};
use crate::kernel::Kernel;
use crate::kho::{self, HandedOver, Spoken};
use crate::line::{Incumbent, Line, Unanswered};
use crate::net::{ArpRules, Held, Link, Mac};
use crate::outcome::Failure;
use crate::plan::Plan;
use crate::sysfs;
use crate::timeline::{Timeline, tsc};

/// How long this kernel's network stays up after its last word, so that whoever waits for the word hears it. The service
/// does not wait: it is with the successor already.
const FAREWELL: Duration = Duration::from_millis(200);
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
    /// What this machine cannot do, found out when nothing was touched yet.
    pub refusal: Option<Failure>,
    /// How far a successor came that never answered.
    pub last_words: Option<String>,
    id: record::UpdateId,
    /// When the effect under way must be over.
    until: Instant,
    site: Option<Site>,
    placed: Option<Placed>,
    unbound: Option<sysfs::Unbound>,
    /// Interfaces whose ARP rules were changed, by MAC address, with the rules as they were.
    arp_rules: Vec<(Mac, ArpRules)>,
    /// The service address: looked up in the trial, dropped in the cutover.
    address: Option<Held>,
    /// The successor's agent has answered.
    heard: bool,
    /// CPUs, by APIC id, that the module counts as the successor's.
    given: BTreeSet<u32>,
    /// CPUs that got INIT and wait for nobody; a kernel that was a successor wants them at its mailbox again.
    stopped: BTreeSet<u32>,
    /// What is sealed, by service.
    sealed: BTreeSet<String>,
}

impl<'k> Hands<'k> {
    /// Holding nothing yet.
    pub fn new(kernel: &'k Kernel, plan: &'k Plan, id: record::UpdateId) -> Result<Hands<'k>> {
        Ok(Hands {
            kernel,
            device: kernel.device()?,
            plan,
            timeline: Timeline::default(),
            refusal: None,
            last_words: None,
            id,
            until: Instant::now(),
            site: None,
            placed: None,
            unbound: None,
            arp_rules: Vec::new(),
            address: None,
            heard: false,
            given: BTreeSet::new(),
            stopped: BTreeSet::new(),
            sealed: BTreeSet::new(),
        })
    }

    /// Carries an effect out, and says what came of it.
    pub fn carry_out(&mut self, effect: &Effect, until: Instant) -> Event {
        self.until = until;
        match self.do_it(effect) {
            Ok(()) => Event::Done,
            Err(error) => self.what_happened(effect, &error),
        }
    }

    /// One line for each effect, in the order of `handover::undo`.
    fn do_it(&mut self, effect: &Effect) -> Result<()> {
        match effect {
            Effect::TakeMemory => self.take_memory(),
            Effect::GrantDevices => self.grant_devices(),
            Effect::OfflineCpu { cpu } => offline_cpu(*cpu),
            Effect::Place => self.place(),
            Effect::StartCpu { cpu } => self.start_cpu(*cpu),
            Effect::AwaitHello => self.await_hello(),
            Effect::StandBy => self.stand_by(),
            Effect::CheckHealth => self.check_health(),
            Effect::Freeze => self.freeze(),
            Effect::Seal => self.seal(),
            Effect::ReleaseAddress => self.release_address(),
            Effect::Activate { epoch } => self.activate(*epoch),
            Effect::DropAddress => self.drop_address(),
            Effect::ParkCpu { cpu } => self.park_cpu(*cpu),
            Effect::HandCpu { cpu } => self.hand_cpu(*cpu),
            Effect::Commit => self.commit(),
            Effect::QuiesceDevices => self.quiesce_devices(),
            Effect::YieldLastCpu { cpu } => self.yield_last_cpu(*cpu),

            Effect::StandDown { epoch } => self.stand_down(*epoch),
            Effect::TakeAddressBack => self.take_address_back(),
            // The services unseal their own arenas, when they are told to go on.
            Effect::Unseal { .. } => Ok(()),
            Effect::Unfreeze { epoch } => self.unfreeze(*epoch),
            Effect::TakeCpuBack { cpu } => self.take_cpu_back(*cpu),
            Effect::UnparkCpu { cpu } => self.unpark_cpu(*cpu),
            Effect::Fence { cpus } => self.fence(cpus),
            Effect::ReadLastWords => self.read_last_words(),
            Effect::DestroyInstance => self.unplace(),
            Effect::OnlineCpu { cpu } => self.online_cpu(*cpu),
            Effect::TakeDevicesBack => self.take_devices_back(),
            Effect::GiveBackMemory => self.give_back_memory(),
        }
    }

    /// What an error means to the state machine. Where it is not certain that nothing is left behind, nobody knows.
    fn what_happened(&mut self, effect: &Effect, error: &anyhow::Error) -> Event {
        let what = format!("{error:#}");
        let answer = error.downcast_ref::<Unanswered>();
        let cause = match answer {
            Some(Unanswered::Panicked(_)) => Cause::successor_died(what),
            Some(Unanswered::Silent { .. }) => Cause { blame: Blame::Successor, sort: Sort::Deadline, what },
            Some(Unanswered::Refused { .. }) => Cause::broken(Blame::Successor, what),
            None => Cause::broken(effect.carried_out_by(), what),
        };
        match (effect, answer) {
            (Effect::TakeMemory, _) => {
                self.refusal = error.downcast_ref().cloned();
                Event::Failed(cause)
            }
            // A successor that says so has not taken the CPU, or has not committed.
            (Effect::HandCpu { .. } | Effect::Commit, Some(Unanswered::Refused { .. })) => Event::Failed(cause),
            _ => Event::Unknown(cause),
        }
    }

    /// Time left for the effect under way.
    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
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
    fn take_memory(&mut self) -> Result<()> {
        let instance = self.device.create_instance("successor", &self.plan.release, State::Created)?;
        let settled = self.kernel.files.close(self.device).map(drop);
        let taken = settled.and_then(|()| self.take_region(instance)).and_then(|region| {
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
                self.kernel.files.open();
                self.device.destroy_instance(instance)?;
                Err(error)
            }
        }
    }

    /// The undo of [`Hands::take_memory`].
    fn give_back_memory(&mut self) -> Result<()> {
        self.kernel.files.open();
        let Some(mut site) = self.site.take() else { return Ok(()) };
        // Mappings first: the module gives back nothing that is in use.
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
        self.kernel.take_contiguous(instance, len, grain, &avoid)
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
        let files: Vec<Range> = self.kernel.files.ranges().iter().collect();
        self.kernel.services.crossings().into_iter().flat_map(|crossing| crossing.ranges).chain(files)
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
    fn grant_devices(&mut self) -> Result<()> {
        let Some(granted) = &self.plan.nic else { return Ok(()) };
        if let Some(link) = self.kernel.netlink.find(granted.mac)? {
            self.part_from(&link, granted.nic.address)?;
            let (_, folder) = sysfs::pci_function_of(&link.name)?;
            self.unbound = sysfs::unbind(&folder)?;
        }
        Ok(())
    }

    /// Clients that send to the interface that goes are sent to the one that stays.
    fn part_from(&mut self, going: &Link, own: Cidr) -> Result<()> {
        let Kernel { netlink, config, .. } = self.kernel;
        if let Some(cidr) = config.network.service_address.filter(|cidr| cidr.network() == own.network()) {
            self.arp_rules = netlink.part(&netlink.held(cidr)?, going)?;
        }
        Ok(())
    }

    /// The undo of [`Hands::grant_devices`].
    fn take_devices_back(&mut self) -> Result<()> {
        let netlink = &self.kernel.netlink;
        let back = match (&self.unbound, &self.plan.nic) {
            (Some(unbound), Some(granted)) => {
                unbound.bind()?;
                self.unbound = None;
                Some((netlink.find(granted.mac)?.context("the interface did not come back")?, granted.nic.address))
            }
            _ => None,
        };
        netlink.restore(std::mem::take(&mut self.arp_rules))?;
        let Some((link, address)) = back else { return Ok(()) };
        netlink.link_up(&link)?;
        netlink.add(&link, address)
    }

    /// The undo of [`offline_cpu`].
    fn online_cpu(&mut self, cpu: Cpu) -> Result<()> {
        self.bring_home(cpu.apic_id)?;
        if self.own_mailbox().is_some_and(|own| !own.is_parked(cpu.apic_id)) {
            bail!("{} does not wait at this kernel's mailbox: onlining it would never end", name(cpu));
        }
        sysfs::online_cpu(cpu.number)
    }

    fn own_mailbox(&self) -> Option<ParkedCpus<'k, Mapping>> {
        let birth = self.kernel.birth.as_ref()?;
        Some(ParkedCpus::new(&birth.control, control_block::MAILBOX.offset))
    }

    /// Back to this kernel's own park page, if it was stopped by INIT.
    fn bring_home(&mut self, apic_id: u32) -> Result<()> {
        if self.stopped.contains(&apic_id) {
            self.park_here(apic_id)?;
            self.stopped.remove(&apic_id);
        }
        Ok(())
    }

    /// After a fence: a kernel that was itself a successor onlines its CPUs through its mailbox, and waits there without
    /// limit. So what was fenced goes back to this kernel's own park page first.
    fn park_here(&self, apic_id: u32) -> Result<()> {
        let (Some(birth), Some(own), Some(site)) = (&self.kernel.birth, self.own_mailbox(), &self.site) else {
            return Ok(());
        };
        let slot = LowSlot::holding(birth.record.grant.low_slot.start).context("this kernel has no low slot")?;
        let args = SipiArgs {
            cr3: slot.root_page().start(),
            entry: birth.base + control_block::PARK_PAGE.offset,
            arg: 0,
            stack: birth.base + control_block::STACK.end(),
        };
        site.low[0].1.write(0, &sipi_page(&args));
        self.device.give_cpu(site.instance, apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
        let arrived = await_parked(&own, apic_id, self.until);
        self.device.take_cpu(site.instance, apic_id, TakeCpu::Record)?;
        arrived.context("at this kernel's own park page")
    }

    // ---- booting ----------------------------------------------------------------------------------------------

    /// Writes kernel, initrd, firmware and handover record into the region.
    fn place(&mut self) -> Result<()> {
        let site = self.site()?;
        let facts = &self.plan.facts;
        let info = self.device.info()?;
        let image = BzImage::parse(&self.plan.image)?;
        let division = &site.division;
        let others: Vec<u32> = self.plan.moves.iter().map(|(cpu, _)| cpu.apic_id).collect();
        let mut record = self.record(site, info.tsc_khz, self.kernel.files.crossings()?);
        let handover = self.plan.kho.map(|spoken| self.hand_over(spoken, site, &image, &mut record)).transpose()?;
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
            kho: handover.as_ref().map(|handed| handed.setup_data.clone()),
        })?;
        let region = self.device.map(site.region, Access::ReadWrite)?;
        let low = site.low.iter().map(|(page, mapping)| Mapped { range: *page, memory: mapping });
        placement.write(&low.chain([Mapped { range: site.region, memory: &region }]).collect::<Vec<_>>())?;
        for (at, bytes) in handover.iter().flat_map(|handed| handed.segments.iter()) {
            region.write(at - site.region.start(), bytes);
        }
        // Nothing is given back that is still mapped.
        drop(region);
        let control = self.device.map(placement.control_block, Access::ReadWrite)?;
        let frame = record.to_frame(self.plan.record_version)?;
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

    /// What a kernel with KHO is told of the memory that it must keep, and where the record says that it is.
    fn hand_over(
        &self,
        spoken: Spoken,
        site: &Site,
        image: &BzImage<'_>,
        record: &mut record::HandoverRecord,
    ) -> Result<HandedOver> {
        let known = site.region.len() + site.division.reserved_in_successor().total();
        let places = kho::Places::new(image, self.plan.initrd.len() as u64, site.region, known)?;
        let handed = kho::write(spoken, places, record)?;
        // An older agent over there finds it by the kernel alone.
        record.kho = (self.plan.record_version >= 2).then(|| handed.places.clone());
        tracing::info!(abi = handed.places.abi, scratch = %places.scratch, "kexec handover for the successor");
        Ok(handed)
    }

    /// The undo of [`Hands::place`]: nothing of it is in use any more, and whoever was stopped is back.
    fn unplace(&mut self) -> Result<()> {
        self.placed = None;
        let stopped = self.stopped.clone();
        stopped.into_iter().try_for_each(|apic_id| self.bring_home(apic_id))
    }

    /// What the successor's agent must know.
    fn record(&self, site: &Site, tsc_khz: u32, files: Vec<CrossingFile>) -> record::HandoverRecord {
        let division = &site.division;
        let facts = &self.plan.facts;
        let crossings = self.kernel.services.crossings();
        let all = |set: &RangeSet| set.iter().map(phys).collect::<Vec<_>>();
        let boot_cpus = self.plan.moves.iter().map(|(cpu, _)| cpu).chain([&self.plan.spare]);
        let numbered = || crossings.iter().zip(1u32..);
        let files = Numbered { files, first: 1 + crossings.len() as u32 };
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
                    ranges: crossing.ranges.iter().copied().map(phys).collect(),
                    len: crossing.ranges.iter().map(|range| range.len()).sum(),
                })
                .chain(files.arenas())
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
            files: files.files().collect(),
            network: self.network_record(),
            ecam: facts.ecam.map(|ecam| record::Ecam { address: ecam.base, segment: 0, bus_end: ecam.bus_end }),
            retired: Vec::new(),
            journal: self.timeline.marks().to_vec(),
            kho: None,
            carried: self.kernel.birth.as_ref().map(|birth| birth.record.carried.clone()).unwrap_or_default(),
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

    /// Starts a CPU in the successor's kernel.
    fn start_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let boot = self.placed()?.boot;
        let site = self.site()?;
        let instance = site.instance;
        site.low[0].1.write(0, &sipi_page(&boot));
        self.device.give_cpu(instance, cpu.apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
        self.given.insert(cpu.apic_id);
        self.forget_parked(cpu.apic_id);
        self.device.update_instance(instance, State::Booting, None)?;
        Ok(())
    }

    /// The undo of [`Hands::start_cpu`], and of every CPU handed over since: nothing runs in the successor any more.
    fn fence(&mut self, cpus: &[Cpu]) -> Result<()> {
        let Some(site) = &self.site else { return Ok(()) };
        if !self.heard {
            self.last_words = Some(how_far_without_agent(&site.low[0].1));
        }
        let mut first_error = Ok(());
        // All of them, whatever one says, and nothing in between: what runs on may still answer clients.
        for cpu in cpus.iter().filter(|cpu| self.given.contains(&cpu.apic_id)) {
            let fenced = if self.is_firmware_bsp(cpu.apic_id) {
                Err(anyhow::anyhow!("{} booted the machine: INIT would reset everything", name(*cpu)))
            } else {
                self.device.take_cpu(site.instance, cpu.apic_id, TakeCpu::Fence).map_err(Into::into)
            };
            first_error = first_error.and(fenced.map(|()| {
                self.stopped.insert(cpu.apic_id);
            }));
        }
        self.given.retain(|apic_id| !self.stopped.contains(apic_id));
        first_error.context("cannot stop the successor")
    }

    fn is_firmware_bsp(&self, apic_id: u32) -> bool {
        self.plan.moves.iter().any(|(cpu, _)| cpu.apic_id == apic_id && cpu.firmware_bsp)
    }

    /// How far a successor came that never answered.
    fn read_last_words(&mut self) -> Result<()> {
        if self.heard {
            return Ok(());
        }
        let Some(placed) = &self.placed else { return Ok(()) };
        self.last_words = match BootMark::of_word(placed.line.memory().load(words::BOOT_MARK_AT)) {
            Some(BootMark::None) => self.last_words.take(),
            Some(BootMark::Agent) => Some("its agent has read the handover record, and come no further".to_owned()),
            Some(BootMark::Network | BootMark::Standby) => Some("its agent was ready and did not say so".to_owned()),
            None => Some("what its agent wrote of itself is destroyed".to_owned()),
        };
        Ok(())
    }

    /// A CPU that INIT took out of this kernel's own park page waits there no longer.
    fn forget_parked(&self, apic_id: u32) {
        if let Some(own) = self.own_mailbox() {
            own.forget(apic_id);
        }
    }

    /// Waits for the successor's agent.
    fn await_hello(&mut self) -> Result<()> {
        let patience = self.left();
        let line = &mut self.placed()?.line;
        match line.receive(patience).context("the successor's agent has not answered")? {
            ToIncumbent::Hello { abi, .. } if abi != words::VERSION => {
                bail!("the successor's agent speaks version {abi} of the control block, this one {}", words::VERSION)
            }
            ToIncumbent::Hello { program, .. } => {
                self.heard = true;
                tracing::info!(release = program.release, "the successor's agent answers");
                let instance = self.site()?.instance;
                self.device.update_instance(instance, State::Running, None)?;
                Ok(())
            }
            ToIncumbent::Failed { what, cause } => Err(Unanswered::Refused { what, cause }.into()),
            other => bail!("the successor began with {other:?}"),
        }
    }

    // ---- trial ------------------------------------------------------------------------------------------------

    fn ask<T>(&mut self, message: &ToSuccessor, answer: impl Fn(ToIncumbent) -> Option<T>) -> Result<T> {
        let patience = self.left();
        self.placed()?.line.ask(message, patience, answer)
    }

    /// Lets the successor's services attach and wait.
    fn stand_by(&mut self) -> Result<()> {
        let expected: Vec<String> = self.kernel.services.crossings().into_iter().map(|c| c.name).collect();
        let standing = self.ask(&ToSuccessor::StandBy, |answer| match answer {
            ToIncumbent::Standing { services } => Some(services),
            _ => None,
        })?;
        let keeping = self.kernel.files.crossings()?.into_iter().map(|file| file.service);
        if let Some(missing) = expected.into_iter().chain(keeping).find(|name| !standing.contains(name)) {
            bail!("service {missing} does not stand by in the successor (standing: {})", standing.join(", "));
        }
        Ok(())
    }

    /// Asks the successor how it is, and looks up what the cutover will need.
    fn check_health(&mut self) -> Result<()> {
        self.ask(&ToSuccessor::CheckHealth, |answer| matches!(answer, ToIncumbent::Healthy).then_some(()))?;
        let network = &self.kernel.config.network;
        if let (Some(service), Some(granted), false) =
            (network.service_address, &self.plan.nic, network.skip_reach_check)
            && granted.nic.address.network() == service.network()
        {
            crate::reach::check(granted.nic.address.address, self.until)?;
        }
        if let Some(cidr) = network.service_address {
            self.address = Some(self.kernel.netlink.held(cidr)?);
        }
        self.kernel.files.settle_again(self.device)
    }

    // ---- cutover: between freeze and activate nobody serves. No file, no log, nothing that can wait -----------------

    /// Stops the services at a request boundary; they seal their arenas.
    fn freeze(&mut self) -> Result<()> {
        self.sealed = self.kernel.services.freeze(self.epoch(), self.left())?.into_keys().collect();
        self.kernel.files.freeze(self.device, self.left())
    }

    /// Every arena that crosses has its receipt.
    fn seal(&mut self) -> Result<()> {
        let crossings = self.kernel.services.crossings();
        match crossings.iter().find(|crossing| !self.sealed.contains(&crossing.name)) {
            Some(open) => bail!("the arena of service {} is not sealed", open.name),
            None => Ok(()),
        }
    }

    /// The undo of [`Hands::freeze`]. No late word of the successor counts from here on.
    fn unfreeze(&mut self, epoch: u64) -> Result<()> {
        if let Some(placed) = &self.placed {
            placed.line.memory().store(words::EPOCH_AT, epoch);
        }
        self.kernel.services.unfreeze(epoch, self.left())?;
        self.kernel.files.serve(self.left())?;
        self.kernel.state().facts.epoch = epoch;
        Ok(())
    }

    /// This kernel speaks for the service address no longer; [`Hands::drop_address`] does the rest when nobody waits for it.
    fn release_address(&mut self) -> Result<()> {
        self.address.as_ref().map_or(Ok(()), Held::hush)
    }

    /// The undo of [`Hands::release_address`].
    fn take_address_back(&mut self) -> Result<()> {
        self.address.as_ref().map_or(Ok(()), |held| self.kernel.netlink.take_again(held))
    }

    /// Gives the epoch to the successor, and waits until its services answer.
    fn activate(&mut self, epoch: u64) -> Result<()> {
        self.placed()?.line.memory().store(words::EPOCH_AT, epoch);
        self.ask(&ToSuccessor::Activate { epoch }, |answer| match answer {
            ToIncumbent::Activated { epoch: reached, .. } if reached == epoch => Some(()),
            _ => None,
        })?;
        self.device.update_instance(self.site()?.instance, State::Serving, None)?;
        Ok(())
    }

    /// The undo of [`Hands::activate`], with the successor's help.
    fn stand_down(&mut self, epoch: u64) -> Result<()> {
        self.ask(&ToSuccessor::StandDown { epoch }, |answer| match answer {
            ToIncumbent::StoodDown { epoch: ended } if ended == epoch => Some(()),
            _ => None,
        })
    }

    // ---- probation: CPUs follow one by one ------------------------------------------------------------------------

    /// Takes the service address off this kernel's interface.
    fn drop_address(&mut self) -> Result<()> {
        let Some(held) = &self.address else { return Ok(()) };
        if let Err(error) = self.kernel.netlink.drop_held(held) {
            // Nothing hangs on it: an address that nobody is told of is silent.
            tracing::warn!("{error:#}");
        }
        Ok(())
    }

    /// Sends an offline CPU to the successor's park page: from our own park page if it waits there, else by SIPI.
    fn park_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let park = self.placed()?.park;
        let site = self.site()?;
        match self.own_mailbox() {
            Some(own) if own.is_parked(cpu.apic_id) => {
                self.device.give_cpu(site.instance, cpu.apic_id, GiveCpu::Record)?;
                self.given.insert(cpu.apic_id);
                own.wake(cpu.apic_id, park.entry, || pause(self.until))?;
            }
            _ if self.is_firmware_bsp(cpu.apic_id) => {
                bail!("{} booted the machine and waits at no mailbox: it cannot be moved", name(cpu))
            }
            _ => {
                site.low[0].1.write(0, &sipi_page(&park));
                self.device.give_cpu(site.instance, cpu.apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
                self.given.insert(cpu.apic_id);
            }
        }
        self.await_parked_there(cpu)
    }

    /// The undo of [`Hands::park_cpu`]: through the successor's mailbox to our own, else by INIT.
    fn unpark_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let apic_id = cpu.apic_id;
        if !self.given.contains(&apic_id) {
            return self.bring_home(apic_id); // never left, or was fenced
        }
        let instance = self.site()?.instance;
        let until = self.until;
        let placed = self.placed.as_ref().context("the successor is not placed")?;
        let theirs = ParkedCpus::new(placed.line.memory(), control_block::MAILBOX.offset);
        match (&self.kernel.birth, self.own_mailbox()) {
            (Some(_), Some(own)) if own.is_parked(apic_id) => {
                self.device.take_cpu(instance, apic_id, TakeCpu::Record)?;
            }
            (Some(birth), Some(own)) if theirs.is_parked(apic_id) => {
                theirs.wake(apic_id, birth.base + control_block::PARK_PAGE.offset, || pause(until))?;
                await_parked(&own, apic_id, until)?;
                self.device.take_cpu(instance, apic_id, TakeCpu::Record)?;
            }
            _ if self.is_firmware_bsp(apic_id) => bail!("{} is at no mailbox", name(cpu)),
            _ => {
                self.device.take_cpu(instance, apic_id, TakeCpu::Fence)?;
                theirs.forget(apic_id);
                self.stopped.insert(apic_id);
            }
        }
        self.given.remove(&apic_id);
        self.bring_home(apic_id)
    }

    /// Tells the successor of a parked CPU, and waits until it is online there.
    fn hand_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let apic_id = cpu.apic_id;
        self.ask(&ToSuccessor::CpuParked { apic_id }, |answer| match answer {
            ToIncumbent::CpuOnline { apic_id: online, .. } if online == apic_id => Some(()),
            _ => None,
        })?;
        self.kernel.note(|update| update.cpus_moved += 1);
        Ok(())
    }

    /// The undo of [`Hands::hand_cpu`], with the successor's help: there, too, an offline CPU parks.
    fn take_cpu_back(&mut self, cpu: Cpu) -> Result<()> {
        let apic_id = cpu.apic_id;
        self.ask(&ToSuccessor::ReleaseCpu { apic_id }, |answer| match answer {
            ToIncumbent::CpuReleased { apic_id: released } if released == apic_id => Some(()),
            _ => None,
        })?;
        self.await_parked_there(cpu)
    }

    fn await_parked_there(&self, cpu: Cpu) -> Result<()> {
        let placed = self.placed.as_ref().context("the successor is not placed")?;
        let theirs = ParkedCpus::new(placed.line.memory(), control_block::MAILBOX.offset);
        await_parked(&theirs, cpu.apic_id, self.until).context("at the successor's park page")
    }

    // ---- commit ---------------------------------------------------------------------------------------------------

    /// Passes the point of no return.
    fn commit(&mut self) -> Result<()> {
        let timeline = self.timeline.marks().to_vec();
        self.ask(&ToSuccessor::Commit { timeline }, |answer| matches!(answer, ToIncumbent::Committed).then_some(()))
    }

    /// Stops everything in this kernel that could still write memory by itself.
    fn quiesce_devices(&mut self) -> Result<()> {
        std::thread::sleep(FAREWELL);
        self.kernel.services.stop();
        nix::unistd::sync();
        let granted: Vec<_> = self.plan.nic.iter().map(|granted| granted.bdf).collect();
        let stopped = sysfs::quiesce_pci(&granted)?;
        tracing::info!("quiesced: {}", stopped.join(" "));
        Ok(())
    }

    /// Hands over the last CPU, and with it the machine. Comes back only if it could not leave.
    fn yield_last_cpu(&mut self, last: Cpu) -> Result<()> {
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

/// Takes a CPU offline. Its undo is [`Hands::online_cpu`].
fn offline_cpu(cpu: Cpu) -> Result<()> {
    sysfs::offline_cpu(cpu.number).with_context(|| format!("{} cannot be taken offline", name(cpu)))
}

fn name(cpu: Cpu) -> String {
    format!("CPU {} (APIC id {:#x})", cpu.number, cpu.apic_id)
}

/// What the trampoline tells of a CPU that was started.
fn how_far_without_agent(sipi: &Mapping) -> String {
    let mut reached = [0; 4];
    sipi.read((offset_of!(SipiPage, epitaph) + offset_of!(Epitaph, step)) as u64, &mut reached);
    match reached {
        step::JUMP => "its CPU entered the kernel, and its agent never came up".to_owned(),
        [0, 0, 0, 0] => "its CPU never began to run".to_owned(),
        other => format!("its CPU came no further than `{}` on its way into the kernel", other.escape_ascii()),
    }
}

fn await_parked<M: SharedMemory + ?Sized>(mailbox: &ParkedCpus<'_, M>, apic_id: u32, until: Instant) -> Result<()> {
    while !mailbox.is_parked(apic_id) {
        if !pause(until) {
            bail!("CPU with APIC id {apic_id:#x} was sent there and has not arrived in time");
        }
    }
    Ok(())
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
