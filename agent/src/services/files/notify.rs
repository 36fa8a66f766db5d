//! systemd's fd store, spoken to unmodified programs: `FDSTORE=1`, `FDSTOREREMOVE=1` and `FDNAME=` on the socket that
//! `NOTIFY_SOCKET` names (sd_notify(3), sd_pid_notify_with_fds(3)). All else that may be said there is heard and means
//! nothing; descriptors are closed, which is all that `BARRIER=1` asks for.
//!
//! Who speaks is known by the kernel's word (SCM_CREDENTIALS) and the sender's cgroup, as systemd does it.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt};

use crate::daemon::kernel::Kernel;
use crate::daemon::listen::bind;
use crate::services::files::Settled;
use baton_sdk::descriptor;
use baton_sdk::files::UNNAMED;

/// Where programs that `baton run` starts send their notices.
pub const SOCKET: &str = "/run/baton/notify";
/// The longest notice, as systemd has it (`NOTIFY_BUFFER_MAX`).
const MAX_NOTICE: usize = 4096;
/// The most descriptors of one notice: the kernel's limit, `SCM_MAX_FD`.
const MAX_DESCRIPTORS: usize = 253;

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
    let socket = bind(Path::new(SOCKET), 0o666, |path| UnixDatagram::bind(path))?;
    setsockopt(&socket, sockopt::PassCred, &true)?;
    thread::Builder::new().name("notices".into()).spawn(move || {
        loop {
            match receive(&socket) {
                Ok((notice, sender, files)) => hear(&kernel, &notice, sender, files),
                Err(error) => tracing::warn!("a notice cannot be read: {error}"),
            }
        }
    })?;
    Ok(())
}

fn receive(socket: &UnixDatagram) -> io::Result<(Vec<u8>, Option<i32>, Vec<OwnedFd>)> {
    let mut buffer = [0; MAX_NOTICE];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS], UnixCredentials);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(Errno::EINTR) => {}
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
    let (len, cut) = (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
    if cut {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it is longer than {MAX_NOTICE} bytes")));
    }
    Ok((buffer[..len].to_vec(), sender, files))
}

/// Nobody waits for an answer: what is refused stands in the log, with the name of who asked.
fn hear(kernel: &Kernel, notice: &[u8], sender: Option<i32>, files: Vec<OwnedFd>) {
    let wish = wish_of(notice);
    if wish == Wish::Nothing {
        return;
    }
    let Some(service) = sender.and_then(|pid| kernel.files.program_of(pid)) else {
        tracing::warn!("process {sender:?} wants files kept, and is no program that `baton run` started");
        return;
    };
    let device = match kernel.device() {
        Ok(device) => device,
        Err(error) => return tracing::warn!("{service}: nothing can be kept: {error:#}"),
    };
    let refused = |name: &str, what: &str, error: anyhow::Error| {
        let why = format!("{service}: file {name:?} is not {what}: {error:#}");
        tracing::warn!("{why}");
        if error.is::<Settled>() {
            kernel.files.miss(why);
        }
    };
    match wish {
        Wish::Nothing => {}
        Wish::Forget { name } => match kernel.files.forget(device, &service, &name) {
            Ok(count) => tracing::info!(service, name, count, "forgotten"),
            Err(error) => refused(&name, "forgotten", error),
        },
        Wish::Keep { name } => {
            for file in files {
                if let Err(error) = kernel.keep_file(&service, &name, file) {
                    refused(&name, "kept", error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
