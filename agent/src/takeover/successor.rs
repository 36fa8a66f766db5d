//! The successor's side of an update: what this kernel does from its agent's first moment until the machine is its own.
//!
//! ```text
//! attach ─► clock ─► arenas ─► interface ─► Hello ─┬─ StandBy ──► Standing
//!                                                  ├─ CheckHealth ► Healthy
//!                                                  ├─ (Examine ─► Examined, RunCheck ─► CheckEnded)   a trial that is taken back
//!                                                  ├─ Activate ─► services, address ─► Activated     the blackout ends
//!                                                  ├─ CpuParked ► online it ─► CpuOnline             undo: ReleaseCpu
//!                                                  ├─ (StandDown ► services, address ─► StoodDown)   undo of Activate
//!                                                  ├─ Commit ───► Committed, programs
//!                                                  └─ LastCpu ──► online it, adopt memory ─► incumbent
//! ```
//! Which word may come when is `handover`'s to say ([`handover::update::successor`]); here each is carried out.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::update::phase::Phase;
use handover::update::successor::{Answer, Order};
use kexec_core::cpus::ParkedCpus;
use kexec_core::device::{Device, End};
use kexec_core::memory_map::RangeSet;
use kexec_core::memory_map::division::Adoption;
use state_schemas::control_block::words::BootMark;
use state_schemas::control_block::{MAILBOX, words};
use state_schemas::latest::handover_record::ClockPair;
use state_schemas::latest::message::ToIncumbent;
use state_schemas::shared::SharedMemory;

use crate::daemon::control::{ServiceState, Stage};
use crate::daemon::kernel::Kernel;
use crate::machine::clock::Moment;
use crate::machine::net::{Announcer, ArpAnswers, Link};
use crate::machine::pci;
use crate::services::arenas::Arena;
use crate::takeover::birth::{Birth, range};
use crate::takeover::trial;
use crate::update::line::{Line, Successor, Unanswered};
use crate::update::timeline::{Timeline, tsc};

/// Domain number of our PCI root buses: the machine's own. With `pci=off` nothing else is there, and functions keep their names.
const PCI_DOMAIN: u32 = 0;
/// How long an incumbent may be silent before its last word, before it counts as gone.
const INCUMBENT_PATIENCE: Duration = Duration::from_secs(3600);
/// How long programs may take to begin.
const PROGRAMS_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last CPU may take to leave the incumbent.
const LAST_CPU_PATIENCE: Duration = Duration::from_secs(120);

/// The service address, ready to be taken.
struct Address {
    link: Link,
    cidr: crate::daemon::config::Cidr,
    announcer: Announcer,
    /// It is this kernel's own already, and needs only to be announced. That takes a route to its clients beforehand, which an address of
    /// the interface's own in the same network gives.
    reserved: bool,
}

/// This kernel while it takes over.
struct Heir<'k> {
    kernel: &'k Kernel,
    birth: &'k Birth,
    device: &'k Device,
    line: Line<Successor>,
    address: Option<Address>,
    /// The kernel's sessions, held back from everybody: what is taken out of one and freed would be lost to an incumbent that goes on.
    sessions: Option<File>,
    /// What could not be done after the service answered; the next order fails with it.
    unsettled: Option<anyhow::Error>,
    /// What could not be done after the commit; the update is told of it when it has ended.
    left_undone: Vec<String>,
    timeline: Timeline,
    /// It has been activated.
    serves: bool,
}

/// Takes the machine over; returns when it is this kernel's own.
pub fn run(kernel: &Kernel) -> Result<()> {
    let birth = kernel.birth.as_ref().context("the firmware booted this kernel: it takes over from nobody")?;
    let mut heir = Heir::prepare(kernel, birth)?;
    heir.line.send(&ToIncumbent::Hello {
        program: state_schemas::latest::handover_record::Program {
            release: kernel.release().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        abi: words::VERSION,
    })?;
    match heir.serve() {
        Ok(last) => heir.drain(last),
        Err(error) if heir.serves => {
            heir.go_on_alone(&error);
            Err(error)
        }
        Err(error) => Err(error),
    }
}

impl<'k> Heir<'k> {
    fn prepare(kernel: &'k Kernel, birth: &'k Birth) -> Result<Heir<'k>> {
        let device = kernel.device()?;
        let started = tsc();
        // The machine is the incumbent's: it must not end with this kernel.
        device.set_end(End::Alone)?;
        mark(birth, BootMark::Agent);
        let ClockPair { tsc: then, unix_ns, tsc_khz } = birth.record.clock;
        kernel.hardware.set_clock(Moment { tsc: then, unix_ns }, tsc_khz)?;
        let line = Line::attach(device, birth.control.clone(), birth.base)?;
        let sessions = kernel.hardware.hold_sessions()?;
        expect_arenas(kernel, device, birth)?;
        kernel.services.all_inherited();
        kernel.files.inherit(device, &birth.record)?;
        let address = attach_network(kernel, device, birth)?;
        mark(birth, BootMark::Network);
        let mut timeline = Timeline::continue_from(birth.record.journal.clone());
        timeline.add("successor: prepare", started, tsc());
        let left_undone = Vec::new();
        Ok(Heir {
            kernel,
            birth,
            device,
            line,
            address,
            sessions,
            unsettled: None,
            left_undone,
            timeline,
            serves: false,
        })
    }

    /// Does what the incumbent says, until its last word: the order to take the rest.
    fn serve(&mut self) -> Result<u32> {
        let mut role = handover::update::successor::Successor::new(&self.birth.record);
        loop {
            let word = self.line.receive(INCUMBENT_PATIENCE)?;
            let answer = match role.hear(&word) {
                Ok(Order::Drain { last }) => return Ok(last),
                Ok(order) => {
                    let answer = self.obey(&order).unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
                    role.answer(&order, answer)?
                }
                // It cannot be obeyed now, or not by this kernel. The incumbent is told why, and turns back or not.
                Err(unheard) => Some(unheard.reply(&word)),
            };
            let Some(answer) = answer else { continue };
            self.line.send(&answer)?;
            match answer {
                ToIncumbent::Activated { .. } => {
                    self.unsettled = self.settle_address().err();
                    self.kernel.connections.settle();
                }
                ToIncumbent::Committed => self.start_programs(),
                ToIncumbent::Failed { what, cause } => tracing::error!("cannot {what}: {cause}"),
                _ => {}
            }
        }
    }

    fn obey(&mut self, order: &Order) -> Result<Answer> {
        match order {
            Order::StandBy => {
                self.kernel.set_phase(Phase::Trial);
                let patience = sooner_than(Duration::from_secs(self.kernel.config.update.step_timeout_s));
                let until = Instant::now() + patience;
                let mut services = self.kernel.services.await_standby(patience)?;
                let programs = crate::services::files::programs_of(&self.birth.record);
                self.kernel.files.await_programs(&programs, until.saturating_duration_since(Instant::now()))?;
                services.extend(programs);
                mark(self.birth, BootMark::Standby);
                Ok(Answer::Services(services))
            }
            Order::CheckHealth => self.check_health(),
            Order::Examine => {
                let found = trial::examine(self.kernel, self.birth, self.device, self.sessions.is_some())?;
                Ok(Answer::Examined(Box::new(found)))
            }
            Order::RunCheck { command, limit_ms } => {
                let trial::Ran { ending, output, took_ms } =
                    trial::run(command, Duration::from_millis((*limit_ms).into()));
                Ok(Answer::CheckEnded { ending, output, took_ms })
            }
            Order::Activate { epoch } => self.activate(*epoch),
            Order::OnlineCpu { .. } | Order::Commit { .. } if self.unsettled.is_some() => {
                Err(self.unsettled.take().expect("it was looked at just now"))
            }
            Order::OnlineCpu { apic_id } => {
                if self.serves {
                    self.kernel.set_phase(Phase::Probation);
                }
                Ok(Answer::Online(self.online(*apic_id)?))
            }
            Order::OfflineCpu { apic_id } => self.offline(*apic_id),
            Order::StandDown { epoch } => self.stand_down(*epoch),
            Order::Commit { timeline } => {
                self.kernel.set_phase(Phase::Commit);
                let own = self.timeline.marks()[self.birth.record.journal.len()..].to_vec();
                self.timeline = Timeline::continue_from(timeline.clone());
                for mark in own {
                    self.timeline.add(&mark.phase, mark.start_tsc, mark.end_tsc);
                }
                Ok(Answer::Done)
            }
            Order::TakeConnections { at, total, bytes } => {
                Ok(Answer::Have(self.kernel.connections.arrive(*at, *total, bytes)?))
            }
            Order::Repeat(_) => Ok(Answer::Done),
            Order::Drain { .. } => bail!("this is not one order among others"),
        }
    }

    fn check_health(&mut self) -> Result<Answer> {
        if let Some(error) = self.unsettled.take() {
            return Err(error);
        }
        let awaited = if self.serves { ServiceState::Serving } else { ServiceState::Standby };
        let status = self.kernel.services.status();
        // One without an arena is not a predecessor's: it waits at the door.
        let inherited = status.iter().filter(|service| service.arena_bytes > 0);
        if let Some(service) = inherited.into_iter().find(|service| service.state != awaited) {
            bail!("service {} is {}, not {awaited}", service.name, service.state);
        }
        Ok(Answer::Done)
    }

    /// In the blackout: nothing here allocates more than a few words, and nothing depends on the arenas' size.
    fn activate(&mut self, epoch: u64) -> Result<Answer> {
        let started = tsc();
        if self.birth.control.load(words::EPOCH_AT) != epoch {
            bail!("epoch {epoch} is not the current one");
        }
        self.set_clock_again();
        let quiet = self.restore_connections(epoch)?;
        let restored = tsc();
        self.kernel.services.activate(epoch, self.cutover_deadline())?;
        let serving = tsc();
        if let Some(address) = &self.address {
            if !address.reserved {
                self.kernel.netlink.add(&address.link, address.cidr)?;
            }
            if let Some(quiet) = quiet {
                quiet.restore()?;
            }
            address.announcer.announce()?;
        }
        let announced = tsc();
        self.device.set_end(End::Machine)?;
        self.serves = true;
        self.kernel.state().facts.epoch = epoch;
        self.timeline.add("successor: connections", started, restored);
        self.timeline.add("successor: services", restored, serving);
        self.timeline.add("successor: address", serving, announced);
        Ok(Answer::AnsweringSince(announced))
    }

    /// The sockets of connections that cross stand before the address is announced: a kernel that has the address and not yet the socket
    /// answers RST. They need the address, so where it is not reserved beforehand it is given to the interface here, which answers no ARP
    /// request for it until what is given back says so.
    fn restore_connections(&self, epoch: u64) -> Result<Option<ArpAnswers>> {
        let connections = &self.kernel.connections;
        if !connections.have_arrived() {
            return Ok(None);
        }
        let quiet = match &self.address {
            Some(address) if !address.reserved => {
                let quiet = ArpAnswers::none_from(&address.link)?;
                self.kernel.netlink.add(&address.link, address.cidr)?;
                Some(quiet)
            }
            _ => None,
        };
        let restored = connections.restore(self.birth.record.clock.tsc_khz)?;
        // From here on their peers may hear of this kernel.
        self.birth.control.store(words::CONNECTIONS_AT, epoch);
        connections.let_go(restored)?;
        Ok(quiet)
    }

    /// The incumbent's wall clock may have been set since the record was written, and the TSC's rate, by which this kernel went on from
    /// there, is known only so well.
    fn set_clock_again(&self) {
        let word = |at| self.birth.control.load(at);
        let then = Moment { tsc: word(words::CLOCK_TSC_AT), unix_ns: word(words::CLOCK_NS_AT) };
        // 0: an older incumbent, which does not say.
        if then.tsc != 0
            && let Err(error) = self.kernel.hardware.set_clock(then, self.birth.record.clock.tsc_khz)
        {
            tracing::warn!("the wall clock stays as it was at the start: {error:#}");
        }
    }

    /// The incumbent has ended while this kernel serves: it goes on serving with what it has.
    fn go_on_alone(&mut self, why: &anyhow::Error) {
        let dead = matches!(why.downcast_ref(), Some(Unanswered::Panicked(_)));
        let mut left = std::mem::take(&mut self.left_undone);
        let online: Vec<u32> =
            self.device.cpus().into_iter().flatten().filter(|cpu| cpu.online).map(|cpu| cpu.apic_id).collect();
        let record = &self.birth.record;
        let lost: Vec<String> = record
            .machine
            .cpus
            .iter()
            .filter(|cpu| !online.contains(&cpu.apic_id))
            .map(|cpu| cpu.apic_id.to_string())
            .collect();
        let blocks: u64 = record.grant.blocks.iter().map(|piece| piece.len).sum();
        let memory = (blocks + crate::update::kho::free_fragments(record).total()) >> 20;
        left.push(format!("{why:#}: what it had is lost until the machine is reset"));
        if !lost.is_empty() {
            left.push(format!("CPUs with APIC id {}: the incumbent had them when it ended", lost.join(", ")));
        }
        left.push(format!("memory: {memory} MiB that the incumbent had when it ended"));
        if dead {
            // None of its programs can go on there, and the machine is this kernel's.
            self.start_programs();
            left.append(&mut self.left_undone);
            if let Err(error) = self.kernel.hardware.grant_panic_wish() {
                left.push(format!("panic=: {error:#}"));
            }
        }
        self.kernel.note(|update| update.left_undone = left);
    }

    /// Not before the incumbent cannot go on any more: its own programs, which cannot be asked to look at their memory anew, would
    /// go on with what they knew of it, and these would have written there.
    fn start_programs(&mut self) {
        let (resumed, until) = (self.kernel.files.resume(), Instant::now() + PROGRAMS_PATIENCE);
        for done in [resumed, self.kernel.files.await_started(until)] {
            if let Err(error) = done {
                self.left_undone.push(format!("{error:#}"));
            }
        }
    }

    /// After the blackout: the interface answers for the address from now on.
    fn settle_address(&self) -> Result<()> {
        match &self.address {
            Some(address) if address.reserved => self.kernel.netlink.settle(&address.link, address.cidr),
            _ => Ok(()),
        }
    }

    /// The undo of [`Heir::activate`]: silent first, so that nobody answers from here when the address is dropped.
    fn stand_down(&mut self, epoch: u64) -> Result<Answer> {
        let until = self.cutover_deadline();
        self.kernel.services.freeze(epoch, until)?;
        self.kernel.files.freeze(self.device, &self.kernel.services.ranges(), until)?;
        if let Some(address) = &self.address {
            let held = self.kernel.netlink.held(address.cidr)?;
            self.kernel.netlink.drop_held(&held)?;
        }
        self.kernel.set_phase(Phase::Trial);
        self.device.set_end(End::Alone)?;
        self.serves = false;
        Ok(Answer::Done)
    }

    fn cutover_deadline(&self) -> Instant {
        Instant::now() + sooner_than(Duration::from_millis(self.kernel.config.update.cutover_timeout_ms))
    }

    /// The undo of [`Heir::online`]: Linux sends an offline CPU to the reset vector, which is our park page.
    fn offline(&mut self, apic_id: u32) -> Result<Answer> {
        self.kernel.hardware.offline_cpu(self.number_of(apic_id)?)?;
        self.kernel.note(|update| update.cpus_moved -= 1);
        Ok(Answer::Done)
    }

    fn number_of(&self, apic_id: u32) -> Result<u32> {
        let cpus = self.device.cpus()?;
        let cpu = cpus.into_iter().find(|cpu| cpu.apic_id == apic_id);
        Ok(cpu.with_context(|| format!("this kernel has no CPU with APIC id {apic_id:#x}"))?.cpu)
    }

    /// Onlines a CPU that waits in our park page.
    fn online(&mut self, apic_id: u32) -> Result<u32> {
        let parked = ParkedCpus::new(&*self.birth.control, MAILBOX.offset);
        if !parked.is_parked(apic_id) {
            bail!("CPU with APIC id {apic_id} is not parked here");
        }
        let cpu = self.number_of(apic_id)?;
        let started = tsc();
        self.kernel.hardware.online_cpu(cpu)?;
        self.timeline.add(&format!("successor: online cpu {cpu}"), started, tsc());
        self.kernel.note(|update| update.cpus_moved += 1);
        Ok(cpu)
    }

    /// The incumbent is gone: its last CPU, its memory. What cannot be had is reported, and the rest goes on.
    fn drain(&mut self, last: u32) -> Result<()> {
        let started = tsc();
        drop(self.sessions.take());
        let deadline = Instant::now() + LAST_CPU_PATIENCE;
        while !ParkedCpus::new(&*self.birth.control, MAILBOX.offset).is_parked(last) {
            if Instant::now() > deadline {
                bail!("the incumbent's last CPU (APIC id {last}) did not arrive in {LAST_CPU_PATIENCE:?}");
            }
            // A parked CPU writes a word, and no interrupt tells of it.
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut left = std::mem::take(&mut self.left_undone);
        if let Err(error) = self.kernel.hardware.grant_panic_wish() {
            left.push(format!("panic=: {error:#}"));
        }
        if let Err(error) = self.kernel.hardware.hold_kexec() {
            left.push(format!("kexec is not held off: {error:#}"));
        }
        if let Err(error) = self.online(last) {
            left.push(format!("CPU with APIC id {last}: {error:#}"));
        }
        let adopting = tsc();
        left.extend(self.adopt_memory());
        self.timeline.add("adopt memory", adopting, tsc());
        self.timeline.add("drained", started, tsc());
        let khz = self.birth.record.clock.tsc_khz;
        let (timeline, zero) = (self.timeline.spans(khz), self.timeline.zero(khz));
        let epoch = self.kernel.facts().epoch;
        // Before anybody is told: from then on this batond may be ended.
        if let Err(error) = self.kernel.ledger.change(|pages| (pages.drained, pages.epoch) = (true, epoch)) {
            left.push(format!("what a batond that is started again must know: {error:#}"));
        }
        // There is no way back any more: who came since the cutover, and stands by, serves.
        self.kernel.services.open(epoch);
        let mut state = self.kernel.state();
        state.successor = false;
        if let Some(update) = &mut state.update {
            update.phase = Stage::In(Phase::Drained);
            (update.timeline, update.zero) = (timeline, Some(zero));
            update.left_undone = left;
        }
        tracing::info!("drained: this kernel has the machine");
        Ok(())
    }

    /// The incumbent could only expect how large this kernel's memory blocks are; the module knows.
    fn plan_adoption(&self) -> Result<Adoption> {
        let grant = &self.birth.record.grant;
        let blocks: RangeSet = grant.blocks.iter().map(|blocks| range(*blocks)).collect();
        // The next region will be as large as this kernel's.
        Ok(Adoption::new(&blocks, grant.region.len, self.device.info()?.memory_block_size)?)
    }

    /// Whole blocks by hot-add; fragments, arenas excepted, page by page. Says what could not be had.
    fn adopt_memory(&self) -> Vec<String> {
        let record = &self.birth.record;
        let mut left = Vec::new();
        match self.plan_adoption() {
            Err(error) => left.push(format!("memory blocks: {error:#}")),
            Ok(adoption) => {
                for (policy, set) in [("online_kernel", &adoption.ordinary), ("online_movable", &adoption.movable)] {
                    if let Err(error) = self.kernel.hardware.set_auto_online(policy) {
                        left.push(format!("memory policy {policy}: {error:#}"));
                    }
                    for block in adoption.each(set) {
                        if let Err(error) = self.device.adopt_memory(block) {
                            left.push(format!("memory block {block}: {error}"));
                        }
                    }
                }
                let mib = adoption.block_size >> 20;
                left.extend(adoption.left.iter().map(|part| {
                    format!("memory {part}: no whole block of this kernel, whose blocks have {mib} MiB; the next one can have it")
                }));
            }
        }
        for free in crate::update::kho::free_fragments(record).iter() {
            if let Err(error) = self.device.adopt_memory(free) {
                left.push(format!("memory fragment {free}: {error}"));
            }
        }
        left
    }
}

/// How long to wait for services, so that the answer, which names the one that is late, comes while the incumbent still
/// waits for it. Its limit for the phase is this one: both kernels have the same configuration.
fn sooner_than(limit: Duration) -> Duration {
    limit * 3 / 4
}

/// What the incumbent can read when it hears nothing.
fn mark(birth: &Birth, reached: BootMark) {
    birth.control.store(words::BOOT_MARK_AT, reached as u64);
}

/// The arenas become memory of this kernel's, with their content, and wait for their services.
fn expect_arenas(kernel: &Kernel, device: &Device, birth: &Birth) -> Result<()> {
    for service in &birth.record.services {
        kernel.services.expect_content(&service.name, service.schema_kind, service.schema_version);
        let [id] = service.arenas[..] else {
            bail!("service {} has {} arenas, this agent gives it one", service.name, service.arenas.len());
        };
        let arena = birth
            .record
            .arenas
            .iter()
            .find(|arena| arena.id == id)
            .with_context(|| format!("service {} has no arena", service.name))?;
        let inherited = Arena::inherit(device, arena.ranges.iter().map(|piece| range(*piece)));
        kernel.services.expect(&service.name, inherited.with_context(|| format!("arena of {}", service.name))?);
    }
    Ok(())
}

/// Binds the granted function and gives its interface its own address; the service address waits.
fn attach_network(kernel: &Kernel, device: &Device, birth: &Birth) -> Result<Option<Address>> {
    let Some((bdf, mac)) = birth.service_function() else { return Ok(None) };
    let ecam = birth.record.ecam.context("a PCI function is granted, but no configuration space")?;
    let function = pci::of_bdf(bdf);
    device.add_pci(PCI_DOMAIN, ecam.address, ecam.bus_end, &[function])?;
    // Sooner than the incumbent gives up: only this kernel knows why nothing came.
    let patience = Duration::from_secs(kernel.config.update.boot_timeout_s) / 4;
    let deadline = Instant::now() + patience;
    let link = loop {
        if let Some(link) = kernel.netlink.find(mac)? {
            break link;
        }
        if Instant::now() > deadline {
            bail!("no interface appeared on PCI function {function} in {patience:?}: is its driver in initrd.modules?");
        }
        // Before anybody waits for this kernel; a netlink subscription would save milliseconds of seconds.
        std::thread::sleep(Duration::from_millis(5));
    };
    kernel.netlink.link_up(&link)?;
    let own =
        kernel.config.network.nic.iter().find(|nic| crate::machine::net::parse_mac(&nic.mac).is_ok_and(|m| m == mac));
    if let Some(nic) = own {
        kernel.netlink.add(&link, nic.address)?;
    }
    let Some(cidr) = birth.service_address() else { return Ok(None) };
    let reserved = own.is_some_and(|nic| nic.address.network() == cidr.network());
    if reserved {
        kernel.netlink.reserve(&link, cidr.address)?;
    }
    let announcer = kernel.netlink.announcer(&link, cidr.address)?;
    Ok(Some(Address { link, cidr, announcer, reserved }))
}
