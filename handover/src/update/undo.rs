//! How each effect is undone, and what must not be undone after a failure: two tables.

use super::effect::Effect;

impl Effect {
    /// THE TABLE: what undoes this effect, in the order in which it is to happen. Nothing: the effect only asks or
    /// waits. (`Commit` and what follows are beyond undoing.)
    pub fn undo(&self) -> Vec<Effect> {
        match *self {
            Effect::TakeMemory => vec![Effect::GiveBackMemory],
            Effect::GrantDevices => vec![Effect::TakeDevicesBack],
            Effect::OfflineCpu { cpu } => vec![Effect::OnlineCpu { cpu }],
            Effect::Place => vec![Effect::DestroyInstance],
            Effect::StartCpu { cpu } => {
                vec![Effect::Fence { cpus: vec![cpu] }, Effect::ReadLastWords]
            }
            Effect::Freeze => vec![Effect::Unfreeze { epoch: 0 }],
            Effect::Seal => vec![Effect::Unseal { epoch: 0 }],
            Effect::ReleaseAddress => vec![Effect::TakeAddressBack],
            Effect::Activate { epoch } => vec![Effect::StandDown { epoch }],
            Effect::ParkCpu { cpu } => vec![Effect::UnparkCpu { cpu }],
            Effect::HandCpu { cpu } => vec![Effect::TakeCpuBack { cpu }],
            Effect::AwaitHello | Effect::StandBy | Effect::CheckHealth | Effect::RunChecks | Effect::Watch { .. } => {
                vec![]
            }
            // What undoes `ReleaseAddress` gives the address back, dropped or not.
            Effect::DropAddress => vec![],
            Effect::Commit | Effect::QuiesceDevices | Effect::YieldLastCpu { .. } => vec![],
            Effect::StandDown { .. }
            | Effect::TakeAddressBack
            | Effect::Unseal { .. }
            | Effect::Unfreeze { .. }
            | Effect::TakeCpuBack { .. }
            | Effect::UnparkCpu { .. }
            | Effect::Fence { .. }
            | Effect::ReadLastWords
            | Effect::DestroyInstance
            | Effect::OnlineCpu { .. }
            | Effect::TakeDevicesBack
            | Effect::GiveBackMemory => vec![],
        }
    }

    /// THE OTHER TABLE: once this undo has failed, that one must not be tried. Memory is given back only when nothing can
    /// write there any more: no kernel, no device, no CPU that waits in it. A CPU is taken online only from where it is.
    pub fn forbids(&self, other: &Effect) -> bool {
        let memory = matches!(other, Effect::DestroyInstance | Effect::GiveBackMemory);
        match self {
            // It may still run, and use whatever was not taken back yet.
            Effect::Fence { .. } => true,
            Effect::TakeDevicesBack | Effect::DestroyInstance => memory,
            Effect::UnparkCpu { cpu } => memory || *other == Effect::OnlineCpu { cpu: *cpu },
            _ => false,
        }
    }
}
