//! The agent's end of one service's connection, blocking: for `batond` in a thread, and for tests. It keeps the same
//! [`Standing`] as the service does, so a service that reports out of order is found out here.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Error;
use super::protocol::{Hello, Inbox, Standing, ToAgent, ToService, encode, receive, send_all};

/// One service, seen from the agent.
#[derive(Debug)]
pub struct AgentEnd {
    socket: UnixStream,
    inbox: Inbox,
    standing: Standing,
    hello: Hello,
}

impl AgentEnd {
    /// Waits for the greeting of a service that has just connected, and checks it.
    ///
    /// # Errors
    /// A time-out, a socket that fails, a greeting that is none or out of bounds.
    pub fn accept(socket: UnixStream, patience: Duration) -> Result<Self, Error> {
        socket.set_nonblocking(true)?;
        let hello = Hello::new("", 0, 0, 0); // until it has come
        let mut end = Self { socket, inbox: Inbox::default(), standing: Standing::Unknown, hello };
        match end.report(patience)? {
            ToAgent::Hello(hello) => {
                hello.check()?;
                end.hello = hello;
                Ok(end)
            }
            other => Err(Error::OutOfOrder { message: format!("{other:?}"), standing: Standing::Unknown }),
        }
    }

    /// Who it is.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Where it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Whether it has closed the connection.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        // What is asked for does not matter: a peer that has gone is told of in any case (poll(2)).
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        poll(&mut polled, PollTimeout::ZERO).is_ok() && polled[0].revents().is_some_and(|found| found.intersects(gone))
    }

    /// Gives it its arena: the memory files, with their lengths, that it maps one behind the other.
    ///
    /// # Errors
    /// The socket's, or out of order.
    pub fn give_arena(&mut self, pieces: &[(BorrowedFd<'_>, u64)], fresh: bool) -> Result<(), Error> {
        let len = pieces.iter().map(|(_, len)| len).sum();
        for (n, &(file, piece)) in pieces.iter().enumerate() {
            let order = match n {
                0 => ToService::Arena { len, fresh, first: piece },
                _ => ToService::Piece { len: piece },
            };
            self.send(&order, Some(file))?;
        }
        Ok(())
    }

    /// Sends any other order.
    ///
    /// # Errors
    /// The socket's, or out of order; `Arena` is always refused, having no descriptor here.
    pub fn order(&mut self, order: &ToService) -> Result<(), Error> {
        if order.descriptors() != 0 {
            return Err(Error::Descriptors(0, order.descriptors()));
        }
        self.send(order, None)
    }

    /// The next report, waiting for it. A failure is an error that names the service.
    ///
    /// # Errors
    /// A time-out, a closed socket, a report out of order, or the service's own failure.
    pub fn report(&mut self, patience: Duration) -> Result<ToAgent, Error> {
        let report = receive(self.socket.as_fd(), &mut self.inbox, Some(patience))?;
        if self.inbox.descriptor().is_ok() {
            return Err(Error::Descriptors(1, 0));
        }
        self.standing = self.standing.reported(&report)?;
        match report {
            ToAgent::Failed { cause } => Err(Error::ServiceFailed { name: self.hello.name.clone(), cause }),
            report => Ok(report),
        }
    }

    fn send(&mut self, order: &ToService, file: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let next = self.standing.ordered(order)?;
        send_all(self.socket.as_fd(), &encode(order)?, file)?;
        self.standing = next;
        Ok(())
    }
}

impl AsFd for AgentEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
