//! `batond`: one daemon for both roles.
//!
//! ```text
//!                  baton.control= on the command line?
//!        no ──► incumbent ◄───────────── drained ─────────── successor ◄── yes
//!                  │ ▲                                          │
//!   upgrade ───────┘ └─ rolled back                             └─ cut off: fenced by the incumbent
//! ```
//! tokio carries the sockets; whatever talks to the module or to the other kernel runs on plain threads of its own.

pub mod config;
pub mod control;
pub mod kernel;
pub mod listen;
pub mod outcome;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use clap::Parser;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tracing::{info, warn};

use self::config::Config;
use self::control::{Reply, Request, Stage};
use self::kernel::{Ground, Kernel};
use crate::daemon::outcome::Failure;
use crate::recovery::recover::{self, GoingOn};
use crate::services::Admitted;
use crate::takeover::successor;
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
    let going_on = recover::recover(&ground);
    let kernel = Arc::new(Kernel::find(ground)?);
    if let Some(GoingOn { resumed, crossing }) = going_on {
        let kernel = kernel.clone();
        std::thread::Builder::new().name("update".into()).spawn(move || {
            if let Err(error) = upgrade::go_on(&kernel, resumed, &crossing) {
                tracing::error!("cannot go on with the update of an earlier batond: {error:#}");
            }
        })?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(kernel, &args))
}

async fn serve(kernel: Arc<Kernel>, args: &Args) -> Result<()> {
    let control = listen(&args.socket, 0o600)?;
    let services = listen(&args.services, 0o666)?;
    if kernel.is_successor() {
        let kernel = kernel.clone();
        std::thread::Builder::new().name("successor".into()).spawn(move || {
            if let Err(error) = successor::run(&kernel) {
                tracing::error!("as successor: {error:#}");
                kernel.set_stage(Stage::Failed);
            }
        })?;
    }
    crate::services::files::server::start(kernel.clone())?;
    crate::services::files::notify::start(kernel.clone())?;
    crate::services::resize::start(kernel.clone())?;
    tell_init();
    info!(release = kernel.release(), role = %kernel.role(), "batond is ready");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        tokio::select! {
            connection = control.accept() => {
                let (stream, _) = connection?;
                let kernel = kernel.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(kernel, stream).await {
                        warn!("a control connection failed: {error:#}");
                    }
                });
            }
            connection = services.accept() => {
                let stream = connection?.0.into_std()?;
                let kernel = kernel.clone();
                tokio::task::spawn_blocking(move || match kernel.admit(stream) {
                    Ok(Admitted { name, was_serving: false }) => info!(service = name, "admitted"),
                    Ok(Admitted { name, was_serving: true }) => info!(service = name, "taken on from an earlier batond"),
                    Err(error) => warn!("a service was not admitted: {error:#}"),
                });
            }
            _ = terminate.recv() => break,
        }
    }
    Ok(())
}

/// Binds a socket; a stale one of a dead daemon is replaced, a live one is not.
fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("another batond listens on {}; stop it first", path.display());
    }
    let listener = crate::daemon::listen::listen(path, mode)?;
    listener.set_nonblocking(true)?;
    Ok(UnixListener::from_std(listener)?)
}

fn tell_init() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        warn!("cannot tell the service manager that batond is ready: {error}");
    }
}

async fn answer(kernel: Arc<Kernel>, stream: UnixStream) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(control::LINE_LIMIT)).read_line(&mut line).await?;
    let request: Request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(error) => {
            let failure = Failure::new(
                crate::daemon::outcome::Class::Usage,
                format!("batond cannot read this request: {error}"),
                "install the same version of baton and batond",
            );
            return send(&mut writer, &Reply::Failed(failure)).await;
        }
    };
    let (replies, mut outbox) = mpsc::unbounded_channel();
    let worker = tokio::task::spawn_blocking(move || {
        let last = match request {
            Request::Status => Reply::Status(Box::new(kernel.status())),
            Request::Check(wish) => Reply::Checked { findings: check::findings(&kernel, &wish) },
            Request::Release { service } => match kernel.release_arena(&service) {
                Ok(bytes) => Reply::Released { bytes },
                Err(error) => Reply::Failed(Failure::from_error(&error)),
            },
            Request::Cancel => match kernel.call_off() {
                Ok(()) => Reply::CalledOff,
                Err(failure) => Reply::Failed(failure),
            },
            Request::Upgrade(wish) => upgrade::run(&kernel, &wish, &replies),
        };
        // The asker may have left; what was done stays done.
        let _ = replies.send(last);
    });
    while let Some(reply) = outbox.recv().await {
        send(&mut writer, &reply).await?;
    }
    worker.await?;
    Ok(())
}

async fn send(writer: &mut (impl AsyncWriteExt + Unpin), reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    Ok(())
}
