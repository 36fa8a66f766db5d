//! The other role: what the successor's agent does at each word of the incumbent.
//!
//! ```text
//!  born ─StandBy─► standing ─Activate─► active ─Commit─► committed ─LastCpu─► alone ─► drained
//!                     ▲                  │ CpuParked, ReleaseCpu: any number
//!                     └────StandDown─────┘
//! ```
//! A word that does not belong where it comes is refused and changes nothing; the incumbent gets the refusal as
//! `Failed` and decides. The epoch and the CPUs that may be named are those of the handover record.
//!
//! A word that has been obeyed already gets the same answer once more ([`Order::Repeat`]), and nothing is done: the incumbent's agent may
//! have died before it read the answer, and the one that follows asks again.

use state_schemas::handover_record::{HandoverRecord, PhaseMark};
use state_schemas::message::{Ending, Examination, Text, ToIncumbent, ToSuccessor};
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
    /// Look at this kernel as it has come up.
    Examine,
    /// Have a shell run this command.
    RunCheck {
        /// The command.
        command: String,
        /// How long it may run, in milliseconds.
        limit_ms: u32,
    },
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
    /// Keep this part of the table of connections until the services are activated; a part at 0 begins anew.
    TakeConnections {
        /// Where in the table it begins.
        at: u64,
        /// Bytes of the whole table.
        total: u64,
        /// The part.
        bytes: Vec<u8>,
    },
    /// It is so already, or (a ping) there is nothing to do: answer this.
    Repeat(ToIncumbent),
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
    /// Bytes of the table of connections that are here; `TakeConnections` only.
    Have(u64),
    /// What was found; `Examine` only.
    Examined(Box<Examination>),
    /// How a command ended; `RunCheck` only.
    CheckEnded {
        /// How.
        ending: Ending,
        /// The end of what it wrote.
        output: Text,
        /// How long it took, in milliseconds.
        took_ms: u32,
    },
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
    /// A word that no incumbent says.
    #[error("{what} is nothing that an incumbent says")]
    Unsaid {
        /// The word.
        what: &'static str,
    },
    /// The answer does not fit the order.
    #[error("{answer:?} is no answer to {order:?}")]
    Answer {
        /// The order.
        order: Box<Order>,
        /// The answer.
        answer: Box<Answer>,
    },
}

/// The successor's side of an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Successor {
    stage: Stage,
    epoch: u64,
    /// Services that wait, or serve.
    services: Vec<String>,
    /// Since when clients are answered, on the TSC.
    since: u64,
    /// APIC ids of the CPUs that may still come.
    away: Vec<u32>,
    /// CPUs that came: APIC id, and number here.
    here: Vec<(u32, u32)>,
}

impl Successor {
    /// As the (checked) record says.
    pub fn new(record: &HandoverRecord) -> Successor {
        let own = record.grant.boot_cpu;
        Successor {
            stage: Stage::Born,
            epoch: record.epoch + 1,
            services: Vec::new(),
            since: 0,
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
        let again = |reply: ToIncumbent| Ok(Order::Repeat(reply));
        let no_such_cpu = |apic_id| Err(Unheard::Cpu { what, apic_id });
        let online = |apic_id: u32| self.here.iter().find(|(id, _)| *id == apic_id).map(|(_, cpu)| *cpu);
        match *word {
            ToSuccessor::StandBy if self.stage == Standing => {
                again(ToIncumbent::Standing { services: self.services.clone() })
            }
            ToSuccessor::StandBy => at(&[Born], Order::StandBy),
            ToSuccessor::CheckHealth => at(&[Standing, Active], Order::CheckHealth),
            // Of a trial only: a kernel that serves has better things to do.
            ToSuccessor::Examine => at(&[Standing], Order::Examine),
            ToSuccessor::RunCheck { ref command, limit_ms } => {
                at(&[Standing], Order::RunCheck { command: command.as_str().to_owned(), limit_ms })
            }
            ToSuccessor::Activate { epoch } => {
                ours(epoch)?;
                match self.stage {
                    Active => again(ToIncumbent::Activated { epoch, tsc: self.since }),
                    _ => at(&[Standing], Order::Activate { epoch }),
                }
            }
            ToSuccessor::CpuParked { apic_id } => match online(apic_id) {
                Some(cpu) if [Standing, Active].contains(&self.stage) => again(ToIncumbent::CpuOnline { apic_id, cpu }),
                None if !self.away.contains(&apic_id) => no_such_cpu(apic_id),
                // A candidate is lent CPUs for its trial, in which it never serves.
                _ => at(&[Standing, Active], Order::OnlineCpu { apic_id }),
            },
            ToSuccessor::ReleaseCpu { apic_id } => match online(apic_id) {
                None if !self.away.contains(&apic_id) => no_such_cpu(apic_id),
                None if self.stage == Active => again(ToIncumbent::CpuReleased { apic_id }),
                _ => at(&[Active], Order::OfflineCpu { apic_id }),
            },
            ToSuccessor::StandDown { epoch } => {
                ours(epoch)?;
                match self.stage {
                    Standing => again(ToIncumbent::StoodDown { epoch }),
                    _ => at(&[Active], Order::StandDown { epoch }),
                }
            }
            ToSuccessor::Commit { .. } if self.stage == Committed => again(ToIncumbent::Committed),
            ToSuccessor::Commit { ref timeline } => {
                let timeline = timeline.clone();
                at(&[Active], Order::Commit { timeline })
            }
            ToSuccessor::LastCpu { apic_id } => match self.away.contains(&apic_id) {
                true => at(&[Committed], Order::Drain { last: apic_id }),
                false => no_such_cpu(apic_id),
            },
            ToSuccessor::Connections { at: from, total, ref bytes } => {
                let bytes = bytes.clone();
                at(&[Standing], Order::TakeConnections { at: from, total, bytes })
            }
            ToSuccessor::Abort { .. } => Err(Unheard::Unsaid { what }),
            ToSuccessor::Ping { nonce } => again(ToIncumbent::Pong { nonce }),
        }
    }

    /// Takes note of what came of an order, and says what to tell the incumbent.
    ///
    /// # Errors
    /// An answer that does not fit the order: a mistake of the driver, which changes nothing.
    pub fn answer(&mut self, order: &Order, answer: Answer) -> Result<Option<ToIncumbent>, Unheard> {
        let reply = match (order, answer) {
            (Order::Repeat(reply), Answer::Done) => reply.clone(),
            (Order::StandBy, Answer::Services(services)) => {
                self.stage = Stage::Standing;
                self.services.clone_from(&services);
                ToIncumbent::Standing { services }
            }
            (Order::CheckHealth, Answer::Done) => ToIncumbent::Healthy,
            (&Order::Activate { epoch }, Answer::AnsweringSince(tsc)) => {
                self.stage = Stage::Active;
                self.since = tsc;
                ToIncumbent::Activated { epoch, tsc }
            }
            (Order::TakeConnections { .. }, Answer::Have(have)) => ToIncumbent::ConnectionsTaken { have },
            (Order::Examine, Answer::Examined(examination)) => ToIncumbent::Examined { examination: *examination },
            (Order::RunCheck { .. }, Answer::CheckEnded { ending, output, took_ms }) => {
                ToIncumbent::CheckEnded { ending, output, took_ms }
            }
            (&Order::OnlineCpu { apic_id }, Answer::Online(cpu)) => {
                self.away.retain(|&id| id != apic_id);
                self.here.push((apic_id, cpu));
                ToIncumbent::CpuOnline { apic_id, cpu }
            }
            (&Order::OfflineCpu { apic_id }, Answer::Done) => {
                self.here.retain(|(id, _)| *id != apic_id);
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
            (Order::Drain { last }, Answer::Online(cpu)) => {
                self.away.retain(|id| id != last);
                self.here.push((*last, cpu));
                self.stage = Stage::Alone;
                return Ok(None);
            }
            (Order::Drain { .. }, Answer::Done) if self.stage == Stage::Alone => {
                self.stage = Stage::Drained;
                return Ok(None);
            }
            (order, Answer::Failed(cause)) => ToIncumbent::Failed { what: order.name().into(), cause: cause.into() },
            (order, answer) => {
                return Err(Unheard::Answer { order: Box::new(order.clone()), answer: Box::new(answer) });
            }
        };
        Ok(Some(reply))
    }
}

impl Unheard {
    /// What to tell the incumbent of a word that cannot be heard now.
    pub fn reply(&self, word: &ToSuccessor) -> ToIncumbent {
        ToIncumbent::Failed { what: name(word).into(), cause: self.to_string().into() }
    }
}

impl Order {
    /// Its name in logs and in `Failed`.
    pub fn name(&self) -> &'static str {
        match self {
            Order::StandBy => "stand by",
            Order::CheckHealth => "check health",
            Order::Examine => "examine",
            Order::RunCheck { .. } => "run check",
            Order::Activate { .. } => "activate",
            Order::OnlineCpu { .. } => "online cpu",
            Order::OfflineCpu { .. } => "offline cpu",
            Order::StandDown { .. } => "stand down",
            Order::Commit { .. } => "commit",
            Order::Drain { .. } => "drain",
            Order::TakeConnections { .. } => "take connections",
            Order::Repeat(_) => "answer again",
        }
    }
}

/// A word's name in logs.
pub fn name(word: &ToSuccessor) -> &'static str {
    match word {
        ToSuccessor::StandBy => "stand by",
        ToSuccessor::CheckHealth => "check health",
        ToSuccessor::Examine => "examine",
        ToSuccessor::RunCheck { .. } => "run check",
        ToSuccessor::Activate { .. } => "activate",
        ToSuccessor::CpuParked { .. } => "cpu parked",
        ToSuccessor::ReleaseCpu { .. } => "release cpu",
        ToSuccessor::StandDown { .. } => "stand down",
        ToSuccessor::Commit { .. } => "commit",
        ToSuccessor::LastCpu { .. } => "last cpu",
        ToSuccessor::Connections { .. } => "connections",
        ToSuccessor::Abort { .. } => "abort",
        ToSuccessor::Ping { .. } => "ping",
    }
}
