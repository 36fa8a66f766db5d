//! `batond`: one daemon for both roles.
//!
//! ```text
//!                  baton.control= on the command line?
//!        no ──► incumbent ◄───────────── drained ─────────── successor ◄── yes
//!                  │ ▲                                          │
//!   upgrade ───────┘ └─ rolled back                             └─ cut off: fenced by the incumbent
//! ```
//! Each socket is served in the same way ([`listen::serve`]), on plain threads.

pub mod config;
pub mod config_keys;
pub mod control;
pub mod kernel;
pub mod listen;
pub mod outcome;
pub mod probation;
pub mod successor_log;
pub mod supervised;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Result, bail};
use baton_sdk::agent_end::AgentEnd;
use clap::Parser;
use kexec_core::klog::cause::AS_SUCCESSOR;
use nix::poll::PollTimeout;
use tokio::sync::mpsc;
use tracing::info;

use self::config::Config;
use self::control::{Reply, Request, Stage};
use self::kernel::{Ground, Kernel};
use self::supervised::Signals;
use crate::daemon::listen::{Caller, Limits};
use crate::daemon::outcome::Failure;
use crate::recovery::recover::{self, GoingOn};
use crate::services::access;
use crate::services::coming::Admitted;
use crate::takeover::{button, successor};
use crate::update::{check, upgrade};
use baton_sdk::protocol::DEFAULT_SOCKET as SERVICE_SOCKET;

/// The agent of a live kernel update.
#[derive(Debug, Parser)]
#[command(name = "batond", version, about)]
pub struct Args {
    /// The configuration.
    #[arg(long, env = "BATON_CONFIG", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    /// Where `baton` finds this daemon.
    #[arg(long, env = "BATON_SOCKET", default_value = control::SOCKET)]
    socket: PathBuf,
    /// Where services find this daemon.
    #[arg(long, default_value = SERVICE_SOCKET)]
    services: PathBuf,
}

/// Runs until SIGTERM.
pub fn run(args: Args) -> Result<()> {
    crate::machine::sys::keep_no_large_buffers();
    let config = Config::load(&args.config)?;
    let ground = Ground::open(config, args.config.clone())?;
    let kernel = Arc::new(Kernel::find(ground)?);
    let going_on = recover::recover(&kernel);
    kernel.begin()?;
    if let Some(GoingOn { resumed, found }) = going_on {
        let kernel = kernel.clone();
        thread::Builder::new().name("update".into()).spawn(move || match upgrade::go_on(&kernel, resumed, &found) {
            Ok(ended) => tracing::error!("the update of an earlier batond has ended: {}", ended.cause),
            Err(error) => tracing::error!("cannot go on with the update of an earlier batond: {error:#}"),
        })?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(kernel, &args))
}

async fn serve(kernel: Arc<Kernel>, args: &Args) -> Result<()> {
    let control = only(&args.socket, |path| listen::listen(path, 0o600))?;
    let services = only(&args.services, |path| listen::listen_for_group(path, access::group()))?;
    if kernel.is_successor() {
        let kernel = kernel.clone();
        thread::Builder::new().name("successor".into()).spawn(move || {
            if let Err(error) = successor::run(&kernel) {
                tracing::error!("{AS_SUCCESSOR}{error:#}");
                kernel.set_stage(Stage::Failed);
            }
        })?;
    }
    mind_services(kernel.clone())?;
    let (asked, admitting, door) = (kernel.clone(), kernel.clone(), kernel.clone());
    listen::serve("control", control, Limits::usual(), |peer| peer.is_root(), move |_, line| answer(&asked, line))?;
    let may_speak = move |peer| door.access.may_speak(peer);
    listen::serve("services", services, Limits::usual(), may_speak, move |peer, Greeting(end)| {
        match admitting.admit(peer, end)? {
            Admitted { name, was_serving: false } => info!(service = name, "admitted"),
            Admitted { name, was_serving: true } => info!(service = name, "taken on from an earlier batond"),
        }
        Ok(())
    })?;
    crate::services::files::server::start(kernel.clone())?;
    crate::services::files::notify::start(kernel.clone())?;
    crate::services::resize::start(kernel.clone())?;
    crate::services::connections::server::start(kernel.clone())?;
    button::watch(kernel.clone())?;
    let signals = Signals::listen()?;
    supervised::tell(&[sd_notify::NotifyState::Ready]);
    info!(release = kernel.release(), role = %kernel.role(), "batond is ready");
    supervised::until_the_end(&kernel, &args.config, signals).await;
    Ok(())
}

/// Hears what services say by themselves, in a thread of its own.
fn mind_services(kernel: Arc<Kernel>) -> Result<()> {
    thread::Builder::new().name("minder".into()).spawn(move || {
        while let Ok(()) = kernel
            .services
            .mind(&*kernel, PollTimeout::NONE)
            .inspect_err(|error| tracing::error!("services are no longer heard: {error:#}"))
        {}
    })?;
    Ok(())
}

/// Binds a socket; a stale one of a dead daemon is replaced, a live one is not.
fn only(path: &Path, listen: impl FnOnce(&Path) -> Result<UnixListener>) -> Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        bail!("another batond listens on {}; stop it first", path.display());
    }
    listen(path)
}

/// A service up to its greeting.
struct Greeting(AgentEnd);

impl AsFd for Greeting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Caller for Greeting {
    fn new(socket: UnixStream) -> Result<Self> {
        Ok(Greeting(AgentEnd::new(socket)?))
    }

    fn has_spoken(&mut self) -> Result<bool> {
        Ok(self.0.poll_hello()?)
    }
}

/// A `baton` up to the end of its line.
struct Line {
    socket: UnixStream,
    bytes: Vec<u8>,
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Caller for Line {
    fn new(socket: UnixStream) -> Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Line { socket, bytes: Vec::new() })
    }

    fn has_spoken(&mut self) -> Result<bool> {
        loop {
            let mut buffer = [0; 4096];
            match self.socket.read(&mut buffer) {
                Ok(0) if self.bytes.is_empty() => bail!("it has left without a word"),
                Ok(0) => return Ok(true), // what there is of it is answered
                Ok(len) => self.bytes.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            if self.bytes.len() as u64 > control::LINE_LIMIT {
                bail!("a request of more than {} bytes", control::LINE_LIMIT);
            }
            if self.bytes.ends_with(b"\n") {
                return Ok(true);
            }
        }
    }
}

fn answer(kernel: &Kernel, line: Line) -> Result<()> {
    let Line { socket, bytes } = line;
    socket.set_nonblocking(false)?;
    let request: Request = match serde_json::from_slice(&bytes) {
        Ok(request) => request,
        Err(error) => {
            let failure = Failure::new(
                crate::daemon::outcome::Class::Usage,
                format!("batond cannot read this request: {error}"),
                "install the same version of baton and batond",
            );
            return send(&socket, &Reply::Failed(failure));
        }
    };
    let (replies, mut outbox) = mpsc::unbounded_channel();
    thread::scope(|scope| {
        // Progress is told by a thread of its own: an asker that does not read holds up nothing.
        let telling = thread::Builder::new().name("progress".into()).spawn_scoped(scope, || {
            while let Some(reply) = outbox.blocking_recv() {
                send(&socket, &reply)?;
            }
            Ok::<(), anyhow::Error>(())
        })?;
        let last = match request {
            Request::Status => Reply::Status(Box::new(kernel.status())),
            Request::Check(wish) => Reply::Checked { findings: check::findings(kernel, &wish) },
            Request::Release { service } => match kernel.release_arena(&service) {
                Ok(bytes) => Reply::Released { bytes },
                Err(error) => Reply::Failed(Failure::from_error(&error)),
            },
            Request::Cancel => match kernel.call_off() {
                Ok(()) => Reply::CalledOff,
                Err(failure) => Reply::Failed(failure),
            },
            Request::Commit => match kernel.commit() {
                Ok(()) => Reply::Committing,
                Err(failure) => Reply::Failed(failure),
            },
            Request::RollBack => match kernel.roll_back() {
                Ok(()) => Reply::CalledOff,
                Err(failure) => Reply::Failed(failure),
            },
            Request::Dmesg { instance, after } => match kernel.log(instance, after) {
                Ok(log) => Reply::Log(Box::new(log)),
                Err(error) => Reply::Failed(Failure::from_error(&error)),
            },
            Request::Upgrade(wish) => upgrade::run(kernel, &wish, None, &replies),
            Request::Canary(canary) => upgrade::run(kernel, &canary.candidate, Some(&canary.trial), &replies),
        };
        // The asker may have left; what was done stays done.
        let _ = replies.send(last);
        drop(replies);
        telling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn send(mut socket: &UnixStream, reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    Ok(socket.write_all(&line)?)
}
