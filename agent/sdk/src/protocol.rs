//! What a service and its agent say to each other, and in which order: types, framing, and the one table of legal steps.
//!
//! A frame is a little-endian `u32` length, then that many bytes of JSON (at most [`MAX_FRAME`]). JSON because these are
//! a dozen small messages in a service's life and a reader of `strace` understands them; the two inside the blackout hold
//! numbers only, are decoded without allocating, and cost some microseconds. `Arena` carries one descriptor (SCM_RIGHTS).
//!
//! Nothing here does I/O except [`send_with_fd`] and [`recv_with_fd`], so both a blocking service and a `batond` under tokio
//! (`stream.try_io(Interest::WRITABLE, || ...)`) can use it. The peer is checked like a stranger: lengths are bounded, names
//! have a small alphabet, and a message out of order is refused by [`Standing`], which both ends keep.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Error;
use super::descriptor;

/// Where `batond` listens for services.
pub const DEFAULT_SOCKET: &str = "/run/baton/services.sock";
/// Grows with every change that an older peer would misread.
pub const PROTOCOL_VERSION: u16 = 2;
/// A frame's payload at most. The longest message is a failure's cause.
pub const MAX_FRAME: usize = 4096;
/// No arena is larger: a length beyond it is a misread message.
pub const MAX_ARENA: u64 = 1 << 40;
/// A service's name at most.
pub const MAX_NAME: usize = 64;
/// A cause is cut here, so that it always fits a frame (JSON may need six bytes for one).
pub const MAX_CAUSE: usize = 512;
const PREFIX: usize = 4;

/// A service introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the service.
    pub protocol: u16,
    /// Which service: one of this name on each side of an update.
    pub name: String,
    /// What kind of state lies in its arena, as the arena's own header says it.
    pub schema_kind: u32,
    /// The version of that state it writes.
    pub schema_version: u32,
    /// How large an arena it would like, should there be none yet.
    pub wanted_arena_len: u64,
    /// The epoch in which it serves already, on the arena that an earlier batond of this kernel gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<u64>,
}

impl Hello {
    /// A greeting in this release's protocol.
    #[must_use]
    pub fn new(name: &str, schema_kind: u32, schema_version: u32, wanted_arena_len: u64) -> Self {
        let (protocol, name) = (PROTOCOL_VERSION, name.to_owned());
        Self { protocol, name, schema_kind, schema_version, wanted_arena_len, serving: None }
    }

    /// Checks every bound, once. The agent calls it before it uses any field as a file name, a size or a log line.
    ///
    /// # Errors
    /// Another protocol version, or a field out of bounds.
    pub fn check(&self) -> Result<(), Error> {
        if self.protocol != PROTOCOL_VERSION {
            return Err(Error::Version { theirs: self.protocol, ours: PROTOCOL_VERSION });
        }
        check_service_name(&self.name)?;
        if self.wanted_arena_len == 0 || self.wanted_arena_len > MAX_ARENA {
            let value = self.wanted_arena_len.to_string();
            return Err(Error::BadGreeting { field: "wanted_arena_len", value, allowed: "1 byte to 1 TiB" });
        }
        Ok(())
    }
}

/// A name that can be a file name, a cgroup's, and part of a log line.
///
/// # Errors
/// It is empty, too long, or has other characters.
pub fn check_service_name(name: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) || name.starts_with('.') {
        let value = name.chars().take(MAX_NAME).collect();
        let allowed = "1 to 64 of a-z, 0-9, '-', '_', '.', not starting with a dot";
        return Err(Error::BadGreeting { field: "name", value, allowed });
    }
    Ok(())
}

/// What a service says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// First, once.
    Hello(Hello),
    /// The arena is mapped, the sockets are bound: orders may come.
    Ready,
    /// The answer to `Serve`, `Activate` and `Unfreeze`: it answers clients from now on.
    Activated {
        /// The epoch it holds.
        epoch: u64,
        /// How many items it found: to be compared with `Frozen`.
        items: u64,
        /// The seal it found, 0 in a fresh arena.
        seal: u64,
    },
    /// The answer to `Freeze`: sealed, and never touched again until told so.
    Frozen {
        /// The epoch it held.
        epoch: u64,
        /// How many items are in the arena.
        items: u64,
        /// The arena's seal.
        seal: u64,
    },
    /// It cannot do what it was told.
    Failed {
        /// Why, in words for the operator.
        cause: String,
    },
}

/// What an agent says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToService {
    /// The memory, as a descriptor beside this frame: map `first` bytes shared, from offset 0, and what follows behind it.
    Arena {
        /// Its size, a multiple of 4096.
        len: u64,
        /// Nothing is in it yet: create. Otherwise attach.
        fresh: bool,
        /// How much of it this frame's descriptor holds; as many [`ToService::Piece`]s follow as the rest needs. 0, as in
        /// frames of a batond that knew one piece only: all of it.
        #[serde(default)]
        first: u64,
    },
    /// The next part of the arena, as a descriptor beside this frame: map all of it, behind what is mapped already.
    Piece {
        /// Its size, a multiple of 4096.
        len: u64,
    },
    /// Go on as you are: this agent has taken the service on from one that has gone.
    Welcome {
        /// The epoch that the service holds.
        epoch: u64,
    },
    /// Wait, silent: another kernel serves. The arena's content is that kernel's.
    StandBy,
    /// Serve (nobody else does).
    Serve {
        /// From now on the service holds this epoch.
        epoch: u64,
    },
    /// Stop answering at a request boundary, seal, report.
    Freeze {
        /// The epoch it holds.
        epoch: u64,
    },
    /// Go on after a freeze: the cutover was taken back.
    Unfreeze {
        /// The epoch from now on: at least the one it was frozen in.
        epoch: u64,
    },
    /// Take over: the arena's content is now this service's.
    Activate {
        /// The new epoch.
        epoch: u64,
    },
    /// Leave.
    Stop,
}

impl ToService {
    /// How many descriptors come beside this message.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        usize::from(matches!(self, Self::Arena { .. } | Self::Piece { .. }))
    }
}

/// Where a service stands, as both ends see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Has connected, said nothing yet.
    Unknown,
    /// Has said who it is; its arena has not come yet.
    Greeted,
    /// Answers clients in this epoch, and has told so to an agent that is new to it.
    Returning(u64),
    /// Maps its arena, binds its sockets.
    Preparing,
    /// Ready, no orders yet.
    Ready,
    /// Told to stand by.
    StandingBy,
    /// Told to answer in this epoch, and attaching.
    Activating(u64),
    /// Answers clients in this epoch.
    Serving(u64),
    /// Told to freeze, and sealing.
    Freezing(u64),
    /// Silent, having held this epoch.
    Frozen(u64),
    /// Told to leave, or failed.
    Over,
}

impl Standing {
    /// The epoch in which this service may answer clients now, if any.
    #[must_use]
    pub fn serving(self) -> Option<u64> {
        match self {
            Self::Serving(epoch) | Self::Returning(epoch) => Some(epoch),
            _ => None,
        }
    }

    /// The agent's message moves the service here.
    ///
    /// # Errors
    /// A message that does not belong here, which includes every epoch that goes backwards.
    pub fn ordered(self, order: &ToService) -> Result<Self, Error> {
        use {Standing as S, ToService as O};
        match (self, *order) {
            (S::Greeted, O::Arena { .. }) => Ok(S::Preparing),
            (S::Preparing, O::Piece { .. }) => Ok(S::Preparing),
            (S::Returning(held), O::Welcome { epoch }) if epoch == held => Ok(S::Serving(held)),
            (S::Ready, O::StandBy) => Ok(S::StandingBy),
            (S::Ready, O::Serve { epoch }) if epoch > 0 => Ok(S::Activating(epoch)),
            (S::StandingBy, O::Activate { epoch }) if epoch > 0 => Ok(S::Activating(epoch)),
            (S::Serving(held), O::Freeze { epoch }) if epoch == held => Ok(S::Freezing(held)),
            (S::Frozen(held), O::Unfreeze { epoch }) if epoch >= held => Ok(S::Activating(epoch)),
            (_, O::Stop) => Ok(S::Over),
            (standing, ref other) => Err(out_of_order(other, standing)),
        }
    }

    /// The service's message moves it here.
    ///
    /// # Errors
    /// A message that does not belong here, or an epoch that it does not hold.
    pub fn reported(self, report: &ToAgent) -> Result<Self, Error> {
        use {Standing as S, ToAgent as R};
        match (self, report) {
            (S::Unknown, R::Hello(hello)) => Ok(hello.serving.map_or(S::Greeted, S::Returning)),
            (S::Preparing, R::Ready) => Ok(S::Ready),
            (S::Activating(held), R::Activated { epoch, .. }) if *epoch == held => Ok(S::Serving(held)),
            (S::Freezing(held), R::Frozen { epoch, .. }) if *epoch == held => Ok(S::Frozen(held)),
            (_, R::Failed { .. }) => Ok(S::Over),
            (standing, other) => Err(out_of_order(other, standing)),
        }
    }
}

fn out_of_order<T: Serialize>(message: &T, standing: Standing) -> Error {
    let message = serde_json::to_string(message).unwrap_or_else(|error| error.to_string());
    Error::OutOfOrder { message, standing }
}

/// Cuts a cause so that it fits a frame.
#[must_use]
pub fn bounded_cause(cause: &str) -> String {
    cause.chars().take(MAX_CAUSE).collect()
}

/// Writes one frame behind what `out` holds (which keeps its room: a second message needs no allocation).
///
/// # Errors
/// A message longer than [`MAX_FRAME`]; `out` is then as it was.
pub fn encode_into<T: Serialize>(message: &T, out: &mut Vec<u8>) -> Result<(), Error> {
    let start = out.len();
    out.extend_from_slice(&[0; PREFIX]);
    let written = serde_json::to_writer(&mut *out, message);
    let len = out.len() - start - PREFIX;
    if let Err(error) = written {
        out.truncate(start);
        return Err(Error::NotAMessage { len, why: error.to_string() });
    }
    if len > MAX_FRAME {
        out.truncate(start);
        return Err(Error::FrameTooLong { announced: len });
    }
    let prefix = u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
    out[start..start + PREFIX].copy_from_slice(&prefix);
    Ok(())
}

/// One frame.
///
/// # Errors
/// As [`encode_into`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, Error> {
    let mut out = Vec::with_capacity(128);
    encode_into(message, &mut out)?;
    Ok(out)
}

/// Bytes and descriptors that came, and the messages in them. Does no I/O.
///
/// Descriptors are kept in the order they came: the kernel may deliver a frame without one together with the frame that has
/// one, so which message a descriptor belongs to is known only after decoding.
#[derive(Debug)]
pub struct Inbox {
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self { bytes: Vec::with_capacity(PREFIX + MAX_FRAME), descriptors: VecDeque::new() }
    }
}

impl Inbox {
    /// What the socket gave.
    ///
    /// # Errors
    /// More descriptors than one: no message takes two.
    pub fn push(&mut self, bytes: &[u8], descriptor: Option<OwnedFd>) -> Result<(), Error> {
        self.bytes.extend_from_slice(bytes);
        self.descriptors.extend(descriptor);
        if self.descriptors.len() > 1 {
            return Err(Error::Descriptors(self.descriptors.len(), 1));
        }
        Ok(())
    }

    /// The next whole message.
    ///
    /// # Errors
    /// A frame too long, or one that is no message of type `T`. The connection is then to be closed.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let Some(prefix) = self.bytes.first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*prefix) as usize;
        if len > MAX_FRAME {
            return Err(Error::FrameTooLong { announced: len });
        }
        let Some(payload) = self.bytes.get(PREFIX..PREFIX + len) else {
            return Ok(None);
        };
        let message =
            serde_json::from_slice(payload).map_err(|error| Error::NotAMessage { len, why: error.to_string() })?;
        self.bytes.drain(..PREFIX + len);
        Ok(Some(message))
    }

    /// The next whole message, from a non-blocking socket if it is not here yet; none if there is nothing more to read now.
    ///
    /// # Errors
    /// As [`Inbox::take`]; the socket's, and a peer that has closed.
    pub fn poll<T: DeserializeOwned>(&mut self, socket: BorrowedFd<'_>) -> Result<Option<T>, Error> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            let mut buffer = [0; 1024];
            match recv_with_fd(socket, &mut buffer) {
                Ok((0, _)) => return Err(Error::Closed),
                Ok((len, descriptor)) => self.push(&buffer[..len], descriptor)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// So many bytes that stand behind a message and are none themselves, from a non-blocking socket if they are not here yet; none if not all
    /// of them have come.
    ///
    /// # Errors
    /// The socket's, and a peer that has closed.
    pub fn poll_bytes(&mut self, socket: BorrowedFd<'_>, len: usize) -> Result<Option<Vec<u8>>, Error> {
        while self.bytes.len() < len {
            let mut buffer = [0; 16 << 10];
            match recv_with_fd(socket, &mut buffer) {
                Ok((0, _)) => return Err(Error::Closed),
                Ok((len, descriptor)) => self.push(&buffer[..len], descriptor)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(self.bytes.drain(..len).collect()))
    }

    /// The descriptor that came beside the message just read.
    ///
    /// # Errors
    /// There is none.
    pub fn descriptor(&mut self) -> Result<OwnedFd, Error> {
        self.descriptors.pop_front().ok_or(Error::Descriptors(0, 1))
    }
}

/// Sends as much of `bytes` as the socket takes, and `descriptor` beside its first byte. `WouldBlock` means nothing was sent;
/// after a short count send the rest without the descriptor.
///
/// # Errors
/// As sendmsg(2).
pub fn send_with_fd(socket: BorrowedFd<'_>, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let raw = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|fds| ControlMessage::ScmRights(fds));
    let iov = [IoSlice::new(bytes)];
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &iov, rights.as_slice(), MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Receives bytes and at most one descriptor (close-on-exec). 0 bytes: the peer has closed.
///
/// # Errors
/// As recvmsg(2); a peer that sends several descriptors at once is refused, and none of them stays open.
pub fn recv_with_fd(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    // Room for more than one, so that too many are seen (and closed) instead of being cut off silently.
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut iov = [IoSliceMut::new(buffer)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        received.extend(descriptor::received(control));
    }
    if received.len() > 1 || message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "several descriptors came at once, none or one is allowed",
        ));
    }
    Ok((message.bytes, received.pop()))
}

/// Sends a whole frame on a socket that may be non-blocking, waiting for room when there is none.
///
/// # Errors
/// The socket's; or a peer that has left its socket full for [`STALLED_PEER`].
pub fn send_all(socket: BorrowedFd<'_>, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let deadline = Some(Instant::now() + STALLED_PEER);
    while !bytes.is_empty() {
        match send_with_fd(socket, bytes, fd) {
            Ok(sent) => {
                bytes = &bytes[sent..];
                fd = None;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !wait_until(socket, PollFlags::POLLOUT, deadline)? {
                    return Err(Error::TimedOut(STALLED_PEER));
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The next message, waiting for it; its descriptor is then in the inbox. The socket is non-blocking. `patience` is for the
/// whole message, in however many pieces it comes; without one it is waited for until the peer closes.
///
/// # Errors
/// As [`Inbox::poll`]; or no whole message in time.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    inbox: &mut Inbox,
    patience: Option<Duration>,
) -> Result<T, Error> {
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    loop {
        if let Some(message) = inbox.poll(socket)? {
            return Ok(message);
        }
        if !wait_until(socket, PollFlags::POLLIN, deadline)? {
            return Err(Error::TimedOut(patience.unwrap_or_default()));
        }
    }
}

/// So many bytes that stand behind a message ([`Inbox::poll_bytes`]), waiting for them.
///
/// # Errors
/// As [`Inbox::poll_bytes`]; or not all of them in time.
pub fn receive_bytes(
    socket: BorrowedFd<'_>,
    inbox: &mut Inbox,
    len: usize,
    patience: Option<Duration>,
) -> Result<Vec<u8>, Error> {
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    loop {
        if let Some(bytes) = inbox.poll_bytes(socket, len)? {
            return Ok(bytes);
        }
        if !wait_until(socket, PollFlags::POLLIN, deadline)? {
            return Err(Error::TimedOut(patience.unwrap_or_default()));
        }
    }
}

/// A peer whose socket stays full this long is dead: our messages are a few hundred bytes in all.
pub const STALLED_PEER: Duration = Duration::from_secs(5);

/// Waits until the socket has what is asked for; says if it has. Without a deadline it waits for ever.
///
/// # Errors
/// As poll(2).
pub fn wait_until(socket: BorrowedFd<'_>, what: PollFlags, deadline: Option<Instant>) -> Result<bool, Error> {
    loop {
        match poll(&mut [PollFd::new(socket, what)], timeout(deadline)) {
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
    }
}

/// What poll(2) is told so that it ends at a deadline. Rounded up: a wait that ends early would spin through the last
/// millisecond.
#[must_use]
pub fn timeout(deadline: Option<Instant>) -> PollTimeout {
    deadline.map_or(PollTimeout::NONE, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
    })
}
