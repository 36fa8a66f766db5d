//! The incumbent's hands: each effect of an update, and its undo, as one small function ([`Hands::do_it`] is the table).
//! What is decided is decided elsewhere ([`crate::update::plan`], `handover`); what is held is held here, so that an undo always
//! knows what there is to undo, and does nothing where there is nothing.
//!
//! Here: the table, devices, the talk with the successor, and the cutover. Beside it: [`memory`] (what the successor is
//! placed in), [`cpus`] (who runs it).
//!
//! Every wait ends at the deadline of the effect under way, which the state machine gives.

mod cpus;
mod memory;
mod resumed;
pub mod trial;
mod watch;

pub use self::resumed::Found;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::update::blame::Blame;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Sort};
use handover::update::machine::Event;
use handover::update::sizes;
use kexec_core::device::{Device, End};
use kexec_core::klog::LogTail;
use kexec_core::registry::State;
use kexec_core::trampoline::SipiArgs;
use state_schemas::control_block::words;
use state_schemas::latest::handover_record as record;
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::SharedMemory;

use self::memory::Site;
use crate::daemon::config::Cidr;
use crate::daemon::control::ServiceState;
use crate::daemon::kernel::Kernel;
use crate::daemon::outcome::Failure;
use crate::daemon::successor_log::EndToldOf;
use crate::machine::bounded::within;
use crate::machine::clock::Moment;
use crate::machine::net::{ArpRules, HeldAddress, Link, Mac};
use crate::machine::pci;
use crate::machine::sysfs;
use crate::recovery::ledger::Granted;
use crate::services::Crossing;
use crate::services::files::sessions::Place;
use crate::update::line::{Incumbent, Line, Unanswered};
use crate::update::plan::{Plan, Target};
use crate::update::timeline::Timeline;

/// How long this kernel's network stays up after its last word, so that whoever waits for the word hears it. The service
/// does not wait: it is with the successor already. A time, since no event tells: when the asker has read the word, what it
/// prints has still to leave the machine through a shell's connection, of which batond knows nothing.
const FAREWELL: Duration = Duration::from_millis(200);

/// Who calls an update off, in its cause: `baton cancel`, or a second ^C at `baton upgrade`.
pub const CALLED_OFF_BY: &str = "the operator";

/// How often the log of a successor that has not answered is looked at. Most have answered before the first time.
const LOOK_AT_LOG: Duration = Duration::from_secs(5);

/// What the successor's CPUs need to know, once it is placed.
struct Placed {
    boot: SipiArgs,
    park: SipiArgs,
    root: u64,
    line: Line<Incumbent>,
}

/// How much of the table of connections the successor has.
fn taken(answer: ToIncumbent) -> Option<u64> {
    match answer {
        ToIncumbent::ConnectionsTaken { have } => Some(have),
        _ => None,
    }
}

/// The hands.
pub struct Hands<'k> {
    kernel: &'k Kernel,
    device: &'k Device,
    target: &'k Target,
    /// What is to be placed; nothing where an earlier batond has placed it.
    plan: Option<&'k Plan>,
    /// When each step was made.
    pub timeline: Timeline,
    /// What this machine cannot do, found out when nothing was touched yet.
    pub refusal: Option<Failure>,
    /// How far a successor came that failed, and why it died, as far as it is known.
    pub last_words: Option<String>,
    /// How its log ended.
    pub log: LogTail,
    /// What was seen of a candidate, in a trial that is taken back.
    pub seen: trial::Seen,
    id: record::UpdateId,
    /// APIC id of the CPU that the firmware booted: INIT would reset the machine there.
    firmware_bsp: Option<u32>,
    /// When the update began, to measure the TSC's rate by.
    began: Moment,
    /// When the effect under way must be over.
    until: Instant,
    site: Option<Site>,
    /// An instance that could not be destroyed when its memory could not be had.
    undestroyed: Option<u32>,
    placed: Option<Placed>,
    unbound: Option<sysfs::Unbound>,
    /// Interfaces whose ARP rules were changed, by MAC address, with the rules as they were.
    arp_rules: Vec<(Mac, ArpRules)>,
    /// The service address: looked up in the trial, dropped in the cutover.
    address: Option<HeldAddress>,
    /// The successor's agent has answered.
    heard: bool,
    /// They follow those of a batond that has died.
    follows: bool,
    /// CPUs, by APIC id, that the module counts as the successor's.
    given: BTreeSet<u32>,
    /// CPUs that got INIT and wait for nobody; a kernel that was a successor wants them at its mailbox again.
    stopped: BTreeSet<u32>,
    /// The services whose arenas the successor is told of, from the taking of its memory on.
    listed: Vec<Crossing>,
    /// What is sealed, by service.
    sealed: BTreeSet<String>,
}

impl<'k> Hands<'k> {
    /// Holding nothing yet.
    pub fn new(kernel: &'k Kernel, plan: &'k Plan, id: record::UpdateId) -> Result<Hands<'k>> {
        let firmware_bsp = plan.moves.iter().find(|(cpu, _)| cpu.firmware_bsp).map(|(cpu, _)| cpu.apic_id);
        Ok(Hands { plan: Some(plan), firmware_bsp, ..Hands::empty(kernel, &plan.target, id)? })
    }

    fn empty(kernel: &'k Kernel, target: &'k Target, id: record::UpdateId) -> Result<Hands<'k>> {
        Ok(Hands {
            kernel,
            device: kernel.device()?,
            target,
            plan: None,
            timeline: Timeline::default(),
            refusal: None,
            last_words: None,
            log: LogTail::default(),
            seen: trial::Seen::default(),
            id,
            firmware_bsp: None,
            began: Moment::raw()?,
            until: Instant::now(),
            site: None,
            undestroyed: None,
            placed: None,
            unbound: None,
            arp_rules: Vec::new(),
            address: None,
            heard: false,
            follows: false,
            given: BTreeSet::new(),
            stopped: BTreeSet::new(),
            listed: Vec::new(),
            sealed: BTreeSet::new(),
        })
    }

    /// Carries an effect out, and says what came of it.
    pub fn carry_out(&mut self, effect: &Effect, until: Instant) -> Event {
        self.until = until;
        let began = Instant::now();
        let event = match self.do_it(effect) {
            Ok(()) => Event::Done,
            Err(error) => self.what_happened(effect, &error),
        };
        self.note_for_trial(effect, &event, began);
        event
    }

    /// One line for each effect, in the order of `handover::update::effect`.
    fn do_it(&mut self, effect: &Effect) -> Result<()> {
        match effect {
            Effect::TakeMemory => self.take_memory(),
            Effect::GrantDevices => self.grant_devices(),
            Effect::OfflineCpu { cpu } => self.offline_cpu(*cpu),
            Effect::Place => self.place(),
            Effect::StartCpu { cpu } => self.start_cpu(*cpu),
            Effect::AwaitHello => self.await_hello(),
            Effect::StandBy => self.stand_by(),
            Effect::CheckHealth => self.check_health(),
            Effect::RunChecks => self.run_checks(),
            Effect::Freeze => self.freeze(),
            Effect::Seal => self.seal(),
            Effect::ReleaseAddress => self.release_address(),
            Effect::Activate { epoch } => self.activate(*epoch),
            Effect::DropAddress => self.drop_address(),
            Effect::ParkCpu { cpu } => self.park_cpu(*cpu),
            Effect::HandCpu { cpu } => self.hand_cpu(*cpu),
            Effect::Watch { period, then } => self.watch(*period, *then),
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
        if let Some(watch::NotCommitted(period)) = error.downcast_ref() {
            return Event::Failed(Cause::not_committed(*period));
        }
        let cause = match answer {
            Some(Unanswered::Silent { .. }) if matches!(effect, Effect::Watch { .. }) => Cause::successor_died(what),
            Some(Unanswered::Panicked(_)) => Cause::successor_died(what),
            Some(Unanswered::CalledOff) => Cause::called_off(CALLED_OFF_BY),
            Some(Unanswered::Silent { .. }) => Cause { blame: Blame::Successor, sort: Sort::Deadline, what },
            Some(Unanswered::Refused { .. }) => Cause::broken(Blame::Successor, what),
            None => Cause::broken(effect.carried_out_by(), what),
        };
        match (effect, answer) {
            (Effect::TakeMemory, _) => {
                self.refusal = error.downcast_ref().cloned();
                if self.undestroyed.is_some() { Event::Unknown(cause) } else { Event::Failed(cause) }
            }
            // A successor that says so has not taken the CPU, or has not committed.
            (Effect::HandCpu { .. } | Effect::Commit, Some(Unanswered::Refused { .. })) => Event::Failed(cause),
            _ => Event::Unknown(cause),
        }
    }

    /// The operator wants the machine back as it was.
    pub fn is_called_off(&self) -> bool {
        self.kernel.called_off.load(Ordering::SeqCst)
    }

    /// Time left for the effect under way.
    fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    fn plan(&self) -> Result<&'k Plan> {
        self.plan.context("what was to be placed is in its place already")
    }

    fn site(&self) -> Result<&Site> {
        self.site.as_ref().context("the successor has no memory yet")
    }

    fn placed(&mut self) -> Result<&mut Placed> {
        self.placed.as_mut().context("the successor is not placed yet")
    }

    fn epoch(&self) -> u64 {
        self.target.facts.epoch
    }

    // ---- granted ----------------------------------------------------------------------------------------------

    /// Takes the interface that the successor gets off this kernel's driver.
    fn grant_devices(&mut self) -> Result<()> {
        let Some(granted) = &self.target.nic else { return Ok(()) };
        // Before anything is changed: a batond that comes after one that dies here must know what is missing.
        self.note_granted(None)?;
        if let Some(link) = self.kernel.netlink.find(granted.mac)? {
            self.part_from(&link, granted.nic.address)?;
            let hardware = self.kernel.hardware.clone();
            let (_, folder) = hardware.function_of(&link.name)?;
            // Some drivers wait for their device, and some devices never answer.
            let function = folder.clone();
            self.unbound = within(self.until, "take the driver off the interface", move || hardware.unbind(&folder))?;
            self.note_granted(self.unbound.clone())?;
            self.pass_through(&function)?;
        }
        Ok(())
    }

    fn note_granted(&self, unbound: Option<sysfs::Unbound>) -> Result<()> {
        let granted = self.target.nic.as_ref().map(|nic| Granted { mac: nic.mac, bdf: nic.bdf, unbound });
        self.kernel.ledger.change(|pages| pages.granted = granted)
    }

    /// The successor knows of no IOMMU: what it tells a device to write goes where it says. Written down before it is done.
    fn pass_through(&self, function: &Path) -> Result<()> {
        let hardware = self.kernel.hardware.clone();
        let Some(translated) = hardware.translated(function)? else { return Ok(()) };
        self.kernel.ledger.change(|pages| pages.translated = Some(translated.clone()))?;
        within(self.until, "have the IOMMU pass the interface's DMA through", move || {
            hardware.pass_through(&translated)
        })
    }

    /// The undo of [`Hands::pass_through`].
    fn translate_again(&self) -> Result<()> {
        let hardware = self.kernel.hardware.clone();
        let Some(translated) = self.kernel.ledger.pages().translated else { return Ok(()) };
        within(self.until, "have the IOMMU translate the interface's DMA again", move || {
            hardware.translate_again(&translated)
        })?;
        self.kernel.ledger.change(|pages| pages.translated = None)
    }

    /// Clients that send to the interface that goes are sent to the one that stays.
    fn part_from(&mut self, going: &Link, own: Cidr) -> Result<()> {
        let Kernel { netlink, config, .. } = self.kernel;
        if let Some(cidr) = config.network.service_address.filter(|cidr| cidr.network() == own.network()) {
            let held = netlink.held(cidr)?;
            self.arp_rules = netlink.rules(&[held.link(), going])?;
            self.kernel.ledger.change(|pages| pages.arp_rules.clone_from(&self.arp_rules))?;
            netlink.part(&held, going)?;
        }
        Ok(())
    }

    /// The undo of [`Hands::grant_devices`]. The rules come back whatever becomes of the interface.
    fn take_devices_back(&mut self) -> Result<()> {
        let back = self.take_interface_back();
        let rules = self.arp_rules.clone();
        let restored = self.kernel.netlink.restore(rules).and_then(|()| {
            self.arp_rules.clear();
            self.kernel.ledger.change(|pages| pages.arp_rules.clear())
        });
        back?;
        restored?;
        self.kernel.ledger.change(|pages| pages.granted = None)
    }

    /// The interface is this kernel's again, or, if it never was, stopped: the successor ran with it, and its memory is not given to
    /// anybody before.
    fn take_interface_back(&mut self) -> Result<()> {
        let Some(granted) = &self.target.nic else { return Ok(()) };
        let Kernel { netlink, hardware, .. } = self.kernel;
        let mut link = netlink.find(granted.mac)?;
        if link.is_none() {
            self.translate_again()?;
            let (asked, unbound) = (hardware.clone(), self.unbound.clone());
            let let_drivers_look = self.follows;
            within(self.until, "give the interface back to its driver", move || match unbound {
                Some(unbound) => asked.bind(&unbound),
                // Whether the batond before this one had taken its driver off is not known.
                None if let_drivers_look => asked.probe_drivers(),
                None => Ok(()),
            })?;
            link = netlink.find(granted.mac)?;
        }
        let Some(link) = link else {
            if self.unbound.is_some() {
                bail!("the interface did not come back");
            }
            return pci::stop_without_driver(&**hardware, self.device, self.target.facts.ecam, granted.bdf);
        };
        self.unbound = None;
        netlink.link_up(&link)?;
        netlink.add(&link, granted.nic.address)
    }

    // ---- booting ----------------------------------------------------------------------------------------------

    /// Waits for the successor's agent.
    fn await_hello(&mut self) -> Result<()> {
        match self.first_word().context("the successor's agent has not answered")? {
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
            ToIncumbent::Failed { what, cause } => {
                Err(Unanswered::Refused { what: what.into(), cause: cause.into() }.into())
            }
            other => bail!("the successor began with {other:?}"),
        }
    }

    /// What the successor's agent says first. A kernel that panics before its agent comes up, or an agent that gives up before it can
    /// speak, is not waited for until the deadline.
    fn first_word(&mut self) -> Result<ToIncumbent> {
        let (patience, device) = (self.left(), self.device);
        loop {
            let left = self.left();
            let called_off = &self.kernel.called_off;
            let heard = self.placed()?.line.receive_unless(left.min(LOOK_AT_LOG), called_off);
            let silent = |error: &anyhow::Error| match error.downcast_ref() {
                Some(Unanswered::Silent { peer, .. }) => Some(*peer),
                _ => None,
            };
            let Some(peer) = heard.as_ref().err().and_then(silent) else { return heard };
            match self.kernel.successor_log.tells_of_end(device) {
                Ok(None) => {}
                Ok(Some(EndToldOf::Kernel)) => return Err(Unanswered::Panicked("successor").into()),
                Ok(Some(EndToldOf::Agent { why })) => {
                    return Err(Unanswered::Refused { what: "take over".to_owned(), cause: why }.into());
                }
                Err(error) => tracing::warn!("the successor's log cannot be read: {error:#}"),
            }
            if self.left().is_zero() {
                return Err(Unanswered::Silent { peer, patience }.into());
            }
        }
    }

    // ---- trial ------------------------------------------------------------------------------------------------

    fn ask<T>(&mut self, message: &ToSuccessor, answer: impl Fn(ToIncumbent) -> Option<T>) -> Result<T> {
        let patience = self.left();
        self.placed()?.line.ask(message, patience, answer)
    }

    /// The same in the trial, which an operator need not wait for: a successor that has not served is stopped without being asked.
    fn ask_on_trial<T>(&mut self, message: &ToSuccessor, answer: impl Fn(ToIncumbent) -> Option<T>) -> Result<T> {
        let (patience, called_off) = (self.left(), &self.kernel.called_off);
        self.placed()?.line.ask_unless(message, patience, called_off, answer)
    }

    /// Lets the successor's services attach and wait.
    fn stand_by(&mut self) -> Result<()> {
        // Whoever began to serve here from now on would do so unseen by the successor. A candidate that is taken back never serves: there a
        // service that ends and comes again goes on at once.
        if !self.is_trial() {
            self.kernel.services.wait();
        }
        let expected: Vec<String> = self.listed.iter().map(|crossing| crossing.name.clone()).collect();
        let standing = self.ask_on_trial(&ToSuccessor::StandBy, |answer| match answer {
            ToIncumbent::Standing { services } => Some(services),
            _ => None,
        })?;
        let to_kernel = |name: &str| self.takes_sessions() && Place::of(name).is_some();
        let files = self.kernel.files.crossings()?.into_iter();
        let keeping = files.filter(|file| !to_kernel(&file.name)).map(|file| file.service);
        if let Some(missing) = expected.into_iter().chain(keeping).find(|name| !standing.contains(name)) {
            bail!("service {missing} does not stand by in the successor (standing: {})", standing.join(", "));
        }
        if self.kernel.connections.are_wanted() {
            // Asked now, so that one which is too old for it ends here and not in the blackout.
            let none = ToSuccessor::Connections { at: 0, total: 0, bytes: Vec::new() };
            self.ask(&none, taken)
                .context("connections that services keep: is the successor's Baton older than this one?")?;
        }
        Ok(())
    }

    /// Asks the successor how it is, and looks up what the cutover will need.
    fn check_health(&mut self) -> Result<()> {
        self.check_own_health()?;
        self.ask_on_trial(&ToSuccessor::CheckHealth, |answer| matches!(answer, ToIncumbent::Healthy).then_some(()))?;
        let network = &self.kernel.config.network;
        if let (Some(service), Some(granted), false) =
            (network.service_address, &self.target.nic, network.skip_reach_check)
            && granted.nic.address.network() == service.network()
        {
            crate::machine::reach::check(granted.nic.address.address, self.until)?;
        }
        // No cutover follows a trial that is taken back.
        if self.is_trial() {
            return Ok(());
        }
        if let Some(cidr) = network.service_address {
            self.address = Some(self.kernel.netlink.held(cidr)?);
        }
        self.kernel.files.settle_again(self.device)?;
        // From here on a batond that dies can be followed by one that goes on.
        let crossing = self.crossing()?;
        self.kernel.ledger.change(|pages| pages.crossing = Some(crossing))
    }

    /// Whether all that is to cross still serves here: that none of it does is better known before the others are stopped.
    fn check_own_health(&self) -> Result<()> {
        self.kernel.services.all_serve(&self.listed, self.epoch())?;
        let programs = self.kernel.files.status();
        match programs.iter().find(|program| program.state != ServiceState::Serving) {
            Some(program) => bail!("program {} is {}, not serving", program.name, program.state),
            None => Ok(()),
        }
    }

    // ---- cutover: between freeze and activate nobody serves. No file, no log, nothing that can wait -----------------

    /// Stops the services at a request boundary; they seal their arenas.
    fn freeze(&mut self) -> Result<()> {
        let services = &self.kernel.services;
        services.all_serve(&self.listed, self.epoch())?;
        self.kernel.connections.open();
        let frozen = services.freeze(self.epoch(), self.until);
        self.kernel.connections.close();
        self.sealed = frozen?.into_keys().collect();
        self.kernel.files.freeze(self.device, &services.ranges(), self.until)
    }

    /// Every arena that the successor was told of has its receipt; and it is told of the connections.
    fn seal(&mut self) -> Result<()> {
        if let Some(open) = self.listed.iter().find(|crossing| !self.sealed.contains(&crossing.name)) {
            bail!("the arena of service {} is not sealed", open.name);
        }
        let connections = &self.kernel.connections;
        connections.tell(|part| self.ask(&part, taken))
    }

    /// Connections that were held go on, unless the successor has let them go: their peers may have heard things of it that this kernel
    /// does not know.
    fn let_connections_go(&self) {
        let theirs = self.placed.as_ref().map_or(0, |placed| placed.line.memory().load(words::CONNECTIONS_AT));
        match theirs {
            0 => self.kernel.connections.go_on(),
            _ => self.kernel.connections.forget(),
        }
    }

    /// The undo of [`Hands::freeze`]. No late word of the successor counts from here on.
    fn unfreeze(&mut self, epoch: u64) -> Result<()> {
        if let Some(placed) = &self.placed {
            placed.line.memory().store(words::EPOCH_AT, epoch);
        }
        // Each of these is done whatever becomes of the others. Programs first: nobody waits for an answer of theirs.
        let ended = self.device.set_end(End::Machine).map_err(Into::into);
        let programs = self.kernel.files.resume();
        // Before the services: what they write must be heard.
        self.let_connections_go();
        let resumed = self.kernel.services.unfreeze(epoch, self.until);
        let started = self.kernel.files.await_started(self.until);
        self.kernel.state().facts.epoch = epoch;
        // From now on services answer in this epoch, also to a batond that comes after this one.
        let written = self.kernel.ledger.change(|pages| pages.epoch = epoch);
        let failed = resumed.failed.iter().map(|(name, why)| format!("service {name} does not go on: {why}"));
        let rest =
            [ended, programs, started, written].into_iter().filter_map(Result::err).map(|error| format!("{error:#}"));
        let failed: Vec<String> = failed.chain(rest).collect();
        if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
    }

    /// This kernel speaks for the service address no longer; [`Hands::drop_address`] does the rest when nobody waits for it.
    fn release_address(&mut self) -> Result<()> {
        self.address.as_ref().map_or(Ok(()), HeldAddress::hush)
    }

    /// The undo of [`Hands::release_address`].
    fn take_address_back(&mut self) -> Result<()> {
        self.address.as_ref().map_or(Ok(()), |held| self.kernel.netlink.take_again(held))
    }

    /// Gives the epoch to the successor, and waits until its services answer.
    fn activate(&mut self, epoch: u64) -> Result<()> {
        // From here on the machine may be the successor's, whatever becomes of this kernel.
        self.device.set_end(End::Alone)?;
        let now = Moment::now()?;
        let memory = self.placed()?.line.memory();
        memory.store(words::CLOCK_NS_AT, now.unix_ns);
        memory.store(words::CLOCK_TSC_AT, now.tsc);
        memory.store(words::EPOCH_AT, epoch);
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
        let dropped = self.address.as_ref().map_or(Ok(()), |held| self.kernel.netlink.drop_held(held));
        if let Err(error) = &dropped {
            // The update need not fail for it: no ARP request for this address is answered here any more, dropped or not.
            tracing::warn!("{error:#}");
        }
        // As long as this kernel has the address, what still comes here for a connection must find its socket, which loses it: without one
        // it would be answered with a RST.
        if dropped.is_ok() {
            self.kernel.connections.forget();
        }
        Ok(())
    }

    // ---- commit ---------------------------------------------------------------------------------------------------

    /// Passes the point of no return.
    fn commit(&mut self) -> Result<()> {
        self.ask(&sizes::commit(self.timeline.marks()), |answer| matches!(answer, ToIncumbent::Committed).then_some(()))
    }

    /// Stops everything in this kernel that could still write memory by itself.
    fn quiesce_devices(&mut self) -> Result<()> {
        std::thread::sleep(FAREWELL);
        self.kernel.services.stop();
        // Whatever does not get to its disk in time is no reason to stay: this kernel has promised to leave.
        let hardware = self.kernel.hardware.clone();
        let written = within(self.until, "write everything to the disks", move || {
            hardware.sync();
            Ok(())
        });
        if let Err(error) = written {
            tracing::error!("{error:#}");
        }
        let granted: Vec<_> = self.target.nic.iter().map(|granted| granted.bdf).collect();
        let stopped = self.kernel.hardware.quiesce(&granted)?;
        tracing::info!("quiesced: {}", stopped.join(" "));
        // Last: this kernel hears no device any more. A pin that stays open would interrupt a CPU that is the successor's by then,
        // and, if it is a level, without end.
        for address in self.kernel.hardware.io_apics() {
            if let Err(error) = self.device.mask_ioapic(address.into()) {
                tracing::error!("the I/O APIC at {address:#x} goes on interrupting: {error}");
            }
        }
        // Its tables get another owner with this kernel's memory. What the successor's functions do passes untranslated already.
        if let Err(error) = self.device.switch_iommu_off() {
            tracing::error!("the IOMMU goes on translating by this kernel's tables: {error}");
        }
        Ok(())
    }
}
