//! The socket of those who keep files ([`baton_sdk::files`]): one question a connection, each on a thread of its own,
//! since a program that stands by may wait for long.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{getsockopt, sockopt};

use super::{borrowed, check_owner, orchestrator};
use crate::daemon::kernel::Kernel;
use crate::daemon::listen::listen;
use crate::services::files::programs::Program;
use baton_sdk::ask::answer;
use baton_sdk::files::{Ask, DEFAULT_SOCKET, Told, What};
use baton_sdk::protocol::{Inbox, receive};

/// How long a question may take to arrive.
const PATIENCE: Duration = Duration::from_secs(20);

/// Listens from now on.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    // Whoever may ask gets the memory of any service.
    let listener = listen(Path::new(DEFAULT_SOCKET), 0o600)?;
    thread::Builder::new().name("files".into()).spawn(move || {
        for connection in listener.incoming() {
            let kernel = kernel.clone();
            let served = connection.and_then(|socket| {
                thread::Builder::new().name("file".into()).spawn(move || {
                    if let Err(error) = serve(&kernel, &socket) {
                        tracing::warn!("a question about kept files failed: {error:#}");
                    }
                })
            });
            if let Err(error) = served {
                tracing::warn!("a question about kept files is not heard: {error}");
            }
        }
    })?;
    Ok(())
}

fn serve(kernel: &Arc<Kernel>, socket: &UnixStream) -> Result<()> {
    socket.set_nonblocking(true)?;
    let mut inbox = Inbox::default();
    let ask: Ask = receive(socket.as_fd(), &mut inbox, Some(PATIENCE))?;
    let carried_out = carry_out(kernel, socket, &ask, &mut inbox);
    let service = &ask.service;
    let told = match carried_out {
        Ok(files) => borrowed(&files)
            .try_for_each(|(name, file)| answer(socket.as_fd(), &Told::File { name: name.to_owned() }, Some(file)))
            .and_then(|()| answer(socket.as_fd(), &Told::Done, None)),
        Err(error) => {
            tracing::warn!("{service}: {error:#}");
            let cause = baton_sdk::protocol::bounded_cause(&format!("{error:#}"));
            answer(socket.as_fd(), &Told::Failed { cause }, None)
        }
    };
    if ask.what == What::Start {
        kernel.files.started(service);
    }
    Ok(told?)
}

fn carry_out(
    kernel: &Arc<Kernel>,
    socket: &UnixStream,
    ask: &Ask,
    inbox: &mut Inbox,
) -> Result<Vec<(String, OwnedFd)>> {
    ask.check()?;
    match &ask.what {
        What::Keep { name } => {
            let file = inbox.descriptor()?;
            kernel.keep_file(&ask.service, name, file).with_context(|| format!("file {name:?}"))?;
            Ok(Vec::new())
        }
        What::Forget { name } => {
            kernel.files.forget(kernel.device()?, &ask.service, name)?;
            Ok(Vec::new())
        }
        What::Files => kernel.files.of(&ask.service),
        What::Start => {
            check_owner(&kernel.services.crossings(), &ask.service)?;
            let pid = getsockopt(socket, sockopt::PeerCredentials)?.pid();
            let program = Program::adopt(&ask.service, pid)?;
            kernel.files.stand_by(&ask.service, program)
        }
        What::Sessions => {
            orchestrator::start(kernel.clone(), ask.service.clone(), inbox.descriptor()?)?;
            Ok(Vec::new())
        }
    }
}
