//! Sockets that others find by their path, and who may come in at them.
//!
//! The control socket, which `batond` binds first, is what tells two daemons from each other ([`crate::daemon`]); what a dead
//! one has left at any other path is replaced.
//!
//! All stream sockets are served in one way ([`serve`]): a thread of the socket's own lets in whom the kernel says it is
//! (SO_PEERCRED) and hears everybody's first word. Only who has said it gets a thread to be answered in. So those who connect
//! and say nothing cost a descriptor each, as many as [`Limits::silent`]; one more takes the place of the one that has been
//! silent longest, of the user who has most of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result};
use baton_sdk::protocol::{Inbox, timeout};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use serde::de::DeserializeOwned;

/// How long accepting rests when there is no descriptor left for whoever comes.
const REST: Duration = Duration::from_millis(100);
/// How many are let in before those who have spoken are heard.
const BATCH: usize = 32;
/// One in so many of all descriptors may be a silent caller's of one socket.
const PART: usize = 16;

/// Listens at a path, for whom `mode` lets in.
pub fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    bind(path, mode, |path| UnixListener::bind(path))
}

/// Listens at a path for root and, if there is this group, for its members.
pub fn listen_for_group(path: &Path, group: Option<u32>) -> Result<UnixListener> {
    let Some(group) = group else { return listen(path, 0o600) };
    let listener = listen(path, 0o600)?;
    chown(path, None, Some(group)).with_context(|| format!("cannot give {} to its group", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Binds any socket at a path.
pub fn bind<S>(path: &Path, mode: u32, bind: impl FnOnce(&Path) -> io::Result<S>) -> Result<S> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let socket = bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(socket)
}

/// Who is at the other end of a connection, by the kernel's word: who they were when they connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The process.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
}

impl Peer {
    fn of(socket: &UnixStream) -> Result<Peer> {
        let peer = getsockopt(socket, sockopt::PeerCredentials).context("the kernel does not say who it is")?;
        Ok(Peer { pid: peer.pid(), uid: peer.uid() })
    }

    /// Whether it is root.
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }
}

/// How much a socket's callers may have of batond.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections that have not said their first word.
    pub silent: usize,
    /// How long a first word may take.
    pub patience: Duration,
    /// Most callers that are answered at the same time.
    pub answered: usize,
    /// And of these, most of one user who is not root.
    pub answered_of_user: usize,
}

impl Limits {
    /// What all sockets have, where there are descriptors enough ([`Limits::usual`]).
    const USUAL: Limits = Limits { silent: 64, patience: Duration::from_secs(20), answered: 256, answered_of_user: 8 };

    /// What all sockets have: those who say nothing never have more than a part of this process's descriptors.
    pub fn usual() -> Limits {
        let text = fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let most = descriptors(&text).map_or(Limits::USUAL.silent, |all| all / PART);
        Limits { silent: Limits::USUAL.silent.min(most).max(1), ..Limits::USUAL }
    }
}

/// How many descriptors a process may have (proc_pid_limits(5)); nothing where there is no limit.
fn descriptors(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// A connection up to its first word.
pub trait Caller: AsFd + Sized + Send + 'static {
    /// One that has just come.
    fn new(socket: UnixStream) -> Result<Self>;
    /// Whether the first word has come as a whole; never waits.
    fn has_spoken(&mut self) -> Result<bool>;
}

/// A caller whose first word is a frame of the SDK's.
#[derive(Debug)]
pub struct Asker<A> {
    /// The connection, non-blocking.
    pub socket: UnixStream,
    /// What came beside the frame.
    pub inbox: Inbox,
    ask: Option<A>,
}

impl<A> Asker<A> {
    /// What it said.
    pub fn take(&mut self) -> Result<A> {
        self.ask.take().context("nothing was asked")
    }
}

impl<A> AsFd for Asker<A> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<A: DeserializeOwned + Send + 'static> Caller for Asker<A> {
    fn new(socket: UnixStream) -> Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Asker { socket, inbox: Inbox::default(), ask: None })
    }

    fn has_spoken(&mut self) -> Result<bool> {
        self.ask = self.inbox.poll(self.socket.as_fd())?;
        Ok(self.ask.is_some())
    }
}

/// One that has not said anything yet.
struct Silent<C> {
    peer: Peer,
    since: Instant,
    caller: C,
}

/// Who has to go so that another may come: the one that has been silent longest, of the user who has most of them.
fn longest_of_most<C>(silent: &[Silent<C>]) -> Option<usize> {
    let mut of_user = BTreeMap::<u32, usize>::new();
    silent.iter().for_each(|one| *of_user.entry(one.peer.uid).or_default() += 1);
    let (most, _) = of_user.into_iter().max_by_key(|(_, count)| *count)?;
    // They are in the order in which they came.
    silent.iter().position(|one| one.peer.uid == most)
}

/// How many of each user are being answered.
#[derive(Debug, Default)]
struct Answered(Mutex<BTreeMap<u32, usize>>);

impl Answered {
    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<u32, usize>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A place for one more, until what is given back is dropped.
    fn begin(self: &Arc<Self>, peer: Peer, limits: &Limits) -> Option<Place> {
        self.change(|of_user| {
            let own = of_user.get(&peer.uid).copied().unwrap_or(0);
            let all: usize = of_user.values().sum();
            let fits = all < limits.answered && (peer.is_root() || own < limits.answered_of_user);
            fits.then(|| of_user.insert(peer.uid, own + 1))
        })?;
        Some(Place { answered: self.clone(), uid: peer.uid })
    }
}

/// One of the [`Answered`].
struct Place {
    answered: Arc<Answered>,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.answered.change(|of_user| {
            if let Some(count) = of_user.get_mut(&self.uid) {
                *count -= 1;
                if *count == 0 {
                    of_user.remove(&self.uid);
                }
            }
        });
    }
}

/// What the log is told of callers that get nothing: not more of it than a line a second, however many there are.
#[derive(Debug)]
struct Complaints {
    name: &'static str,
    /// When one was told, and how many were not since.
    last: Mutex<(Option<Instant>, u64)>,
}

impl Complaints {
    const APART: Duration = Duration::from_secs(1);

    fn tell(&self, peer: Peer, what: impl std::fmt::Display) {
        let Peer { pid, uid } = peer;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match *last {
            (Some(before), untold) if now.saturating_duration_since(before) < Self::APART => last.1 = untold + 1,
            (_, untold) => {
                *last = (Some(now), 0);
                let more = if untold > 0 { format!(" ({untold} more like it were not told)") } else { String::new() };
                tracing::warn!("{}: process {pid} of user {uid}: {what}{more}", self.name);
            }
        }
    }
}

/// A socket, its callers that are still silent, and what is done for those who are not.
struct Doorkeeper<C, L, A> {
    name: &'static str,
    listener: UnixListener,
    limits: Limits,
    silent: Vec<Silent<C>>,
    answered: Arc<Answered>,
    /// Given up so that somebody can be let in when there is no descriptor left, and had again as soon as there is one.
    reserve: Option<File>,
    /// Nobody could be let in when it was last tried, and that has been said.
    full: bool,
    complaints: Arc<Complaints>,
    lets_in: L,
    answer: Arc<A>,
}

/// Serves a socket, in threads of its own, as long as the program runs. `lets_in` says who may speak at all; `answer` does
/// what is asked, in a thread for each caller.
pub fn serve<C: Caller>(
    name: &'static str,
    listener: UnixListener,
    limits: Limits,
    lets_in: impl Fn(Peer) -> bool + Send + 'static,
    answer: impl Fn(Peer, C) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    listener.set_nonblocking(true)?;
    let (silent, answered) = (Vec::new(), Arc::default());
    let answer = Arc::new(answer);
    let complaints = Arc::new(Complaints { name, last: Mutex::default() });
    let mut doorkeeper = Doorkeeper {
        name,
        listener,
        limits,
        silent,
        answered,
        reserve: None,
        full: false,
        complaints,
        lets_in,
        answer,
    };
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let mut listens = true;
        loop {
            listens = doorkeeper.turn(listens);
        }
    })?;
    Ok(())
}

impl<C, L, A> Doorkeeper<C, L, A>
where
    C: Caller,
    L: Fn(Peer) -> bool,
    A: Fn(Peer, C) -> Result<()> + Send + Sync + 'static,
{
    /// Waits until something happens, and deals with it; says whether it can go on letting people in at once.
    fn turn(&mut self, listens: bool) -> bool {
        if self.reserve.is_none() {
            self.reserve = File::open("/dev/null").ok();
        }
        let rests = (!listens).then(|| Instant::now() + REST);
        let expiry = self.silent.first().map(|oldest| oldest.since + self.limits.patience);
        let deadline = rests.into_iter().chain(expiry).min();
        let mut polled = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        polled.extend(self.silent.iter().map(|one| PollFd::new(one.caller.as_fd(), PollFlags::POLLIN)));
        let skipped = usize::from(!listens);
        if let Err(error) = poll(&mut polled[skipped..], timeout(deadline)) {
            if error != Errno::EINTR {
                tracing::warn!("{}: cannot wait for callers: {error}", self.name);
                thread::sleep(REST);
            }
            return true;
        }
        let mut told = polled.iter().map(|fd| fd.any().unwrap_or(false));
        let comes = told.next().unwrap_or(false) || !listens;
        let speaks: Vec<bool> = told.collect();
        let mut speaks = speaks.into_iter();
        let (speaking, silent) =
            std::mem::take(&mut self.silent).into_iter().partition(|_| speaks.next().unwrap_or(false));
        self.silent = silent;
        for one in speaking {
            self.hear(one);
        }
        let now = Instant::now();
        let patience = self.limits.patience;
        self.silent.retain(|one| now.saturating_duration_since(one.since) < patience);
        !comes || self.let_in()
    }

    /// Lets in who is there; says whether there was a descriptor for each.
    fn let_in(&mut self) -> bool {
        for _ in 0..BATCH {
            // Without a descriptor accept(2) fails also where nobody waits, and nobody would have to go for that.
            if !self.somebody_waits() {
                return true;
            }
            match self.listener.accept() {
                Ok((socket, _)) => {
                    self.full = false;
                    self.greet(socket);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {
                        // A descriptor for the one who comes: that of a caller who has said nothing yet, else the one kept in reserve.
                        if let Some(longest) = longest_of_most(&self.silent) {
                            self.silent.remove(longest);
                        } else if self.reserve.take().is_none() {
                            if !std::mem::replace(&mut self.full, true) {
                                tracing::warn!("{}: nobody can be let in for now: {error}", self.name);
                            }
                            return false;
                        }
                    }
                    // Who was about to come has gone.
                    _ => tracing::debug!("{}: {error}", self.name),
                },
            }
        }
        true
    }

    fn somebody_waits(&self) -> bool {
        let mut polled = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        // Where poll(2) fails, accept(2) is tried: its error is the one that counts.
        poll(&mut polled, PollTimeout::ZERO).map_or(true, |found| found > 0)
    }

    fn greet(&mut self, socket: UnixStream) {
        let greeted = Peer::of(&socket).and_then(|peer| Ok((peer, C::new(socket)?)));
        let (peer, caller) = match greeted {
            Ok(greeted) => greeted,
            Err(error) => return tracing::warn!("{}: a caller is not let in: {error:#}", self.name),
        };
        if !(self.lets_in)(peer) {
            return self.complaints.tell(peer, "it may not ask here");
        }
        // Whoever means it has spoken already, and is never the one who has to go.
        self.hear(Silent { peer, since: Instant::now(), caller });
        if self.silent.len() > self.limits.silent
            && let Some(longest) = longest_of_most(&self.silent)
        {
            let Peer { pid, uid } = self.silent.remove(longest).peer;
            tracing::debug!("{}: process {pid} of user {uid} was silent for too long", self.name);
        }
    }

    fn hear(&mut self, mut one: Silent<C>) {
        let Peer { pid, uid } = one.peer;
        match one.caller.has_spoken() {
            Ok(false) => {
                let at = self.silent.partition_point(|other| other.since <= one.since);
                self.silent.insert(at, one);
            }
            Ok(true) => {
                let Some(place) = self.answered.begin(one.peer, &self.limits) else {
                    return self.complaints.tell(one.peer, "it is not answered, because too many others are");
                };
                let (answer, complaints) = (self.answer.clone(), self.complaints.clone());
                let begun = thread::Builder::new().name(self.name.to_owned()).spawn(move || {
                    if let Err(error) = answer(one.peer, one.caller) {
                        complaints.tell(one.peer, format_args!("{error:#}"));
                    }
                    drop(place);
                });
                if let Err(error) = begun {
                    self.complaints.tell(one.peer, format_args!("it cannot be answered: {error}"));
                }
            }
            Err(error) => tracing::debug!("{}: process {pid} of user {uid}: {error:#}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// A caller who says one byte.
    struct Byte(UnixStream, u8);

    impl AsFd for Byte {
        fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    impl Caller for Byte {
        fn new(socket: UnixStream) -> Result<Self> {
            socket.set_nonblocking(true)?;
            Ok(Byte(socket, 0))
        }

        fn has_spoken(&mut self) -> Result<bool> {
            let mut byte = [0];
            match self.0.read(&mut byte) {
                Ok(0) => anyhow::bail!("gone"),
                Ok(_) => self.1 = byte[0],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            Ok(true)
        }
    }

    fn echo(_: Peer, mut caller: Byte) -> Result<()> {
        Ok(caller.0.write_all(&[caller.1])?)
    }

    fn ask(path: &Path) -> Option<u8> {
        let mut socket = UnixStream::connect(path).ok()?;
        socket.write_all(&[7]).ok()?;
        let mut answer = [0];
        socket.read_exact(&mut answer).ok().map(|()| answer[0])
    }

    #[test]
    fn five_thousand_who_say_nothing_keep_nobody_from_being_answered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let limits = Limits { silent: 16, ..Limits::USUAL };
        serve("test", listen(&path, 0o600).unwrap(), limits, |_| true, echo).unwrap();
        let mut held = std::collections::VecDeque::new();
        for n in 0..5000 {
            held.push_back(UnixStream::connect(&path).unwrap());
            if held.len() > 100 {
                held.pop_front();
            }
            if n % 500 == 0 {
                assert_eq!(ask(&path), Some(7), "after {n}");
            }
        }
        assert_eq!(ask(&path), Some(7));
        // Those that had to go are told so; the last ones are still welcome to speak.
        let mut last = held.pop_back().unwrap();
        last.write_all(&[9]).unwrap();
        let mut answer = [0];
        last.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [9]);
        assert_eq!(held[0].read(&mut answer).unwrap_or(0), 0);
    }

    #[test]
    fn who_is_not_let_in_is_closed_before_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let own = nix::unistd::geteuid().as_raw();
        serve("test", listen(&path, 0o600).unwrap(), Limits::USUAL, move |peer| peer.uid != own, echo).unwrap();
        let mut socket = UnixStream::connect(&path).unwrap();
        assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_user_with_most_silent_callers_loses_the_oldest_of_his() {
        let silent = |uid| Silent { peer: Peer { pid: 1, uid }, since: Instant::now(), caller: () };
        let users = |uids: &[u32]| uids.iter().map(|uid| silent(*uid)).collect::<Vec<_>>();
        assert_eq!(longest_of_most(&users(&[0, 7, 7, 0, 7])), Some(1));
        assert_eq!(longest_of_most(&users(&[0])), Some(0));
        assert_eq!(longest_of_most(&users(&[])), None);
    }

    #[test]
    fn silent_callers_never_have_most_descriptors() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(descriptors(limits), Some(1024));
        assert_eq!(descriptors("Max open files            unlimited            unlimited            files"), None);
        assert!((1..=64).contains(&Limits::usual().silent));
    }

    #[test]
    fn one_user_does_not_take_all_places() {
        let limits = Limits { answered: 10, answered_of_user: 3, ..Limits::USUAL };
        let answered = Arc::new(Answered::default());
        let (root, user) = (Peer { pid: 1, uid: 0 }, Peer { pid: 2, uid: 7 });
        let mut places: Vec<_> = (0..3).map(|_| answered.begin(user, &limits).unwrap()).collect();
        assert!(answered.begin(user, &limits).is_none());
        places.extend((0..7).map(|_| answered.begin(root, &limits).unwrap()));
        assert!(answered.begin(root, &limits).is_none(), "ten in all");
        places.clear();
        assert!(answered.change(|of_user| of_user.is_empty()));
    }
}
