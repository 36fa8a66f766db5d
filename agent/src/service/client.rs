//! The service's end: blocking where it may be, pollable where it must be, no runtime.
//!
//! A program with an event loop registers the [`Client`]'s descriptor for reading and calls [`Client::poll_order`] until it
//! gives `None` (that makes edge-triggered loops safe too). The way from an order to its report allocates nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::poll::PollFlags;

use super::Error;
use super::mapping::Arena;
use super::protocol::{
    Hello, Inbox, Standing, ToAgent, ToService, bounded_cause, encode_into, receive, send_all, wait,
};

/// How long an agent may take to find an arena.
const ARENA_PATIENCE: Duration = Duration::from_secs(60);

/// The right to answer clients and to use the arena: exists from the order to serve until the report that the service is
/// frozen. Cannot be copied or made by hand.
#[derive(Debug)]
pub struct Held {
    /// The epoch.
    pub epoch: u64,
    /// The arena is blank: create, do not attach. False after the first time.
    pub fresh: bool,
    /// The service was frozen before and goes on: connections and their unsent replies are still good.
    pub resumed: bool,
}

/// What the agent wants.
#[derive(Debug)]
pub enum Order {
    /// Stay silent, be ready.
    StandBy,
    /// Attach to the arena, report [`Client::activated`], answer. (`Serve`, `Activate` and `Unfreeze` on the wire.)
    Serve(Held),
    /// Finish the request at hand, seal, report [`Client::frozen`].
    Freeze {
        /// The epoch that ends.
        epoch: u64,
    },
    /// Leave.
    Stop,
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    inbox: Inbox,
    outbox: Vec<u8>,
    standing: Standing,
    fresh: bool,
    agent_gone: bool,
}

impl Client {
    /// Connects, introduces the service and receives its arena.
    ///
    /// # Errors
    /// No agent there, an agent that closes (its log says why), an arena that cannot be mapped.
    pub fn connect(path: &Path, hello: Hello) -> Result<(Self, Arena), Error> {
        Self::over(UnixStream::connect(path)?, hello)
    }

    /// The same over a socket that is already connected.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn over(socket: UnixStream, hello: Hello) -> Result<(Self, Arena), Error> {
        hello.check()?;
        socket.set_nonblocking(true)?;
        let mut client = Self {
            socket,
            inbox: Inbox::default(),
            outbox: Vec::with_capacity(256),
            standing: Standing::Unknown,
            fresh: false,
            agent_gone: false,
        };
        client.report(&ToAgent::Hello(hello))?;
        let order = client.await_message()?;
        client.standing = client.standing.ordered(&order)?;
        let ToService::Arena { len, fresh, first } = order else {
            return Err(Error::Closed); // told to stop before it began
        };
        let mut arena = Arena::map(client.inbox.descriptor()?, if first == 0 { len } else { first }, fresh)?;
        while (arena.len() as u64) < len {
            let order = client.await_message()?;
            client.standing = client.standing.ordered(&order)?;
            let ToService::Piece { len } = order else { return Err(Error::Closed) };
            arena.append(client.inbox.descriptor()?, len)?;
        }
        client.fresh = fresh;
        Ok((client, arena))
    }

    /// Says that orders may come: the arena is mapped and the sockets listen.
    ///
    /// # Errors
    /// The socket's.
    pub fn ready(&mut self) -> Result<(), Error> {
        self.report(&ToAgent::Ready)
    }

    /// The epoch in which this service may answer clients now. `None`: say nothing to anybody.
    #[must_use]
    pub fn serving(&self) -> Option<u64> {
        self.standing.serving()
    }

    /// Where this service stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// The next order, waiting for it. `None`: the agent has gone while this service serves, and no order will come.
    ///
    /// # Errors
    /// A time-out, a socket that fails, an order out of place, or an agent gone while this service is silent.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Option<Order>, Error> {
        loop {
            if let Some(order) = self.poll_order()? {
                return Ok(Some(order));
            }
            if self.agent_gone {
                return Ok(None);
            }
            wait(self.socket.as_fd(), PollFlags::POLLIN, timeout)?;
        }
    }

    /// The next order if there is one; never waits.
    ///
    /// # Errors
    /// As [`Client::wait`], without the time-out.
    pub fn poll_order(&mut self) -> Result<Option<Order>, Error> {
        let message = match self.inbox.poll(self.socket.as_fd()) {
            Ok(None) => return Ok(None),
            Ok(Some(message)) => message,
            Err(Error::Closed) if self.serving().is_some() => {
                self.agent_gone = true;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let before = self.standing;
        self.standing = before.ordered(&message)?;
        let order = match message {
            ToService::StandBy => Order::StandBy,
            ToService::Serve { epoch } | ToService::Activate { epoch } => {
                Order::Serve(Held { epoch, fresh: std::mem::take(&mut self.fresh), resumed: false })
            }
            ToService::Unfreeze { epoch } => Order::Serve(Held { epoch, fresh: false, resumed: true }),
            ToService::Freeze { epoch } => Order::Freeze { epoch },
            ToService::Stop => Order::Stop,
            // The table of legal steps lets it through only inside `over`.
            memory @ (ToService::Arena { .. } | ToService::Piece { .. }) => {
                return Err(Error::OutOfOrder { message: format!("{memory:?}"), standing: before });
            }
        };
        Ok(Some(order))
    }

    /// Whether the agent has closed the connection.
    #[must_use]
    pub fn agent_gone(&self) -> bool {
        self.agent_gone
    }

    /// Reports that the service has attached and answers from now on.
    ///
    /// # Errors
    /// The socket's.
    pub fn activated(&mut self, held: &Held, items: u64, seal: u64) -> Result<(), Error> {
        self.report(&ToAgent::Activated { epoch: held.epoch, items, seal })
    }

    /// Reports that the service is silent and its arena sealed, and gives up the right to touch it.
    ///
    /// # Errors
    /// The socket's. The right is gone all the same.
    pub fn frozen(&mut self, held: Held, items: u64, seal: u64) -> Result<(), Error> {
        self.report(&ToAgent::Frozen { epoch: held.epoch, items, seal })
    }

    /// Reports that an order cannot be carried out. Leave afterwards.
    ///
    /// # Errors
    /// The socket's.
    pub fn failed(&mut self, cause: &str) -> Result<(), Error> {
        self.report(&ToAgent::Failed { cause: bounded_cause(cause) })
    }

    fn report(&mut self, report: &ToAgent) -> Result<(), Error> {
        let next = self.standing.reported(report)?;
        self.outbox.clear();
        encode_into(report, &mut self.outbox)?;
        send_all(self.socket.as_fd(), &self.outbox, None)?;
        self.standing = next;
        Ok(())
    }

    fn await_message(&mut self) -> Result<ToService, Error> {
        receive(self.socket.as_fd(), &mut self.inbox, Some(ARENA_PATIENCE))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
