//! A question to `batond` on a connection of its own: a frame ([`super::protocol`]) with an [`Ask`], beside it a descriptor
//! if the question takes one; then frames of the answer, any number of parts with a descriptor each, and a last one.
//! [`super::files`] and [`super::resize`] ask so, each with questions, answers and a version of its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Error;
use super::protocol::{Inbox, encode, receive, send_all};

/// How long an answer may take: memory is copied, moved aside and cleared.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask<W> {
    /// [`Question::VERSION`] of the asker.
    pub version: u16,
    /// In the name of which service.
    pub service: String,
    /// What.
    pub what: W,
}

/// A kind of questions.
pub trait Question: Serialize {
    /// Grows with every change that an older peer would misread.
    const VERSION: u16;
    /// What it is answered with.
    type Told: DeserializeOwned;
    /// Checks every bound of this question.
    ///
    /// # Errors
    /// Something is out of its bounds.
    fn check(&self) -> Result<(), Error>;
}

impl<W: Question> Ask<W> {
    /// A question in this release's form.
    #[must_use]
    pub fn new(service: &str, what: W) -> Self {
        Self { version: W::VERSION, service: service.to_owned(), what }
    }

    /// Checks every bound, once.
    ///
    /// # Errors
    /// Another version, or something out of its bounds.
    pub fn check(&self) -> Result<(), Error> {
        if self.version != W::VERSION {
            return Err(Error::Version { theirs: self.version, ours: W::VERSION });
        }
        super::protocol::check_service_name(&self.service)?;
        self.what.check()
    }
}

/// What a frame of an answer says.
pub(super) enum Said<P> {
    /// A part of it; its descriptor comes beside the frame.
    Part(P),
    /// That was all.
    Done,
    /// It cannot be done, and why.
    Failed(String),
}

/// Who asks, and where.
#[derive(Debug, Clone)]
pub(super) struct Asker {
    socket: PathBuf,
    service: String,
}

impl Asker {
    /// A service, at a socket of `batond`'s.
    pub(super) fn at(socket: &Path, service: &str) -> Self {
        Self { socket: socket.to_owned(), service: service.to_owned() }
    }

    /// Asks, and hears the whole answer. Without `patience` it waits for ever.
    ///
    /// # Errors
    /// The agent's refusal, in its words ([`Error::ServiceFailed`]), or no agent.
    pub(super) fn ask<W, P>(
        &self,
        what: W,
        file: Option<BorrowedFd<'_>>,
        patience: Option<Duration>,
    ) -> Result<Vec<(P, OwnedFd)>, Error>
    where
        W: Question<Told: Into<Said<P>>>,
    {
        let ask = Ask::new(&self.service, what);
        ask.check()?;
        let socket = UnixStream::connect(&self.socket)?;
        socket.set_nonblocking(true)?;
        send_all(socket.as_fd(), &encode(&ask)?, file)?;
        let mut inbox = Inbox::default();
        let mut parts = Vec::new();
        loop {
            let told: W::Told = receive(socket.as_fd(), &mut inbox, patience)?;
            match told.into() {
                Said::Part(part) => parts.push((part, inbox.descriptor()?)),
                Said::Done => return Ok(parts),
                Said::Failed(cause) => return Err(Error::ServiceFailed { name: ask.service, cause }),
            }
        }
    }
}

/// Sends one frame of an answer.
pub fn answer<T: Serialize>(socket: BorrowedFd<'_>, told: &T, file: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    send_all(socket, &encode(told)?, file)
}
