// Only where it is read: a page that changes is no reason to build every program anew.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "README.md, beside this crate, is its page.")]

pub mod agent_end;
pub mod ask;
pub mod client;
pub mod connections;
pub mod descriptor;
mod door;
pub mod files;
mod filter;
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
    /// A service whose socket is full: it has not read what it was sent before.
    #[error("it does not read what it is sent")]
    Unread,
    /// No answer in time.
    #[error("no message within {0:?}")]
    TimedOut(std::time::Duration),
}
