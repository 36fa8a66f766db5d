//! A place to run the tree's programs in, that cannot be left behind.
//!
//! A thread gets a mount namespace of its own (and, if wanted, a network namespace), in which the tree is read-only and has `/proc`,
//! `/dev`, a fresh `/tmp` and the caller's folder at `/mnt`. Nothing of it has a name outside: mounts, bridge and TAPs last as long as
//! this thread and the programs that it started, and those are killed by the host's kernel when the thread ends (`host::leashed`). So
//! ^C, a panic, SIGTERM and kill -9 all leave the host as it was, without a handler, and there is nothing to clean at the next start.

use std::any::Any;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::error::{Doing, LabError, Result};
use super::host;
use super::tree::Tree;

type Job = Box<dyn FnOnce() + Send>;

/// A thread in namespaces of its own; dropped, it takes everything with it.
#[derive(Debug)]
pub struct Inside {
    tree: Tree,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// A way into the network namespace for other threads; keeps the namespace alive.
#[derive(Clone, Debug)]
pub struct Door(Arc<File>);

impl Door {
    /// The way into the network of a process: of another lab's machine, say.
    pub fn of_process(pid: u32) -> Result<Self> {
        let namespace = format!("/proc/{pid}/ns/net");
        File::open(&namespace).map(|file| Self(Arc::new(file))).doing(format_args!("opening {namespace}"))
    }

    /// Moves the calling thread into the namespace, for good. Sockets stay in the namespace in which they were made, so a thread that
    /// only needs a socket is better served by [`Inside::run`].
    pub fn enter(&self) -> Result<()> {
        setns(&*self.0, CloneFlags::CLONE_NEWNET).doing("entering the lab's network namespace")
    }

    /// A connection made inside the namespace; the stream may be used from anywhere.
    pub fn connect(&self, address: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
        let attempt = self.spawn("connect", move || TcpStream::connect_timeout(&address, patience));
        let ended = attempt.map_err(io::Error::other)?.join().unwrap_or_else(|panic| resume_unwind(panic));
        ended.map_err(io::Error::other)?
    }

    /// A thread inside the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let door = self.clone();
        let body = move || {
            door.enter()?;
            Ok(work())
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(body).doing("starting a thread")
    }
}

impl Inside {
    /// The host's network stays visible: for compilers.
    pub fn with_host_network(tree: &Tree, folder: &Path) -> Result<Self> {
        Self::new(tree, folder, CloneFlags::CLONE_NEWNS)
    }

    /// An empty network namespace, and the way into it: for machines and their clients.
    pub fn with_own_network(tree: &Tree, folder: &Path) -> Result<(Self, Door)> {
        let inside = Self::new(tree, folder, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
        let namespace = inside.run(|| File::open("/proc/thread-self/ns/net")).doing("opening the network namespace")?;
        Ok((inside, Door(Arc::new(namespace))))
    }

    fn new(tree: &Tree, folder: &Path, namespaces: CloneFlags) -> Result<Self> {
        if !host::is_root() {
            return Err(LabError::Prerequisite(
                "machines need root (mounts, TAPs): run this under `sudo -E env PATH=$PATH`".into(),
            ));
        }
        let (jobs, inbox) = channel::<Job>();
        let (ready, readiness) = channel();
        let (root, folder) = (tree.root().to_owned(), folder.to_owned());
        let body = move || {
            let settled = settle(&root, &folder, namespaces);
            let go_on = settled.is_ok();
            // The receiver waits for exactly this message.
            let _ = ready.send(settled);
            if go_on {
                inbox.iter().for_each(|job| job());
            }
        };
        let thread = std::thread::Builder::new().name("inside".into()).spawn(body).doing("starting a thread")?;
        readiness.recv().map_err(std::io::Error::other).doing("setting up namespaces")??;
        Ok(Self { tree: tree.clone(), jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs a closure in there and waits for it. One at a time: nothing long belongs here.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (send, receive) = channel::<std::result::Result<T, Box<dyn Any + Send>>>();
        let job: Job = Box::new(move || {
            // The receiver waits for exactly this message.
            let _ = send.send(catch_unwind(AssertUnwindSafe(work)));
        });
        let jobs = self.jobs.as_ref().expect("jobs are taken only by drop");
        jobs.send(job).expect("the thread ends only when the sender is gone");
        receive.recv().expect("every job answers").unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Starts a program in there. It is killed when this value goes.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let name = format!("{command:?}");
        self.run(move || command.spawn()).doing(format_args!("starting {name}"))
    }

    /// Runs a program to its end in there; its output. Blocks other users of this value meanwhile.
    pub fn output(&self, program: &str, mut command: Command) -> Result<Output> {
        let name = program.to_owned();
        self.run(move || host::run(&name, &mut command))
    }

    /// A program of the tree, to be started by [`Inside::spawn`] or [`Inside::output`].
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        self.tree.command(program)
    }

    /// The tree that is visible in there.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It only runs jobs, whose panics went to their callers.
            let _ = thread.join();
        }
    }
}

/// What the thread does before it takes jobs.
fn settle(root: &Path, folder: &Path, namespaces: CloneFlags) -> Result<()> {
    unshare(namespaces).doing("making namespaces (does this container allow it?)")?;
    let none: Option<&str> = None;
    let bind = |from: &Path, to: PathBuf| {
        mount(Some(from), &to, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).doing(format_args!(
            "mounting {} on {}",
            from.display(),
            to.display()
        ))
    };
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).doing("making mounts private")?;
    bind(root, root.to_owned())?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, root, none, read_only, none).doing("making the tree read-only")?;
    bind(Path::new("/dev"), root.join("dev"))?;
    bind(Path::new("/proc"), root.join("proc"))?;
    bind(folder, root.join("mnt"))?;
    mount(Some("tmpfs"), &root.join("tmp"), Some("tmpfs"), MsFlags::empty(), none).doing("mounting a tmpfs")
}
