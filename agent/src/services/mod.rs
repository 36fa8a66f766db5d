//! The services of this kernel, as batond holds them: who is connected, where each one's arena is, and how it stands.
//!
//! A service is as long as its connection is ([`AgentEnd`]). Who may be one is [`access`]'s to say; whether it may serve now is
//! [`Admission`]'s. Orders in the blackout go to all services first, and their answers are gathered after, under one deadline
//! for all; an order to go on goes to everybody, whatever becomes of one of them. What a service says when nobody waits for it
//! is heard by [`Services::mind`].
//!
//! What a test must play is a [`Land`]: where arenas come from, and who has them mapped.

pub mod access;
pub mod arenas;
pub mod files;
pub mod holders;
pub mod resize;
#[cfg(test)]
mod tests;
pub mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{Hello, Standing, ToAgent, ToService, timeout};
use kexec_core::device::Device;
use kexec_core::memory_map::{Range, RangeSet};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::daemon::control::{ServiceState, ServiceStatus};
use crate::daemon::listen::Peer;
use crate::recovery::ledger::{Entry, Ledger, Process};
use crate::services::access::{Access, Budget};
use crate::services::arenas::{Arena, Piece};
use crate::services::watched::Watched;

/// How long a service may take to get ready, whatever its arena's size.
const PATIENCE: Duration = Duration::from_secs(20);
/// And for each MiB of it: ten times what mapping one takes under emulation.
const PATIENCE_FOR_MIB: Duration = Duration::from_millis(2);
/// How often one that waits to be let in is looked after: it may have gone, and another of its name may have come.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// Where arenas come from, and who has them.
pub trait Land: Sync {
    /// Takes `len` bytes for an arena, beside `kept`, which is what all others have.
    fn take(&self, len: u64, kept: &RangeSet) -> Result<Arena>;
    /// Gives an arena's memory back. While somebody has it mapped nothing is done, and it is handed back.
    fn give_back(&self, arena: Arena) -> Result<(), (Arena, anyhow::Error)>;
    /// The processes that have some of this memory mapped.
    fn holders(&self, ranges: &[Range]) -> Result<Vec<i32>>;
}

/// Whether services may serve on this kernel, and what becomes of one that comes now.
///
/// ```text
/// incumbent   Open ─ update ─► Listed ─ stand by ─► Waiting ─┬─► (leaves)
///               ▲                 └────────┬─────────┘ undone │
///               └──────────────────────────┘                 Elsewhere: a batond that is started again finds that
/// successor   Inheriting ─► Waiting ─ drained ─► Open         the successor serves
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Admission {
    /// A predecessor's arenas are still being taken over: nobody is let in.
    #[default]
    Inheriting,
    /// Whoever comes serves, in this epoch.
    Open {
        /// Of this kernel's services.
        epoch: u64,
    },
    /// A successor is being told which arenas there are. Whose is among them serves; a new name waits at the door.
    Listed {
        /// Of this kernel's services.
        epoch: u64,
    },
    /// Nobody begins to serve. Who has an arena stands by; a new name waits at the door.
    Waiting,
    /// Another kernel serves: nobody is let in, and nothing of what it has is given away.
    Elsewhere {
        /// Which one, and what to do.
        why: String,
    },
}

/// One service.
#[derive(Debug, Default)]
struct Slot {
    end: Option<AgentEnd>,
    hello: Option<Hello>,
    arena: Option<Arena>,
    /// The user who had it; nothing if nobody knows.
    owner: Option<u32>,
    /// Who connected for it last, be it to an earlier batond. It may have ended, and a child of it serve on.
    process: Option<Process>,
    /// Why it was not admitted when it last tried.
    refusal: Option<String>,
    /// Somebody is being admitted.
    coming: bool,
    /// It has served, here or on the kernel before: what is in the arena must not be lost.
    served: bool,
    /// It was told to freeze, has not answered, and was to go on in this epoch meanwhile: it is told when it answers.
    goes_on: Option<u64>,
}

impl Slot {
    fn standing(&self) -> Option<Standing> {
        let end = self.end.as_ref().filter(|end| !end.is_gone())?;
        Some(end.standing()).filter(|standing| *standing != Standing::Over)
    }

    fn is_connected(&self) -> bool {
        self.standing().is_some()
    }

    /// An arena that nobody has served with, and whose service has gone: nothing would be lost with it.
    fn is_idle(&self) -> bool {
        !self.served && !self.coming && self.arena.is_some() && !self.is_connected()
    }

    fn state(&self) -> ServiceState {
        match self.standing() {
            None if self.coming => ServiceState::Starting,
            None => ServiceState::Absent,
            Some(Standing::Serving(_)) => ServiceState::Serving,
            Some(Standing::StandingBy) => ServiceState::Standby,
            Some(Standing::Frozen(_) | Standing::Freezing(_)) => ServiceState::Frozen,
            Some(_) => ServiceState::Starting,
        }
    }

    fn ranges(&self) -> impl Iterator<Item = Range> {
        self.arena.iter().flat_map(|arena| arena.pieces.iter().map(|piece| piece.range))
    }
}

/// What a service reported when it was sealed or activated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// How many items are in its arena.
    pub items: u64,
    /// The seal it computed.
    pub seal: u64,
}

/// What a service must know about an arena that crosses to another kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crossing {
    /// The service's name.
    pub name: String,
    /// Kind of its state.
    pub schema_kind: u32,
    /// Version of its state.
    pub schema_version: u32,
    /// Where its arena lies: these pieces in this order.
    pub ranges: Vec<Range>,
}

/// A service that was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Its name.
    pub name: String,
    /// It had an agent before this one, and serves on.
    pub was_serving: bool,
}

/// What came of an order to all.
#[derive(Debug)]
struct Gathered<T> {
    answers: BTreeMap<String, T>,
    /// Who did not do it, and why.
    failed: BTreeMap<String, String>,
}

impl<T> Gathered<T> {
    /// All answers, or everything that went wrong.
    fn all(self, what: &str) -> Result<BTreeMap<String, T>> {
        if self.failed.is_empty() {
            return Ok(self.answers);
        }
        bail!("{}", told(&self.failed, what))
    }
}

fn told(failed: &BTreeMap<String, String>, what: &str) -> String {
    let all: Vec<_> = failed.iter().map(|(name, why)| format!("service {name} was told {what}: {why}")).collect();
    all.join("; ")
}

/// What came of the order to go on.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// Who serves again.
    pub serving: BTreeSet<String>,
    /// Who has not even answered the freeze yet: it goes on as soon as it does.
    pub late: BTreeSet<String>,
    /// Who was told and did not go on, and why.
    pub failed: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Inner {
    slots: BTreeMap<String, Slot>,
    /// Kind and version of what each service of the predecessor kept.
    left: BTreeMap<String, (u32, u32)>,
    admission: Admission,
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

    // ---- one comes -------------------------------------------------------------------------------------------------

    /// Takes a service in that has greeted: whether it may be the one it says; its arena, made where there is none yet; its
    /// readiness; then it serves or stands by as [`Admission`] says, and until that says anything it waits here. One that serves
    /// already, with an earlier batond's arena, goes on.
    pub fn admit(&self, peer: Peer, end: AgentEnd, access: &Access, land: &dyn Land) -> Result<Admitted> {
        self.give_back_idle(land);
        let name = end.hello().name.clone();
        let serving = end.hello().serving;
        let coming = Coming { name: name.clone(), access, peer, process: Process::find(peer.pid) };
        let entered = self.inner.wait(None, |inner| match inner.admission {
            Admission::Inheriting => None,
            _ => Some(inner.enter(&coming, end.hello())),
        });
        let budget = entered.context("it was waited for without a deadline")??;
        let admitted = match serving {
            None => self.prepare(&coming, end, budget, land),
            Some(held) => self.welcome_back(&coming, end, held, land),
        };
        let mut inner = self.inner.lock();
        if let Some(slot) = inner.slots.get_mut(&name) {
            slot.coming = false;
            slot.refusal = admitted.as_ref().err().map(|error| format!("{error:#}"));
            if slot.arena.is_none() && slot.end.is_none() {
                inner.slots.remove(&name);
            }
        }
        drop(inner);
        self.inner.notify();
        if admitted.is_err() {
            self.give_back_idle(land);
        }
        admitted.map(|()| Admitted { name, was_serving: serving.is_some() })
    }

    /// It proves by its memory that it has the arena; nothing is sent to it again.
    fn welcome_back(&self, coming: &Coming<'_>, end: AgentEnd, held: u64, land: &dyn Land) -> Result<()> {
        let name = &coming.name;
        self.await_admission(&end, |admission| matches!(admission, Admission::Open { .. }))?;
        let ranges: Option<Vec<_>> = {
            let inner = self.inner.lock();
            let arena = inner.slots.get(name).filter(|slot| slot.arena.is_some());
            arena.map(|slot| slot.ranges().collect())
        };
        let ranges = ranges.with_context(|| format!("service {name} says that it serves, and has no arena here"))?;
        if !land.holders(&ranges)?.contains(&coming.peer.pid) {
            bail!("service {name} says that it serves, and is not the process that has its arena");
        }
        self.seat(coming, end, |admission| match admission {
            Admission::Open { epoch } if *epoch == held => Ok(ToService::Welcome { epoch: held }),
            other => bail!("service {name} says that it serves in epoch {held}, and here services are {other:?}"),
        })
    }

    fn prepare(&self, coming: &Coming<'_>, mut end: AgentEnd, budget: Budget, land: &dyn Land) -> Result<()> {
        let name = &coming.name;
        let left: Option<Vec<Range>> = {
            let inner = self.inner.lock();
            inner.slots.get(name).filter(|slot| slot.arena.is_some()).map(|slot| slot.ranges().collect())
        };
        match left {
            None => self.take_arena(coming, &end, budget, land)?,
            // Two processes that write to one arena would destroy it.
            Some(ranges) => {
                if let Some(pid) = land.holders(&ranges)?.into_iter().find(|pid| *pid != coming.peer.pid) {
                    bail!("process {pid} still has the arena of {name}: end it first");
                }
            }
        }
        let (files, fresh) = self.hand_out(coming)?;
        let pieces: Vec<_> = files.iter().map(|(file, len)| (file.as_fd(), *len)).collect();
        end.give_arena(&pieces, fresh)?;
        let len: u64 = pieces.iter().map(|(_, len)| len).sum();
        expect_report(&mut end, "to get ready", patience_for(len), |report| {
            matches!(report, ToAgent::Ready).then_some(())
        })?;
        self.seat(coming, end, |admission| match admission {
            Admission::Open { epoch } | Admission::Listed { epoch } => Ok(ToService::Serve { epoch: *epoch }),
            Admission::Waiting => Ok(ToService::StandBy),
            Admission::Elsewhere { why } => bail!("{why}"),
            Admission::Inheriting => bail!("arenas of a predecessor are still being taken over"),
        })
    }

    /// Copies of the arena's files with their lengths, and whether nothing was ever in it. It is written down before
    /// they are given: from then on there is something in it to be lost.
    fn hand_out(&self, coming: &Coming<'_>) -> Result<(Vec<(std::os::fd::OwnedFd, u64)>, bool)> {
        let mut inner = self.inner.lock();
        let slot = inner.slots.get_mut(&coming.name).context("its place is gone")?;
        slot.process = coming.process;
        slot.owner = Some(coming.peer.uid);
        let arena = slot.arena.as_mut().context("its arena is gone")?;
        let copy = |piece: &Piece| Ok((piece.file.try_clone()?, piece.range.len()));
        let files = arena.pieces.iter().map(copy).collect::<Result<_>>()?;
        let fresh = std::mem::take(&mut arena.fresh);
        self.note(&inner.slots)?;
        Ok((files, fresh))
    }

    /// A new arena for a new name, when it may have one: not while a list of arenas is with a successor.
    fn take_arena(&self, coming: &Coming<'_>, end: &AgentEnd, budget: Budget, land: &dyn Land) -> Result<()> {
        let (name, wanted) = (&coming.name, end.hello().wanted_arena_len);
        loop {
            self.await_admission(end, |admission| matches!(admission, Admission::Open { .. }))?;
            let _one_at_a_time = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
            let (kept, strangers) = {
                let inner = self.inner.lock();
                let not_roots = inner.slots.iter().filter(|(_, slot)| slot.owner.is_some_and(|uid| uid != 0));
                let unlisted = not_roots.filter(|(name, _)| !coming.access.lists(name));
                let had = unlisted.flat_map(|(_, slot)| slot.ranges()).map(|range| range.len()).sum();
                (inner.ranges(), had)
            };
            budget.check(name, wanted, strangers)?;
            let arena = land.take(wanted, &kept)?;
            let mut inner = self.inner.lock();
            if matches!(inner.admission, Admission::Open { .. })
                && let Some(slot) = inner.slots.get_mut(name)
            {
                (slot.arena, slot.owner) = (Some(arena), Some(coming.peer.uid));
                return Ok(());
            }
            // An update has begun meanwhile.
            drop(inner);
            land.give_back(arena).map_err(|(_, error)| error)?;
        }
    }

    /// Waits until the one who comes may go on; not longer than it waits itself.
    fn await_admission(&self, end: &AgentEnd, may: impl Fn(&Admission) -> bool) -> Result<()> {
        loop {
            let found = self.inner.wait(Some(Instant::now() + LOOK_AFTER), |inner| match &inner.admission {
                Admission::Elsewhere { why } => Some(Err(anyhow::anyhow!("{why}"))),
                admission => may(admission).then_some(Ok(())),
            });
            match found {
                Some(found) => return found,
                None if end.is_gone() => bail!("it has left before it could be let in"),
                None => {}
            }
        }
    }

    /// From now on it is one of the services. What it is told, and that it has its place, is one step for everybody else.
    fn seat(
        &self,
        coming: &Coming<'_>,
        mut end: AgentEnd,
        order: impl FnOnce(&Admission) -> Result<ToService>,
    ) -> Result<()> {
        let mut inner = self.inner.lock();
        let order = order(&inner.admission)?;
        end.order(&order)?;
        let told = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        self.events.add(end.as_fd(), EpollEvent::new(told, 0)).context("cannot wait for it")?;
        let slot = inner.slots.get_mut(&coming.name).context("its place is gone")?;
        (slot.process, slot.owner) = (coming.process, Some(coming.peer.uid));
        (slot.coming, slot.refusal, slot.goes_on) = (false, None, None);
        slot.served |= matches!(order, ToService::Welcome { .. });
        slot.hello = Some(end.hello().clone());
        slot.end = Some(end);
        self.note(&inner.slots)?;
        drop(inner);
        self.inner.notify();
        Ok(())
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
                // A service that cannot be told is gone anyway.
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

/// Who is being admitted.
struct Coming<'a> {
    name: String,
    access: &'a Access,
    peer: Peer,
    process: Option<Process>,
}

impl Slot {
    /// Takes in what it has said and nobody waited for.
    fn hear(&mut self, name: &str) {
        while let Some(end) = &mut self.end {
            if end.standing() == Standing::Over {
                // What it said last was no word of the protocol: it hears of that by the end of the connection.
                (self.end, self.goes_on) = (None, None);
                return;
            }
            match end.poll_report() {
                Ok(None) => return,
                Ok(Some(_)) => {
                    self.served |= matches!(end.standing(), Standing::Serving(_));
                    if matches!(end.standing(), Standing::Frozen(_))
                        && let Some(epoch) = self.goes_on.take()
                    {
                        tracing::info!(service = name, "it has answered the freeze that was undone, and goes on");
                        if let Err(error) = end.order(&ToService::Unfreeze { epoch }) {
                            tracing::warn!("service {name} cannot be told to go on: {error}");
                        }
                    }
                }
                Err(error) => {
                    tracing::info!("service {name} is no longer connected: {error}");
                    (self.end, self.goes_on) = (None, None);
                }
            }
        }
    }
}

impl Inner {
    fn understands(&self, hello: &Hello) -> Result<()> {
        match self.left.get(&hello.name) {
            Some(&(kind, version)) if kind != hello.schema_kind || version > hello.schema_version => bail!(
                "it reads kind {:#x} up to version {}, and was left kind {kind:#x} version {version}",
                hello.schema_kind,
                hello.schema_version
            ),
            _ => Ok(()),
        }
    }

    /// Somebody comes under this name, if it may: nobody else does meanwhile.
    fn enter(&mut self, coming: &Coming<'_>, hello: &Hello) -> Result<Budget> {
        let name = &coming.name;
        if let Admission::Elsewhere { why } = &self.admission {
            bail!("{why}");
        }
        let left = self.slots.get(name).filter(|slot| slot.arena.is_some()).map(|slot| slot.owner);
        let budget = coming.access.check(coming.peer, name, left)?;
        if let Some(slot) = self.slots.get(name) {
            if slot.is_connected() || slot.coming {
                bail!("service {name} is connected already");
            }
            if slot.is_idle() && slot.arena.as_ref().is_some_and(|arena| !arena.fresh) {
                bail!(
                    "an earlier {name} has left and never served, and its process still has that memory: end it first"
                );
            }
        }
        let understood = self.understands(hello);
        let slot = self.slots.entry(name.clone()).or_default();
        if let Err(error) = understood {
            slot.refusal = Some(format!("{error:#}"));
            return Err(error);
        }
        slot.coming = true;
        Ok(budget)
    }

    fn ranges(&self) -> RangeSet {
        self.slots.values().flat_map(Slot::ranges).collect()
    }

    fn crossings(&self) -> Vec<Crossing> {
        let crosses = self.slots.iter().filter(|(_, slot)| !slot.is_idle());
        crosses
            .filter_map(|(name, slot)| {
                let (arena, hello) = (slot.arena.as_ref()?, slot.hello.as_ref()?);
                Some(Crossing {
                    name: name.clone(),
                    schema_kind: hello.schema_kind,
                    schema_version: hello.schema_version,
                    ranges: arena.ranges(),
                })
            })
            .collect()
    }

    fn all_serve(&self, crossings: &[Crossing], epoch: u64) -> Result<()> {
        let not_serving: Vec<String> = crossings
            .iter()
            .filter_map(|crossing| {
                let slot = self.slots.get(&crossing.name);
                let serves = slot.is_some_and(|slot| slot.standing() == Some(Standing::Serving(epoch)));
                let state = slot.map_or(ServiceState::Absent, Slot::state);
                (!serves).then(|| format!("service {} is {state}, not serving in epoch {epoch}", crossing.name))
            })
            .collect();
        if not_serving.is_empty() { Ok(()) } else { bail!("{}", not_serving.join("; ")) }
    }

    /// The connections of those who stand so.
    fn ends(&mut self, who: impl Fn(Standing) -> bool) -> Vec<(&str, &mut AgentEnd)> {
        let ends = self.slots.iter_mut().filter_map(|(name, slot)| Some((name.as_str(), slot.end.as_mut()?)));
        ends.filter(|(_, end)| who(end.standing())).collect()
    }

    /// Opens this kernel for services, and tells all that are silent to go on; says who was told or could not be, and who is late.
    fn go_on(&mut self, epoch: u64) -> (Gathered<()>, BTreeSet<String>) {
        self.admission = Admission::Open { epoch };
        let mut told = Gathered { answers: BTreeMap::new(), failed: BTreeMap::new() };
        let mut late = BTreeSet::new();
        for (name, slot) in &mut self.slots {
            // What it has said by now counts.
            slot.hear(name);
            let Some(end) = &mut slot.end else { continue };
            let order = match end.standing() {
                Standing::Frozen(_) => ToService::Unfreeze { epoch },
                Standing::StandingBy => ToService::Activate { epoch },
                Standing::Freezing(_) => {
                    slot.goes_on = Some(epoch);
                    late.insert(name.clone());
                    continue;
                }
                _ => continue,
            };
            match end.order(&order) {
                Ok(()) => _ = told.answers.insert(name.clone(), ()),
                Err(error) => _ = told.failed.insert(name.clone(), error.to_string()),
            }
        }
        (told, late)
    }
}

/// Says what the operator must know of it.
fn report(resumed: &Resumed) {
    for name in &resumed.late {
        tracing::warn!("service {name} has not answered the freeze: it goes on as soon as it does");
    }
    if !resumed.failed.is_empty() {
        tracing::error!("{}", told(&resumed.failed, "to go on"));
    }
}

/// Tells all of them, then gathers what they answer.
fn order_all<T>(
    ends: &mut Vec<(&str, &mut AgentEnd)>,
    order: &ToService,
    until: Option<Instant>,
    answer: impl Fn(ToAgent) -> Option<T>,
) -> Gathered<T> {
    let mut failed = BTreeMap::new();
    ends.retain_mut(|(name, end)| match end.order(order) {
        Ok(()) => true,
        Err(error) => {
            failed.insert((*name).to_owned(), error.to_string());
            false
        }
    });
    let mut gathered = gather(ends, until, answer);
    gathered.failed.extend(failed);
    gathered
}

/// Gathers one answer of each, in the order in which they come, until all have answered or the deadline has passed.
fn gather<T>(
    ends: &mut Vec<(&str, &mut AgentEnd)>,
    until: Option<Instant>,
    answer: impl Fn(ToAgent) -> Option<T>,
) -> Gathered<T> {
    let began = Instant::now();
    let mut gathered = Gathered { answers: BTreeMap::new(), failed: BTreeMap::new() };
    loop {
        ends.retain_mut(|(name, end)| {
            let failed = match end.poll_report() {
                Ok(None) => return true,
                Ok(Some(report)) => {
                    let shown = format!("{report:?}");
                    match answer(report) {
                        Some(answer) => {
                            gathered.answers.insert((*name).to_owned(), answer);
                            return false;
                        }
                        None => format!("it answered {shown}"),
                    }
                }
                Err(error) => error.to_string(),
            };
            gathered.failed.insert((*name).to_owned(), failed);
            false
        });
        let over = until.is_some_and(|until| Instant::now() >= until);
        if ends.is_empty() || over {
            let why = || format!("it has not answered in {:.1?}", began.elapsed());
            gathered.failed.extend(ends.drain(..).map(|(name, _)| (name.to_owned(), why())));
            return gathered;
        }
        let mut polled: Vec<_> = ends.iter().map(|(_, end)| PollFd::new(end.as_fd(), PollFlags::POLLIN)).collect();
        // What it says is looked up above, and an interrupted wait just looks earlier.
        let _ = poll(&mut polled, timeout(until));
    }
}

fn activated(report: ToAgent) -> Option<Seal> {
    match report {
        ToAgent::Activated { items, seal, .. } => Some(Seal { items, seal }),
        _ => None,
    }
}

/// How long a service may take to map an arena of this size.
fn patience_for(bytes: u64) -> Duration {
    PATIENCE + PATIENCE_FOR_MIB * u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

fn expect_report<T>(
    end: &mut AgentEnd,
    what: &str,
    patience: Duration,
    answer: impl Fn(ToAgent) -> Option<T>,
) -> Result<T> {
    let report = end.report(patience)?;
    let shown = format!("{report:?}");
    answer(report).with_context(|| format!("it was told {what} and answered {shown}"))
}
