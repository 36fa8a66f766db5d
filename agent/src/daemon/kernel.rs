//! This kernel, as batond holds it: the device, the services, the machine's facts, and how far an update has come.
//!
//! Shared by all threads. What changes is behind one lock ([`State`]); nothing waits while it holds it.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use baton_sdk::agent_end::AgentEnd;
use handover::update::phase::Phase;
use kexec_core::cmdline::control_block_of;
use kexec_core::device::{Device, DeviceError, TakeMemory};
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates};
use kexec_core::registry;

use crate::daemon::config::Config;
use crate::daemon::control::{Role, ServiceState, ServiceStatus, Stage, Status, UpdateStatus};
use crate::daemon::listen::Peer;
use crate::daemon::outcome::{Class, Failure};
use crate::daemon::probation::Probation;
use crate::daemon::successor_log::{self, Log, SuccessorLog};
use crate::machine::facts::Facts;
use crate::machine::hardware::{self, Hardware};
use crate::machine::net::{Net, Netlink};
use crate::recovery::journal::JOURNAL;
use crate::recovery::ledger::{self, Ledger};
use crate::services::access::Access;
use crate::services::arenas::{Arena, Piece};
use crate::services::coming::Admitted;
use crate::services::connections::Connections;
use crate::services::files::Store;
use crate::services::{Admission, Land, Services, holders};
use crate::takeover::birth::Birth;
use crate::userland::kernels;

/// What changes.
#[derive(Debug)]
pub struct State {
    /// Not yet drained.
    pub successor: bool,
    /// The machine.
    pub facts: Facts,
    /// The update that brought this kernel here, or the one that runs.
    pub update: Option<UpdateStatus>,
}

/// What a `batond` stands on before it looks at anything: alone on this machine, with what an earlier one has left in writing.
pub struct Ground {
    /// The configuration.
    pub config: Config,
    /// Where it was read from.
    pub config_path: PathBuf,
    /// Interfaces and addresses.
    pub netlink: Box<dyn Net>,
    /// CPUs, drivers, memory.
    pub hardware: Arc<dyn Hardware>,
    /// What a batond that comes after this one must know.
    pub ledger: Arc<Ledger>,
    /// How this kernel came to be: nothing when the firmware booted it.
    pub birth: Option<Birth>,
    device: OnceLock<Device>,
    release: String,
}

impl Ground {
    /// Opens the device, which no other agent may have, and reads what was left in writing.
    ///
    /// # Errors
    /// Another batond lives; a ledger or a handover record that cannot be read.
    pub fn open(config: Config, config_path: PathBuf) -> Result<Ground> {
        let netlink = Box::new(Netlink::open()?);
        let hardware: Arc<dyn Hardware> = Arc::new(hardware::Live);
        let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
        let device = OnceLock::new();
        // First of all: whatever is found below may belong to an update that another one makes.
        if let Ok(opened) = Device::open() {
            device.get_or_init(|| opened);
        }
        if let Some(opened) = device.get() {
            claim(opened)?;
        }
        let ledger = Ledger::open(Path::new(ledger::PATH))
            .context("what an earlier batond knew of arenas is lost; remove that file to begin without them")?;
        let birth = match control_block_of(&fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?) {
            None => None,
            Some(base) => Some(Birth::read(device_or_why(&device)?, base, ledger.pages().drained)?),
        };
        Ok(Ground { config, config_path, netlink, hardware, ledger: Arc::new(ledger), birth, device, release })
    }

    /// Whether this kernel has the machine: one that has not taken it over yet is left to do so.
    pub fn is_settled(&self) -> bool {
        self.birth.is_none() || self.ledger.pages().drained
    }
}

/// Nobody else may have this machine's module.
fn claim(device: &Device) -> Result<()> {
    if device.hold_alone().context("cannot lock the device of the module")? {
        return Ok(());
    }
    let cause = "another batond has this machine: two would each take back what the other one holds";
    Err(Failure::new(Class::Busy, cause, "talk to that one (`baton status`), or stop it first").into())
}

/// The module, opened and nobody else's.
fn device_or_why(device: &OnceLock<Device>) -> Result<&Device> {
    if let Some(device) = device.get() {
        return Ok(device);
    }
    let opened = Device::open().map_err(|error| unusable(&error))?;
    claim(&opened)?;
    Ok(device.get_or_init(|| opened))
}

/// This kernel.
pub struct Kernel {
    /// The configuration.
    pub config: Config,
    /// Where it was read from.
    pub config_path: PathBuf,
    /// Interfaces and addresses.
    pub netlink: Box<dyn Net>,
    /// CPUs, drivers, memory.
    pub hardware: Arc<dyn Hardware>,
    /// The services.
    pub services: Services,
    /// Who may be which of them.
    pub access: Access,
    /// The files that programs keep.
    pub files: Store,
    /// The connections that cross.
    pub connections: Connections,
    /// What a batond that comes after this one must know.
    pub ledger: Arc<Ledger>,
    /// Where the journal of updates is.
    pub journal: PathBuf,
    /// How this kernel came to be: nothing when the firmware booted it.
    pub birth: Option<Birth>,
    /// Held by the update that runs.
    pub updating: Mutex<()>,
    /// The operator wants the update that runs to be undone. It is heeded where the update can still turn back.
    pub called_off: AtomicBool,
    /// Whether a successor is being watched, and what an operator says of it.
    pub probation: Probation,
    /// What the successor says while it has not taken over.
    pub successor_log: SuccessorLog,
    device: OnceLock<Device>,
    release: String,
    state: Mutex<State>,
}

impl Kernel {
    /// Finds out what this kernel is. Nobody is let in yet: see [`Kernel::begin`].
    pub fn find(ground: Ground) -> Result<Kernel> {
        let facts = match &ground.birth {
            Some(birth) => birth.facts(),
            None => Facts::explore(&ground.config, &*ground.netlink)?,
        };
        Kernel::of(ground, facts)
    }

    fn of(ground: Ground, facts: Facts) -> Result<Kernel> {
        let settled = ground.is_settled();
        let Ground { config, config_path, netlink, hardware, ledger, birth, device, release } = ground;
        let written = ledger.pages();
        let update = birth.as_ref().map(|birth| birth.update_status(&release, written.drained));
        let facts = Facts { epoch: facts.epoch.max(written.epoch), ..facts };
        let state = Mutex::new(State { successor: !settled, facts, update });
        let services = Services::of_ledger(ledger.clone(), device.get())?;
        let (updating, called_off) = (Mutex::new(()), AtomicBool::new(false));
        let successor_log = SuccessorLog::default();
        let files = Store::of_ledger(ledger.clone());
        let access = Access::of(&config);
        Ok(Kernel {
            config,
            config_path,
            netlink,
            hardware,
            services,
            access,
            files,
            connections: Connections::default(),
            ledger,
            journal: JOURNAL.into(),
            birth,
            updating,
            called_off,
            probation: Probation::default(),
            successor_log,
            device,
            release,
            state,
        })
    }

    /// One on a machine that a test plays, with ledger and journal in `folder`.
    #[cfg(test)]
    pub fn played(
        folder: &Path,
        config: Config,
        device: Device,
        netlink: Box<dyn Net>,
        hardware: Arc<dyn Hardware>,
        birth: Option<Birth>,
    ) -> Kernel {
        let ledger = Arc::new(Ledger::open(&folder.join("arenas.json")).unwrap());
        let held = OnceLock::new();
        held.get_or_init(|| device);
        let ground = Ground {
            config,
            config_path: folder.join("config.toml"),
            netlink,
            hardware,
            ledger,
            birth,
            device: held,
            release: "6.12.1-played".to_owned(),
        };
        let facts = ground.birth.as_ref().map_or_else(Facts::default, Birth::facts);
        Kernel { journal: folder.join("journal.jsonl"), ..Kernel::of(ground, facts).unwrap() }
    }

    /// Lets services and programs in, where they may serve here. What an earlier batond had taken away from this kernel must be back by
    /// now, or its successor serves.
    pub fn begin(&self) -> Result<()> {
        if self.is_successor() {
            return Ok(()); // it takes over first
        }
        if let Some(why) = serving_successor(&*self.hardware)? {
            tracing::error!("{why}");
            self.files.elsewhere();
            self.services.elsewhere(why);
            return Ok(());
        }
        if let Admission::Elsewhere { .. } = self.services.admission() {
            self.files.elsewhere();
            return Ok(());
        }
        if self.birth.is_none() {
            // The service address, too: nobody else has it.
            if self.config.network.configure {
                configure_network(&self.config, &*self.netlink)?;
            }
            // An interface that was missing may have come back since.
            let facts = Facts::explore(&self.config, &*self.netlink)?;
            let mut state = self.state();
            let epoch = state.facts.epoch;
            state.facts = Facts { epoch, ..facts };
        }
        self.files.begin();
        self.services.open(self.facts().epoch);
        Ok(())
    }

    /// The module, if it was loaded when this batond started.
    pub fn loaded_device(&self) -> Option<&Device> {
        self.device.get()
    }

    /// The module. Opened at first use, so that batond runs, and says what is missing, on a machine without it.
    pub fn device(&self) -> Result<&Device> {
        device_or_why(&self.device)
    }

    /// The lock on what changes.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Release of this kernel.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Whether this kernel has not finished taking over.
    pub fn is_successor(&self) -> bool {
        self.state().successor
    }

    /// What this kernel is to the machine.
    pub fn role(&self) -> Role {
        if self.is_successor() { Role::Successor } else { Role::Incumbent }
    }

    /// The machine, as known now.
    pub fn facts(&self) -> Facts {
        self.state().facts.clone()
    }

    /// Notes how far the update has come.
    pub fn set_phase(&self, phase: Phase) {
        self.set_stage(Stage::In(phase));
    }

    /// The same, of an end that is no phase.
    pub fn set_stage(&self, stage: Stage) {
        self.note(|update| update.phase = stage);
    }

    /// Changes what is told of the update.
    pub fn note(&self, change: impl FnOnce(&mut UpdateStatus)) {
        if let Some(update) = &mut self.state().update {
            change(update);
        }
    }

    /// Services, and programs that keep files. A service whose files an earlier batond had is both.
    pub fn who_serves(&self) -> Vec<ServiceStatus> {
        let mut all = self.services.status();
        for program in self.files.status() {
            match all.iter_mut().find(|service| service.name == program.name) {
                None => all.push(program),
                Some(service) if service.state == ServiceState::Serving => service.state = ServiceState::Bereft,
                Some(_) => {}
            }
        }
        all
    }

    /// How things stand.
    pub fn status(&self) -> Status {
        let services = self.who_serves();
        let state = self.state();
        Status {
            schema_version: 1,
            kernel_release: self.release.clone(),
            role: if state.successor { Role::Successor } else { Role::Incumbent },
            epoch: state.facts.epoch,
            hops: state.facts.hops,
            services,
            update: state.update.clone(),
        }
    }

    /// The log of the successor that runs, or of the last one that failed: what is newer than record `after`.
    pub fn log(&self, instance: Option<u32>, after: Option<u64>) -> Result<Log> {
        let asked = |log: &Log| instance.is_none_or(|id| id == log.instance);
        // A machine without the module has no successor.
        let live = self.device().ok().map(|device| self.successor_log.read(device, after)).transpose()?.flatten();
        if let Some(log) = live.filter(asked) {
            return Ok(log);
        }
        let mut log = successor_log::kept(Path::new(successor_log::KEPT))?.filter(asked).with_context(|| {
            let which = instance.map_or_else(|| "no successor".to_owned(), |id| format!("no instance {id}"));
            format!("{which} runs, and none that failed has left its log; this kernel's own is shown by dmesg(1)")
        })?;
        log.records.retain(|record| after.is_none_or(|after| record.seq > after));
        Ok(log)
    }

    /// Takes a service in that has greeted.
    pub fn admit(&self, peer: Peer, end: AgentEnd) -> Result<Admitted> {
        let admitted = self.services.admit(peer, end, &self.access, self)?;
        // One that begins anew has seen that it has no files. One that serves on has not, and must keep them again.
        if !admitted.was_serving {
            self.files.give_up(None, &admitted.name)?;
        }
        Ok(admitted)
    }

    /// Makes a service's arena longer; gives the files of what is new, in order.
    pub fn grow_arena(&self, service: &str, more: u64) -> Result<Vec<(OwnedFd, u64)>> {
        let _held = self.between_updates()?;
        let device = self.device()?;
        let pieces = Piece::take(device, &self.services.ranges().union(&self.files.ranges()), more)?;
        let copies = pieces.iter().map(|piece| Ok((piece.file.try_clone()?, piece.range.len()))).collect::<Result<_>>();
        match self.services.extend(service, pieces) {
            Ok(()) => copies,
            Err(pieces) => {
                drop(copies);
                Arena { pieces, fresh: true }.give_back(device).map_err(|(_, error)| error)?;
                bail!("there is no service {service} with an arena");
            }
        }
    }

    /// Keeps a program's memfd, beside the arenas.
    pub fn keep_file(&self, service: &str, name: &str, file: OwnedFd) -> Result<()> {
        self.files.keep(self.device()?, &self.services.ranges(), service, name, file)
    }

    /// Gives the arena of a service that has left to the allocator; says how much it was. A program whose files died with an
    /// earlier batond is no longer waited for.
    pub fn release_arena(&self, service: &str) -> Result<u64> {
        let _held = self.between_updates()?;
        if self.files.give_up(self.device.get(), service)? && !self.services.has_left_arena(service) {
            return Ok(0);
        }
        let arena = self.services.remove(service, self)?;
        let len = arena.bytes();
        match arena.give_back(self.device()?) {
            Ok(()) => Ok(len),
            Err((kept, error)) => {
                self.services.expect(service, kept);
                Err(error).with_context(|| format!("somebody still has the arena of {service}"))
            }
        }
    }

    /// Calls off the update that runs. It turns back at the next step that can be undone; whoever asked for it hears so.
    ///
    /// # Errors
    /// None runs here.
    pub fn call_off(&self) -> Result<(), Failure> {
        match self.updating.try_lock() {
            Err(TryLockError::WouldBlock) => {
                self.called_off.store(true, Ordering::SeqCst);
                Ok(())
            }
            _ => Err(Failure::precondition("no update runs in this kernel", "see `baton status`")),
        }
    }

    /// The successor that is watched stays, without waiting for the end of its time.
    ///
    /// # Errors
    /// None is watched here.
    pub fn commit(&self) -> Result<(), Failure> {
        if self.probation.commit() { Ok(()) } else { Err(self.not_on_probation("commit")) }
    }

    /// The successor that is watched hands everything back.
    ///
    /// # Errors
    /// None is watched here.
    pub fn roll_back(&self) -> Result<(), Failure> {
        if !self.probation.is_watching() {
            return Err(self.not_on_probation("roll back"));
        }
        self.call_off()
    }

    fn not_on_probation(&self, what: &str) -> Failure {
        if self.is_successor() {
            return Failure::precondition(
                format!("this kernel cannot {what} what it is itself on probation for"),
                "say it to the kernel that watches: its batond, on the machine's last CPU, waits for it",
            );
        }
        let advice = match self.updating.try_lock() {
            Err(TryLockError::WouldBlock) => {
                "`baton status` shows how far the update is; `baton cancel` calls it off as long as it can still be undone"
            }
            _ => "begin an update with `baton upgrade --probation TIME`",
        };
        Failure::precondition(format!("nothing to {what}: no successor is on probation"), advice)
    }

    /// Keeps updates from beginning: what lies where must not change while one runs.
    fn between_updates(&self) -> Result<MutexGuard<'_, ()>> {
        let busy = || Failure::new(Class::Busy, "an update runs", "ask again when it is over");
        let held = match self.updating.try_lock() {
            _ if self.is_successor() => return Err(busy().into()),
            Ok(held) => held,
            Err(TryLockError::Poisoned(held)) => held.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(busy().into()),
        };
        // An update that an earlier batond began, and that nobody has finished or undone, runs on without a lock.
        match kernels::others(&*self.hardware)?.first() {
            None => Ok(held),
            Some(other) => Err(Failure::new(
                Class::Busy,
                format!(
                    "instance {} ({}, {}) may have this memory: it is {}",
                    other.id, other.name, other.image, other.state
                ),
                "finish or undo that update first; `baton status` says how far it is",
            )
            .into()),
        }
    }

    /// Takes `len` contiguous bytes out of this kernel's allocator, wherever they can be had.
    pub fn take_contiguous(&self, instance: u32, len: u64, grain: u64, avoid: &RangeSet) -> Result<Range> {
        let device = self.device()?;
        let wish = Wish { size: len, grain };
        let mut tried = 0;
        for range in candidates(&self.hardware.movable_memory(&self.facts().ram)?, avoid, &wish)? {
            tried += 1;
            match device.take_memory(instance, range, TakeMemory::Alloc) {
                Ok(()) => return Ok(range),
                Err(error) if error.is_busy() => {}
                Err(DeviceError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(no_place(len, tried)).context("cannot take memory")
    }
}

/// No range of memory can be had for a successor.
pub fn no_place(len: u64, tried: usize) -> Failure {
    let why = if tried == 0 { "no range of it is that long" } else { "in each of them something cannot be moved" };
    Failure::precondition(
        format!("no {} MiB of contiguous memory: {tried} places tried, {why}", len >> 20),
        "free memory (stop a program, drop caches), ask for a smaller update.region_mib, or reserve memory at boot with \
         memmap=SIZE$ADDRESS and name it in update.reserved",
    )
}

impl Land for Kernel {
    fn take(&self, len: u64, kept: &RangeSet) -> Result<Arena> {
        let started = Instant::now();
        let pieces = Piece::take(self.device()?, &kept.union(&self.files.ranges()), len)?;
        let arena = Arena { pieces, fresh: true };
        let (mib, pieces, took) = (arena.bytes() >> 20, arena.ranges().len(), started.elapsed());
        tracing::info!("an arena of {mib} MiB in {pieces} pieces, had in {took:.1?}");
        Ok(arena)
    }

    fn give_back(&self, arena: Arena) -> Result<(), (Arena, anyhow::Error)> {
        match self.device() {
            Ok(device) => arena.give_back(device),
            Err(error) => Err((arena, error)),
        }
    }

    fn holders(&self, ranges: &[Range]) -> Result<Vec<i32>> {
        holders::of(ranges)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Each change is a whole one, so a panicked holder leaves nothing half done.
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether an instance beside this kernel serves, though this batond begins in it: an earlier one died after the cutover.
/// Then the arenas are that kernel's.
fn serving_successor(hardware: &dyn Hardware) -> Result<Option<String>> {
    let serving = kernels::others(hardware)?.into_iter().find(|instance| instance.state == registry::State::Serving);
    Ok(serving.map(|instance| {
        format!(
            "the successor serves (instance {}, {}): nobody serves here, and nothing is given away",
            instance.id, instance.image
        )
    }))
}

/// A module that cannot be used, and what to do about it.
pub fn unusable(error: &DeviceError) -> Failure {
    let advice = match error {
        DeviceError::ModuleMissing { .. } => "load it with `modprobe baton`; `dkms install baton/1` builds it",
        DeviceError::OtherVersion { .. } | DeviceError::NotBaton { .. } => {
            "install the module of the same version as this agent, and load it"
        }
        DeviceError::Lockdown => "boot without lockdown (it follows Secure Boot): baton does not get around it",
        _ => "run batond as root",
    };
    Failure::precondition(error.to_string(), advice)
}

/// Gives every configured interface its own address, and the first of them the service address.
fn configure_network(config: &Config, netlink: &dyn Net) -> Result<()> {
    let mut service = config.network.service_address;
    for nic in &config.network.nic {
        let Some(link) = netlink.find(crate::machine::net::parse_mac(&nic.mac)?)? else { continue };
        netlink.link_up(&link)?;
        netlink.add(&link, nic.address)?;
        if let Some(cidr) = service.take() {
            netlink.add(&link, cidr)?;
        }
    }
    Ok(())
}
