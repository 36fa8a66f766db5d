//! The event loop: one thread, in *turns*. A turn takes what the sockets have and does a bounded amount of work; between two
//! turns no command is under way, and that is where a freeze is obeyed. So the longest that a freeze waits is one turn: at most
//! [`TURN_REQUESTS`] requests or one long reply.
//!
//! The sockets are bound before the service may serve, also to an address that this machine does not have yet (IP_FREEBIND): the
//! service's address moves here during the cutover, and nothing is left to set up then. Bound to one address they also answer from
//! it, which a datagram socket bound to 0.0.0.0 would not. Until the first turn nothing is accepted, read or answered.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket as StdUdpSocket};
use std::os::fd::RawFd;
use std::time::Duration;

use baton_sdk::connections::{Carried, Carrier, hold, release};
use handover::arena::Store;
use mio::event::Event;
use mio::net::{TcpListener, UdpSocket};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use socket2::{Domain, Protocol, Socket, Type};

use super::commands::Facts;
use super::connection::{Connection, Progress};
use super::resp::{Limits, Reply, digits};

/// Requests executed in one turn.
pub const TURN_REQUESTS: usize = 128;
/// Datagrams answered in one turn.
const TURN_DATAGRAMS: usize = 64;
/// Connections accepted in one turn.
const TURN_ACCEPTS: usize = 16;
/// The longest probe that is answered.
pub const MAX_PROBE: usize = 512;
/// Bytes read from one client at a time.
const READ: usize = 16 << 10;
const BACKLOG: i32 = 1024;

const LISTENER: Token = Token(usize::MAX);
const PROBES: Token = Token(usize::MAX - 1);
const CONTROL: Token = Token(usize::MAX - 2);

/// What a turn found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Only clients.
    Clients,
    /// The control descriptor has something to read; no client was served in this turn.
    Control,
}

/// Sockets, clients and their queue. The data is not among them: each turn borrows it, so that it can be taken away.
#[derive(Debug)]
pub struct Server {
    poll: Poll,
    events: Events,
    listener: TcpListener,
    probes: UdpSocket,
    clients: Vec<Option<Connection>>,
    /// Which clients to work for, each at most once.
    queue: VecDeque<usize>,
    queued: Vec<bool>,
    max_clients: usize,
    limits: Limits,
    facts: Facts,
    scratch: Box<[u8]>,
    probe: Vec<u8>,
    accepting: bool,
    probing: bool,
    registered: bool,
}

impl Server {
    /// Binds both sockets. They queue what comes; nothing is answered before the first [`Server::turn`].
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn bind(address: SocketAddr, max_clients: usize) -> io::Result<Self> {
        let (listener, probes) = sockets(address)?;
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            listener: TcpListener::from_std(listener),
            probes: UdpSocket::from_std(probes),
            clients: Vec::new(),
            queue: VecDeque::new(),
            queued: Vec::new(),
            max_clients,
            limits: Limits::default(),
            facts: Facts { kernel, epoch: 0, clients: 0, reply_limit: 16 << 20 },
            scratch: vec![0; READ].into(),
            probe: Vec::with_capacity(MAX_PROBE + 32),
            accepting: false,
            probing: false,
            registered: false,
        })
    }

    /// The address in use (the port may have been chosen by the kernel).
    ///
    /// # Errors
    /// As getsockname(2).
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Adds a descriptor whose readability ends a turn early.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn watch(&mut self, control: RawFd) -> io::Result<()> {
        self.poll.registry().register(&mut SourceFd(&control), CONTROL, Interest::READABLE)
    }

    /// To be called when the right to serve was given: from now on turns may be taken. All sockets are looked at afresh.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn begin(&mut self, epoch: u64) -> io::Result<()> {
        self.facts.epoch = epoch;
        if !self.registered {
            self.poll.registry().register(&mut self.listener, LISTENER, Interest::READABLE)?;
            self.poll.registry().register(&mut self.probes, PROBES, Interest::READABLE)?;
            self.registered = true;
        }
        (self.accepting, self.probing) = (true, true);
        for index in 0..self.clients.len() {
            if let Some(client) = &mut self.clients[index] {
                client.mark_readable();
                self.enqueue(index);
            }
        }
        Ok(())
    }

    /// Gives all clients to the agent, to be served on the next kernel, with those that wait to be accepted. Whoever comes from now on is
    /// neither let in nor refused. To be called between two turns; gives how many stay behind, and why the first of them does.
    ///
    /// # Errors
    /// The agent's, or the listener's. Nobody is lost by it here.
    pub fn keep(&mut self, carrier: &Carrier) -> Result<Option<(usize, String)>, baton_sdk::Error> {
        hold(&self.listener)?;
        self.accepting = true;
        while self.accepting {
            self.accept();
        }
        let notes: Vec<Vec<u8>> = self.clients.iter().flatten().map(Connection::note).collect();
        let sockets = self.clients.iter().flatten().map(|client| &client.socket);
        let kept = carrier.keep(sockets.zip(notes.iter().map(Vec::as_slice)))?;
        let mut left = kept.into_iter().filter_map(Result::err);
        Ok(left.next().map(|first| (1 + left.count(), first.0)))
    }

    /// Clients that were served on the kernel before.
    ///
    /// # Errors
    /// As epoll_ctl(2), or a note that is none.
    pub fn adopt(&mut self, carried: Vec<Carried>) -> io::Result<()> {
        for Carried { socket, note } in carried {
            let socket = std::net::TcpStream::from(socket);
            socket.set_nonblocking(true)?;
            let client = Connection::resume(mio::net::TcpStream::from_std(socket), &note)?;
            self.seat(client)?;
        }
        Ok(())
    }

    /// The clients stay: new ones are let in again.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn stay(&mut self) -> io::Result<()> {
        release(&self.listener)
    }

    /// One turn. Waits up to `patience` when there is nothing to do.
    ///
    /// # Errors
    /// The poll's; a client's troubles end that client only.
    pub fn turn(&mut self, store: &mut Store<'_>, patience: Option<Duration>) -> io::Result<Turn> {
        let busy = self.accepting || self.probing || !self.queue.is_empty();
        match self.poll.poll(&mut self.events, if busy { Some(Duration::ZERO) } else { patience }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Turn::Clients),
            other => other?,
        }
        if self.sort_events() {
            return Ok(Turn::Control);
        }
        self.answer_probes();
        self.accept();
        let mut budget = TURN_REQUESTS;
        for _ in 0..self.queue.len() {
            let Some(index) = self.queue.pop_front() else { break };
            self.queued[index] = false;
            let Some(client) = &mut self.clients[index] else { continue };
            match client.work(store, &self.facts, &self.limits, &mut self.scratch, &mut budget) {
                Progress::Idle => {}
                Progress::More => self.enqueue(index),
                Progress::Done => self.drop_client(index),
            }
            if budget == 0 {
                break;
            }
        }
        Ok(Turn::Clients)
    }

    /// Notes what the poll reported. True when the control descriptor is among it. Edges are reported once, so that all of them
    /// are noted before anything is done about any.
    fn sort_events(&mut self) -> bool {
        let mut control = false;
        let events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        for event in &events {
            match event.token() {
                LISTENER => self.accepting = true,
                PROBES => self.probing = true,
                CONTROL => control = true,
                Token(index) => self.note_client(index, event),
            }
        }
        self.events = events;
        control
    }

    fn note_client(&mut self, index: usize, event: &Event) {
        let Some(Some(client)) = self.clients.get_mut(index) else { return };
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            client.mark_readable();
        }
        self.enqueue(index);
    }

    fn enqueue(&mut self, index: usize) {
        if !std::mem::replace(&mut self.queued[index], true) {
            self.queue.push_back(index);
        }
    }

    /// `PING <bytes>` → `PONG <bytes> <epoch>`: who asked can see which kernel answered. Anything else is not answered.
    fn answer_probes(&mut self) {
        for _ in 0..if self.probing { TURN_DATAGRAMS } else { 0 } {
            let mut datagram = [0; MAX_PROBE + 1];
            match self.probes.recv_from(&mut datagram) {
                Ok((len, from)) if len <= MAX_PROBE => {
                    let Some(payload) = datagram[..len].strip_prefix(b"PING ") else { continue };
                    self.probe.clear();
                    self.probe.extend_from_slice(b"PONG ");
                    self.probe.extend_from_slice(payload);
                    self.probe.push(b' ');
                    digits(&mut self.probe, self.facts.epoch);
                    // A full socket buffer loses the answer, as the network may: the prober counts it.
                    let _ = self.probes.send_to(&self.probe, from);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.probing = false;
                    return;
                }
                // What ICMP says about an earlier answer is reported here, once.
                Err(_) => {}
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..if self.accepting { TURN_ACCEPTS } else { 0 } {
            match self.listener.accept() {
                Ok((socket, _)) => {
                    // Refused by the peer before it was accepted: nobody to serve.
                    let _ = self.add_client(socket);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.accepting = false;
                    return;
                }
                // Out of descriptors: those in the backlog wait for the next connection to come or go.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                    self.accepting = false;
                    return;
                }
                Err(_) => {} // that connection is gone already
            }
        }
    }

    fn add_client(&mut self, mut socket: mio::net::TcpStream) -> io::Result<()> {
        if self.facts.clients >= self.max_clients {
            let mut words = Vec::new();
            words.error("ERR max number of clients reached");
            return io::Write::write(&mut socket, &words).map(drop);
        }
        socket.set_nodelay(true)?;
        self.seat(Connection::new(socket))
    }

    fn seat(&mut self, mut client: Connection) -> io::Result<()> {
        let index = self.clients.iter().position(Option::is_none).unwrap_or(self.clients.len());
        let wanted = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut client.socket, Token(index), wanted)?;
        if index == self.clients.len() {
            self.clients.push(None);
            self.queued.push(false);
        }
        self.clients[index] = Some(client);
        self.facts.clients += 1;
        self.enqueue(index);
        Ok(())
    }

    fn drop_client(&mut self, index: usize) {
        if let Some(mut client) = self.clients[index].take() {
            // Closing the socket would do; an error changes nothing.
            let _ = self.poll.registry().deregister(&mut client.socket);
            self.facts.clients -= 1;
            // One that could not be accepted for want of a descriptor may be now.
            self.accepting = true;
        }
    }
}

fn sockets(address: SocketAddr) -> io::Result<(std::net::TcpListener, StdUdpSocket)> {
    let listener = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // A predecessor of this process may have left connections in TIME_WAIT.
    listener.set_reuse_address(true)?;
    freebind(&listener, address)?;
    listener.bind(&address.into())?;
    listener.listen(BACKLOG)?;
    let listener: std::net::TcpListener = listener.into();
    let probes = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    let address = listener.local_addr()?; // with the port, if the kernel chose it
    freebind(&probes, address)?;
    probes.bind(&address.into())?;
    Ok((listener, probes.into()))
}

fn freebind(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => socket.set_freebind_v4(true),
        SocketAddr::V6(_) => socket.set_freebind_v6(true),
    }
}
