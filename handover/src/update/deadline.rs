//! How long each phase may take before the update turns back.
//!
//! They are generous: a deadline is there so that no update hangs, not to make it fast. The cutover's is what a client
//! may have to wait at worst before the incumbent answers again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::effect::Effect;
use super::phase::Phase;

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
    /// [`Phase::Cutover`].
    pub cutover: Duration,
    /// [`Phase::Probation`], for each CPU that moves.
    pub per_cpu: Duration,
    /// [`Phase::Commit`].
    pub commit: Duration,
    /// Each undo, on the way back. What takes longer is left and reported. (Those in the blackout get no longer than the
    /// cutover.)
    pub undo: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            granted: Duration::from_secs(60),
            booting: Duration::from_secs(120),
            trial: Duration::from_secs(60),
            cutover: Duration::from_secs(5),
            per_cpu: Duration::from_secs(20),
            commit: Duration::from_secs(20),
            undo: Duration::from_secs(20),
        }
    }
}

impl Deadlines {
    /// Time for a phase in which `cpus` CPUs move.
    pub fn of(&self, phase: Phase, cpus: usize) -> Duration {
        match phase {
            Phase::Planned | Phase::Drained => Duration::MAX,
            Phase::Granted => self.granted,
            Phase::Booting => self.booting,
            Phase::Trial => self.trial,
            Phase::Cutover => self.cutover,
            Phase::Probation => self.per_cpu.saturating_mul(u32::try_from(cpus.max(1)).unwrap_or(u32::MAX)),
            Phase::Commit => self.commit,
        }
    }

    /// Time for an undo. While nobody serves, a successor that does not help is not waited for longer than the cutover
    /// may take: it is fenced.
    pub fn of_undo(&self, effect: &Effect) -> Duration {
        if effect.is_in_blackout() { self.undo.min(self.cutover) } else { self.undo }
    }
}
