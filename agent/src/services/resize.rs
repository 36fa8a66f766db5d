//! The agent's side of [`baton_sdk::resize`]: arenas that grow, and arenas that go.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tracing::{info, warn};

use crate::daemon::kernel::Kernel;
use crate::daemon::listen::listen;
use baton_sdk::ask;
use baton_sdk::protocol::{Inbox, bounded_cause, receive};
use baton_sdk::resize::{Ask, DEFAULT_SOCKET, Told, What};

/// How long a question may take to arrive; the next one waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Listens, in a thread of its own; one question at a time, because each takes memory.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    let listener = listen(Path::new(DEFAULT_SOCKET), 0o600)?;
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
    let asked = receive(stream.as_fd(), &mut Inbox::default(), Some(PATIENCE));
    let told = match asked.map_err(Into::into).and_then(|ask| obey(kernel, stream, &ask)) {
        Ok(()) => Told::Done,
        Err(error) => Told::Failed { cause: bounded_cause(&format!("{error:#}")) },
    };
    Ok(ask::answer(stream.as_fd(), &told, None)?)
}

fn obey(kernel: &Kernel, stream: &UnixStream, ask: &Ask) -> Result<()> {
    ask.check()?;
    match ask.what {
        What::Grow { more } => {
            let pieces = kernel.grow_arena(&ask.service, more)?;
            let len: u64 = pieces.iter().map(|(_, len)| len).sum();
            info!(service = ask.service, "its arena has {} KiB more, in {} pieces", len >> 10, pieces.len());
            for (file, len) in pieces {
                ask::answer(stream.as_fd(), &Told::Piece { len }, Some(file.as_fd()))?;
            }
        }
        What::Release => {
            let bytes = kernel.release_arena(&ask.service)?;
            info!(service = ask.service, "its arena's {} KiB are free", bytes >> 10);
        }
    }
    Ok(())
}
