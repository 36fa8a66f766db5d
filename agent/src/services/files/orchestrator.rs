//! The Live Update Orchestrator's calls (include/uapi/linux/liveupdate.h), answered for programs that `baton run --liveupdate` started: what they
//! put into a session crosses with Baton's updates, on a kernel with an orchestrator or without one.
//!
//! A kernel's own sessions do not: it writes them down only inside reboot(LINUX_REBOOT_CMD_KEXEC) (`liveupdate_reboot`), which never comes.
//! So the program's calls are diverted ([`crate::machine::sys::seccomp`]), and its memfds are kept as files of sessions
//! ([`super::sessions`]). A successor with an orchestrator gives them back itself; on any other the calls that retrieve
//! are answered here too.
//!
//! ```text
//! ioctl(/dev/liveupdate, CREATE_SESSION)   a pipe's end: closed by all who have it, it is a session given up
//! ioctl(session, PRESERVE_FD)              the file is kept, as luo/TOKEN/SESSION
//! ioctl(/dev/liveupdate, RETRIEVE_SESSION) the kernel's answer where it has an orchestrator, else what a predecessor left
//! ioctl(session, RETRIEVE_FD, FINISH)      the kernel's, for its sessions
//! ```
//! Where this differs from the kernel: the device may be open more than once, only memfds are taken, their file position starts at 0
//! again, and names have printable ASCII characters without a colon.

use std::fs::{self, File, Metadata};
use std::io::{self, IoSlice, IoSliceMut, PipeReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::Settled;
use super::sessions::{MAX_SESSION, Place};
use crate::daemon::kernel::Kernel;
use crate::daemon::outcome::Failure;
use crate::machine::liveupdate::DEVICE;
use crate::machine::sys::seccomp::{self, Answer, Notice};

/// `LIVEUPDATE_IOCTL_TYPE`
pub const IOCTLS: u8 = 0xba;
/// Most sessions of one program: each is a descriptor of batond's.
const MAX_SESSIONS: usize = 128;
/// Largest argument that is looked at.
const MAX_ARGUMENT: usize = 256;
/// Where a structure has its descriptor, a session's name, a file's token.
const DESCRIPTOR_AT: u64 = 4;
const NAME_AT: usize = 8;

/// Listens to a program, in a thread of its own, until nothing of it is left.
pub fn start(kernel: Arc<Kernel>, service: String, listener: OwnedFd) -> Result<()> {
    // Without an orchestrator there is no device to open; what is done with it never reaches the file.
    if !Path::new(DEVICE).exists() {
        File::create(DEVICE).with_context(|| format!("cannot make {DEVICE}"))?;
    }
    let mut program = Program { kernel, service, listener, sessions: Vec::new() };
    std::thread::Builder::new().name("sessions".into()).spawn(move || {
        if let Err(error) = program.serve() {
            tracing::warn!("{}: its sessions are no longer heard: {error:#}", program.service);
        }
    })?;
    Ok(())
}

/// A session that a program has open.
struct Session {
    name: String,
    /// Ends when the program has closed its end.
    end: PipeReader,
    /// By which its end is recognised.
    identity: (u64, u64),
    /// It comes from a predecessor.
    incoming: bool,
}

struct Program {
    kernel: Arc<Kernel>,
    service: String,
    listener: OwnedFd,
    sessions: Vec<Session>,
}

/// A call, and the words it is answered from.
struct Call<'p> {
    listener: BorrowedFd<'p>,
    notice: Notice,
}

impl Call<'_> {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.notice.thread.cast_signed())
    }

    /// A descriptor of the caller's, by the name that the kernel gives it.
    fn descriptor(&self, number: i32) -> PathBuf {
        format!("/proc/{}/fd/{number}", self.notice.thread).into()
    }

    /// The structure that the call names, whose first word is its size (`copy_struct_from_user`).
    fn argument<const N: usize>(&self) -> Result<[u8; N], Errno> {
        let at = self.notice.arguments[2];
        let size = u32::from_le_bytes(self.read(at)?) as usize;
        if size < N {
            return Err(Errno::EINVAL);
        }
        if size > MAX_ARGUMENT {
            return Err(Errno::E2BIG);
        }
        for beyond in N..size {
            if self.read::<1>(at.wrapping_add(beyond as u64))? != [0] {
                return Err(Errno::E2BIG);
            }
        }
        self.read(at)
    }

    fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        let from = RemoteIoVec { base: usize::try_from(at).map_err(|_| Errno::EFAULT)?, len: N };
        match process_vm_readv(self.pid(), &mut [IoSliceMut::new(&mut bytes)], &[from]) {
            Ok(read) if read == N && seccomp::is_valid(self.listener, self.notice.id) => Ok(bytes),
            _ => Err(Errno::EFAULT),
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let at = self.notice.arguments[2].wrapping_add(offset);
        let to = RemoteIoVec { base: usize::try_from(at).map_err(|_| Errno::EFAULT)?, len: bytes.len() };
        match process_vm_writev(self.pid(), &[IoSlice::new(bytes)], &[to]) {
            Ok(written) if written == bytes.len() => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }

    /// Gives the caller a descriptor, and says so in the structure.
    fn give(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let given = seccomp::give(self.listener, self.notice.id, file);
        let number = given.map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))?;
        self.write(DESCRIPTOR_AT, &number.to_le_bytes())
    }
}

impl Program {
    fn serve(&mut self) -> Result<()> {
        loop {
            let mut ready = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            ready.extend(self.sessions.iter().map(|session| PollFd::new(session.end.as_fd(), PollFlags::empty())));
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let told: Vec<_> = ready.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
            let closed: Vec<bool> = told[1..].iter().map(|flags| flags.contains(PollFlags::POLLHUP)).collect();
            let mut closed = closed.into_iter();
            let gone: Vec<_> = self.sessions.extract_if(.., |_| closed.next() == Some(true)).collect();
            gone.iter().for_each(|session| self.give_up(session));
            if told[0].contains(PollFlags::POLLIN) {
                self.hear()?;
            } else if told[0].contains(PollFlags::POLLHUP) {
                return Ok(()); // its last process has ended, and with it every session was closed
            }
        }
    }

    fn hear(&mut self) -> Result<()> {
        let notice = match seccomp::receive(self.listener.as_fd()) {
            // A signal came first: the caller asks again.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        let opened = self.sessions.len();
        let listener = self.listener.try_clone()?;
        let call = Call { listener: listener.as_fd(), notice };
        let answer = self.carry_out(&call).unwrap_or_else(|error| Answer::Failed(error as i32));
        if let Err(error) = seccomp::answer(listener.as_fd(), notice.id, answer) {
            // It does not know of the session that it was given, and asks again.
            if let Some(unheard) = self.sessions.get(opened).filter(|_| error.raw_os_error() == Some(libc::ENOENT)) {
                self.give_up(unheard);
                self.sessions.truncate(opened);
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, call: &Call<'_>) -> Result<Answer, Errno> {
        let path = call.descriptor(call.notice.arguments[0] as i32);
        let Ok(meta) = fs::metadata(&path) else { return Ok(Answer::GoOn) };
        let of_session = self.sessions.iter().position(|session| session.identity == identity(&meta));
        let is_device = fs::read_link(&path).is_ok_and(|link| link == Path::new(DEVICE));
        match (call.notice.arguments[1] & 0xff, of_session) {
            (0x00, None) if is_device => self.create(call),
            // A kernel that has an orchestrator knows what it was handed over.
            (0x01, None) if is_device && !meta.file_type().is_char_device() => self.retrieve(call),
            (0x40, Some(at)) => self.preserve(at, call),
            (0x41, Some(at)) => self.retrieve_file(at, call),
            (0x42, Some(at)) => self.finish(at, call),
            (0x43, Some(at)) => self.name(at, call),
            _ => Ok(Answer::GoOn),
        }
    }

    fn open_session(&mut self, call: &Call<'_>, name: &str, incoming: bool) -> Result<Answer, Errno> {
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Errno::ENOSPC);
        }
        let (end, theirs) = io::pipe().map_err(|_| Errno::EMFILE)?;
        let copy = end.try_clone().map_err(|_| Errno::EMFILE)?;
        let meta = File::from(OwnedFd::from(copy)).metadata().map_err(|_| Errno::EIO)?;
        call.give(theirs.as_fd())?;
        self.sessions.push(Session { name: name.to_owned(), end, identity: identity(&meta), incoming });
        Ok(Answer::Done)
    }

    fn create(&mut self, call: &Call<'_>) -> Result<Answer, Errno> {
        let name = name_in(&call.argument::<72>()?)?;
        let itself = Place { session: &name, token: None }.name();
        if self.sessions.iter().any(|session| session.name == name) {
            return Err(Errno::EEXIST);
        }
        let mark = memfd_create("session", MFdFlags::MFD_CLOEXEC)?;
        File::from(mark.try_clone().map_err(|_| Errno::EMFILE)?).set_len(1).map_err(|_| Errno::ENOMEM)?;
        self.keep(&itself, mark)?;
        self.open_session(call, &name, false).inspect_err(|_| self.forget(&itself))
    }

    fn retrieve(&mut self, call: &Call<'_>) -> Result<Answer, Errno> {
        let name = name_in(&call.argument::<72>()?)?;
        let itself = Place { session: &name, token: None }.name();
        match self.sessions.iter().any(|session| session.name == name) {
            true => Err(Errno::EINVAL),
            false if self.kernel.files.was_left(&self.service, &itself) => self.open_session(call, &name, true),
            false => Err(Errno::ENOENT),
        }
    }

    fn preserve(&self, at: usize, call: &Call<'_>) -> Result<Answer, Errno> {
        let argument = call.argument::<16>()?;
        let session = &self.sessions[at];
        let path = call.descriptor(i32::from_le_bytes(argument[4..8].try_into().expect("four bytes")));
        let link = fs::read_link(&path).map_err(|_| Errno::EBADF)?;
        if session.incoming {
            return Err(Errno::EINVAL);
        }
        // As a kernel that knows nobody who could preserve such a file; opened again, it might do anything.
        if !link.to_string_lossy().starts_with("/memfd:") {
            return Err(Errno::ENOENT);
        }
        let file = File::options().read(true).write(true).open(&path).map_err(|_| Errno::EBADF)?;
        self.keep(&place(session, &argument).name(), file.into())?;
        Ok(Answer::Done)
    }

    fn retrieve_file(&self, at: usize, call: &Call<'_>) -> Result<Answer, Errno> {
        let argument = call.argument::<16>()?;
        let session = &self.sessions[at];
        let wanted = place(session, &argument).name();
        let files = self.kernel.files.of(&self.service).map_err(|_| Errno::EIO)?;
        let found = files.iter().find(|(name, _)| *name == wanted).filter(|_| session.incoming);
        call.give(found.ok_or(Errno::ENOENT)?.1.as_fd())?;
        Ok(Answer::Done)
    }

    fn finish(&mut self, at: usize, call: &Call<'_>) -> Result<Answer, Errno> {
        call.argument::<8>()?;
        if !self.sessions[at].incoming {
            return Err(Errno::EINVAL);
        }
        self.give_up(&self.sessions[at]);
        Ok(Answer::Done)
    }

    fn name(&self, at: usize, call: &Call<'_>) -> Result<Answer, Errno> {
        call.argument::<72>()?;
        let mut name = [0; MAX_SESSION + 1];
        let known = self.sessions[at].name.as_bytes();
        name[..known.len()].copy_from_slice(known);
        call.write(NAME_AT as u64, &name)?;
        Ok(Answer::Done)
    }

    fn keep(&self, name: &str, file: OwnedFd) -> Result<(), Errno> {
        self.kernel.keep_file(&self.service, name, file).map_err(|error| {
            tracing::warn!("{}: {name} is not kept: {error:#}", self.service);
            match error {
                error if error.is::<Settled>() => Errno::EBUSY,
                error if error.is::<Failure>() => Errno::ENOMEM,
                _ => Errno::EINVAL,
            }
        })
    }

    /// All of a session, whose program has closed it or is done with it.
    fn give_up(&self, session: &Session) {
        let files = self.kernel.files.of(&self.service).unwrap_or_default();
        let is_its = |name: &str| Place::of(name).is_some_and(|place| place.session == session.name);
        files.iter().map(|(name, _)| name).filter(|name| is_its(name)).for_each(|name| self.forget(name));
    }

    fn forget(&self, name: &str) {
        let gone = self.kernel.device().and_then(|device| self.kernel.files.forget(device, &self.service, name));
        if let Err(error) = gone {
            let why = format!("{}: {name} is not forgotten: {error:#}", self.service);
            tracing::warn!("{why}");
            if error.is::<Settled>() {
                self.kernel.files.miss(why);
            }
        }
    }
}

fn identity(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// A session's name, up to its first zero (`strscpy`).
fn name_in(argument: &[u8; 72]) -> Result<String, Errno> {
    let field = &argument[NAME_AT..];
    let name = &field[..field.iter().position(|byte| *byte == 0).unwrap_or(MAX_SESSION)];
    let name = std::str::from_utf8(name).map_err(|_| Errno::EINVAL)?;
    let place = Place { session: name, token: None }.name();
    let fits = baton_sdk::files::check_name(&place).is_ok() && super::sessions::check(&place).is_ok();
    if fits { Ok(name.to_owned()) } else { Err(Errno::EINVAL) }
}

fn place<'s>(session: &'s Session, argument: &[u8; 16]) -> Place<'s> {
    let token = u64::from_le_bytes(argument[8..].try_into().expect("eight bytes"));
    Place { session: &session.name, token: Some(token) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argument(name: &[u8]) -> [u8; 72] {
        let mut bytes = [0; 72];
        bytes[NAME_AT..NAME_AT + name.len()].copy_from_slice(name);
        bytes
    }

    #[test]
    fn a_session_has_a_name_that_can_cross() {
        assert_eq!(name_in(&argument(b"kexec_simple_state\0rest")).unwrap(), "kexec_simple_state");
        assert_eq!(name_in(&argument(&[b'x'; 64])).unwrap().len(), MAX_SESSION, "cut, as the kernel does it");
        for bad in [&b""[..], b"baton", b"a:b", b"a\n", b"\xff"] {
            assert_eq!(name_in(&argument(bad)), Err(Errno::EINVAL), "{bad:?}");
        }
    }
}
