//! What an update would be made with: beside the machine, all that a judgement depends on.

use crate::daemon::config::Config;
use crate::machine::facts::Facts;

/// Configuration, facts, and who belongs to Baton.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The machine as batond knows it.
    pub facts: &'a Facts,
    /// This batond's process.
    pub own: u32,
    /// The process that asks (`baton`).
    pub asker: Option<u32>,
}
