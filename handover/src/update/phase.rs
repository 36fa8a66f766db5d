//! The phases of an update, and the one order they have.

use serde::{Deserialize, Serialize};

/// A phase, as in the design's table. They follow each other in this order; none is skipped and none comes twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Everything was looked at, nothing was touched.
    Planned,
    /// Memory and devices are taken, the spare CPU is offline.
    Granted,
    /// The image lies in place; the successor boots.
    Booting,
    /// Its agent answers; services stand by; health is checked.
    Trial,
    /// Freeze, seal, move the address, activate. Nobody serves: this is the blackout.
    Cutover,
    /// The successor serves; CPUs move one by one; the incumbent can still come back.
    Probation,
    /// The successor stays. The last CPU is handed over.
    Commit,
    /// Every CPU is online and memory adopted: the successor's business alone.
    Drained,
}

/// All phases, in their order.
pub const ALL: [Phase; 8] = [
    Phase::Planned,
    Phase::Granted,
    Phase::Booting,
    Phase::Trial,
    Phase::Cutover,
    Phase::Probation,
    Phase::Commit,
    Phase::Drained,
];

impl Phase {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Planned => "planned",
            Phase::Granted => "granted",
            Phase::Booting => "booting",
            Phase::Trial => "trial",
            Phase::Cutover => "cutover",
            Phase::Probation => "probation",
            Phase::Commit => "commit",
            Phase::Drained => "drained",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
