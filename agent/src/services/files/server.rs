//! The socket of those who keep files ([`baton_sdk::files`]): one question a connection, each on a thread of its own,
//! since a program that stands by may wait for long.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::{borrowed, check_owner, orchestrator};
use crate::daemon::kernel::Kernel;
use crate::daemon::listen::{Asker, Limits, Peer, listen, serve};
use crate::services::Admission;
use crate::services::files::programs::Program;
use baton_sdk::ask::answer;
use baton_sdk::files::{Ask, DEFAULT_SOCKET, Told, What};
use baton_sdk::protocol::Inbox;

/// Listens from now on.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    // Whoever may ask gets the memory of any service.
    let listener = listen(Path::new(DEFAULT_SOCKET), 0o600)?;
    serve("files", listener, Limits::usual(), |peer| peer.is_root(), move |peer, asker| reply(&kernel, peer, asker))
}

fn reply(kernel: &Arc<Kernel>, peer: Peer, mut asker: Asker<Ask>) -> Result<()> {
    let ask = asker.take()?;
    let Asker { socket, mut inbox, .. } = asker;
    let carried_out = carry_out(kernel, peer, &ask, &mut inbox);
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

fn carry_out(kernel: &Arc<Kernel>, peer: Peer, ask: &Ask, inbox: &mut Inbox) -> Result<Vec<(String, OwnedFd)>> {
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
            if let Admission::Elsewhere { why } = kernel.services.admission() {
                bail!("{why}");
            }
            let program = Program::adopt(&ask.service, peer.pid)?;
            kernel.files.stand_by(&ask.service, program)
        }
        What::Sessions => {
            orchestrator::start(kernel.clone(), ask.service.clone(), inbox.descriptor()?)?;
            Ok(Vec::new())
        }
    }
}
