//! The list of services, and how each of them stands: what may be said of it while its lock is held.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};
use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{Hello, Standing, ToService};
use kexec_core::memory_map::{Range, RangeSet};

use crate::daemon::control::ServiceState;
use crate::daemon::listen::Peer;
use crate::recovery::ledger::Process;
use crate::services::access::{Access, Budget};
use crate::services::answers::Gathered;
use crate::services::arenas::Arena;

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
pub(super) struct Slot {
    pub(super) end: Option<AgentEnd>,
    pub(super) hello: Option<Hello>,
    pub(super) arena: Option<Arena>,
    /// The user who had it; nothing if nobody knows.
    pub(super) owner: Option<u32>,
    /// Who connected for it last, be it to an earlier batond. It may have ended, and a child of it serve on.
    pub(super) process: Option<Process>,
    /// Why it was not admitted when it last tried.
    pub(super) refusal: Option<String>,
    /// Somebody is being admitted.
    pub(super) coming: bool,
    /// It has served, here or on the kernel before: what is in the arena must not be lost.
    pub(super) served: bool,
    /// It was told to freeze, has not answered, and was to go on in this epoch meanwhile: it is told when it answers.
    pub(super) goes_on: Option<u64>,
}

impl Slot {
    pub(super) fn standing(&self) -> Option<Standing> {
        let end = self.end.as_ref().filter(|end| !end.is_gone())?;
        Some(end.standing()).filter(|standing| *standing != Standing::Over)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.standing().is_some()
    }

    /// An arena that nobody has served with, and whose service has gone: nothing would be lost with it.
    pub(super) fn is_idle(&self) -> bool {
        !self.served && !self.coming && self.arena.is_some() && !self.is_connected()
    }

    pub(super) fn state(&self) -> ServiceState {
        match self.standing() {
            None if self.coming => ServiceState::Starting,
            None => ServiceState::Absent,
            Some(Standing::Serving(_)) => ServiceState::Serving,
            Some(Standing::StandingBy) => ServiceState::Standby,
            Some(Standing::Frozen(_) | Standing::Freezing(_)) => ServiceState::Frozen,
            Some(_) => ServiceState::Starting,
        }
    }

    pub(super) fn ranges(&self) -> impl Iterator<Item = Range> {
        self.arena.iter().flat_map(|arena| arena.pieces.iter().map(|piece| piece.range))
    }
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

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) slots: BTreeMap<String, Slot>,
    /// Kind and version of what each service of the predecessor kept.
    pub(super) left: BTreeMap<String, (u32, u32)>,
    pub(super) admission: Admission,
}

/// Who is being admitted.
pub(super) struct Coming<'a> {
    pub(super) name: String,
    pub(super) access: &'a Access,
    pub(super) peer: Peer,
    pub(super) process: Option<Process>,
}

impl Slot {
    /// Takes in what it has said and nobody waited for.
    pub(super) fn hear(&mut self, name: &str) {
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
    pub(super) fn understands(&self, hello: &Hello) -> Result<()> {
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
    pub(super) fn enter(&mut self, coming: &Coming<'_>, hello: &Hello) -> Result<Budget> {
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

    pub(super) fn ranges(&self) -> RangeSet {
        self.slots.values().flat_map(Slot::ranges).collect()
    }

    pub(super) fn crossings(&self) -> Vec<Crossing> {
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

    pub(super) fn all_serve(&self, crossings: &[Crossing], epoch: u64) -> Result<()> {
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
    pub(super) fn ends(&mut self, who: impl Fn(Standing) -> bool) -> Vec<(&str, &mut AgentEnd)> {
        let ends = self.slots.iter_mut().filter_map(|(name, slot)| Some((name.as_str(), slot.end.as_mut()?)));
        ends.filter(|(_, end)| who(end.standing())).collect()
    }

    /// Opens this kernel for services, and tells all that are silent to go on; says who was told or could not be, and who is late.
    pub(super) fn go_on(&mut self, epoch: u64) -> (Gathered<()>, BTreeSet<String>) {
        self.admission = Admission::Open { epoch };
        let mut told = Gathered { answers: BTreeMap::new(), failed: BTreeMap::new() };
        let mut late = BTreeSet::new();
        for (name, slot) in &mut self.slots {
            // First what it has sent already: it may have answered the freeze in this moment.
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
