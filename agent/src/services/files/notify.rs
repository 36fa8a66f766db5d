//! systemd's fd store, spoken to unmodified programs: `FDSTORE=1`, `FDSTOREREMOVE=1` and `FDNAME=` on the socket that
//! `NOTIFY_SOCKET` names (sd_notify(3), sd_pid_notify_with_fds(3)). All else that may be said there is heard and means
//! nothing; descriptors are closed, which is all that `BARRIER=1` asks for.
//!
//! Who speaks is known by the kernel's word (SCM_CREDENTIALS) and the sender's cgroup, as systemd does it.

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Result, anyhow};
use kexec_core::device::Device;
use kexec_core::memory_map::RangeSet;
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt};

use crate::daemon::kernel::Kernel;
use crate::daemon::listen::bind;
use crate::services::files::{LastWords, Settled, Store};
use baton_sdk::descriptor;
use baton_sdk::files::UNNAMED;
use baton_sdk::protocol::wait_until;

/// Where programs that `baton run` starts send their notices.
pub const SOCKET: &str = "/run/baton/notify";
/// The longest notice, as systemd has it (`NOTIFY_BUFFER_MAX`).
const MAX_NOTICE: usize = 4096;
/// The most descriptors of one notice: the kernel's limit, `SCM_MAX_FD`.
const MAX_DESCRIPTORS: usize = 253;
/// How many notices wait at most, and the longest that queue can be where nobody says.
const QUEUE_LENGTH: &str = "/proc/sys/net/unix/max_dgram_qlen";
const MAX_QUEUE: usize = 4096;

/// What a notice asks of us.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wish {
    Nothing,
    Keep { name: String },
    Forget { name: String },
}

fn wish_of(notice: &[u8]) -> Wish {
    let lines = || notice.split(|byte| *byte == b'\n');
    let says = |text: &[u8]| lines().any(|line| line == text);
    let name = lines().find_map(|line| line.strip_prefix(b"FDNAME=")).map(|name| String::from_utf8_lossy(name));
    match (says(b"FDSTORE=1"), says(b"FDSTOREREMOVE=1"), name) {
        (_, true, Some(name)) => Wish::Forget { name: name.into_owned() },
        (true, false, name) => Wish::Keep { name: name.map_or_else(|| UNNAMED.to_owned(), |name| name.into_owned()) },
        _ => Wish::Nothing,
    }
}

/// Listens from now on.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    // Everybody may speak: a program's own user is not known here. What counts is whose cgroup the sender is in.
    let socket = bind(Path::new(SOCKET), 0o666, |path| UnixDatagram::bind(path))?;
    setsockopt(&socket, sockopt::PassCred, &true)?;
    let notices = Arc::new(Notices { socket, hearing: Mutex::new(()) });
    kernel.files.listen(notices.clone())?;
    thread::Builder::new().name("notices".into()).spawn(move || {
        loop {
            if let Err(error) = wait_until(notices.socket.as_fd(), PollFlags::POLLIN, None) {
                tracing::warn!("notices are no longer heard: {error}");
                return;
            }
            let _held = notices.lock();
            match notices.receive() {
                Ok(Some(notice)) => hear(&kernel.files, kernel.device(), || kernel.services.ranges(), notice),
                Ok(None) => {}
                Err(error) => tracing::warn!("a notice cannot be read: {error}"),
            }
        }
    })?;
    Ok(())
}

/// The socket of notices.
#[derive(Debug)]
struct Notices {
    socket: UnixDatagram,
    /// Held from the reading of a notice until what it asks for is done: who holds it knows that none is on its way.
    hearing: Mutex<()>,
}

/// One notice.
struct Notice {
    text: Vec<u8>,
    sender: Option<i32>,
    files: Vec<OwnedFd>,
    /// Why it cannot be obeyed as it is.
    damage: Option<&'static str>,
}

impl LastWords for Notices {
    /// Who is frozen says nothing more, and what others say behind it is left for later: there are never more in the queue
    /// than the kernel lets in.
    fn hear(&self, store: &Store, device: &Device, arenas: &RangeSet) {
        let _held = self.lock();
        let most = fs::read_to_string(QUEUE_LENGTH).ok().and_then(|text| text.trim().parse().ok());
        for _ in 0..=most.unwrap_or(MAX_QUEUE) {
            match self.receive() {
                Ok(Some(notice)) => hear(store, Ok(device), || arenas.clone(), notice),
                Ok(None) => return,
                Err(error) => tracing::warn!("a notice cannot be read: {error}"),
            }
        }
    }
}

impl Notices {
    fn lock(&self) -> MutexGuard<'_, ()> {
        // The lock guards no data, only that one at a time hears: a thread that panicked with it leaves nothing half done.
        self.hearing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next one; none if there is nothing more to read now.
    fn receive(&self) -> io::Result<Option<Notice>> {
        let mut buffer = [0; MAX_NOTICE];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS], UnixCredentials);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = loop {
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                other => break other?,
            }
        };
        let (mut files, mut sender) = (Vec::new(), None);
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials.pid()),
                other => files.extend(descriptor::received(other)),
            }
        }
        let damage = if message.flags.contains(MsgFlags::MSG_TRUNC) {
            Some("it is longer than a notice may be")
        } else if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            Some("not all of its descriptors could be received: batond has too many open")
        } else {
            None
        };
        let len = message.bytes.min(MAX_NOTICE);
        Ok(Some(Notice { text: buffer[..len].to_vec(), sender, files, damage }))
    }
}

/// Nobody waits for an answer: what is refused stands in the log, with the name of who asked.
fn hear(store: &Store, device: Result<&Device>, arenas: impl FnOnce() -> RangeSet, notice: Notice) {
    let Notice { text, sender, files, damage } = notice;
    let wish = wish_of(&text);
    if wish == Wish::Nothing && damage.is_none() {
        return;
    }
    let Some(service) = sender.and_then(|pid| store.program_of(pid)) else {
        tracing::debug!("process {sender:?} wants files kept, and is no program that `baton run` started");
        return;
    };
    let refused = |name: &str, what: &str, error: anyhow::Error| {
        let why = format!("{service}: file {name:?} is not {what}: {error:#}");
        tracing::warn!("{why}");
        if error.is::<Settled>() || damage.is_some() {
            store.miss(why);
        }
    };
    let device = match (damage, device) {
        // What came of it is closed.
        (Some(damage), _) => return refused("?", "kept", anyhow!("{damage}")),
        (None, Err(error)) => return tracing::warn!("{service}: nothing can be kept: {error:#}"),
        (None, Ok(device)) => device,
    };
    match wish {
        Wish::Nothing => {}
        Wish::Forget { name } => match store.forget(device, &service, &name) {
            Ok(count) => tracing::info!(service, name, count, "forgotten"),
            Err(error) => refused(&name, "forgotten", error),
        },
        Wish::Keep { name } => {
            let arenas = arenas();
            for file in files {
                if let Err(error) = store.keep(device, &arenas, &service, &name, file) {
                    refused(&name, "kept", error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notices() -> (tempfile::TempDir, Notices, UnixDatagram) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        setsockopt(&socket, sockopt::PassCred, &true).unwrap();
        let program = UnixDatagram::unbound().unwrap();
        program.connect(&path).unwrap();
        (folder, Notices { socket, hearing: Mutex::new(()) }, program)
    }

    #[test]
    fn what_waits_in_the_queue_is_read_whole_and_says_who_sent_it() {
        let (_folder, notices, program) = notices();
        program.send(b"FDSTORE=1\nFDNAME=a").unwrap();
        program.send(&[b'x'; MAX_NOTICE + 1]).unwrap();
        let first = notices.receive().unwrap().unwrap();
        assert_eq!((first.text.as_slice(), first.damage), (&b"FDSTORE=1\nFDNAME=a"[..], None));
        assert_eq!(first.sender, Some(std::process::id().cast_signed()));
        let second = notices.receive().unwrap().unwrap();
        assert_eq!(second.damage, Some("it is longer than a notice may be"));
        assert!(notices.receive().unwrap().is_none(), "it does not wait for more");
    }

    #[test]
    fn notices_say_what_systemd_says_they_say() {
        let keep = |name: &str| Wish::Keep { name: name.to_owned() };
        for (notice, wish) in [
            ("READY=1\n", Wish::Nothing),
            ("FDSTORE=1", keep(UNNAMED)),
            ("FDSTORE=1\nFDNAME=table\n", keep("table")),
            ("FDNAME=table\nFDPOLL=0\nFDSTORE=1\n", keep("table")),
            ("FDSTOREREMOVE=1\nFDNAME=table", Wish::Forget { name: "table".to_owned() }),
            // Which one to remove is not said: systemd does nothing either.
            ("FDSTOREREMOVE=1", Wish::Nothing),
            ("FDSTORE=11", Wish::Nothing),
            ("XFDSTORE=1", Wish::Nothing),
            ("", Wish::Nothing),
        ] {
            assert_eq!(wish_of(notice.as_bytes()), wish, "{notice:?}");
        }
        assert_eq!(wish_of(b"FDSTORE=1\nFDNAME=\xff"), keep("\u{fffd}"), "which is refused as a name");
    }
}
