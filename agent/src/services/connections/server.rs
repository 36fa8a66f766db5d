//! The agent's side of [`baton_sdk::connections`].

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use baton_sdk::ask;
use baton_sdk::connections::{Ask, DEFAULT_SOCKET, One, Told, What};
use baton_sdk::protocol::{STALLED_PEER, bounded_cause, receive, receive_bytes, send_all};

use super::Carried;
use crate::daemon::kernel::Kernel;
use crate::daemon::listen::{Asker, Limits, Peer, listen_for_group, serve};
use crate::services::access;

/// Listens from now on, for whoever may be a service.
pub fn start(kernel: Arc<Kernel>) -> Result<()> {
    let listener = listen_for_group(Path::new(DEFAULT_SOCKET), access::group())?;
    if let Err(error) = super::sys::raise_descriptor_limit() {
        tracing::warn!("fewer connections can cross: {error}");
    }
    let door = kernel.clone();
    let may_speak = move |peer| door.access.may_speak(peer);
    serve("connections", listener, Limits::usual(), may_speak, move |peer, asker: Asker<Ask>| {
        answer(&kernel, peer, asker)
    })
}

fn answer(kernel: &Kernel, peer: Peer, mut asker: Asker<Ask>) -> Result<()> {
    let told = match asker.take().and_then(|ask| obey(kernel, peer, &mut asker, &ask)) {
        Ok(()) => Told::Done,
        Err(error) => Told::Failed { cause: bounded_cause(&format!("{error:#}")) },
    };
    Ok(ask::answer(asker.socket.as_fd(), &told, None)?)
}

fn obey(kernel: &Kernel, peer: Peer, asker: &mut Asker<Ask>, ask: &Ask) -> Result<()> {
    ask.check()?;
    let connections = &kernel.connections;
    match ask.what {
        What::Begin => {
            match kernel.services.owner(&ask.service) {
                Some(owner) if owner == peer.uid => {}
                Some(owner) => bail!("service {} is user {owner}'s, and user {} asks", ask.service, peer.uid),
                None => bail!("there is no service {}: connect it first (`Client::connect`)", ask.service),
            }
            connections.enlist(&ask.service, peer.uid);
        }
        What::Keep { count } => {
            for _ in 0..count {
                let kept = receive_one(asker).map(|(socket, note)| {
                    // What the service did wrong with one is no reason to leave the others behind.
                    connections.keep(&ask.service, peer.uid, socket, note)
                })?;
                let told = match kept {
                    Ok(()) => Told::Kept,
                    Err(error) => Told::Refused { cause: bounded_cause(&format!("{error:#}")) },
                };
                ask::answer(asker.socket.as_fd(), &told, None)?;
            }
        }
        What::Sockets => {
            for Carried { note, socket } in connections.fetch(&ask.service, peer.uid)? {
                let len = u32::try_from(note.len()).context("a note without end")?;
                ask::answer(asker.socket.as_fd(), &Told::Socket { note: len }, Some(socket.as_fd()))?;
                send_all(asker.socket.as_fd(), &note, None)?;
            }
        }
    }
    Ok(())
}

fn receive_one(asker: &mut Asker<Ask>) -> Result<(OwnedFd, Vec<u8>)> {
    let socket = asker.socket.as_fd();
    let one: One = receive(socket, &mut asker.inbox, Some(STALLED_PEER))?;
    one.check()?;
    // Before anything else is read, which may bring the next one.
    let descriptor = asker.inbox.descriptor()?;
    let note = receive_bytes(socket, &mut asker.inbox, one.note as usize, Some(STALLED_PEER))?;
    Ok((descriptor, note))
}
