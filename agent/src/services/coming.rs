//! A service comes: whether it may, its arena, its readiness, its place among the others.

use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{ToAgent, ToService};
use kexec_core::memory_map::Range;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{Land, Services};
use crate::daemon::listen::Peer;
use crate::recovery::ledger::Process;
use crate::services::access::{Access, Budget};
use crate::services::arenas::Piece;
use crate::services::slot::{Admission, Coming};

/// How long a service may take to get ready, whatever its arena's size.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// And for each MiB of it: ten times what mapping one takes under emulation.
const PATIENCE_FOR_MIB: Duration = Duration::from_millis(2);
/// How often one that waits to be let in is looked after: it may have gone, and another of its name may have come.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// A service that was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Its name.
    pub name: String,
    /// It had an agent before this one, and serves on.
    pub was_serving: bool,
}

impl Services {
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
}

/// How long a service may take to map an arena of this size.
pub(super) fn patience_for(bytes: u64) -> Duration {
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
