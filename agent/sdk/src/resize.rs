//! More memory for a service's arena while it serves, and the end of it: asked for on a connection of its own, so that a
//! service can ask from a thread beside the one that answers its clients.
//!
//! ```no_run
//! use baton_sdk::{held::Held, mapping::Arena, resize::Resizer};
//!
//! # fn run(mut arena: Arena, held: Held) -> Result<(), Box<dyn std::error::Error>> {
//! let resizer = Resizer::new("baton-kv");
//! let before = arena.len();
//! let more = resizer.grow(64 << 20)?;           // takes as long as moving that much memory aside does: best in a thread
//! arena.extend(more)?;                          // what is mapped already stays where it is
//! arena.memory(&held)[before..].fill(0);        // from now on there is room behind it
//! drop(arena);                                  // ...and one day, after the connection to the agent has been closed:
//! resizer.release()?;                           // the memory is the kernel's again
//! # Ok(()) }
//! ```
//! A connection is one question ([`super::ask`]): an [`Ask`], answered by frames of [`Told`].

use std::os::fd::OwnedFd;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Error;
use super::ask::{Asker, PATIENCE, Question, Said};

/// Where `batond` listens for those who want more memory, or less. Only root may ask.
pub const DEFAULT_SOCKET: &str = "/run/baton/arenas.sock";
/// Grows with every change that an older peer would misread.
pub const VERSION: u16 = 1;

/// What is asked: whose arena, and what shall become of it.
pub type Ask = super::ask::Ask<What>;

/// The questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// More memory behind what there is.
    Grow {
        /// Bytes.
        more: u64,
    },
    /// Nobody needs it any more: it goes back to the kernel. The service has left, and has it mapped no longer.
    Release,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// A piece, as a descriptor beside this frame: map all of it behind what is mapped already. Several come before `Done`.
    Piece {
        /// Bytes.
        len: u64,
    },
    /// The last frame: it is done.
    Done,
    /// The last frame: it is not, and why.
    Failed {
        /// In words for the operator.
        cause: String,
    },
}

impl Question for What {
    const VERSION: u16 = VERSION;
    type Told = Told;
    fn check(&self) -> Result<(), Error> {
        Ok(()) // how much there is, the kernel says
    }
}

impl From<Told> for Said<u64> {
    fn from(told: Told) -> Said<u64> {
        match told {
            Told::Piece { len } => Said::Part(len),
            Told::Done => Said::Done,
            Told::Failed { cause } => Said::Failed(cause),
        }
    }
}

/// More memory, to be mapped in this order.
#[derive(Debug, Default)]
pub struct More {
    pub(super) pieces: Vec<(OwnedFd, u64)>,
}

impl More {
    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| len).sum()
    }

    /// None.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

/// A service's way to more memory.
#[derive(Debug, Clone)]
pub struct Resizer(Asker);

impl Resizer {
    /// For a service, at [`DEFAULT_SOCKET`].
    #[must_use]
    pub fn new(service: &str) -> Self {
        Self::at(DEFAULT_SOCKET.as_ref(), service)
    }

    /// The same at another socket.
    #[must_use]
    pub fn at(socket: &Path, service: &str) -> Self {
        Self(Asker::at(socket, service))
    }

    /// Asks for `more` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// The agent's refusal in its words: no such memory, or an update runs ([`Error::ServiceFailed`]); or no agent.
    pub fn grow(&self, more: u64) -> Result<More, Error> {
        self.ask(What::Grow { more })
    }

    /// Gives the arena back. Its content is gone.
    ///
    /// # Errors
    /// As [`Resizer::grow`]; also while the service is connected or has the arena mapped.
    pub fn release(&self) -> Result<(), Error> {
        self.ask(What::Release).map(drop)
    }

    fn ask(&self, what: What) -> Result<More, Error> {
        let pieces = self.0.ask(what, None, Some(PATIENCE))?;
        Ok(More { pieces: pieces.into_iter().map(|(len, piece)| (piece, len)).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::encode;
    use super::*;

    /// Another release must read what this one writes.
    #[test]
    fn the_frames_are_written_as_ever() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes[4..].to_vec()).unwrap();
        let ask = |what| text(encode(&Ask::new("kv", what)).unwrap());
        assert_eq!(ask(What::Grow { more: 4096 }), r#"{"version":1,"service":"kv","what":{"Grow":{"more":4096}}}"#);
        assert_eq!(ask(What::Release), r#"{"version":1,"service":"kv","what":"Release"}"#);
        assert_eq!(text(encode(&Told::Piece { len: 4096 }).unwrap()), r#"{"Piece":{"len":4096}}"#);
    }
}
