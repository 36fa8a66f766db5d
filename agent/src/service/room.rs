//! More memory for a service's arena while it serves, and the end of it: asked for on a connection of its own, so that a
//! service can ask from a thread beside the one that answers its clients.
//!
//! ```no_run
//! use agent::service::{client::Held, mapping::Arena, room::Room};
//! use handover::arena::Store;
//!
//! # fn run(mut arena: Arena, held: Held) -> Result<(), Box<dyn std::error::Error>> {
//! let room = Room::new("baton-kv");
//! let more = room.grow(64 << 20)?;             // takes as long as moving that much memory aside does: best in a thread
//! arena.extend(more)?;                         // what is mapped already stays where it is
//! let mut store = Store::attach(arena.memory(&held))?;
//! store.take_all(held.epoch)?;                 // from now on there is room in it
//! drop(arena);                                 // ...and one day, after the connection to the agent has been closed:
//! room.release()?;                             // the memory is the kernel's again
//! # Ok(()) }
//! ```
//! A connection is one question: a frame ([`super::protocol`]) with [`Ask`], answered by frames of [`Told`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::PollFlags;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Error;
use super::protocol::{Inbox, encode, recv_with_fd, send_all, wait};

/// Where `batond` listens for those who want more memory, or less. Only root may ask.
pub const DEFAULT_SOCKET: &str = "/run/baton/arenas.sock";
/// Grows with every change that an older peer would misread.
pub const VERSION: u16 = 1;
/// How long an answer may take: memory is moved aside and cleared.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// [`VERSION`] of the asker.
    pub version: u16,
    /// Whose arena.
    pub service: String,
    /// What shall become of it.
    pub what: What,
}

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
pub struct Room {
    socket: PathBuf,
    service: String,
}

impl Room {
    /// For a service, at [`DEFAULT_SOCKET`].
    #[must_use]
    pub fn new(service: &str) -> Self {
        Self::at(DEFAULT_SOCKET.as_ref(), service)
    }

    /// The same at another socket.
    #[must_use]
    pub fn at(socket: &Path, service: &str) -> Self {
        Self { socket: socket.to_owned(), service: service.to_owned() }
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
    /// As [`Room::grow`]; also while the service is connected or has the arena mapped.
    pub fn release(&self) -> Result<(), Error> {
        self.ask(What::Release).map(drop)
    }

    fn ask(&self, what: What) -> Result<More, Error> {
        let socket = UnixStream::connect(&self.socket)?;
        socket.set_nonblocking(true)?;
        let ask = Ask { version: VERSION, service: self.service.clone(), what };
        send_all(socket.as_fd(), &encode(&ask)?, None)?;
        let mut inbox = Inbox::default();
        let mut more = More::default();
        loop {
            match receive(socket.as_fd(), &mut inbox)? {
                Told::Piece { len } => more.pieces.push((inbox.descriptor()?, len)),
                Told::Done => return Ok(more),
                Told::Failed { cause } => return Err(Error::ServiceFailed { name: self.service.clone(), cause }),
            }
        }
    }
}

/// The next message, waiting for it; its descriptor is then in the inbox.
pub(crate) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>, inbox: &mut Inbox) -> Result<T, Error> {
    loop {
        if let Some(message) = inbox.take()? {
            return Ok(message);
        }
        wait(socket, PollFlags::POLLIN, Some(PATIENCE))?;
        let mut buffer = [0; 1024];
        match recv_with_fd(socket, &mut buffer) {
            Ok((0, _)) => return Err(Error::Closed),
            Ok((len, descriptor)) => inbox.push(&buffer[..len], descriptor)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another release must read what this one writes.
    #[test]
    fn the_frames_are_written_as_ever() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes[4..].to_vec()).unwrap();
        let ask = |what| text(encode(&Ask { version: VERSION, service: "kv".into(), what }).unwrap());
        assert_eq!(ask(What::Grow { more: 4096 }), r#"{"version":1,"service":"kv","what":{"Grow":{"more":4096}}}"#);
        assert_eq!(ask(What::Release), r#"{"version":1,"service":"kv","what":"Release"}"#);
        assert_eq!(text(encode(&Told::Piece { len: 4096 }).unwrap()), r#"{"Piece":{"len":4096}}"#);
    }
}
