//! From what was asked to a [`Plan`], or a refusal before anything is touched.
//!
//! A plan leaves nothing to be decided while it runs: its [script](Plan::script) is the whole way forward, and can be
//! printed before it is taken. Which CPU is spare and in which order the others follow is kexec-core's choice, what an
//! image or a service must be like its and the agent's; here it is made into steps.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use state_schemas::handover_record::UpdateId;
use thiserror::Error;

use super::cpu::{Cpu, Cpus, Moving};
use super::deadline::Deadlines;
use super::effect::{Effect, Epochs};
use super::phase::Phase;
use super::probation::{ProbationPolicy, WATCH_LIMITS};
use super::sizes::{self, CPU_LIMIT};

/// How far the update shall go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// All the way.
    Upgrade,
    /// To the end of the trial, and back. The CPUs that follow the spare one ([`Cpus::others`]) are those that the candidate is lent.
    Canary,
}

/// What will be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Identity of the update.
    pub update: UpdateId,
    /// This kernel's boot id (`/proc/sys/kernel/random/boot_id`): after a boot, its journal is history.
    pub boot: String,
    /// Names of the services that shall stand by in the successor.
    pub services: Vec<String>,
    /// How far.
    pub goal: Goal,
    /// Epoch that this kernel holds at the beginning.
    pub epoch: u64,
    /// Who goes over, and when.
    pub cpus: Cpus,
    /// PCI functions will be granted.
    pub devices: bool,
    /// What happens between activation and commit.
    pub probation: ProbationPolicy,
    /// How long each phase may take.
    pub deadlines: Deadlines,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// One CPU cannot move twice.
    #[error("cpu {number} (apic id {apic_id:#x}) is named twice")]
    CpuTwice {
        /// Its number.
        number: u32,
        /// Its APIC id.
        apic_id: u32,
    },
    /// More CPUs than an update can move.
    #[error("{count} CPUs, but this version of Baton moves {CPU_LIMIT} at most")]
    TooManyCpus {
        /// How many.
        count: usize,
    },
    /// The names of the services do not fit in the one message that carries them.
    #[error(
        "{count} services: their names make a message of {len} bytes, but the channel between the kernels carries {limit}: \
         shorten the names, or let fewer services cross"
    )]
    Services {
        /// How many.
        count: usize,
        /// Bytes of the message.
        len: u64,
        /// Bytes that a message may have.
        limit: u64,
    },
    /// Too many updates, or a number that is none.
    #[error("epoch {epoch} leaves no room for another update")]
    Epoch {
        /// The epoch now.
        epoch: u64,
    },
    /// No time, or too much, to watch the successor.
    #[error(
        "a probation of {} s: it can last from {} s to {} s",
        .period.as_secs_f64(), WATCH_LIMITS.0.as_secs(), WATCH_LIMITS.1.as_secs()
    )]
    Probation {
        /// The time that was asked for.
        period: Duration,
    },
}

impl Plan {
    /// Says whether this can be a plan. Touches nothing.
    ///
    /// # Errors
    /// What contradicts itself in it.
    pub fn check(self) -> Result<Plan, Refusal> {
        let epoch = self.epoch;
        if epoch > u64::MAX - 4 {
            return Err(Refusal::Epoch { epoch });
        }
        if let ProbationPolicy::Watch { period, .. } = self.probation
            && !(WATCH_LIMITS.0..=WATCH_LIMITS.1).contains(&period)
        {
            return Err(Refusal::Probation { period });
        }
        let count = self.cpus.others.len() + 2;
        if count > CPU_LIMIT {
            return Err(Refusal::TooManyCpus { count });
        }
        if let Err((len, limit)) = sizes::standing(&self.services) {
            return Err(Refusal::Services { count: self.services.len(), len, limit });
        }
        let others = self.cpus.others.iter().map(|moving| moving.cpu);
        let mut seen = BTreeSet::new();
        for cpu in others.chain([self.cpus.spare.cpu, self.cpus.last]) {
            if !seen.insert(cpu.apic_id) {
                let Cpu { number, apic_id } = cpu;
                return Err(Refusal::CpuTwice { number, apic_id });
            }
        }
        Ok(self)
    }

    /// Epochs of this update.
    pub fn epochs(&self) -> Epochs {
        Epochs::from(self.epoch)
    }

    /// THE WAY FORWARD: every effect, in its order, with its phase.
    pub fn script(&self) -> Vec<(Phase, Effect)> {
        use Phase::{Booting, Commit, Cutover, Granted, Probation, Trial};
        let spare = self.cpus.spare;
        let epoch = self.epochs().successor;

        let mut script = vec![(Granted, Effect::TakeMemory)];
        if self.devices {
            script.push((Granted, Effect::GrantDevices));
        }
        if spare.online {
            script.push((Granted, Effect::OfflineCpu { cpu: spare.cpu }));
        }
        script.extend([
            (Booting, Effect::Place),
            (Booting, Effect::StartCpu { cpu: spare.cpu }),
            (Booting, Effect::AwaitHello),
            (Trial, Effect::StandBy),
            (Trial, Effect::CheckHealth),
        ]);
        if self.goal == Goal::Canary {
            for &Moving { cpu, .. } in self.cpus.others.iter().filter(|moving| moving.online) {
                let lent = [Effect::OfflineCpu { cpu }, Effect::ParkCpu { cpu }, Effect::HandCpu { cpu }];
                script.extend(lent.map(|effect| (Trial, effect)));
            }
            script.push((Trial, Effect::RunChecks));
            return script;
        }
        script.extend([
            (Cutover, Effect::Freeze),
            (Cutover, Effect::Seal),
            (Cutover, Effect::ReleaseAddress),
            (Cutover, Effect::Activate { epoch }),
            (Probation, Effect::DropAddress),
        ]);
        let (watch, held_back) = match self.probation {
            ProbationPolicy::CommitAtOnce => (None, 0),
            ProbationPolicy::Watch { period, then, held_back } => (Some(Effect::Watch { period, then }), held_back),
        };
        let moves = |cpus: &[Moving]| -> Vec<(Phase, Effect)> {
            let each = |&Moving { cpu, online }| {
                let (offline, hand) = (Effect::OfflineCpu { cpu }, Effect::HandCpu { cpu });
                [online.then_some(offline), Some(Effect::ParkCpu { cpu }), online.then_some(hand)]
            };
            cpus.iter().flat_map(each).flatten().map(|effect| (Probation, effect)).collect()
        };
        let others = &self.cpus.others;
        let (before, after) = others.split_at(others.len().saturating_sub(held_back));
        script.extend(moves(before));
        script.extend(watch.map(|watch| (Probation, watch)));
        script.extend(moves(after));
        let cpu = self.cpus.last;
        script.extend([
            (Commit, Effect::Commit),
            (Commit, Effect::QuiesceDevices),
            (Commit, Effect::YieldLastCpu { cpu }),
        ]);
        script
    }
}
