//! The one table that says how each effect is undone.

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
            Effect::AwaitHello | Effect::StandBy | Effect::CheckHealth => vec![],
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
}
