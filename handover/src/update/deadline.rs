//! How long everything may take before the update turns back.
//!
//! A deadline is there so that no update hangs, not to make it fast; so it is generous, and grows with nothing: not with the
//! number of CPUs, not with what was done before.
//!
//! - Steps that wait for one thing [share](Share) a deadline: the steps of a phase, or in the probation the steps of one CPU.
//! - The cutover's is for the whole way from the freeze to the first answer of the successor. It is what a client may have to wait
//!   at worst before the update turns back.
//! - The way back from there has the same time again, for all that has to happen until the incumbent serves. A step that comes when
//!   this is used up has [a little](Deadlines::least_in_blackout) all the same, since not even to tell the services to go on would be worse.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::effect::Effect;
use super::phase::Phase;

/// Steps with the same share have one deadline for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// All steps of a phase.
    Phase(Phase),
    /// The steps by which one CPU moves, by its APIC id.
    Cpu(u32),
    /// Dropping the service address, which waits for nobody else.
    Address,
    /// Watching the successor serve.
    Watch,
    /// The checks of a trial that is taken back.
    Checks,
}

impl Share {
    /// Which deadline a step of the script has.
    pub fn of(phase: Phase, effect: &Effect) -> Share {
        match (phase, effect) {
            (
                Phase::Probation | Phase::Trial,
                Effect::OfflineCpu { cpu } | Effect::ParkCpu { cpu } | Effect::HandCpu { cpu },
            ) => Share::Cpu(cpu.apic_id),
            (_, Effect::RunChecks) => Share::Checks,
            (Phase::Probation, Effect::DropAddress) => Share::Address,
            (Phase::Probation, Effect::Watch { .. }) => Share::Watch,
            (phase, _) => Share::Phase(phase),
        }
    }
}

/// Time allowed for each phase, and for each undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadlines {
    /// [`Phase::Granted`]: moving pages out of the way takes about a second for 256 MiB under emulation, and may
    /// have to be tried at several places.
    pub granted: Duration,
    /// [`Phase::Booting`]: 2 to 6 s under emulation on an idle machine.
    pub booting: Duration,
    /// [`Phase::Trial`].
    pub trial: Duration,
    /// [`Phase::Cutover`], and again the way back from it.
    pub cutover: Duration,
    /// The checks of a trial that is taken back, and the time for which it is watched. Nothing in an update, which has none.
    #[serde(default, skip_serializing_if = "Duration::is_zero")]
    pub checks: Duration,
    /// Each CPU that moves (in [`Phase::Probation`], or in a trial that is taken back), and the service address.
    pub per_cpu: Duration,
    /// [`Effect::Watch`]: its period, and time for the last answer. Not there in journals of before there was a watch.
    #[serde(default, skip_serializing_if = "Duration::is_zero")]
    pub watch: Duration,
    /// [`Phase::Commit`].
    pub commit: Duration,
    /// Each undo, on the way back, while somebody serves. What takes longer is left and reported.
    pub undo: Duration,
}

impl Deadlines {
    /// Time for all steps with this share together.
    pub fn of(&self, share: Share) -> Duration {
        match share {
            Share::Phase(Phase::Planned | Phase::Drained) => Duration::MAX,
            Share::Phase(Phase::Granted) => self.granted,
            Share::Phase(Phase::Booting) => self.booting,
            Share::Phase(Phase::Trial) => self.trial,
            Share::Checks => self.checks,
            Share::Phase(Phase::Cutover) => self.cutover,
            Share::Phase(Phase::Probation) | Share::Cpu(_) | Share::Address => self.per_cpu,
            Share::Watch => self.watch,
            Share::Phase(Phase::Commit) => self.commit,
        }
    }

    /// Time for an undo while somebody serves. One that lets clients be answered again has no longer than the cutover.
    pub fn of_undo(&self, effect: &Effect) -> Duration {
        if effect.is_in_blackout() { self.undo.min(self.cutover) } else { self.undo }
    }

    /// What an undo in the blackout has at least, when those before it have used the time for all of them up: an eighth of it. There are
    /// at most five (stand down, fence, take the address back, unseal, unfreeze), so that the way back to a serving incumbent takes no
    /// longer than 1.5 times the cutover's limit.
    pub fn least_in_blackout(&self) -> Duration {
        self.cutover / 8
    }
}
