//! Files that a program keeps across kernels: memfds, by name, beside or instead of an arena.
//!
//! ```no_run
//! # fn run() -> Result<(), baton_sdk::Error> {
//! use baton_sdk::files::Keeper;
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
//! A connection is one question ([`super::ask`]): an [`Ask`], answered by frames of [`Told`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use super::ask::{Asker, PATIENCE, Question, Said};

/// Where `batond` listens for those who keep files. Only root may ask.
pub const DEFAULT_SOCKET: &str = "/run/baton/files.sock";
/// Grows with every change that an older peer would misread.
pub const VERSION: u16 = 1;
/// Longest name of a file: what systemd takes as `FDNAME=` (sd_pid_notify_with_fds(3)).
pub const MAX_NAME: usize = 255;
/// The name of a file that was kept without one, as systemd has it.
pub const UNNAMED: &str = "stored";

/// What is asked.
pub type Ask = super::ask::Ask<What>;

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
    /// Calls of the Live Update Orchestrator, of the asker and what it starts, wait for an answer at the descriptor that comes beside this frame.
    Sessions,
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

impl Question for What {
    const VERSION: u16 = VERSION;
    type Told = Told;
    fn check(&self) -> Result<(), Error> {
        match self {
            What::Keep { name } | What::Forget { name } => check_name(name),
            What::Files | What::Start | What::Sessions => Ok(()),
        }
    }
}

impl From<Told> for Said<String> {
    fn from(told: Told) -> Said<String> {
        match told {
            Told::File { name } => Said::Part(name),
            Told::Done => Said::Done,
            Told::Failed { cause } => Said::Failed(cause),
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
pub struct Keeper(Asker);

impl Keeper {
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

    /// Has the agent answer calls of the Live Update Orchestrator (a seccomp filter that its starter put on the asker).
    pub fn divert(&self, listener: impl AsFd) -> Result<(), Error> {
        self.ask(What::Sessions, Some(listener.as_fd()), Some(PATIENCE)).map(drop)
    }

    fn ask(
        &self,
        what: What,
        file: Option<BorrowedFd<'_>>,
        patience: Option<Duration>,
    ) -> Result<Vec<KeptFile>, Error> {
        let kept = self.0.ask(what, file, patience)?;
        Ok(kept.into_iter().map(|(name, file)| KeptFile { name, file }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::encode;
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
            String::from_utf8(encode(&Ask::new("memo", What::Sessions)).unwrap()[4..].into()),
            String::from_utf8(encode(&Told::File { name: "t".into() }).unwrap()[4..].into()),
            String::from_utf8(encode(&Told::Done).unwrap()[4..].into()),
        ];
        let texts: Vec<String> = frames.into_iter().map(Result::unwrap).collect();
        assert_eq!(
            texts,
            [
                r#"{"version":1,"service":"memo","what":{"Keep":{"name":"t"}}}"#,
                r#"{"version":1,"service":"memo","what":"Start"}"#,
                r#"{"version":1,"service":"memo","what":"Sessions"}"#,
                r#"{"File":{"name":"t"}}"#,
                r#""Done""#,
            ]
        );
    }
}
