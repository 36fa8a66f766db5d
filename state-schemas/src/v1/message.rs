//! What the two agents say to each other over the channel.
//!
//! ```text
//! incumbent                        successor
//!    |  <--- Hello                     |     its agent runs, has read the record
//!    |  StandBy --->                   |     services attach to their arenas
//!    |  <--- Standing                  |
//!    |  CheckHealth --->  <--- Healthy |
//!    |  Activate{epoch} --->           |     the blackout ends with the service's first answer
//!    |  <--- Activated{epoch, tsc}     |
//!    |  CpuParked{id} ---> <--- CpuOnline   for each CPU
//!    |  Commit ---> <--- Committed     |     the point of no return is the answer
//!    |  LastCpu{id} --->               |     the incumbent is gone
//! ```
//! Backwards: `ReleaseCpu` is answered by `CpuReleased`, `StandDown` by `StoodDown`. Anything may be answered by `Failed`.
//!
//! A word that has been obeyed may come again, from an agent that follows one that died: it gets the same answer again. Such an agent
//! sends `Ping` first. Answers that it finds before the `Pong` with its nonce were meant for the one that died.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::record::{PhaseMark, Program};
use crate::checked::Check;
use crate::connections::TABLE_LIMIT;

/// Words of the incumbent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSuccessor {
    /// 0: attach the services to their arenas, and wait.
    StandBy,
    /// 1: say how you are.
    CheckHealth,
    /// 2: unseal the arenas for this epoch, take the address, answer clients.
    Activate {
        /// The successor's epoch.
        epoch: u64,
    },
    /// 3: this CPU is parked at your mailbox: take it online.
    CpuParked {
        /// Its APIC id.
        apic_id: u32,
    },
    /// 4: take this CPU offline again; it parks.
    ReleaseCpu {
        /// Its APIC id.
        apic_id: u32,
    },
    /// 5: stop answering, seal the arenas, drop the address: the incumbent takes over again.
    StandDown {
        /// The epoch that ends.
        epoch: u64,
    },
    /// 6: you stay. Nothing that follows is taken back.
    Commit {
        /// The update so far.
        timeline: Vec<PhaseMark>,
    },
    /// 7: the incumbent's last CPU parks next; then its memory is yours.
    LastCpu {
        /// Its APIC id.
        apic_id: u32,
    },
    /// 8: no Baton says this, and a successor refuses it: who is about to be fenced has no time to listen. The number stays taken.
    Abort {
        /// Why.
        reason: Text,
    },
    /// 9: answer with [`ToIncumbent::Pong`].
    Ping {
        /// To be sent back. Of its sender's own choice: another one than in earlier pings.
        nonce: u64,
    },
    /// 10: a part of the table of connections ([`crate::connections`]), for the next `Activate`. The first part, with `at` 0, begins a
    /// table anew. Nothing but one of no bytes, which asks whether the successor takes such a table at all, is sent in the trial: a
    /// successor that is older than this word ends there, and not in the blackout.
    Connections {
        /// Where in the table this part begins, in bytes.
        at: u64,
        /// Bytes of the whole table.
        total: u64,
        /// The part.
        bytes: Vec<u8>,
    },
}

/// Words of the successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToIncumbent {
    /// 0: the agent runs, and has read and checked the record.
    Hello {
        /// Which kernel and agent.
        program: Program,
        /// [`crate::control_block::words::VERSION`]: which control block and which rings it speaks. Payloads have versions of
        /// their own.
        abi: u32,
    },
    /// 1: the services are attached and wait.
    Standing {
        /// Their names.
        services: Vec<String>,
    },
    /// 2: all is well.
    Healthy,
    /// 3: the services answer.
    Activated {
        /// The epoch they hold.
        epoch: u64,
        /// When the address was taken, on the TSC.
        tsc: u64,
    },
    /// 4: the CPU is online.
    CpuOnline {
        /// Its APIC id.
        apic_id: u32,
        /// Its number in the successor.
        cpu: u32,
    },
    /// 5: the CPU is offline and parked.
    CpuReleased {
        /// Its APIC id.
        apic_id: u32,
    },
    /// 6: the services have stopped; the arenas are sealed.
    StoodDown {
        /// The epoch that ended.
        epoch: u64,
    },
    /// 7: understood.
    Committed,
    /// 8: this was asked for, and cannot be done.
    Failed {
        /// What was asked.
        what: Text,
        /// Why not.
        cause: Text,
    },
    /// 9: the answer to a ping.
    Pong {
        /// From the ping.
        nonce: u64,
    },
    /// 10: the answer to a part of the table of connections.
    ConnectionsTaken {
        /// Bytes of the table that are here.
        have: u64,
    },
}

/// Why a message is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MessageError {
    /// A text is too long to be logged.
    #[error("{what} of {len} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which text.
        what: &'static str,
        /// Its length.
        len: usize,
        /// Most allowed.
        limit: usize,
    },
    /// Too many of something.
    #[error("{count} {what}, at most {limit} are allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// Most allowed.
        limit: usize,
    },
    /// A part of a table that does not lie in it, or a table that is too long.
    #[error("bytes {at} to {at} + {len} of a table of {total} bytes, which may have {limit}")]
    Part {
        /// Where it begins.
        at: u64,
        /// Its length.
        len: usize,
        /// The table's.
        total: u64,
        /// Most allowed.
        limit: u64,
    },
}

/// Longest text in a message, in bytes.
pub const TEXT_LIMIT: usize = 1024;

/// A text for people, of at most [`TEXT_LIMIT`] bytes: one that is made here is cut to that length, so that the message in which it
/// goes is not refused on the other side. (One that was received may be longer until its message has been checked.)
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(String);

impl Text {
    /// What stands at the end of a text that was cut.
    const CUT: &str = "…";

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Cuts what is too long, between two characters.
impl From<String> for Text {
    fn from(mut text: String) -> Text {
        if text.len() > TEXT_LIMIT {
            text.truncate(text.floor_char_boundary(TEXT_LIMIT - Text::CUT.len()));
            text.push_str(Text::CUT);
        }
        Text(text)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Text {
        Text::from(text.to_owned())
    }
}

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.0
    }
}

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
/// Most items in a message.
pub const ITEM_LIMIT: usize = 1024;
/// Most bytes of a table in one message: it fits the channel.
pub const PART_LIMIT: usize = 15 << 10;

fn short(what: &'static str, text: &str) -> Result<(), MessageError> {
    if text.len() <= TEXT_LIMIT {
        return Ok(());
    }
    Err(MessageError::TooLong { what, len: text.len(), limit: TEXT_LIMIT })
}

fn few(what: &'static str, count: usize) -> Result<(), MessageError> {
    if count <= ITEM_LIMIT {
        return Ok(());
    }
    Err(MessageError::TooMany { what, count, limit: ITEM_LIMIT })
}

fn part(at: u64, total: u64, len: usize) -> Result<(), MessageError> {
    if len > PART_LIMIT {
        return Err(MessageError::TooMany { what: "bytes of a table", count: len, limit: PART_LIMIT });
    }
    match at.checked_add(len as u64) {
        Some(end) if end <= total && total <= TABLE_LIMIT => Ok(()),
        _ => Err(MessageError::Part { at, len, total, limit: TABLE_LIMIT }),
    }
}

impl Check for ToSuccessor {
    type Against = ();
    type Error = MessageError;

    fn check(&self, (): &()) -> Result<(), MessageError> {
        match self {
            ToSuccessor::Commit { timeline } => {
                few("phase marks", timeline.len())?;
                timeline.iter().try_for_each(|mark| short("phase name", &mark.phase))
            }
            ToSuccessor::Abort { reason } => short("reason", reason.as_str()),
            &ToSuccessor::Connections { at, total, ref bytes } => part(at, total, bytes.len()),
            ToSuccessor::StandBy
            | ToSuccessor::CheckHealth
            | ToSuccessor::Activate { .. }
            | ToSuccessor::CpuParked { .. }
            | ToSuccessor::ReleaseCpu { .. }
            | ToSuccessor::StandDown { .. }
            | ToSuccessor::LastCpu { .. }
            | ToSuccessor::Ping { .. } => Ok(()),
        }
    }
}

impl Check for ToIncumbent {
    type Against = ();
    type Error = MessageError;

    fn check(&self, (): &()) -> Result<(), MessageError> {
        match self {
            ToIncumbent::Hello { program, .. } => {
                short("release", &program.release)?;
                short("agent version", &program.agent_version)
            }
            ToIncumbent::Standing { services } => {
                few("services", services.len())?;
                services.iter().try_for_each(|name| short("service name", name))
            }
            ToIncumbent::Failed { what, cause } => {
                short("what failed", what.as_str())?;
                short("cause", cause.as_str())
            }
            ToIncumbent::Healthy
            | ToIncumbent::Activated { .. }
            | ToIncumbent::CpuOnline { .. }
            | ToIncumbent::CpuReleased { .. }
            | ToIncumbent::StoodDown { .. }
            | ToIncumbent::Committed
            | ToIncumbent::Pong { .. }
            | ToIncumbent::ConnectionsTaken { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters_and_then_believed() {
        for (unit, len) in
            [("x", 1023), ("x", 1024), ("x", 1025), ("ä", 513), ("日本", 700), ("🦀", 257), ("x", 100_000)]
        {
            for before in ["", "x", "xx", "xxx"] {
                let long = format!("{before}{}", unit.repeat(len));
                let text = Text::from(long.clone());
                assert!(text.as_str().len() <= TEXT_LIMIT);
                match long.len() <= TEXT_LIMIT {
                    true => assert_eq!(text.as_str(), long),
                    false => {
                        // Not more is lost than the mark and a part of a character.
                        assert!(text.as_str().len() > TEXT_LIMIT - 4);
                        assert!(long.starts_with(text.as_str().strip_suffix('…').unwrap()));
                    }
                }
                let failed = ToIncumbent::Failed { what: text.clone(), cause: text };
                assert_eq!(failed.check(&()), Ok(()));
            }
        }
    }
}
