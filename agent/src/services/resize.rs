//! The agent's side of [`baton_sdk::resize`]: arenas that grow, and arenas that go.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use tracing::info;

use crate::daemon::kernel::Kernel;
use crate::daemon::listen::{Asker, Limits, listen, serve};
use baton_sdk::ask;
use baton_sdk::protocol::bounded_cause;
use baton_sdk::resize::{Ask, DEFAULT_SOCKET, Told, What};

/// Listens from now on; one question is answered at a time, because each takes memory.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    let listener = listen(Path::new(DEFAULT_SOCKET), 0o600)?;
    let one_at_a_time = Mutex::new(());
    serve(
        "arenas",
        listener,
        Limits::usual(),
        |peer| peer.is_root(),
        move |_, asker: Asker<Ask>| {
            let _held = one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
            answer(&kernel, asker)
        },
    )
}

fn answer(kernel: &Kernel, mut asker: Asker<Ask>) -> Result<()> {
    let told = match asker.take().and_then(|ask| obey(kernel, &asker.socket, &ask)) {
        Ok(()) => Told::Done,
        Err(error) => Told::Failed { cause: bounded_cause(&format!("{error:#}")) },
    };
    Ok(ask::answer(asker.socket.as_fd(), &told, None)?)
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
