//! The agent's side of [`crate::service::room`]: arenas that grow, and arenas that go.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tracing::{info, warn};

use crate::kernel::Kernel;
use crate::service::protocol::{Inbox, bounded_cause, encode, send_all};
use crate::service::room::{Ask, DEFAULT_SOCKET, Told, VERSION, What, receive};

/// Listens, in a thread of its own; one question at a time, because each takes memory.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    let path = Path::new(DEFAULT_SOCKET);
    // The control socket, bound before, is what tells two daemons from each other.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    std::thread::Builder::new().name("room".into()).spawn(move || {
        for stream in listener.incoming() {
            let answered = stream.map_err(anyhow::Error::from).and_then(|stream| answer(&kernel, &stream));
            if let Err(error) = answered {
                warn!("a question for memory was not answered: {error:#}");
            }
        }
    })?;
    Ok(())
}

fn answer(kernel: &Kernel, stream: &UnixStream) -> Result<()> {
    stream.set_nonblocking(true)?;
    let told = match receive(stream.as_fd(), &mut Inbox::default())
        .map_err(Into::into)
        .and_then(|ask| obey(kernel, stream, &ask))
    {
        Ok(()) => Told::Done,
        Err(error) => Told::Failed { cause: bounded_cause(&format!("{error:#}")) },
    };
    Ok(send_all(stream.as_fd(), &encode(&told)?, None)?)
}

fn obey(kernel: &Kernel, stream: &UnixStream, ask: &Ask) -> Result<()> {
    if ask.version != VERSION {
        bail!("the service speaks version {} of this protocol, this agent {VERSION}", ask.version);
    }
    match ask.what {
        What::Grow { more } => {
            let pieces = kernel.grow_arena(&ask.service, more)?;
            let len: u64 = pieces.iter().map(|(_, len)| len).sum();
            info!(service = ask.service, "its arena has {} KiB more, in {} pieces", len >> 10, pieces.len());
            for (file, len) in pieces {
                send_all(stream.as_fd(), &encode(&Told::Piece { len })?, Some(file.as_fd()))?;
            }
        }
        What::Release => {
            let bytes = kernel.release_arena(&ask.service)?;
            info!(service = ask.service, "its arena's {} KiB are free", bytes >> 10);
        }
    }
    Ok(())
}
