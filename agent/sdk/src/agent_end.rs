//! The agent's end of one service's connection. It keeps the same [`Standing`] as the service does, so a service that reports
//! out of order is found out here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Error;
use super::protocol::{Hello, Inbox, Standing, ToAgent, ToService, encode, send_all, send_with_fd, wait_until};

/// One service, seen from the agent.
#[derive(Debug)]
pub struct AgentEnd {
    socket: UnixStream,
    inbox: Inbox,
    standing: Standing,
    hello: Hello,
}

impl AgentEnd {
    /// The end of a service that has just connected, and has said nothing yet.
    ///
    /// # Errors
    /// The socket's.
    pub fn new(socket: UnixStream) -> Result<Self, Error> {
        socket.set_nonblocking(true)?;
        let hello = Hello::new("", 0, 0, 0); // until it has come
        Ok(Self { socket, inbox: Inbox::default(), standing: Standing::Unknown, hello })
    }

    /// Waits for the greeting of a service that has just connected, and checks it.
    ///
    /// # Errors
    /// A time-out, a socket that fails, a greeting that is none or out of bounds.
    pub fn accept(socket: UnixStream, patience: Duration) -> Result<Self, Error> {
        let mut end = Self::new(socket)?;
        let greeting = end.report(patience)?;
        end.greeted(greeting)?;
        Ok(end)
    }

    /// Whether the greeting has come, and is what it must be; never waits.
    ///
    /// # Errors
    /// As [`AgentEnd::accept`].
    pub fn poll_hello(&mut self) -> Result<bool, Error> {
        match self.poll_report()? {
            None => Ok(false),
            Some(greeting) => self.greeted(greeting).map(|()| true),
        }
    }

    fn greeted(&mut self, greeting: ToAgent) -> Result<(), Error> {
        match greeting {
            ToAgent::Hello(hello) => {
                hello.check()?;
                self.hello = hello;
                Ok(())
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
            self.send(&order, file)?;
        }
        Ok(())
    }

    /// Sends any other order; never waits, because other services may be waiting for theirs.
    ///
    /// # Errors
    /// The socket's, out of order, or a service that has not read what it was sent before ([`Error::Unread`]; nothing can be
    /// said to it any more). `Arena` is always refused, having no descriptor here.
    pub fn order(&mut self, order: &ToService) -> Result<(), Error> {
        if order.descriptors() != 0 {
            return Err(Error::Descriptors(0, order.descriptors()));
        }
        let next = self.standing.ordered(order)?;
        let frame = encode(order)?;
        match send_with_fd(self.socket.as_fd(), &frame, None) {
            Ok(sent) if sent == frame.len() => {
                self.standing = next;
                Ok(())
            }
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                self.standing = Standing::Over;
                Err(error.into())
            }
            _ => {
                self.standing = Standing::Over;
                Err(Error::Unread)
            }
        }
    }

    /// The next report, waiting for it. A failure is an error that names the service.
    ///
    /// # Errors
    /// A time-out, which leaves everything as it is; else as [`AgentEnd::poll_report`].
    pub fn report(&mut self, patience: Duration) -> Result<ToAgent, Error> {
        let deadline = Instant::now().checked_add(patience);
        loop {
            if let Some(report) = self.poll_report()? {
                return Ok(report);
            }
            if !wait_until(self.socket.as_fd(), PollFlags::POLLIN, deadline)? {
                return Err(Error::TimedOut(patience));
            }
        }
    }

    /// The next report, if it has come as a whole; never waits.
    ///
    /// # Errors
    /// A closed socket, a report out of order or that is none, or the service's own failure. Then the connection is of no
    /// use any more ([`Standing::Over`]).
    pub fn poll_report(&mut self) -> Result<Option<ToAgent>, Error> {
        let report = self.read();
        if report.is_err() {
            self.standing = Standing::Over;
        }
        report
    }

    fn read(&mut self) -> Result<Option<ToAgent>, Error> {
        let Some(report) = self.inbox.poll(self.socket.as_fd())? else { return Ok(None) };
        if self.inbox.descriptor().is_ok() {
            return Err(Error::Descriptors(1, 0));
        }
        self.standing = self.standing.reported(&report)?;
        match report {
            ToAgent::Failed { cause } => Err(Error::ServiceFailed { name: self.hello.name.clone(), cause }),
            report => Ok(Some(report)),
        }
    }

    fn send(&mut self, order: &ToService, file: BorrowedFd<'_>) -> Result<(), Error> {
        let next = self.standing.ordered(order)?;
        send_all(self.socket.as_fd(), &encode(order)?, Some(file))?;
        self.standing = next;
        Ok(())
    }
}

impl AsFd for AgentEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
