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
//! In a trial that is taken back afterwards the incumbent asks, once the services stand by, how the successor came up (`Examine`,
//! answered by `Examined`), and has the operator's checks run there (`RunCheck`, answered by `CheckEnded`).
//!
//! Words are only ever added, at the end, so there is one type for all versions: each word says since which version it is there, and
//! is written in that one ([`Payload::least_version`](crate::Payload::least_version)). A reader of an older version never meets it.
//!
//! A word that has been obeyed may come again, from an agent that follows one that died: it gets the same answer again. Such an agent
//! sends `Ping` first. Answers that it finds before the `Pong` with its nonce were meant for the one that died.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::record::{PhaseMark, Program};
use crate::checked::Check;

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
    /// 10, since version 2: say what you found of the machine when you came up.
    Examine,
    /// 11, since version 2: run this command by a shell, and say how it ended.
    RunCheck {
        /// The command. One that is cut is another command: whoever asks has seen to it that it fits.
        command: Text,
        /// How long it may run, in milliseconds; then it is killed, with all that it has started.
        limit_ms: u32,
    },
    /// 12, since version 2: a part of the table of connections ([`crate::connections`]), for the next `Activate`. The first part, with `at` 0, begins a
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
    /// 10, since version 2: the answer to [`ToSuccessor::Examine`].
    Examined {
        /// What it found.
        examination: Examination,
    },
    /// 11, since version 2: the answer to [`ToSuccessor::RunCheck`].
    CheckEnded {
        /// How.
        ending: Ending,
        /// The end of what it wrote, standard output and error; control characters spelled out.
        output: Text,
        /// How long it took, in milliseconds.
        took_ms: u32,
    },
    /// 12, since version 2: the answer to a part of the table of connections.
    ConnectionsTaken {
        /// Bytes of the table that are here.
        have: u64,
    },
}

/// How a successor came up, in its own words. What it says of its kernel's log, the incumbent reads for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examination {
    /// APIC ids of the CPUs that are online there.
    pub cpus: Vec<u32>,
    /// What the TSC read ...
    pub tsc: u64,
    /// ... when its wall clock showed this, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// `/proc/sys/kernel/tainted`.
    pub taint: u64,
    /// The services that it was told of, in the order of the record.
    pub services: Vec<Attached>,
    /// Modules of its initrd's list, and those that are not loaded.
    pub modules: Counted,
    /// PCI functions that it was given, and those that have no driver.
    pub functions: Counted,
    /// What became of the kernel's Live Update Orchestrator.
    pub live_update: LiveUpdate,
}

/// How many of something there are, and which of them are not as they should be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// How many there are in all.
    pub count: u32,
    /// Names, with what is wrong.
    pub wrong: Vec<Text>,
}

/// A service and its arena in the successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Its name.
    pub name: Text,
    /// How it is.
    pub state: Text,
    /// Kind of the state that the service there reads; 0 if it has not come.
    pub schema_kind: u32,
    /// And its version.
    pub schema_version: u32,
    /// Bytes of its arena that were mapped read-only there, and begin with an arena's header.
    pub mapped: u64,
    /// Why they could not be, or what is wrong with the header; empty when nothing is.
    pub trouble: Text,
}

/// A kernel's Live Update Orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LiveUpdate {
    /// 0: it has none.
    Absent,
    /// 1: its device was opened, and what was handed over to it was read.
    Opened,
}

/// How a check's command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// 0: by itself.
    Exited {
        /// Its exit code; 0 is good.
        code: u32,
    },
    /// 1: by a signal that nobody here sent.
    Killed {
        /// Which.
        signal: u32,
    },
    /// 2: it did not end in time, and was killed.
    TimedOut,
    /// 3: it could not be started.
    NotStarted {
        /// Why not.
        cause: Text,
    },
}

impl ToSuccessor {
    /// The version in which this word came.
    pub fn since(&self) -> u32 {
        match self {
            ToSuccessor::Examine | ToSuccessor::RunCheck { .. } | ToSuccessor::Connections { .. } => 2,
            _ => 1,
        }
    }
}

impl ToIncumbent {
    /// The version in which this word came.
    pub fn since(&self) -> u32 {
        match self {
            ToIncumbent::Examined { .. } | ToIncumbent::CheckEnded { .. } | ToIncumbent::ConnectionsTaken { .. } => 2,
            _ => 1,
        }
    }
}

impl Counted {
    fn check(&self, what: &'static str) -> Result<(), MessageError> {
        few(what, self.wrong.len())?;
        self.wrong.iter().try_for_each(|text| short(what, text.as_str()))
    }
}

impl Examination {
    fn check(&self) -> Result<(), MessageError> {
        if self.cpus.len() > CPU_LIMIT {
            return Err(MessageError::TooMany { what: "CPUs", count: self.cpus.len(), limit: CPU_LIMIT });
        }
        few("services", self.services.len())?;
        for service in &self.services {
            short("service name", service.name.as_str())?;
            short("state of a service", service.state.as_str())?;
            short("trouble of a service", service.trouble.as_str())?;
        }
        self.modules.check("modules")?;
        self.functions.check("functions")
    }
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
/// Most CPUs in a message.
const CPU_LIMIT: usize = 4096;
/// Most bytes of a table.
pub const TABLE_LIMIT: u64 = 64 << 20;
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
            | ToSuccessor::Examine
            | ToSuccessor::Ping { .. } => Ok(()),
            ToSuccessor::RunCheck { command, .. } => short("command", command.as_str()),
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
            ToIncumbent::Examined { examination } => examination.check(),
            ToIncumbent::CheckEnded { ending, output, .. } => {
                if let Ending::NotStarted { cause } = ending {
                    short("cause", cause.as_str())?;
                }
                short("output", output.as_str())
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
