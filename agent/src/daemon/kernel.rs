//! This kernel, as batond holds it: the device, the services, the machine's facts, and how far an update has come.
//!
//! Shared by all threads. What changes is behind one lock ([`State`]); nothing waits while it holds it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use kexec_core::device::{Device, DeviceError, TakeMemory};
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates};

use crate::daemon::config::Config;
use crate::daemon::control::{ServiceStatus, Status, UpdateStatus};
use crate::daemon::outcome::Failure;
use crate::machine::facts::{Facts, managed_memory};
use crate::machine::net::Netlink;
use crate::recovery::ledger::{self, Ledger};
use crate::recovery::recover;
use crate::services::arenas::{Arena, Piece};
use crate::services::files::Store;
use crate::services::{Admitted, Services};
use crate::takeover::birth::Birth;

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

/// This kernel.
pub struct Kernel {
    /// The configuration.
    pub config: Config,
    /// Where it was read from.
    pub config_path: PathBuf,
    /// Interfaces and addresses.
    pub netlink: Netlink,
    /// The services.
    pub services: Services,
    /// The files that programs keep.
    pub files: Store,
    /// What a batond that comes after this one must know.
    pub ledger: Arc<Ledger>,
    /// How this kernel came to be: nothing when the firmware booted it.
    pub birth: Option<Birth>,
    /// Held by the update that runs.
    pub updating: Mutex<()>,
    device: OnceLock<Device>,
    release: String,
    state: Mutex<State>,
}

impl Kernel {
    /// Opens the device and finds out what this kernel is.
    pub fn open(config: Config, config_path: PathBuf) -> Result<Kernel> {
        let netlink = Netlink::open()?;
        let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
        let device = OnceLock::new();
        let ledger = Ledger::open(Path::new(ledger::PATH))
            .context("what an earlier batond knew of arenas is lost; remove that file to begin without them")?;
        let written = ledger.pages();
        let birth = Birth::find(written.drained)?.map(|(birth, opened)| {
            device.get_or_init(|| opened);
            birth
        });
        // Before anything is looked at: a CPU or an interface may be missing. Without the module, nothing can be.
        let settled = birth.is_none() || written.drained;
        if let (None, Ok(opened)) = (device.get(), Device::open()) {
            device.get_or_init(|| opened);
        }
        if let Some(opened) = device.get().filter(|_| settled) {
            recover::recover(opened, &netlink, &config, birth.as_ref(), &ledger);
        }
        let (mut facts, update) = match &birth {
            Some(birth) => (birth.facts(), Some(birth.update_status(&release, written.drained))),
            None => {
                if config.network.configure {
                    configure_network(&config, &netlink)?;
                }
                (Facts::explore(&config, &netlink)?, None)
            }
        };
        facts.epoch = facts.epoch.max(written.epoch);
        let successor = !settled;
        let state = Mutex::new(State { successor, facts, update });
        let ledger = Arc::new(ledger);
        let services = Services::of_ledger(ledger.clone(), device.get());
        let updating = Mutex::new(());
        let files = Store::of_ledger(ledger.clone());
        if !successor {
            files.begin();
            services.all_inherited();
        }
        Ok(Kernel { config, config_path, netlink, services, files, ledger, birth, updating, device, release, state })
    }

    /// The module. Opened at first use, so that batond runs, and says what is missing, on a machine without it.
    pub fn device(&self) -> Result<&Device> {
        if let Some(device) = self.device.get() {
            return Ok(device);
        }
        let opened = Device::open().map_err(|error| unusable(&error))?;
        Ok(self.device.get_or_init(|| opened))
    }

    /// The lock on what changes.
    pub fn state(&self) -> MutexGuard<'_, State> {
        // Each change is a whole one, so a panicked holder leaves nothing half done.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Release of this kernel.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Whether this kernel has not finished taking over.
    pub fn is_successor(&self) -> bool {
        self.state().successor
    }

    /// The role by its name.
    pub fn role(&self) -> &'static str {
        if self.is_successor() { "successor" } else { "incumbent" }
    }

    /// The machine, as known now.
    pub fn facts(&self) -> Facts {
        self.state().facts.clone()
    }

    /// Notes how far the update has come.
    pub fn set_phase(&self, phase: &str) {
        if let Some(update) = &mut self.state().update {
            phase.clone_into(&mut update.phase);
        }
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
                Some(service) if service.state == "serving" => "bereft".clone_into(&mut service.state),
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
            role: if state.successor { "successor" } else { "incumbent" }.to_owned(),
            epoch: state.facts.epoch,
            hops: state.facts.hops,
            services,
            update: state.update.clone(),
        }
    }

    /// Takes a service in. In a successor it stands by, whatever it asks.
    pub fn admit(&self, stream: UnixStream) -> Result<Admitted> {
        let epoch = {
            let state = self.state();
            (!state.successor).then_some(state.facts.epoch)
        };
        let admitted = self.services.admit(stream, epoch, |len, arenas| self.allocate_arena(len, arenas))?;
        // One that begins anew has seen that it has no files. One that serves on has not, and must keep them again.
        if !admitted.was_serving {
            self.files.give_up(&admitted.name)?;
        }
        Ok(admitted)
    }

    fn allocate_arena(&self, len: u64, arenas: &RangeSet) -> Result<Arena> {
        let started = Instant::now();
        let pieces = Piece::take(self.device()?, &arenas.union(&self.files.ranges()), len)?;
        let arena = Arena { pieces, fresh: true };
        let (mib, pieces, took) = (arena.bytes() >> 20, arena.ranges().len(), started.elapsed());
        tracing::info!("an arena of {mib} MiB in {pieces} pieces, had in {took:.1?}");
        Ok(arena)
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
        if self.files.give_up(service)? && !self.services.has_left_arena(service) {
            return Ok(0);
        }
        let arena = self.services.remove(service)?;
        let len = arena.bytes();
        match arena.give_back(self.device()?) {
            Ok(()) => Ok(len),
            Err((kept, error)) => {
                self.services.expect(service, kept);
                Err(error).with_context(|| format!("somebody still has the arena of {service}"))
            }
        }
    }

    /// Keeps updates from beginning: what lies where must not change while one runs.
    fn between_updates(&self) -> Result<MutexGuard<'_, ()>> {
        let busy = "an update runs: ask again when it is over";
        match self.updating.try_lock() {
            _ if self.is_successor() => bail!(busy),
            Ok(held) => Ok(held),
            Err(TryLockError::Poisoned(held)) => Ok(held.into_inner()),
            Err(TryLockError::WouldBlock) => bail!(busy),
        }
    }

    /// Takes `len` contiguous bytes out of this kernel's allocator, wherever they can be had.
    pub fn take_contiguous(&self, instance: u32, len: u64, grain: u64, avoid: &RangeSet) -> Result<Range> {
        let device = self.device()?;
        let wish = Wish { size: len, grain, below: None };
        let mut tried = 0;
        for range in candidates(&managed_memory()?, avoid, &wish)? {
            tried += 1;
            match device.take_memory(instance, range, TakeMemory::Alloc) {
                Ok(()) => return Ok(range),
                Err(error) if error.is_busy() => {}
                Err(DeviceError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Failure::precondition(
            format!(
                "no {} MiB of contiguous memory: {tried} places tried, in each of them something cannot be moved",
                len >> 20
            ),
            "free memory (stop a program, drop caches), ask for a smaller update.region_mib, or reserve memory at boot \
             with memmap=SIZE$ADDRESS",
        ))
        .context("cannot take memory")
    }
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
fn configure_network(config: &Config, netlink: &Netlink) -> Result<()> {
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
