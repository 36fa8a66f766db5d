//! The services of this kernel, as batond holds them: who is connected, where each one's arena is, and how it stands.
//!
//! A service's thread of life is its connection ([`AgentEnd`]); orders inside the blackout are sent to all
//! services first and their answers gathered after, so that they work at the same time.

pub mod arenas;
pub mod files;
pub mod resize;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kexec_core::device::Device;
use kexec_core::memory_map::{Range, RangeSet};
use nix::sys::socket::{getsockopt, sockopt};

use crate::daemon::control::ServiceStatus;
use crate::recovery::ledger::{Entry, Ledger, Process};
use crate::services::arenas::{Arena, Piece};
use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{Hello, Standing, ToAgent, ToService};

/// How long a service may take to answer where nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// One service.
#[derive(Debug, Default)]
struct Slot {
    end: Option<AgentEnd>,
    hello: Option<Hello>,
    arena: Option<Arena>,
    /// Who has the arena mapped, be it from an earlier batond.
    process: Option<Process>,
    /// Why it was not admitted when it last tried.
    refusal: Option<String>,
}

impl Slot {
    fn is_connected(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.standing() != Standing::Over && !end.is_gone())
    }

    /// The process that has the arena, as long as it lives: whatever became of its connection, it may write there.
    fn holder(&self) -> Option<Process> {
        self.process.filter(Process::lives)
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
#[derive(Debug, Clone)]
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

/// All services of this kernel.
#[derive(Debug, Default)]
pub struct Services {
    slots: Mutex<BTreeMap<String, Slot>>,
    /// Kind and version of what each service of the predecessor kept.
    left: Mutex<BTreeMap<String, (u32, u32)>>,
    changed: Condvar,
    /// For a batond that comes after this one.
    ledger: Arc<Ledger>,
    /// Set when every arena that came from a predecessor is here: at once in a kernel that has none.
    inherited: OnceLock<()>,
}

impl Services {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        // A panic while the lock was held has already ended the update; the map itself is always whole.
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Those of a kernel whose batond can be started again: what an earlier one had is found again.
    pub fn of_ledger(ledger: Arc<Ledger>, device: Option<&Device>) -> Services {
        let services = Services::default();
        for (name, entry) in ledger.pages().services {
            let pieces = entry.pieces.iter().map(|&(start, len)| Range::with_len(start, len));
            let found = device.context("the module is not there").and_then(|device| {
                let pieces = pieces.collect::<Option<Vec<_>>>().context("it passes the end of memory")?;
                Arena::find_again(device, pieces, entry.fresh)
            });
            match found {
                Ok(arena) => {
                    tracing::info!(service = name, bytes = arena.bytes(), "the arena that an earlier batond gave it");
                    services.lock().entry(name.clone()).or_default().arena = Some(arena);
                    if entry.schema_kind != 0 {
                        services.expect_content(&name, entry.schema_kind, entry.schema_version);
                    }
                }
                Err(error) => tracing::error!("the arena of service {name} is lost: {error:#}"),
            }
            services.lock().entry(name).or_default().process = entry.process;
        }
        Services { ledger, ..services }
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
                let (fresh, process) = (arena.fresh, slot.process);
                Some((name.clone(), Entry { schema_kind, schema_version, pieces, fresh, process }))
            };
            pages.services = slots.iter().filter_map(entry).collect();
        })
    }

    /// No more arenas come from a predecessor: services are let in.
    pub fn all_inherited(&self) {
        // Twice is once.
        let _ = self.inherited.set(());
    }

    /// An arena that came from the predecessor waits for its service here.
    pub fn expect(&self, name: &str, arena: Arena) {
        let mut slots = self.lock();
        slots.entry(name.to_owned()).or_default().arena = Some(arena);
        if let Err(error) = self.note(&slots) {
            tracing::warn!("a batond that is started after this one will not know of {name}'s arena: {error:#}");
        }
    }

    /// What the predecessor's service of this name kept, as the handover record says. Whoever comes for it must read it.
    pub fn expect_content(&self, name: &str, kind: u32, version: u32) {
        let mut left = self.left.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        left.insert(name.to_owned(), (kind, version));
    }

    fn understands(&self, hello: &Hello) -> Result<()> {
        let left = self.left.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match left.get(&hello.name) {
            Some(&(kind, version)) if kind != hello.schema_kind || version > hello.schema_version => bail!(
                "it reads kind {:#x} up to version {}, and was left kind {kind:#x} version {version}",
                hello.schema_kind,
                hello.schema_version
            ),
            _ => Ok(()),
        }
    }

    /// Takes a service in: greeting, arena (made by `allocate` when there is none yet), readiness; then tells it to serve
    /// in `epoch`, or to stand by when there is none. One that serves already, with an earlier batond's arena, goes on.
    pub fn admit(
        &self,
        socket: UnixStream,
        epoch: Option<u64>,
        allocate: impl FnOnce(u64, &RangeSet) -> Result<Arena>,
    ) -> Result<Admitted> {
        let process = getsockopt(&socket, sockopt::PeerCredentials).ok().and_then(|peer| Process::find(peer.pid()));
        let end = AgentEnd::accept(socket, PATIENCE)?;
        // A service may be quicker than the taking of large arenas; it must not get a new one meanwhile.
        self.inherited.wait();
        let name = end.hello().name.clone();
        let was_serving = end.hello().serving.is_some();
        let admitted = match end.hello().serving {
            None => self.prepare(end, process, epoch, allocate),
            Some(held) => self.welcome_back(end, process, epoch, held),
        };
        let mut slots = self.lock();
        let slot = slots.entry(name.clone()).or_default();
        let live = slot.end.as_ref().is_some_and(|end| end.standing() != Standing::Over);
        match &admitted {
            Ok(_) => slot.refusal = None,
            // A second one of the same name is not this one's trouble.
            Err(_) if live => {}
            Err(error) => slot.refusal = Some(format!("{error:#}")),
        }
        self.changed.notify_all();
        let end = admitted?;
        slot.hello = Some(end.hello().clone());
        slot.end = Some(end);
        self.note(&slots)?;
        Ok(Admitted { name, was_serving })
    }

    /// It proves by its process that it is the one which an earlier batond gave this arena; nothing is sent to it again.
    fn welcome_back(
        &self,
        mut end: AgentEnd,
        process: Option<Process>,
        epoch: Option<u64>,
        held: u64,
    ) -> Result<AgentEnd> {
        let name = &end.hello().name;
        self.understands(end.hello())?;
        if epoch != Some(held) {
            let ours = epoch.map_or("not yet".to_owned(), |epoch| format!("in epoch {epoch}"));
            bail!("service {name} says that it serves in epoch {held}, and this kernel's services serve {ours}");
        }
        let slots = self.lock();
        let slot = slots.get(name).filter(|slot| slot.arena.is_some());
        let slot = slot.with_context(|| format!("service {name} says that it serves, and has no arena here"))?;
        if slot.is_connected() {
            bail!("service {name} is connected already");
        }
        if process.is_none() || slot.holder() != process {
            bail!("service {name} says that it serves, and is not the process that has its arena");
        }
        end.order(&ToService::Welcome { epoch: held })?;
        Ok(end)
    }

    fn prepare(
        &self,
        mut end: AgentEnd,
        process: Option<Process>,
        epoch: Option<u64>,
        allocate: impl FnOnce(u64, &RangeSet) -> Result<Arena>,
    ) -> Result<AgentEnd> {
        let hello = end.hello().clone();
        self.understands(&hello)?;
        let name = hello.name;
        {
            let mut slots = self.lock();
            let arenas: RangeSet = all_ranges(&slots).collect();
            let slot = slots.entry(name.clone()).or_default();
            if slot.is_connected() {
                bail!("service {name} is connected already");
            }
            if let Some(other) = slot.holder().filter(|other| Some(*other) != process) {
                bail!("process {} still has the arena of {name}: end it first", other.pid);
            }
            slot.process = process;
            let arena = match &mut slot.arena {
                Some(arena) => arena,
                none => none.insert(allocate(hello.wanted_arena_len, &arenas)?),
            };
            let fresh = std::mem::take(&mut arena.fresh);
            // Before it is given: from then on there is something in it to be lost.
            self.note(&slots)?;
            let arena = slots.get(&name).and_then(|slot| slot.arena.as_ref()).context("it has just been here")?;
            let pieces: Vec<_> = arena.pieces.iter().map(|piece| (piece.file.as_fd(), piece.range.len())).collect();
            end.give_arena(&pieces, fresh)?;
        }
        expect_report(&mut end, "to get ready", PATIENCE, |report| matches!(report, ToAgent::Ready).then_some(()))?;
        match epoch {
            None => end.order(&ToService::StandBy)?,
            Some(epoch) => {
                end.order(&ToService::Serve { epoch })?;
                expect_report(&mut end, "to serve", PATIENCE, activated)?;
            }
        }
        Ok(end)
    }

    /// Whether there is an arena of this service, and nobody who is connected for it.
    pub fn has_left_arena(&self, name: &str) -> bool {
        self.lock().get(name).is_some_and(|slot| slot.arena.is_some() && !slot.is_connected())
    }

    /// Where all arenas lie.
    pub fn ranges(&self) -> RangeSet {
        all_ranges(&self.lock()).collect()
    }

    /// An arena has become longer.
    pub fn extend(&self, name: &str, more: Vec<Piece>) -> Result<(), Vec<Piece>> {
        let mut slots = self.lock();
        let Some(arena) = slots.get_mut(name).and_then(|slot| slot.arena.as_mut()) else { return Err(more) };
        arena.pieces.extend(more);
        if let Err(error) = self.note(&slots) {
            tracing::warn!("a batond that is started after this one will not know of all of {name}'s arena: {error:#}");
        }
        Ok(())
    }

    /// Takes the arena of a service that has left; nothing is known of the service afterwards.
    pub fn remove(&self, name: &str) -> Result<Arena> {
        let mut slots = self.lock();
        let slot = slots.get(name).with_context(|| format!("there is no service {name}"))?;
        if slot.is_connected() {
            bail!("service {name} is connected: it has to leave first");
        }
        if let Some(process) = slot.holder() {
            bail!("process {} still has the arena of {name}: end it first", process.pid);
        }
        let arena = slots.remove(name).and_then(|slot| slot.arena);
        self.note(&slots)?;
        arena.with_context(|| format!("service {name} has no arena"))
    }

    /// Waits until every service with an arena stands by.
    pub fn await_standby(&self, patience: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + patience;
        let mut slots = self.lock();
        loop {
            if let Some((name, why)) = slots.iter().find_map(|(name, slot)| Some((name, slot.refusal.as_ref()?))) {
                bail!("service {name} cannot stand by: {why}");
            }
            let missing: Vec<&str> = slots
                .iter()
                .filter(|(_, slot)| slot.end.as_ref().is_none_or(|end| end.standing() != Standing::StandingBy))
                .map(|(name, _)| name.as_str())
                .collect();
            if missing.is_empty() {
                return Ok(slots.keys().cloned().collect());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("services do not stand by after {patience:?}: {}", missing.join(", "));
            }
            slots = self
                .changed
                .wait_timeout(slots, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(guard, _)| guard);
        }
    }

    /// Freezes all services; on an error some may be frozen, and [`Services::unfreeze`] is due.
    pub fn freeze(&self, epoch: u64, patience: Duration) -> Result<BTreeMap<String, Seal>> {
        self.order_all(
            |standing| standing == Standing::Serving(epoch),
            &ToService::Freeze { epoch },
            "to freeze",
            patience,
            |report| match report {
                ToAgent::Frozen { items, seal, .. } => Some(Seal { items, seal }),
                _ => None,
            },
        )
    }

    /// Lets every frozen service go on, in this epoch; one that has not answered the freeze yet is waited for.
    pub fn unfreeze(&self, epoch: u64, patience: Duration) -> Result<BTreeMap<String, Seal>> {
        for (name, slot) in self.lock().iter_mut() {
            if let Some(end) = slot.end.as_mut().filter(|end| matches!(end.standing(), Standing::Freezing(_))) {
                end.report(patience).with_context(|| format!("service {name} was told to freeze"))?;
            }
        }
        let frozen = |standing| matches!(standing, Standing::Frozen(_));
        self.order_all(frozen, &ToService::Unfreeze { epoch }, "to go on", patience, activated)
    }

    /// Lets every standby service serve.
    pub fn activate(&self, epoch: u64, patience: Duration) -> Result<BTreeMap<String, Seal>> {
        let standby = |standing| standing == Standing::StandingBy;
        self.order_all(standby, &ToService::Activate { epoch }, "to take over", patience, activated)
    }

    /// Ends all services' connections: they are told to leave.
    pub fn stop(&self) {
        for slot in self.lock().values_mut() {
            if let Some(mut end) = slot.end.take() {
                // A service that cannot be told is gone anyway.
                let _ = end.order(&ToService::Stop);
            }
        }
    }

    fn order_all<T>(
        &self,
        who: impl Fn(Standing) -> bool,
        order: &ToService,
        what: &str,
        patience: Duration,
        answer: impl Fn(ToAgent) -> Option<T>,
    ) -> Result<BTreeMap<String, T>> {
        let mut slots = self.lock();
        let mut chosen: Vec<(&String, &mut AgentEnd)> = slots
            .iter_mut()
            .filter_map(|(name, slot)| slot.end.as_mut().map(|end| (name, end)))
            .filter(|(_, end)| who(end.standing()))
            .collect();
        for (name, end) in &mut chosen {
            end.order(order).with_context(|| format!("cannot tell service {name} {what}"))?;
        }
        let mut answers = BTreeMap::new();
        for (name, end) in chosen {
            let value = expect_report(end, what, patience, &answer)
                .with_context(|| format!("service {name} was told {what}"))?;
            answers.insert(name.clone(), value);
        }
        Ok(answers)
    }

    /// Arenas that must cross, with what is in them.
    pub fn crossings(&self) -> Vec<Crossing> {
        self.lock()
            .iter()
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

    /// For `baton status`.
    pub fn status(&self) -> Vec<ServiceStatus> {
        self.lock()
            .iter()
            .map(|(name, slot)| ServiceStatus {
                name: name.clone(),
                state: match slot.end.as_ref().filter(|_| slot.is_connected()).map(AgentEnd::standing) {
                    None | Some(Standing::Over) => "absent",
                    Some(Standing::Serving(_)) => "serving",
                    Some(Standing::StandingBy) => "standby",
                    Some(Standing::Frozen(_) | Standing::Freezing(_)) => "frozen",
                    Some(_) => "starting",
                }
                .to_owned(),
                arena_bytes: slot.arena.as_ref().map_or(0, |arena| arena.bytes()),
                schema_kind: slot.hello.as_ref().map_or(0, |hello| hello.schema_kind),
                schema_version: slot.hello.as_ref().map_or(0, |hello| hello.schema_version),
            })
            .collect()
    }
}

/// Where the arenas lie.
fn all_ranges(slots: &BTreeMap<String, Slot>) -> impl Iterator<Item = Range> {
    slots.values().flat_map(|slot| &slot.arena).flat_map(|arena| arena.pieces.iter().map(|piece| piece.range))
}

fn activated(report: ToAgent) -> Option<Seal> {
    match report {
        ToAgent::Activated { items, seal, .. } => Some(Seal { items, seal }),
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use baton_sdk::protocol::{Inbox, encode, receive, send_with_fd};

    #[test]
    fn who_has_an_arena_keeps_others_from_it() {
        let parent = Process::find(std::os::unix::process::parent_id().cast_signed());
        assert!(parent.is_some());
        let slot = |process| Slot { process, ..Slot::default() };
        assert_eq!((slot(parent).holder(), slot(None).holder()), (parent, None));
        let services = Services::default();
        services.lock().insert("kv".into(), slot(parent));
        let refused = services.remove("kv").unwrap_err().to_string();
        assert!(refused.contains("still has the arena of kv: end it first"), "{refused}");
    }

    /// The process is this test's own at both ends.
    fn says_that_it_serves(services: &Services, epoch: u64) -> Result<Admitted> {
        let (ours, theirs) = UnixStream::pair()?;
        let hello = Hello { serving: Some(3), ..Hello::new("kv", 7, 1, 4096) };
        let _ = send_with_fd(theirs.as_fd(), &encode(&ToAgent::Hello(hello))?, None)?;
        let admitted = services.admit(ours, Some(epoch), |_, _| bail!("it asked for an arena"))?;
        let mut inbox = Inbox::default();
        let order = receive::<ToService>(theirs.as_fd(), &mut inbox, Some(PATIENCE))?;
        assert_eq!(order, ToService::Welcome { epoch: 3 });
        Ok(admitted)
    }

    #[test]
    fn a_service_that_serves_is_taken_on_if_the_arena_and_the_epoch_are_its() {
        let services = Services::default();
        services.all_inherited();
        let refused = |epoch| says_that_it_serves(&services, epoch).unwrap_err().to_string();
        assert!(refused(3).contains("has no arena here"));
        let own = Process::find(std::process::id().cast_signed());
        let parent = Process::find(std::os::unix::process::parent_id().cast_signed());
        let arena = Some(Arena { pieces: Vec::new(), fresh: false });
        services.lock().insert("kv".into(), Slot { process: parent, arena, ..Slot::default() });
        assert!(refused(3).contains("is not the process that has its arena"));
        services.lock().get_mut("kv").unwrap().process = own;
        assert!(refused(4).contains("in epoch 3, and this kernel's services serve in epoch 4"));
        let admitted = says_that_it_serves(&services, 3).unwrap();
        assert_eq!(admitted, Admitted { name: "kv".into(), was_serving: true });
        assert_eq!(services.status()[0].state, "absent", "its other end was closed");
    }

    #[test]
    fn a_service_must_read_what_it_was_left() {
        let services = Services::default();
        services.expect_content("kv", 7, 2);
        let reads = |kind, version| services.understands(&Hello::new("kv", kind, version, 0));
        assert!(reads(7, 2).is_ok() && reads(7, 3).is_ok());
        let older = reads(7, 1).unwrap_err().to_string();
        assert_eq!(older, "it reads kind 0x7 up to version 1, and was left kind 0x7 version 2");
        assert!(reads(8, 2).is_err());
        assert!(services.understands(&Hello::new("new", 8, 1, 0)).is_ok());
    }
}
