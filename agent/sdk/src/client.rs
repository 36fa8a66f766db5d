//! The service's end: blocking where it may be, pollable where it must be, no runtime.
//!
//! A program with an event loop registers the [`Client`]'s descriptor for reading and calls [`Client::poll_order`] until it
//! gives `None` (that makes edge-triggered loops safe too). It is the same descriptor for as long as the service lives, whichever
//! agent is at the other end. The way from an order to its report allocates nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::Error;
use super::door::{Door, Events};
use super::held::Held;
use super::mapping::Arena;
use super::protocol::{
    Hello, Inbox, Standing, ToAgent, ToService, bounded_cause, encode_into, receive, send_all, wait_until,
};

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
    /// The agent had gone, and another has taken this service on as it is: orders come again. Files that the earlier one
    /// kept for it are not kept any more: keep them again ([`super::files`]).
    AgentIsBack,
    /// Leave.
    Stop,
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    /// None while the agent is gone and no other is there.
    socket: Option<UnixStream>,
    events: Events,
    /// Where another agent would be; none where there is no way back.
    door: Option<Door>,
    hello: Hello,
    inbox: Inbox,
    outbox: Vec<u8>,
    standing: Standing,
    fresh: bool,
}

impl Client {
    /// Connects, introduces the service and receives its arena; waits for it as long as the agent lives. Large arenas take a
    /// while, and during an update a newcomer waits until the update has ended.
    ///
    /// # Errors
    /// No agent there, an agent that closes (its log says why), an arena that cannot be mapped.
    pub fn connect(path: &Path, hello: Hello) -> Result<(Self, Arena), Error> {
        let (mut client, arena) = Self::over(UnixStream::connect(path)?, hello)?;
        client.door = Some(Door::new(path.to_owned()));
        Ok((client, arena))
    }

    /// The same over a socket that is already connected. When its agent has gone, no other is looked for.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn over(socket: UnixStream, hello: Hello) -> Result<(Self, Arena), Error> {
        hello.check()?;
        socket.set_nonblocking(true)?;
        let mut client = Self {
            events: Events::of(&socket).map_err(io::Error::from)?,
            socket: Some(socket),
            door: None,
            hello: hello.clone(),
            inbox: Inbox::default(),
            outbox: Vec::with_capacity(256),
            standing: Standing::Unknown,
            fresh: false,
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

    /// The next order, waiting for it. `None`: the agent has gone while this service serves, and there is no way to another.
    ///
    /// # Errors
    /// A time-out, a socket that fails, an order out of place, or an agent gone while this service is silent.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Option<Order>, Error> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if let Some(order) = self.poll_order()? {
                return Ok(Some(order));
            }
            if self.socket.is_none() && self.door.is_none() {
                return Ok(None);
            }
            if !wait_until(self.events.as_fd(), PollFlags::POLLIN, deadline)? {
                return Err(Error::TimedOut(timeout.unwrap_or_default()));
            }
        }
    }

    /// The next order if there is one; never waits.
    ///
    /// # Errors
    /// As [`Client::wait`], without the time-out.
    pub fn poll_order(&mut self) -> Result<Option<Order>, Error> {
        loop {
            let Some(socket) = &self.socket else {
                match &self.door {
                    Some(door) if door.has_moved() => self.knock(),
                    _ => return Ok(None),
                }
                continue;
            };
            match (self.inbox.poll(socket.as_fd()), self.standing) {
                (Ok(None), _) => return Ok(None),
                // An agent that answers with any other order does not know that this service serves: it is left again.
                (Ok(Some(message)), Standing::Returning(epoch)) if self.standing.ordered(&message).is_err() => {
                    self.lose_agent(epoch);
                }
                (Ok(Some(message)), _) => return self.order(message).map(Some),
                (Err(Error::Closed), Standing::Serving(epoch)) | (Err(_), Standing::Returning(epoch)) => {
                    self.lose_agent(epoch);
                }
                (Err(error), _) => return Err(error),
            }
        }
    }

    fn order(&mut self, message: ToService) -> Result<Order, Error> {
        let before = self.standing;
        self.standing = before.ordered(&message)?;
        Ok(match message {
            ToService::StandBy => Order::StandBy,
            ToService::Serve { epoch } | ToService::Activate { epoch } => {
                Order::Serve(Held::new(epoch, std::mem::take(&mut self.fresh), false))
            }
            ToService::Unfreeze { epoch } => Order::Serve(Held::new(epoch, false, true)),
            ToService::Freeze { epoch } => Order::Freeze { epoch },
            ToService::Welcome { .. } => {
                if let Some(door) = &mut self.door {
                    door.leave(&self.events);
                }
                Order::AgentIsBack
            }
            ToService::Stop => Order::Stop,
            // The table of legal steps lets it through only inside `over`.
            memory @ (ToService::Arena { .. } | ToService::Piece { .. }) => {
                return Err(Error::OutOfOrder { message: format!("{memory:?}"), standing: before });
            }
        })
    }

    fn lose_agent(&mut self, serving: u64) {
        if let Some(socket) = self.socket.take() {
            self.events.remove(socket.as_fd());
        }
        self.standing = Standing::Serving(serving);
        self.inbox = Inbox::default();
        match self.door.as_mut().map(|door| door.watch(&self.events)) {
            Some(Ok(true)) => self.knock(),
            Some(Err(_)) => self.door = None, // it will not be told of another
            Some(Ok(false)) | None => {}
        }
    }

    /// Tells an agent, if there is one, that this service serves already. What it says to that comes as any message.
    fn knock(&mut self) {
        let (Some(epoch), Some(door)) = (self.serving(), &self.door) else { return };
        let Ok(socket) = door.knock() else { return };
        if self.events.add(socket.as_fd()).is_err() {
            return;
        }
        (self.socket, self.standing) = (Some(socket), Standing::Unknown);
        let hello = Hello { serving: Some(epoch), ..self.hello.clone() };
        if self.report(&ToAgent::Hello(hello)).is_err() {
            self.lose_agent(epoch);
        }
    }

    /// Whether the agent has closed the connection, and no other has taken this service on.
    #[must_use]
    pub fn agent_gone(&self) -> bool {
        self.socket.is_none() || matches!(self.standing, Standing::Returning(_))
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
        let socket = self.socket.as_ref().ok_or(Error::Closed)?;
        send_all(socket.as_fd(), &self.outbox, None)?;
        self.standing = next;
        Ok(())
    }

    fn await_message(&mut self) -> Result<ToService, Error> {
        let socket = self.socket.as_ref().ok_or(Error::Closed)?;
        receive(socket.as_fd(), &mut self.inbox, None)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_fd().as_raw_fd()
    }
}
