//! From what the machine has and what was asked to a [`Plan`], or a refusal before anything is touched.
//!
//! A plan leaves nothing to be decided while it runs: its [script](Plan::script) is the whole way forward, and can be
//! printed before it is taken. What an image or a service must be like is checked by those who know (kexec-core, the
//! agent); here are the choices: which CPU is spare, in which order the others follow, which goes last.

use serde::{Deserialize, Serialize};
use state_schemas::handover_record::UpdateId;
use thiserror::Error;

use crate::deadline::Deadlines;
use crate::phase::Phase;
use crate::undo::{Effect, Epochs};

/// A CPU of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cpu {
    /// Its number in this kernel.
    pub number: u32,
    /// Its local APIC id, by which both kernels mean the same CPU.
    pub apic_id: u32,
}

/// What this kernel says of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// Which.
    pub cpu: Cpu,
    /// It is online.
    pub online: bool,
    /// This kernel cannot take it offline: its own boot CPU. It goes last.
    pub kernel_boot: bool,
    /// The firmware started the machine on it: INIT sends it back to the firmware, so that it cannot be fenced.
    pub firmware_boot: bool,
}

/// How far the update shall go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// All the way.
    Upgrade,
    /// To the end of the trial, and back.
    Canary,
}

/// What happens between activation and commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ProbationPolicy {
    /// The CPUs move; then the update commits, without watching the successor for any time. Until then whatever fails
    /// is a reverse cutover.
    CommitAtOnce,
    // The next policy watches for a while with the incumbent's last CPU parked as dead-man switch: one more step of
    // the script, between the last `HandCpu` and `Commit`.
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Identity of the update.
    pub update: UpdateId,
    /// How far.
    pub goal: Goal,
    /// Number of the CPU to start the successor on; `None`: whichever suits.
    pub cpu: Option<u32>,
    /// What happens between activation and commit.
    pub probation: ProbationPolicy,
    /// How long each phase may take.
    pub deadlines: Deadlines,
}

/// What this machine has, as far as the choices here depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// All CPUs.
    pub cpus: Vec<CpuState>,
    /// Epoch that this kernel holds.
    pub epoch: u64,
    /// PCI functions will be granted.
    pub devices: bool,
}

/// What will be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Identity of the update.
    pub update: UpdateId,
    /// How far.
    pub goal: Goal,
    /// Epoch that this kernel holds at the beginning.
    pub epoch: u64,
    /// The CPU that the successor starts on.
    pub spare: Cpu,
    /// It is online now, so that it has to be taken offline first (and back online in the end).
    pub spare_is_online: bool,
    /// The CPUs that follow, in this order.
    pub others: Vec<Cpu>,
    /// The CPU that this kernel leaves last.
    pub last: Cpu,
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
    /// The successor needs a CPU of its own.
    #[error("an update needs 2 online cpus, this machine has {online}")]
    TooFewCpus {
        /// CPUs that are online.
        online: usize,
    },
    /// No such CPU.
    #[error("there is no cpu {number}: this machine has {cpus}")]
    NoSuchCpu {
        /// The one asked for.
        number: u32,
        /// How many there are.
        cpus: usize,
    },
    /// The kernel cannot run without it.
    #[error("cpu {number} is the one this kernel leaves last; choose another one")]
    LastCpu {
        /// The one asked for.
        number: u32,
    },
    /// It cannot be fenced.
    #[error(
        "cpu {number} is the firmware's boot cpu, which cannot be stopped if the new kernel hangs; choose another one"
    )]
    FirmwareBootCpu {
        /// The one asked for.
        number: u32,
    },
    /// No CPU is suitable.
    #[error("none of the {cpus} cpus can be the successor's first: each is the firmware's or this kernel's boot cpu")]
    NoSpareCpu {
        /// How many there are.
        cpus: usize,
    },
    /// The kernel does not say which CPU it booted on.
    #[error("{boot} cpus claim to be the one this kernel booted on")]
    BootCpu {
        /// How many claim it.
        boot: usize,
    },
    /// Too many updates, or a number that is none.
    #[error("epoch {epoch} leaves no room for another update")]
    Epoch {
        /// The epoch now.
        epoch: u64,
    },
}

impl Plan {
    /// Decides. Touches nothing.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn make(inventory: &Inventory, request: &Request) -> Result<Plan, Refusal> {
        let cpus = &inventory.cpus;
        let online = cpus.iter().filter(|state| state.online).count();
        if online < 2 {
            return Err(Refusal::TooFewCpus { online });
        }
        if inventory.epoch > u64::MAX - 4 {
            let epoch = inventory.epoch;
            return Err(Refusal::Epoch { epoch });
        }
        let mut boot = cpus.iter().filter(|state| state.kernel_boot);
        let (Some(last), None) = (boot.next(), boot.next()) else {
            let boot = cpus.iter().filter(|state| state.kernel_boot).count();
            return Err(Refusal::BootCpu { boot });
        };
        let suits = |state: &CpuState| !state.kernel_boot && !state.firmware_boot;
        let spare = match request.cpu {
            Some(number) => {
                let asked = cpus.iter().find(|state| state.cpu.number == number);
                match asked {
                    None => {
                        let cpus = cpus.len();
                        return Err(Refusal::NoSuchCpu { number, cpus });
                    }
                    Some(state) if state.kernel_boot => return Err(Refusal::LastCpu { number }),
                    Some(state) if state.firmware_boot => {
                        return Err(Refusal::FirmwareBootCpu { number });
                    }
                    Some(state) => state,
                }
            }
            // An offline CPU costs this kernel nothing; else the highest number, which Linux fills last.
            None => cpus
                .iter()
                .filter(|state| suits(state))
                .max_by_key(|state| (!state.online, state.cpu.number))
                .ok_or(Refusal::NoSpareCpu { cpus: cpus.len() })?,
        };
        let mut others: Vec<&CpuState> =
            cpus.iter().filter(|state| state.online && !state.kernel_boot && state.cpu != spare.cpu).collect();
        // The firmware's boot CPU as late as can be: once the successor runs on it, it cannot be taken back by force.
        others.sort_by_key(|state| (state.firmware_boot, state.cpu.number));
        Ok(Plan {
            update: request.update,
            goal: request.goal,
            epoch: inventory.epoch,
            spare: spare.cpu,
            spare_is_online: spare.online,
            others: others.into_iter().map(|state| state.cpu).collect(),
            last: last.cpu,
            devices: inventory.devices,
            probation: request.probation,
            deadlines: request.deadlines,
        })
    }

    /// Epochs of this update.
    pub fn epochs(&self) -> Epochs {
        Epochs::from(self.epoch)
    }

    /// THE WAY FORWARD: every effect, in its order, with its phase.
    pub fn script(&self) -> Vec<(Phase, Effect)> {
        use Phase::{Booting, Commit, Cutover, Granted, Probation, Trial};
        let cpu = self.spare;
        let epoch = self.epochs().successor;

        let mut script = vec![(Granted, Effect::TakeMemory)];
        if self.devices {
            script.push((Granted, Effect::GrantDevices));
        }
        if self.spare_is_online {
            script.push((Granted, Effect::OfflineCpu { cpu }));
        }
        script.extend([
            (Granted, Effect::Place),
            (Booting, Effect::StartCpu { cpu }),
            (Booting, Effect::AwaitHello),
            (Trial, Effect::StandBy),
            (Trial, Effect::CheckHealth),
        ]);
        if self.goal == Goal::Canary {
            return script;
        }
        script.extend([
            (Cutover, Effect::Freeze),
            (Cutover, Effect::Seal),
            (Cutover, Effect::ReleaseAddress),
            (Cutover, Effect::Activate { epoch }),
        ]);
        for &cpu in &self.others {
            script.extend([
                (Probation, Effect::OfflineCpu { cpu }),
                (Probation, Effect::ParkCpu { cpu }),
                (Probation, Effect::HandCpu { cpu }),
            ]);
        }
        match self.probation {
            ProbationPolicy::CommitAtOnce => {}
        }
        script.extend([
            (Commit, Effect::Commit),
            (Commit, Effect::QuiesceDevices),
            (Commit, Effect::YieldLastCpu { cpu: self.last }),
        ]);
        script
    }
}
