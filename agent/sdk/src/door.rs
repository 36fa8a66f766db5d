//! Where a service finds an agent again after its own has gone: the folder of the agent's socket is watched, so that nobody
//! has to ask now and then, and what tells of it is one descriptor for as long as the service lives.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Readable when there is something to read of an agent, or when one may have come.
#[derive(Debug)]
pub(super) struct Events(Epoll);

impl Events {
    /// Of this socket.
    pub(super) fn of(socket: &UnixStream) -> nix::Result<Events> {
        let events = Events(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        events.add(socket.as_fd())?;
        Ok(events)
    }

    /// Of this one, too.
    pub(super) fn add(&self, fd: BorrowedFd<'_>) -> nix::Result<()> {
        self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))
    }

    /// No longer of this one. Closing it would not do where a child of the service has a copy.
    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        // One that is not there is what was wanted.
        let _ = self.0.delete(fd);
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

/// The agent's socket, by its path.
#[derive(Debug)]
pub(super) struct Door {
    path: PathBuf,
    watch: Option<Inotify>,
}

impl Door {
    /// The door at which somebody answered.
    pub(super) fn new(path: PathBuf) -> Door {
        Door { path, watch: None }
    }

    /// Watches for somebody else to come; says whether one may be there already.
    ///
    /// # Errors
    /// As inotify_init(2) and inotify_add_watch(2).
    pub(super) fn watch(&mut self, events: &Events) -> nix::Result<bool> {
        if self.watch.is_some() {
            return Ok(false);
        }
        let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // An agent makes its socket, listens, and then lets in whom it may concern.
        let folder = self.path.parent().unwrap_or(&self.path);
        watch.add_watch(folder, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ATTRIB)?;
        events.add(watch.as_fd())?;
        self.watch = Some(watch);
        Ok(true)
    }

    /// Whether something has happened at the door since it was last asked.
    pub(super) fn has_moved(&self) -> bool {
        let mut moved = false;
        while let Some(Ok(happened)) = self.watch.as_ref().map(Inotify::read_events) {
            // One without a name tells that others were lost.
            moved |=
                happened.iter().any(|event| event.name.is_none() || event.name.as_deref() == self.path.file_name());
        }
        moved
    }

    /// Connects to whom is there now.
    pub(super) fn knock(&self) -> std::io::Result<UnixStream> {
        let socket = UnixStream::connect(&self.path)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Nobody else needs to come.
    pub(super) fn leave(&mut self, events: &Events) {
        if let Some(watch) = self.watch.take() {
            events.remove(watch.as_fd());
        }
    }
}
