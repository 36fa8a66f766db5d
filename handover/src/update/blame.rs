//! Who is to blame for a failure.

use serde::{Deserialize, Serialize};

/// Who has to do something about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The person who asked: wrong arguments, or changed their mind.
    Operator,
    /// The kernel that runs, or its agent.
    Incumbent,
    /// The kernel that was to take over, or its agent.
    Successor,
    /// The machine.
    Hardware,
}
