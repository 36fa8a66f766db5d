//! Everything that an update does to the world.
//!
//! The contract of whoever carries an effect out:
//!
//! 1. `Done`: it is so.
//! 2. `Failed`: it is not so, and nothing of it is left behind. Its undo will not be asked for.
//! 3. `Unknown` (time ran out, the other side died, the operator called it off meanwhile): its undo will be asked for,
//!    and must work whether or not the effect, or a part of it, had happened.
//! 4. An undo works any number of times.
//! 5. So do the effects from `Activate` on: a driver that died is followed by one that carries the effect under way out again
//!    ([`super::recover`]). What is so already is `Done`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::blame::Blame;
use super::cpu::Cpu;
use super::probation::WhenWatched;

/// Something to be carried out. The upper half goes forward, the lower half back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "effect")]
pub enum Effect {
    /// Take the successor's memory out of this kernel.
    TakeMemory,
    /// Take the PCI functions that the successor gets away from their drivers.
    GrantDevices,
    /// Take a CPU offline in this kernel.
    OfflineCpu {
        /// Which.
        cpu: Cpu,
    },
    /// Write image, initrd, tables and the handover record into the region, and register the instance.
    Place,
    /// INIT and SIPI: the successor begins to run.
    StartCpu {
        /// On which CPU.
        cpu: Cpu,
    },
    /// Wait for the successor's agent, and check what it says of itself.
    AwaitHello,
    /// Have the services attach to their arenas.
    StandBy,
    /// Ask the successor how it is.
    CheckHealth,
    /// Only in a trial that is taken back: make its checks, and watch the candidate for as long as was asked for. A check that fails is
    /// a failure of the successor's.
    RunChecks,
    /// Have the services finish what they do and fall silent.
    Freeze,
    /// Check that every arena is sealed.
    Seal,
    /// Speak for the service address no longer: no client is told any more that it is here.
    ReleaseAddress,
    /// Tell the successor to unseal the arenas, take the address and answer; wait until it does.
    Activate {
        /// Its epoch.
        epoch: u64,
    },
    /// Drop the service address, which is the successor's by now. It takes longer than a client should wait, so it is not in the
    /// cutover.
    DropAddress,
    /// Park an offline CPU at the successor's mailbox.
    ParkCpu {
        /// Which.
        cpu: Cpu,
    },
    /// Tell the successor about a parked CPU, and wait until it is online there.
    HandCpu {
        /// Which.
        cpu: Cpu,
    },
    /// Watch the successor serve: ask it again and again how it is, and listen for its end. Done when the time is over and that
    /// means a commit, or when an operator commits.
    Watch {
        /// For how long.
        period: Duration,
        /// What is done when it is over.
        then: WhenWatched,
    },
    /// Tell the successor that it stays. Its answer is the point of no return.
    Commit,
    /// Stop every device of this kernel: nothing may write into memory that changes hands.
    QuiesceDevices,
    /// Announce the last CPU, and leave it. This kernel is gone; the effect does not return.
    YieldLastCpu {
        /// Which.
        cpu: Cpu,
    },

    /// Undoes `Activate`, with the successor's help: it seals the arenas and drops the address.
    StandDown {
        /// The epoch that ends.
        epoch: u64,
    },
    /// Undoes `ReleaseAddress`, and `DropAddress` if it came to that: take the service address, with gratuitous ARP.
    TakeAddressBack,
    /// Undoes `Seal`: the arenas belong to this epoch.
    Unseal {
        /// The incumbent's epoch from now on.
        epoch: u64,
    },
    /// Undoes `Freeze`: the services go on.
    Unfreeze {
        /// The incumbent's epoch from now on.
        epoch: u64,
    },
    /// Undoes `HandCpu`, with the successor's help: it takes the CPU offline, which parks it.
    TakeCpuBack {
        /// Which.
        cpu: Cpu,
    },
    /// Undoes `ParkCpu`: the CPU is again where this kernel's `OnlineCpu` finds it.
    UnparkCpu {
        /// Which.
        cpu: Cpu,
    },
    /// Undoes `StartCpu`, without anybody's help: the successor's CPUs get INIT. It does not run any more.
    Fence {
        /// All that it has.
        cpus: Vec<Cpu>,
    },
    /// Read the log of the kernel that was fenced, before its memory is given back.
    ReadLastWords,
    /// Undoes `Place`.
    DestroyInstance,
    /// Undoes `OfflineCpu`.
    OnlineCpu {
        /// Which.
        cpu: Cpu,
    },
    /// Undoes `GrantDevices`.
    TakeDevicesBack,
    /// Undoes `TakeMemory`.
    GiveBackMemory,
}

/// The epochs of an update: they only grow, and each belongs to one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Epochs {
    /// The incumbent's, before.
    pub before: u64,
    /// The successor's.
    pub successor: u64,
    /// The incumbent's, should it have to take over from a successor that was told to answer.
    pub back: u64,
}

impl Epochs {
    /// Those of an update that begins in this epoch.
    pub fn from(before: u64) -> Epochs {
        Epochs { before, successor: before + 1, back: before + 2 }
    }
}

impl Effect {
    /// It needs the successor's help. A successor that does not give it is fenced instead.
    pub fn needs_successor(&self) -> bool {
        matches!(self, Effect::StandDown { .. } | Effect::TakeCpuBack { .. })
    }

    /// It stands between the freeze and the next answer to a client: no disk, no logging to disk, nothing that can
    /// wait, while it is carried out.
    pub fn is_in_blackout(&self) -> bool {
        matches!(
            self,
            Effect::Freeze
                | Effect::Seal
                | Effect::ReleaseAddress
                | Effect::Activate { .. }
                | Effect::StandDown { .. }
                | Effect::TakeAddressBack
                | Effect::Unseal { .. }
                | Effect::Unfreeze { .. }
        )
    }

    /// Who is to blame when it takes too long.
    pub fn carried_out_by(&self) -> Blame {
        match self {
            Effect::AwaitHello
            | Effect::StandBy
            | Effect::CheckHealth
            | Effect::RunChecks
            | Effect::Activate { .. }
            | Effect::HandCpu { .. }
            | Effect::Watch { .. }
            | Effect::Commit
            | Effect::StandDown { .. }
            | Effect::TakeCpuBack { .. } => Blame::Successor,
            Effect::StartCpu { .. } | Effect::ParkCpu { .. } | Effect::UnparkCpu { .. } => Blame::Hardware,
            _ => Blame::Incumbent,
        }
    }

    /// The CPU that it moves.
    pub fn cpu(&self) -> Option<Cpu> {
        match self {
            Effect::OfflineCpu { cpu }
            | Effect::StartCpu { cpu }
            | Effect::ParkCpu { cpu }
            | Effect::HandCpu { cpu }
            | Effect::YieldLastCpu { cpu }
            | Effect::TakeCpuBack { cpu }
            | Effect::UnparkCpu { cpu }
            | Effect::OnlineCpu { cpu } => Some(*cpu),
            _ => None,
        }
    }

    /// Its name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Effect::TakeMemory => "take memory",
            Effect::GrantDevices => "grant devices",
            Effect::OfflineCpu { .. } => "offline cpu",
            Effect::Place => "place image",
            Effect::StartCpu { .. } => "start cpu",
            Effect::AwaitHello => "await hello",
            Effect::StandBy => "stand by",
            Effect::CheckHealth => "check health",
            Effect::RunChecks => "run checks",
            Effect::Freeze => "freeze",
            Effect::Seal => "seal",
            Effect::ReleaseAddress => "release address",
            Effect::Activate { .. } => "activate",
            Effect::DropAddress => "drop address",
            Effect::ParkCpu { .. } => "park cpu",
            Effect::HandCpu { .. } => "hand cpu over",
            Effect::Watch { .. } => "watch",
            Effect::Commit => "commit",
            Effect::QuiesceDevices => "quiesce devices",
            Effect::YieldLastCpu { .. } => "yield last cpu",
            Effect::StandDown { .. } => "stand down",
            Effect::TakeAddressBack => "take address back",
            Effect::Unseal { .. } => "unseal",
            Effect::Unfreeze { .. } => "unfreeze",
            Effect::TakeCpuBack { .. } => "take cpu back",
            Effect::UnparkCpu { .. } => "unpark cpu",
            Effect::Fence { .. } => "fence",
            Effect::ReadLastWords => "read last words",
            Effect::DestroyInstance => "destroy instance",
            Effect::OnlineCpu { .. } => "online cpu",
            Effect::TakeDevicesBack => "take devices back",
            Effect::GiveBackMemory => "give back memory",
        }
    }
}
