//! TCP connections that a service takes along: its clients notice nothing but a short silence.
//!
//! ```no_run
//! use std::net::{TcpListener, TcpStream};
//! use baton_sdk::connections::{Carrier, hold};
//!
//! # fn freeze(listener: &TcpListener, mut clients: Vec<TcpStream>) -> Result<(), baton_sdk::Error> {
//! let carrier = Carrier::new("counter");
//! carrier.begin()?; // once, behind `Client::connect` and before `ready`; again after `Order::AgentIsBack`
//! // Order::Freeze: nobody new; who waits to be accepted comes along; then `frozen` is reported.
//! hold(listener)?;
//! while let Ok((client, _)) = listener.accept() { clients.push(client) }
//! let kept = carrier.keep(clients.iter().map(|client| (client, &b"what I know of it"[..])))?;
//! for (client, kept) in clients.iter().zip(kept) {
//!     if let Err(why) = kept { eprintln!("{:?} is left behind: {why}", client.peer_addr()) }
//! }
//! // Order::Serve, in the next kernel, before `activated` is reported:
//! for one in carrier.sockets()? { let client = TcpStream::from(one.socket); /* go on, with `one.note` */ }
//! # Ok(()) }
//! ```
//! What crosses is in [the agent's README](../../README.md#connections-that-cross). The service keeps its own descriptors; between
//! [`Carrier::keep`] and the next order they can be neither read nor written. When the cutover is undone (`Order::Serve` with
//! [`super::held::Held::resumed`]) they work as before, and what was held is to be let go: [`release`] the listener. A connection
//! that could not be taken back gives an error then.
//!
//! A connection to the agent is one question ([`super::ask`]). `Keep` is followed by as many frames of [`One`] as it says, each with a
//! socket beside it and its note's bytes behind it; each is answered by `Kept` or `Refused`, and all of them by `Done`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use super::ask::{Question, Said};
use super::protocol::{Inbox, encode, receive, receive_bytes, send_all};

pub use super::filter::{hold, release};

/// Where `batond` listens for those who keep connections. Who may be a service may ask.
pub const DEFAULT_SOCKET: &str = "/run/baton/connections.sock";
/// Grows with every change that an older peer would misread.
pub const VERSION: u16 = 1;
/// Most bytes of a note.
pub const MAX_NOTE: usize = 32 << 20;
/// Most connections at once.
pub const MAX_COUNT: usize = 16_384;
/// So many are on their way to the agent before its answers are read: both ends' sockets have room for that.
const AHEAD: usize = 32;
/// How long the agent may take for an answer. The cutover's deadline is shorter.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked.
pub type Ask = super::ask::Ask<What>;

/// The questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// This service will keep its connections when it freezes, and takes those that come.
    Begin,
    /// So many sockets follow.
    Keep {
        /// How many.
        count: u32,
    },
    /// What has come.
    Sockets,
}

/// A connection, as it is kept: its socket comes beside this frame, its note's bytes behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct One {
    /// Bytes of the note.
    pub note: u32,
}

impl One {
    /// Checks every bound.
    ///
    /// # Errors
    /// A note that is too long.
    pub fn check(&self) -> Result<(), Error> {
        if self.note as usize > MAX_NOTE {
            return Err(Error::BadGreeting { field: "note", value: self.note.to_string(), allowed: "at most 32 MiB" });
        }
        Ok(())
    }
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// The next one of those to be kept is.
    Kept,
    /// It is not, and is as it was.
    Refused {
        /// Why, in words for the operator.
        cause: String,
    },
    /// A connection that has come: its socket beside this frame, its note's bytes behind it.
    Socket {
        /// Bytes of the note.
        note: u32,
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
        match *self {
            What::Keep { count } if count as usize > MAX_COUNT => {
                Err(Error::BadGreeting { field: "count", value: count.to_string(), allowed: "at most 16384" })
            }
            _ => Ok(()),
        }
    }
}

impl From<Told> for Said<Told> {
    fn from(told: Told) -> Said<Told> {
        match told {
            Told::Done => Said::Done,
            Told::Failed { cause } => Said::Failed(cause),
            part => Said::Part(part),
        }
    }
}

/// A connection that has come from the kernel before.
#[derive(Debug)]
pub struct Carried {
    /// Its socket: open, with everything that was in it and set on it.
    pub socket: OwnedFd,
    /// What this service said of it there.
    pub note: Vec<u8>,
}

/// Why a connection does not cross.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// A service's way to take its connections along.
#[derive(Debug, Clone)]
pub struct Carrier {
    socket: PathBuf,
    service: String,
}

impl Carrier {
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

    /// Says that this service keeps its connections. An update asks the successor in its trial whether it can take them.
    ///
    /// # Errors
    /// The agent's refusal, in its words ([`Error::ServiceFailed`]), or no agent (or one that is older than this).
    pub fn begin(&self) -> Result<(), Error> {
        let (socket, mut inbox) = self.ask(What::Begin)?;
        match self.hear(&socket, &mut inbox)? {
            None => Ok(()),
            Some(told) => Err(unexpected(&told)),
        }
    }

    /// Gives the agent connections to take along, each with a note (at most [`MAX_NOTE`] bytes): after the order to freeze, when this service
    /// will neither read nor write them any more, and before it reports that it is frozen. Says of each, in their order, whether it
    /// crosses; one that does not is as it was, and its peer will be reset when it speaks to the next kernel.
    ///
    /// # Errors
    /// No agent, or an answer that is none. (Those that were taken before it go on if the freeze is undone.)
    pub fn keep<'a, S: AsFd + 'a>(
        &self,
        all: impl IntoIterator<Item = (&'a S, &'a [u8])>,
    ) -> Result<Vec<Result<(), Refused>>, Error> {
        let all: Vec<(BorrowedFd<'a>, &'a [u8])> =
            all.into_iter().map(|(socket, note)| (socket.as_fd(), note)).collect();
        let too_long = |note: &[u8]| note.len() > MAX_NOTE;
        let count = all.iter().filter(|(_, note)| !too_long(note)).count();
        let mut answers = Vec::with_capacity(all.len());
        let (socket, mut inbox) = self.ask(What::Keep { count: u32::try_from(count).unwrap_or(u32::MAX) })?;
        for some in all.chunks(AHEAD) {
            for (connection, note) in some.iter().filter(|(_, note)| !too_long(note)) {
                let one = One { note: u32::try_from(note.len()).unwrap_or(u32::MAX) };
                send_all(socket.as_fd(), &encode(&one)?, Some(*connection))?;
                send_all(socket.as_fd(), note, None)?;
            }
            for (_, note) in some {
                if too_long(note) {
                    answers
                        .push(Err(Refused(format!("its note has {} bytes, at most {MAX_NOTE} are taken", note.len()))));
                    continue;
                }
                answers.push(match self.hear(&socket, &mut inbox)? {
                    Some(Told::Kept) => Ok(()),
                    Some(Told::Refused { cause }) => Err(Refused(cause)),
                    Some(told) => return Err(unexpected(&told)),
                    None => return Err(unexpected(&Told::Done)),
                });
            }
        }
        match self.hear(&socket, &mut inbox)? {
            None => Ok(answers),
            Some(told) => Err(unexpected(&told)),
        }
    }

    /// The connections that this service kept on the kernel before, each once: after the first order to serve, and before it reports that it
    /// is activated.
    ///
    /// # Errors
    /// As [`Carrier::begin`].
    pub fn sockets(&self) -> Result<Vec<Carried>, Error> {
        let (socket, mut inbox) = self.ask(What::Sockets)?;
        let mut all = Vec::new();
        while let Some(told) = self.hear(&socket, &mut inbox)? {
            let Told::Socket { note } = told else { return Err(unexpected(&told)) };
            One { note }.check()?;
            let descriptor = inbox.descriptor()?;
            let note = receive_bytes(socket.as_fd(), &mut inbox, note as usize, Some(PATIENCE))?;
            all.push(Carried { socket: descriptor, note });
        }
        Ok(all)
    }

    fn ask(&self, what: What) -> Result<(UnixStream, Inbox), Error> {
        let ask = Ask::new(&self.service, what);
        ask.check()?;
        let socket = UnixStream::connect(&self.socket)?;
        socket.set_nonblocking(true)?;
        send_all(socket.as_fd(), &encode(&ask)?, None)?;
        Ok((socket, Inbox::default()))
    }

    /// The next part of an answer; nothing when that was all.
    fn hear(&self, socket: &UnixStream, inbox: &mut Inbox) -> Result<Option<Told>, Error> {
        let told: Told = receive(socket.as_fd(), inbox, Some(PATIENCE))?;
        match told.into() {
            Said::Part(told) => Ok(Some(told)),
            Said::Done => Ok(None),
            Said::Failed(cause) => Err(Error::ServiceFailed { name: self.service.clone(), cause }),
        }
    }
}

fn unexpected(told: &Told) -> Error {
    let why = format!("{told:?} is no answer to what was asked");
    Error::NotAMessage { len: 0, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another release must read what this one writes.
    #[test]
    fn the_frames_are_written_as_ever() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes[4..].to_vec()).unwrap();
        let ask = |what| text(encode(&Ask::new("kv", what)).unwrap());
        let told = |told: &Told| text(encode(told).unwrap());
        assert_eq!(ask(What::Begin), r#"{"version":1,"service":"kv","what":"Begin"}"#);
        assert_eq!(ask(What::Keep { count: 2 }), r#"{"version":1,"service":"kv","what":{"Keep":{"count":2}}}"#);
        assert_eq!(ask(What::Sockets), r#"{"version":1,"service":"kv","what":"Sockets"}"#);
        assert_eq!(text(encode(&One { note: 3 }).unwrap()), r#"{"note":3}"#);
        assert_eq!(told(&Told::Kept), r#""Kept""#);
        assert_eq!(told(&Told::Refused { cause: "x".into() }), r#"{"Refused":{"cause":"x"}}"#);
        assert_eq!(told(&Told::Socket { note: 3 }), r#"{"Socket":{"note":3}}"#);
    }

    #[test]
    fn what_is_out_of_bounds_is_not_sent() {
        assert!(Ask::new("kv", What::Keep { count: 16_385 }).check().is_err());
        assert!(One { note: (32 << 20) + 1 }.check().is_err());
        assert!(One { note: 1 << 20 }.check().is_ok());
    }

    /// An agent that is played: what was sent ahead arrives in order, each socket with its own note, and so does what comes back.
    #[test]
    fn each_socket_comes_with_its_own_note() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let carrier = Carrier::at(&path, "kv");
        let agent = std::thread::spawn(move || {
            let mut kept: Vec<(OwnedFd, Vec<u8>)> = Vec::new();
            for turn in 0..2 {
                let (socket, _) = listener.accept().unwrap();
                socket.set_nonblocking(true).unwrap();
                let mut inbox = Inbox::default();
                let ask: Ask = receive(socket.as_fd(), &mut inbox, Some(PATIENCE)).unwrap();
                let say = |told: &Told, fd: Option<BorrowedFd<'_>>| {
                    send_all(socket.as_fd(), &encode(told).unwrap(), fd).unwrap();
                };
                match ask.what {
                    What::Keep { count } => {
                        for n in 0..count {
                            let one: One = receive(socket.as_fd(), &mut inbox, Some(PATIENCE)).unwrap();
                            let fd = inbox.descriptor().unwrap();
                            let note =
                                receive_bytes(socket.as_fd(), &mut inbox, one.note as usize, Some(PATIENCE)).unwrap();
                            if n == 3 {
                                say(&Told::Refused { cause: "not this one".into() }, None);
                            } else {
                                say(&Told::Kept, None);
                                kept.push((fd, note));
                            }
                        }
                    }
                    What::Sockets => {
                        assert_eq!(turn, 1);
                        for (fd, note) in kept.drain(..) {
                            say(&Told::Socket { note: note.len() as u32 }, Some(fd.as_fd()));
                            send_all(socket.as_fd(), &note, None).unwrap();
                        }
                    }
                    What::Begin => panic!(),
                }
                say(&Told::Done, None);
            }
        });
        let pairs: Vec<_> = (0..100).map(|_| UnixStream::pair().unwrap()).collect();
        let notes: Vec<Vec<u8>> = (0..100).map(|n| vec![n as u8; n * 700]).collect();
        let kept = carrier.keep(pairs.iter().map(|(a, _)| a).zip(notes.iter().map(Vec::as_slice))).unwrap();
        assert_eq!(kept.iter().filter(|kept| kept.is_ok()).count(), 99);
        assert_eq!(kept[3], Err(Refused("not this one".into())));
        let back = carrier.sockets().unwrap();
        assert_eq!(back.len(), 99);
        for (n, one) in (0..100).filter(|n| *n != 3).zip(back) {
            assert_eq!(one.note, notes[n]);
            UnixStream::from(one.socket).write_all(&[n as u8]).unwrap();
            let mut heard = [0];
            std::io::Read::read_exact(&mut &pairs[n].1, &mut heard).unwrap();
            assert_eq!(heard, [n as u8]);
        }
        agent.join().unwrap();
    }
}
