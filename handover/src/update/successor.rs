//! The other role: what the successor's agent does at each word of the incumbent.
//!
//! ```text
//!  born ─StandBy─► standing ─Activate─► active ─Commit─► committed ─LastCpu─► alone ─► drained
//!                     ▲                  │ CpuParked, ReleaseCpu: any number
//!                     └────StandDown─────┘
//! ```
//! A word that does not belong where it comes is refused and changes nothing; the incumbent gets the refusal as
//! `Failed` and decides. The epoch and the CPUs that may be named are those of the handover record.

use state_schemas::handover_record::{HandoverRecord, PhaseMark};
use state_schemas::message::{ToIncumbent, ToSuccessor};
use thiserror::Error;

/// How far the successor has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It has said hello.
    Born,
    /// Its services wait.
    Standing,
    /// It serves.
    Active,
    /// It stays.
    Committed,
    /// The incumbent is gone, or leaves in this moment.
    Alone,
    /// Everything is its own.
    Drained,
}

/// What to do about a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Attach the services to their arenas; answer with their names.
    StandBy,
    /// See whether all is well.
    CheckHealth,
    /// Unseal the arenas for this epoch, take the address, answer clients.
    Activate {
        /// This kernel's epoch.
        epoch: u64,
    },
    /// Take a parked CPU online.
    OnlineCpu {
        /// Its APIC id.
        apic_id: u32,
    },
    /// Take a CPU offline; it parks.
    OfflineCpu {
        /// Its APIC id.
        apic_id: u32,
    },
    /// Stop answering, seal the arenas for this epoch, drop the address.
    StandDown {
        /// The epoch that ends.
        epoch: u64,
    },
    /// Keep this; it is the first half of the report.
    Commit {
        /// The update as the incumbent saw it.
        timeline: Vec<PhaseMark>,
    },
    /// Wait until this CPU is seen parked, take it online, then adopt memory and release fragments: [`Order`] of the
    /// whole phase `Drained`, in which nobody asks any more.
    Drain {
        /// APIC id of the incumbent's last CPU.
        last: u32,
    },
    /// Log this; the end is near.
    Abort {
        /// Why.
        reason: String,
    },
    /// Answer a ping.
    Pong {
        /// From the ping.
        nonce: u64,
    },
}

/// What came of an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Services attached; `StandBy` only.
    Services(Vec<String>),
    /// Clients are answered since this count of the TSC; `Activate` only.
    AnsweringSince(u64),
    /// Number of the CPU in this kernel; `OnlineCpu` only.
    Online(u32),
    /// Anything else that was done.
    Done,
    /// It was not done.
    Failed(String),
}

/// A word that cannot be heard now.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unheard {
    /// It belongs elsewhere.
    #[error("{what} does not belong in stage {stage:?}")]
    Stage {
        /// The word.
        what: &'static str,
        /// The stage.
        stage: Stage,
    },
    /// Another epoch.
    #[error("{what} for epoch {given}, this kernel's is {own}")]
    Epoch {
        /// The word.
        what: &'static str,
        /// The epoch in it.
        given: u64,
        /// The one this kernel was born for.
        own: u64,
    },
    /// No such CPU.
    #[error("{what} for cpu {apic_id:#x}, which this machine does not have or which is not to be moved")]
    Cpu {
        /// The word.
        what: &'static str,
        /// The APIC id in it.
        apic_id: u32,
    },
    /// The answer does not fit the order.
    #[error("{answer:?} is no answer to {order:?}")]
    Answer {
        /// The order.
        order: Order,
        /// The answer.
        answer: Answer,
    },
}

/// The successor's side of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Successor {
    stage: Stage,
    epoch: u64,
    /// CPUs that may still come.
    away: Vec<u32>,
    /// CPUs that came.
    here: Vec<u32>,
}

impl Successor {
    /// As the (checked) record says.
    pub fn new(record: &HandoverRecord) -> Successor {
        let own = record.grant.boot_cpu;
        Successor {
            stage: Stage::Born,
            epoch: record.epoch + 1,
            away: record.machine.cpus.iter().map(|cpu| cpu.apic_id).filter(|&id| id != own).collect(),
            here: Vec::new(),
        }
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The epoch it holds once it is active.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What to do about this word. Changes nothing: [`Successor::answer`] does.
    ///
    /// # Errors
    /// A word that cannot be heard now.
    pub fn hear(&self, word: &ToSuccessor) -> Result<Order, Unheard> {
        use Stage::{Active, Born, Committed, Standing};
        let what = name(word);
        let at = |stages: &[Stage], order: Order| {
            if stages.contains(&self.stage) {
                Ok(order)
            } else {
                let stage = self.stage;
                Err(Unheard::Stage { what, stage })
            }
        };
        let ours = |given: u64| {
            let own = self.epoch;
            if given == own { Ok(()) } else { Err(Unheard::Epoch { what, given, own }) }
        };
        let among = |cpus: &[u32], apic_id: u32| {
            if cpus.contains(&apic_id) { Ok(()) } else { Err(Unheard::Cpu { what, apic_id }) }
        };
        match *word {
            ToSuccessor::StandBy => at(&[Born], Order::StandBy),
            ToSuccessor::CheckHealth => at(&[Standing, Active], Order::CheckHealth),
            ToSuccessor::Activate { epoch } => {
                ours(epoch)?;
                at(&[Standing], Order::Activate { epoch })
            }
            ToSuccessor::CpuParked { apic_id } => {
                among(&self.away, apic_id)?;
                at(&[Active], Order::OnlineCpu { apic_id })
            }
            ToSuccessor::ReleaseCpu { apic_id } => {
                among(&self.here, apic_id)?;
                at(&[Active], Order::OfflineCpu { apic_id })
            }
            ToSuccessor::StandDown { epoch } => {
                ours(epoch)?;
                at(&[Active], Order::StandDown { epoch })
            }
            ToSuccessor::Commit { ref timeline } => {
                let timeline = timeline.clone();
                at(&[Active], Order::Commit { timeline })
            }
            ToSuccessor::LastCpu { apic_id } => {
                among(&self.away, apic_id)?;
                at(&[Committed], Order::Drain { last: apic_id })
            }
            ToSuccessor::Abort { ref reason } => {
                let reason = reason.clone();
                at(&[Born, Standing, Active], Order::Abort { reason })
            }
            ToSuccessor::Ping { nonce } => Ok(Order::Pong { nonce }),
        }
    }

    /// Takes note of what came of an order, and says what to tell the incumbent.
    ///
    /// # Errors
    /// An answer that does not fit the order: a mistake of the driver, which changes nothing.
    pub fn answer(&mut self, order: &Order, answer: Answer) -> Result<Option<ToIncumbent>, Unheard> {
        let reply = match (order, answer) {
            (Order::StandBy, Answer::Services(services)) => {
                self.stage = Stage::Standing;
                ToIncumbent::Standing { services }
            }
            (Order::CheckHealth, Answer::Done) => ToIncumbent::Healthy,
            (&Order::Activate { epoch }, Answer::AnsweringSince(tsc)) => {
                self.stage = Stage::Active;
                ToIncumbent::Activated { epoch, tsc }
            }
            (&Order::OnlineCpu { apic_id }, Answer::Online(cpu)) => {
                self.away.retain(|&id| id != apic_id);
                self.here.push(apic_id);
                ToIncumbent::CpuOnline { apic_id, cpu }
            }
            (&Order::OfflineCpu { apic_id }, Answer::Done) => {
                self.here.retain(|&id| id != apic_id);
                self.away.push(apic_id);
                ToIncumbent::CpuReleased { apic_id }
            }
            (&Order::StandDown { epoch }, Answer::Done) => {
                self.stage = Stage::Standing;
                ToIncumbent::StoodDown { epoch }
            }
            (Order::Commit { .. }, Answer::Done) => {
                self.stage = Stage::Committed;
                ToIncumbent::Committed
            }
            (Order::Drain { last }, Answer::Online(_)) => {
                self.away.retain(|id| id != last);
                self.here.push(*last);
                self.stage = Stage::Alone;
                return Ok(None);
            }
            (Order::Drain { .. }, Answer::Done) if self.stage == Stage::Alone => {
                self.stage = Stage::Drained;
                return Ok(None);
            }
            (Order::Abort { .. }, _) => return Ok(None),
            (&Order::Pong { nonce }, Answer::Done) => ToIncumbent::Pong { nonce },
            (order, Answer::Failed(cause)) => ToIncumbent::Failed { what: order.name().into(), cause },
            (order, answer) => {
                let order = order.clone();
                return Err(Unheard::Answer { order, answer });
            }
        };
        Ok(Some(reply))
    }
}

impl Order {
    /// Its name in logs and in `Failed`.
    pub fn name(&self) -> &'static str {
        match self {
            Order::StandBy => "stand by",
            Order::CheckHealth => "check health",
            Order::Activate { .. } => "activate",
            Order::OnlineCpu { .. } => "online cpu",
            Order::OfflineCpu { .. } => "offline cpu",
            Order::StandDown { .. } => "stand down",
            Order::Commit { .. } => "commit",
            Order::Drain { .. } => "drain",
            Order::Abort { .. } => "abort",
            Order::Pong { .. } => "pong",
        }
    }
}

/// A word's name in logs.
pub fn name(word: &ToSuccessor) -> &'static str {
    match word {
        ToSuccessor::StandBy => "stand by",
        ToSuccessor::CheckHealth => "check health",
        ToSuccessor::Activate { .. } => "activate",
        ToSuccessor::CpuParked { .. } => "cpu parked",
        ToSuccessor::ReleaseCpu { .. } => "release cpu",
        ToSuccessor::StandDown { .. } => "stand down",
        ToSuccessor::Commit { .. } => "commit",
        ToSuccessor::LastCpu { .. } => "last cpu",
        ToSuccessor::Abort { .. } => "abort",
        ToSuccessor::Ping { .. } => "ping",
    }
}
