//! The services of this kernel, as batond holds them: who is connected, where each one's arena is, and how it stands.
//!
//! A service is as long as its connection is ([`baton_sdk::agent_end::AgentEnd`]). Who may be one is [`access`]'s to say; whether it may serve now is
//! [`Admission`]'s. Orders in the blackout go to all services first, and their answers are gathered after, under one deadline
//! for all; an order to go on goes to everybody, whatever becomes of one of them. What a service says when nobody waits for it
//! is heard by [`Services::mind`].
//!
//! One that comes is taken in by [`coming`]; how each stands is its slot's to say; orders to many are sent and gathered in `answers`.
//!
//! What a test must play is a [`Land`]: where arenas come from, and who has them mapped.

pub mod access;
mod answers;
pub mod arenas;
pub mod coming;
pub mod connections;
pub mod files;
pub mod holders;
pub mod resize;
mod slot;
#[cfg(test)]
mod tests;
pub mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_sdk::protocol::{Standing, ToAgent, ToService};
use kexec_core::device::Device;
use kexec_core::memory_map::{Range, RangeSet};
use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};

use crate::daemon::control::ServiceStatus;
use crate::recovery::ledger::{Entry, Ledger};
use crate::services::answers::{Resumed, Seal, activated, gather, order_all, report};
use crate::services::arenas::{Arena, Piece};
pub use crate::services::slot::{Admission, Crossing};
use crate::services::slot::{Inner, Slot};
use crate::services::watched::Watched;

/// Where arenas come from, and who has them.
pub trait Land: Sync {
    /// Takes `len` bytes for an arena, beside `kept`, which is what all others have.
    fn take(&self, len: u64, kept: &RangeSet) -> Result<Arena>;
    /// Gives an arena's memory back. While somebody has it mapped nothing is done, and it is handed back.
    fn give_back(&self, arena: Arena) -> Result<(), (Arena, anyhow::Error)>;
    /// The processes that have some of this memory mapped.
    fn holders(&self, ranges: &[Range]) -> Result<Vec<i32>>;
}

/// All services of this kernel.
#[derive(Debug)]
pub struct Services {
    inner: Watched<Inner>,
    /// Held while memory is taken for an arena, so that two do not count the same memory as free. [`Services::inner`] is not.
    taking: Mutex<()>,
    /// For a batond that comes after this one.
    ledger: Arc<Ledger>,
    /// Tells of each service that says something, or has gone.
    events: Epoll,
}

impl Services {
    /// None yet, and none admitted before [`Services::all_inherited`] or [`Services::open`].
    pub fn new(ledger: Arc<Ledger>) -> Result<Services> {
        let events = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot wait for services")?;
        Ok(Services { inner: Watched::default(), taking: Mutex::default(), ledger, events })
    }

    /// Those of a kernel whose batond can be started again: what an earlier one had is found again.
    pub fn of_ledger(ledger: Arc<Ledger>, device: Option<&Device>) -> Result<Services> {
        let services = Services::new(ledger)?;
        let mut inner = services.inner.lock();
        for (name, entry) in services.ledger.pages().services {
            let pieces = entry.pieces.iter().map(|&(start, len)| Range::with_len(start, len));
            let found = device.context("the module is not there").and_then(|device| {
                let pieces = pieces.collect::<Option<Vec<_>>>().context("it passes the end of memory")?;
                Arena::find_again(device, pieces, entry.fresh)
            });
            let slot = inner.slots.entry(name.clone()).or_default();
            (slot.process, slot.owner) = (entry.process, entry.owner);
            match found {
                Ok(arena) => {
                    tracing::info!(service = name, bytes = arena.bytes(), "the arena that an earlier batond gave it");
                    (slot.served, slot.arena) = (!arena.fresh, Some(arena));
                    if entry.schema_kind != 0 {
                        inner.left.insert(name, (entry.schema_kind, entry.schema_version));
                    }
                }
                Err(error) => tracing::error!("the arena of service {name} is lost: {error:#}"),
            }
        }
        drop(inner);
        Ok(services)
    }

    /// Writes down who has which arena.
    fn note(&self, slots: &BTreeMap<String, Slot>) -> Result<()> {
        self.ledger.change(|pages| {
            let entry = |(name, slot): (&String, &Slot)| {
                let arena = slot.arena.as_ref()?;
                let before = pages.services.get(name);
                let (schema_kind, schema_version) = match &slot.hello {
                    Some(hello) => (hello.schema_kind, hello.schema_version),
                    None => before.map_or((0, 0), |before| (before.schema_kind, before.schema_version)),
                };
                let pieces = arena.pieces.iter().map(|piece| (piece.range.start(), piece.range.len())).collect();
                let (fresh, process, owner) = (arena.fresh, slot.process, slot.owner);
                Some((name.clone(), Entry { schema_kind, schema_version, pieces, fresh, process, owner }))
            };
            pages.services = slots.iter().filter_map(entry).collect();
        })
    }

    // ---- who may serve ---------------------------------------------------------------------------------------------

    /// What becomes of one that comes now.
    pub fn admission(&self) -> Admission {
        self.inner.lock().admission.clone()
    }

    /// No more arenas come from a predecessor: its services may come and stand by. Does nothing where that was said before.
    pub fn all_inherited(&self) {
        let mut inner = self.inner.lock();
        if inner.admission == Admission::Inheriting {
            inner.admission = Admission::Waiting;
        }
        drop(inner);
        self.inner.notify();
    }

    /// This kernel's services serve, in this epoch: who stands by or is frozen is told so, and who waits at the door comes
    /// in. What they answer is not waited for.
    pub fn open(&self, epoch: u64) {
        let mut inner = self.inner.lock();
        let (told, late) = inner.go_on(epoch);
        drop(inner);
        self.inner.notify();
        report(&Resumed { serving: BTreeSet::new(), late, failed: told.failed });
    }

    /// Another kernel's services serve.
    pub fn elsewhere(&self, why: String) {
        self.inner.lock().admission = Admission::Elsewhere { why };
        self.inner.notify();
    }

    /// What crosses, as it is about to be told to a successor; until [`Services::open`] nothing else does. Each of them serves
    /// now.
    pub fn list(&self, land: &dyn Land) -> Result<Vec<Crossing>> {
        self.give_back_idle(land);
        let mut inner = self.inner.lock();
        let epoch = match &inner.admission {
            Admission::Open { epoch } => *epoch,
            Admission::Elsewhere { why } => bail!("{why}"),
            _ => bail!("what crosses is settled already: an update is under way"),
        };
        let crossings = inner.crossings();
        inner.all_serve(&crossings, epoch)?;
        inner.admission = Admission::Listed { epoch };
        Ok(crossings)
    }

    /// The successor's services stand by: from now on nobody begins to serve here.
    pub fn wait(&self) {
        let mut inner = self.inner.lock();
        if matches!(inner.admission, Admission::Open { .. } | Admission::Listed { .. }) {
            inner.admission = Admission::Waiting;
        }
    }

    /// Whether all of these serve in this epoch; else who does not.
    pub fn all_serve(&self, crossings: &[Crossing], epoch: u64) -> Result<()> {
        self.inner.lock().all_serve(crossings, epoch)
    }

    // ---- a predecessor's -------------------------------------------------------------------------------------------

    /// An arena with something in it waits for its service here.
    pub fn expect(&self, name: &str, arena: Arena) {
        let mut inner = self.inner.lock();
        let slot = inner.slots.entry(name.to_owned()).or_default();
        (slot.arena, slot.served) = (Some(arena), true);
        if let Err(error) = self.note(&inner.slots) {
            tracing::warn!("a batond that is started after this one will not know of {name}'s arena: {error:#}");
        }
    }

    /// What the predecessor's service of this name kept, as the handover record says. Whoever comes for it must read it.
    pub fn expect_content(&self, name: &str, kind: u32, version: u32) {
        self.inner.lock().left.insert(name.to_owned(), (kind, version));
    }

    // ---- what they say by themselves -------------------------------------------------------------------------------

    /// Waits until a service says something or leaves, and hears it; at most as long as `limit` says.
    pub fn mind(&self, land: &dyn Land, limit: PollTimeout) -> Result<()> {
        match self.events.wait(&mut [EpollEvent::empty(); 16], limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for services"),
        }
        self.hear();
        self.give_back_idle(land);
        Ok(())
    }

    fn hear(&self) {
        let mut inner = self.inner.lock();
        for (name, slot) in &mut inner.slots {
            slot.hear(name);
        }
        drop(inner);
        self.inner.notify();
    }

    /// Gives back the arenas of those who came, got one, and left without ever serving. Nothing of the kind happens while an update
    /// runs.
    fn give_back_idle(&self, land: &dyn Land) {
        let mut tried = BTreeSet::new();
        loop {
            let mut inner = self.inner.lock();
            if !matches!(inner.admission, Admission::Open { .. }) {
                return;
            }
            let idle = inner.slots.iter_mut().find(|(name, slot)| slot.is_idle() && !tried.contains(*name));
            let Some((name, slot)) = idle else { return };
            let (name, arena) = (name.clone(), slot.arena.take());
            tried.insert(name.clone());
            slot.coming = true;
            drop(inner);
            let back = arena.map_or(Ok(()), |arena| land.give_back(arena));
            let mut inner = self.inner.lock();
            if let Some(slot) = inner.slots.get_mut(&name) {
                slot.coming = false;
                match back {
                    Ok(()) => {
                        tracing::info!(service = name, "it has left and never served: its memory is free again");
                        inner.slots.remove(&name);
                    }
                    Err((arena, error)) => {
                        tracing::debug!("the memory of {name}, which never served: {error:#}");
                        slot.arena = Some(arena);
                    }
                }
            }
            if let Err(error) = self.note(&inner.slots) {
                tracing::warn!("a batond that is started after this one will look for {name}'s arena: {error:#}");
            }
            drop(inner);
            self.inner.notify();
        }
    }

    // ---- arenas ----------------------------------------------------------------------------------------------------

    /// Whether there is an arena of this service, and nobody who is connected for it.
    pub fn has_left_arena(&self, name: &str) -> bool {
        self.inner.lock().slots.get(name).is_some_and(|slot| slot.arena.is_some() && !slot.is_connected())
    }

    /// Whose a service is that has connected; nothing if there is none, or nobody knows.
    pub fn owner(&self, name: &str) -> Option<u32> {
        self.inner.lock().slots.get(name)?.owner
    }

    /// Where all arenas lie.
    pub fn ranges(&self) -> RangeSet {
        self.inner.lock().ranges()
    }

    /// An arena has become longer.
    pub fn extend(&self, name: &str, more: Vec<Piece>) -> Result<(), Vec<Piece>> {
        let mut inner = self.inner.lock();
        let Some(arena) = inner.slots.get_mut(name).and_then(|slot| slot.arena.as_mut()) else { return Err(more) };
        arena.pieces.extend(more);
        if let Err(error) = self.note(&inner.slots) {
            tracing::warn!("a batond that is started after this one will not know of all of {name}'s arena: {error:#}");
        }
        Ok(())
    }

    /// Takes the arena of a service that has left; nothing is known of the service afterwards.
    pub fn remove(&self, name: &str, land: &dyn Land) -> Result<Arena> {
        let ranges: Vec<Range> = {
            let inner = self.inner.lock();
            let slot = inner.slots.get(name).with_context(|| format!("there is no service {name}"))?;
            slot.ranges().collect()
        };
        let holders = if ranges.is_empty() { Vec::new() } else { land.holders(&ranges)? };
        let mut inner = self.inner.lock();
        if let Admission::Elsewhere { why } = &inner.admission {
            bail!("{why}");
        }
        let slot = inner.slots.get(name).with_context(|| format!("there is no service {name}"))?;
        if slot.is_connected() || slot.coming {
            bail!("service {name} is connected: it has to leave first");
        }
        if let Some(pid) = holders.first() {
            bail!("process {pid} still has the arena of {name}: end it first");
        }
        let arena = inner.slots.remove(name).and_then(|slot| slot.arena);
        self.note(&inner.slots)?;
        arena.with_context(|| format!("service {name} has no arena"))
    }

    /// Arenas that must cross, with what is in them.
    pub fn crossings(&self) -> Vec<Crossing> {
        self.inner.lock().crossings()
    }

    // ---- orders to all ---------------------------------------------------------------------------------------------

    /// Waits until every service with an arena stands by.
    pub fn await_standby(&self, patience: Duration) -> Result<Vec<String>> {
        let standing = |slot: &Slot| slot.standing() == Some(Standing::StandingBy);
        let expected = |inner: &Inner| -> Vec<(String, bool)> {
            let all = inner.slots.iter().filter(|(_, slot)| slot.arena.is_some());
            all.map(|(name, slot)| (name.clone(), standing(slot))).collect()
        };
        let found = self.inner.wait(Some(Instant::now() + patience), |inner| {
            let all = inner.slots.iter().filter(|(_, slot)| slot.arena.is_some() && !standing(slot));
            let mut refused = all.filter_map(|(name, slot)| Some((name, slot.refusal.as_ref()?)));
            if let Some((name, why)) = refused.next() {
                return Some(Err(anyhow::anyhow!("service {name} cannot stand by: {why}")));
            }
            let all = expected(inner);
            all.iter().all(|(_, stands)| *stands).then(|| Ok(all.into_iter().map(|(name, _)| name).collect()))
        });
        found.unwrap_or_else(|| {
            let all = expected(&self.inner.lock()).into_iter();
            let missing: Vec<String> = all.filter(|(_, stands)| !stands).map(|(name, _)| name).collect();
            bail!("services do not stand by after {patience:?}: {}", missing.join(", "))
        })
    }

    /// Freezes all services; on an error some may be frozen, and [`Services::unfreeze`] is due.
    pub fn freeze(&self, epoch: u64, until: Instant) -> Result<BTreeMap<String, Seal>> {
        let mut inner = self.inner.lock();
        let mut ends = inner.ends(|standing| standing == Standing::Serving(epoch));
        let gathered = order_all(&mut ends, &ToService::Freeze { epoch }, Some(until), |report| match report {
            ToAgent::Frozen { items, seal, .. } => Some(Seal { items, seal }),
            _ => None,
        });
        gathered.all("to freeze")
    }

    /// Lets every service go on, in this epoch, whatever becomes of one of them. One that has not answered the freeze yet is not
    /// waited for: it is told as soon as it answers.
    pub fn unfreeze(&self, epoch: u64, until: Instant) -> Resumed {
        let mut inner = self.inner.lock();
        let (mut told, late) = inner.go_on(epoch);
        let answered = {
            let names = std::mem::take(&mut told.answers);
            let mut ends = inner.ends(|standing| standing == Standing::Activating(epoch));
            ends.retain(|(name, _)| names.contains_key(*name));
            gather(&mut ends, Some(until), activated)
        };
        for name in answered.answers.keys() {
            if let Some(slot) = inner.slots.get_mut(name) {
                slot.served = true;
            }
        }
        told.failed.extend(answered.failed);
        drop(inner);
        self.inner.notify();
        let resumed = Resumed { serving: answered.answers.into_keys().collect(), late, failed: told.failed };
        report(&resumed);
        resumed
    }

    /// Lets every standby service serve.
    pub fn activate(&self, epoch: u64, until: Instant) -> Result<BTreeMap<String, Seal>> {
        let mut inner = self.inner.lock();
        let mut ends = inner.ends(|standing| standing == Standing::StandingBy);
        order_all(&mut ends, &ToService::Activate { epoch }, Some(until), activated).all("to take over")
    }

    /// Ends all services' connections: they are told to leave.
    pub fn stop(&self) {
        for slot in self.inner.lock().slots.values_mut() {
            if let Some(mut end) = slot.end.take() {
                // The order fails only where the connection has ended, and then there is nobody to be stopped.
                let _ = end.order(&ToService::Stop);
            }
        }
    }

    /// For `baton status`.
    pub fn status(&self) -> Vec<ServiceStatus> {
        let inner = self.inner.lock();
        let all = inner.slots.iter().filter(|(_, slot)| !slot.is_idle());
        all.map(|(name, slot)| ServiceStatus {
            name: name.clone(),
            state: slot.state(),
            arena_bytes: slot.arena.as_ref().map_or(0, |arena| arena.bytes()),
            schema_kind: slot.hello.as_ref().map_or(0, |hello| hello.schema_kind),
            schema_version: slot.hello.as_ref().map_or(0, |hello| hello.schema_version),
        })
        .collect()
    }
}
