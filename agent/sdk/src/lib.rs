//! The service SDK: how a program keeps its state in an arena, is frozen and sealed, and goes on in the successor **on
//! the same memory**, which is mapped there and never copied.
//!
//! What it is: the words that a service and `batond` exchange ([`protocol`]), the service's end ([`client`]), the
//! agent's end ([`agent_end`]), and the door through which the arena becomes memory ([`mapping`]).
//! What it is not: a format. What lies in the arena is the service's own (the demo service uses `handover::arena`).
//!
//! ```text
//!            incumbent                                      successor
//!   service              batond                     batond              service
//!      │── Hello ──────────►│                          │◄────────── Hello ──│
//!      │◄─ Arena(fd, fresh) │                          │ Arena(fd) ────────►│   maps it, does not touch it
//!      │── Ready ──────────►│                          │◄────────── Ready ──│   sockets already bound and listening
//!      │◄─ Serve{1} ────────│                          │ StandBy ──────────►│
//!      │── Activated{1} ───►│                          │                    │
//!      :      serves        :                          :      silent        :
//!      │◄─ Freeze{1} ───────│  ── blackout begins ──   │                    │
//!      │── Frozen{1} ──────►│ ····· doorbell ········► │ Activate{2} ──────►│
//!      :      silent        :                          │◄───── Activated{2} │
//!      │◄─ Unfreeze{3} or Stop                         │  ── ends ──        :   serves
//! ```
//!
//! # The epoch rule
//! The epoch numbers the kernel that owns the service. *Whoever does not hold the current epoch must not answer*: no
//! reply, no refusal, nothing. Here the rule is a type: an order to serve carries a [`held::Held`], the arena's
//! memory can only be borrowed together with it, and reporting "frozen" consumes it. A program that compiles cannot
//! touch the arena after it has said that it is frozen. Epochs only grow; an older one is refused by [`protocol::Standing`].
//!
//! # A service in one screen
//! ```no_run
//! use baton_sdk::{client::{Client, Order}, protocol::{Hello, DEFAULT_SOCKET}};
//!
//! # fn run() -> Result<(), baton_sdk::Error> {
//! let hello = Hello::new("counter", u32::from_le_bytes(*b"cntr"), 1, 2 << 20);
//! let (mut agent, mut arena) = Client::connect(DEFAULT_SOCKET.as_ref(), hello)?;
//! // Bind and listen here (with IP_FREEBIND): nothing is set up inside the blackout.
//! agent.ready()?;
//! while let Some(order) = agent.wait(None)? {
//!     match order {
//!         Order::Serve(held) => {
//!             let counter = &mut arena.memory(&held)[0]; // attach to what is there; `held.fresh` says if it is blank
//!             agent.activated(&held, u64::from(*counter), 0)?;
//!             *counter = counter.wrapping_add(1); // ...answer clients until an order comes in
//!             while !matches!(agent.wait(None)?, Some(Order::Freeze { .. })) {}
//!             agent.frozen(held, 1, 0)?;
//!         }
//!         Order::StandBy | Order::Freeze { .. } | Order::AgentIsBack => {}
//!         Order::Stop => break,
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! # When the agent goes away
//! A service that serves goes on serving (the daemon may be upgraded; without it no update can begin, because nobody can
//! freeze the service), and presents itself to the next agent by itself, over a connection that replaces the lost one:
//!
//! ```text
//!   service                            the next batond of this kernel
//!      │── Hello{serving: 1} ──────────►│  it has this arena, by its process; the epoch is this kernel's
//!      │◄─ Welcome{1} ──────────────────│  [`client::Order::AgentIsBack`]
//! ```
//! One that is refused serves on alone until yet another agent comes. A service that stands by or is frozen stays silent, and
//! its [`client::Client`] fails.

pub mod agent_end;
pub mod ask;
pub mod client;
pub mod descriptor;
mod door;
pub mod files;
pub mod held;
pub mod mapping;
pub mod protocol;
pub mod resize;
#[cfg(test)]
mod tests;

use std::io;

/// What goes wrong between a service and its agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the socket between service and agent: {0}")]
    Io(#[from] io::Error),
    /// The peer has closed the socket.
    #[error("the other end closed the connection")]
    Closed,
    /// A frame announces more than the limit.
    #[error("a frame announces {announced} bytes; at most {limit} are allowed", limit = protocol::MAX_FRAME)]
    FrameTooLong {
        /// The length in the frame's prefix.
        announced: usize,
    },
    /// A frame's content is not a message of this protocol.
    #[error("a frame of {len} bytes is no message of this protocol: {why}")]
    NotAMessage {
        /// Its length.
        len: usize,
        /// The decoder's words.
        why: String,
    },
    /// The peer speaks another version.
    #[error("the service speaks protocol version {theirs}, this agent {ours}: install the same release on both sides")]
    Version {
        /// What the service said.
        theirs: u16,
        /// [`protocol::PROTOCOL_VERSION`].
        ours: u16,
    },
    /// A field of a greeting is out of its bounds.
    #[error("the greeting's {field} is {value}; allowed is {allowed}")]
    BadGreeting {
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: &'static str,
    },
    /// A message that does not belong here.
    #[error("{message} does not belong where the service {standing:?}")]
    OutOfOrder {
        /// What came, as the wire writes it.
        message: String,
        /// Where the service stands.
        standing: protocol::Standing,
    },
    /// An arena announced without its memory file, or a descriptor nobody announced.
    #[error("{0} descriptors came with a message that takes {1}")]
    Descriptors(usize, usize),
    /// The memory file cannot be the arena.
    #[error(
        "the arena's memory file holds {held:#x} bytes, announced were {announced:#x} (a multiple of 4096, at most {room:#x})"
    )]
    ArenaLength {
        /// Address space there is for it.
        room: u64,
        /// Its size.
        held: u64,
        /// What the message says.
        announced: u64,
    },
    /// The service gave up and said why.
    #[error("the service {name} failed: {cause}")]
    ServiceFailed {
        /// Its name.
        name: String,
        /// Its words.
        cause: String,
    },
    /// No answer in time.
    #[error("no message within {0:?}")]
    TimedOut(std::time::Duration),
}
