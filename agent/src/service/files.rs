//! Files that a program keeps across kernels: memfds, by name, beside or instead of an arena.
//!
//! ```no_run
//! # fn run() -> Result<(), agent::service::Error> {
//! use agent::service::files::Keeper;
//!
//! let keeper = Keeper::new("counter");
//! let kept = keeper.files()?; // what this service kept before, here or on the kernel before
//! if !kept.iter().any(|file| file.name == "table") {
//!     let memfd = std::fs::File::from(nix::sys::memfd::memfd_create("table", nix::sys::memfd::MFdFlags::empty())
//!         .map_err(std::io::Error::from)?);
//!     memfd.set_len(1 << 20)?;
//!     keeper.keep("table", &memfd)?; // from now on its pages are pages that cross
//! }
//! # Ok(()) }
//! ```
//! Whatever is written to the file later, through any mapping or descriptor, is in the pages that cross; keeping costs as
//! much as the file is large, an update does not. The epoch's rule is the same as for an arena: a service that stands by or
//! is frozen does not touch the memory ([`super::mapping::Arena::map`] of a kept file holds it to that).
//!
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

/// Where `batond` listens for those who keep files. Only root may ask.
pub const DEFAULT_SOCKET: &str = "/run/baton/files.sock";
/// Grows with every change that an older peer would misread.
pub const VERSION: u16 = 1;
/// Longest name of a file: what systemd takes as `FDNAME=` (sd_pid_notify_with_fds(3)).
pub const MAX_NAME: usize = 255;
/// The name of a file that was kept without one, as systemd has it.
pub const UNNAMED: &str = "stored";
/// How long an answer may take: keeping a file copies it.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// [`VERSION`] of the asker.
    pub version: u16,
    /// In the name of which service.
    pub service: String,
    /// What.
    pub what: What,
}

/// The questions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// Keep the memfd that comes beside this frame, under this name.
    Keep {
        /// Several files may have one name; the same file twice is one.
        name: String,
    },
    /// Forget all files of this name.
    Forget {
        /// Their name.
        name: String,
    },
    /// What is kept.
    Files,
    /// The asker is about to become the service's program: it gets what is kept when the service may run here, and
    /// stands by until then.
    Start,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// A kept file, beside this frame. Any number of them comes before `Done`.
    File {
        /// Its name.
        name: String,
    },
    /// The last frame: it is done.
    Done,
    /// The last frame: it is not, and why.
    Failed {
        /// In words for the operator.
        cause: String,
    },
}

impl Ask {
    /// A question in this release's form.
    #[must_use]
    pub fn new(service: &str, what: What) -> Self {
        Self { version: VERSION, service: service.to_owned(), what }
    }

    /// Checks every bound, once.
    ///
    /// # Errors
    /// Another version, or a name out of bounds.
    pub fn check(&self) -> Result<(), Error> {
        if self.version != VERSION {
            return Err(Error::Version { theirs: self.version, ours: VERSION });
        }
        super::protocol::check_service_name(&self.service)?;
        match &self.what {
            What::Keep { name } | What::Forget { name } => check_name(name),
            What::Files | What::Start => Ok(()),
        }
    }
}

/// A name that systemd would take too (`fdname_is_valid()`).
///
/// # Errors
/// It is empty, too long, or has a colon or a byte that is not printable ASCII.
pub fn check_name(name: &str) -> Result<(), Error> {
    let plain = |b: u8| (b' '..=b'~').contains(&b) && b != b':';
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(plain) {
        let value = name.chars().take(MAX_NAME).collect();
        let allowed = "1 to 255 printable ASCII characters, no colon";
        return Err(Error::BadGreeting { field: "name", value, allowed });
    }
    Ok(())
}

/// A file that is kept.
#[derive(Debug)]
pub struct KeptFile {
    /// Under this name.
    pub name: String,
    /// The file: another descriptor of the same memory.
    pub file: OwnedFd,
}

/// A service's way to its kept files.
#[derive(Debug, Clone)]
pub struct Keeper {
    socket: PathBuf,
    service: String,
}

impl Keeper {
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

    /// Keeps a memfd: it crosses from now on, with whatever is written to it later.
    ///
    /// # Errors
    /// The agent's refusal, in its words ([`Error::ServiceFailed`]), or no agent.
    pub fn keep(&self, name: &str, memfd: impl AsFd) -> Result<(), Error> {
        self.ask(What::Keep { name: name.to_owned() }, Some(memfd.as_fd()), Some(PATIENCE)).map(drop)
    }

    /// Forgets all files of this name. Who has them open goes on having them.
    ///
    /// # Errors
    /// As [`Keeper::keep`].
    pub fn forget(&self, name: &str) -> Result<(), Error> {
        self.ask(What::Forget { name: name.to_owned() }, None, Some(PATIENCE)).map(drop)
    }

    /// What this service keeps, in the order in which it was kept.
    ///
    /// # Errors
    /// As [`Keeper::keep`].
    pub fn files(&self) -> Result<Vec<KeptFile>, Error> {
        self.ask(What::Files, None, Some(PATIENCE))
    }

    /// Waits until the service may run on this kernel, however long; gives what it keeps.
    ///
    /// # Errors
    /// As [`Keeper::keep`].
    pub fn start(&self) -> Result<Vec<KeptFile>, Error> {
        self.ask(What::Start, None, None)
    }

    fn ask(
        &self,
        what: What,
        file: Option<BorrowedFd<'_>>,
        patience: Option<Duration>,
    ) -> Result<Vec<KeptFile>, Error> {
        let ask = Ask::new(&self.service, what);
        ask.check()?;
        let socket = UnixStream::connect(&self.socket)?;
        socket.set_nonblocking(true)?;
        send_all(socket.as_fd(), &encode(&ask)?, file)?;
        let mut inbox = Inbox::default();
        let mut files = Vec::new();
        loop {
            match receive(socket.as_fd(), &mut inbox, patience)? {
                Told::File { name } => files.push(KeptFile { name, file: inbox.descriptor()? }),
                Told::Done => return Ok(files),
                Told::Failed { cause } => return Err(Error::ServiceFailed { name: self.service.clone(), cause }),
            }
        }
    }
}

/// The next message, waiting for it; its descriptor is then in the inbox.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    inbox: &mut Inbox,
    patience: Option<Duration>,
) -> Result<T, Error> {
    loop {
        if let Some(message) = inbox.take()? {
            return Ok(message);
        }
        wait(socket, PollFlags::POLLIN, patience)?;
        let mut buffer = [0; 1024];
        match recv_with_fd(socket, &mut buffer) {
            Ok((0, _)) => return Err(Error::Closed),
            Ok((len, descriptor)) => inbox.push(&buffer[..len], descriptor)?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends one answer.
pub(crate) fn answer(socket: BorrowedFd<'_>, told: &Told, file: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    send_all(socket, &encode(told)?, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_systemd_takes() {
        for good in ["a", "stored", "with blank", &"x".repeat(255)] {
            check_name(good).unwrap();
        }
        for bad in ["", "a:b", "a\nb", "\u{e4}", &"x".repeat(256)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        let error = Ask::new("no/such", What::Files).check().unwrap_err().to_string();
        assert!(error.contains("1 to 64"), "{error}");
    }

    /// Another release must read what this one writes.
    #[test]
    fn the_frames_are_written_as_ever() {
        let frames = [
            String::from_utf8(encode(&Ask::new("memo", What::Keep { name: "t".into() })).unwrap()[4..].into()),
            String::from_utf8(encode(&Ask::new("memo", What::Start)).unwrap()[4..].into()),
            String::from_utf8(encode(&Told::File { name: "t".into() }).unwrap()[4..].into()),
            String::from_utf8(encode(&Told::Done).unwrap()[4..].into()),
        ];
        let texts: Vec<String> = frames.into_iter().map(Result::unwrap).collect();
        assert_eq!(
            texts,
            [
                r#"{"version":1,"service":"memo","what":{"Keep":{"name":"t"}}}"#,
                r#"{"version":1,"service":"memo","what":"Start"}"#,
                r#"{"File":{"name":"t"}}"#,
                r#""Done""#,
            ]
        );
    }
}
