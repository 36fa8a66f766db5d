//! The service's life: connect to the agent, stand by, serve, freeze, perhaps serve again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use baton_sdk::client::{Client, Order};
use baton_sdk::connections::Carrier;
use baton_sdk::held::Held;
use baton_sdk::mapping::Arena;
use baton_sdk::protocol::Hello;
use handover::arena::store::{SCHEMA_KIND, SCHEMA_VERSION};
use handover::arena::{ArenaError, SealReceipt, Store, StoreError};
use state_schemas::arena::ArenaHeader;

use super::rehearsal;
use super::server::{Server, Turn};

/// The service's name towards the agent.
pub const NAME: &str = "baton-kv";

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; the machine need not have the address yet.
    pub listen: SocketAddr,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The arena to ask for, in MiB.
    pub arena_mib: u64,
    /// Clients at most.
    pub max_clients: usize,
}

/// Why the service ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address could not be bound.
    #[error("cannot listen on {0}: {1}")]
    Bind(SocketAddr, io::Error),
    /// The event loop's own trouble.
    #[error("the event loop: {0}")]
    Loop(#[from] io::Error),
    /// Between service and agent.
    #[error(transparent)]
    Agent(#[from] baton_sdk::Error),
    /// The arena's content.
    #[error("the arena: {0}")]
    Store(#[from] StoreError),
}

/// Serves under an agent until it says stop.
///
/// # Errors
/// See [`Error`]. What concerns the arena was reported to the agent too.
pub fn under_agent(options: &Options) -> Result<(), Error> {
    let mut server = bind(options)?;
    let hello = Hello::new(NAME, SCHEMA_KIND, SCHEMA_VERSION, options.arena_mib << 20);
    let (mut agent, mut arena) = Client::connect(&options.socket, hello)?;
    if let Err(error) = recognise(&arena) {
        // Said before anybody relies on this service: an update is refused in its trial then.
        let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        let _ = agent.failed(&format!("{error}{source}"));
        return Err(error.into());
    }
    server.watch(agent.as_raw_fd())?;
    if let Err(error) = rehearsal::rehearse() {
        // Then the first clients wait a little longer; nothing else hangs on it.
        let _ = writeln!(io::stderr(), "{NAME}: the rehearsal failed: {error}");
    }
    let mut carrier = Carry::begin(options);
    agent.ready()?;
    while let Some(order) = agent.wait(None)? {
        match order {
            Order::StandBy => {}
            Order::Serve(held) => match serve(&mut server, &mut agent, &mut arena, &mut carrier, held) {
                Ok(After::Frozen) => {}
                Ok(After::Stopped) => break,
                Err(error) => {
                    // It may be the agent who is gone; the error below says more than this report's.
                    let _ = agent.failed(&error.to_string());
                    return Err(error);
                }
            },
            // `serve` takes it where it belongs; the protocol's table refuses it anywhere else.
            Order::Freeze { .. } | Order::AgentIsBack => {}
            Order::Stop => break,
        }
    }
    Ok(())
}

/// From the order to serve to the report of being frozen.
fn serve(
    server: &mut Server,
    agent: &mut Client,
    arena: &mut Arena,
    carry: &mut Carry,
    held: Held,
) -> Result<After, Error> {
    let (mut store, seal) = open(arena.memory(&held), &held)?;
    carry.bring(server)?;
    server.begin(held.epoch)?;
    agent.activated(&held, store.len()?, seal)?;
    // Looked for first: one that came with the order to serve has left the socket already, and no readiness will tell of it.
    let order = loop {
        match agent.poll_order()? {
            Some(Order::AgentIsBack) => carry.begin_again(),
            Some(order) => break order,
            None => while server.turn(&mut store, None)? != Turn::Control {},
        }
    };
    let receipt = store.seal(held.epoch)?;
    let items = store.len()?;
    match order {
        Order::Freeze { .. } => {
            carry.take(server);
            agent.frozen(held, items, seal_word(receipt))?;
            Ok(After::Frozen)
        }
        // Told to leave: sealed all the same, so that a successor may attach.
        _ => Ok(After::Stopped),
    }
}

/// The way of the clients' connections to the next kernel.
struct Carry {
    carrier: Carrier,
    /// The agent knows that this service keeps its connections.
    enlisted: bool,
    /// They were given to it, and not taken back yet.
    given: bool,
}

impl Carry {
    fn begin(options: &Options) -> Carry {
        let socket = options.socket.with_file_name("connections.sock");
        let mut carry = Carry { carrier: Carrier::at(&socket, NAME), enlisted: false, given: false };
        carry.begin_again();
        carry
    }

    fn begin_again(&mut self) {
        let begun = self.carrier.begin();
        if let Err(error) = &begun {
            complain(&format!("clients will have to connect again after an update: {error}"));
        }
        self.enlisted = begun.is_ok();
    }

    /// Before anything is answered: what came from the kernel before, or stays after all.
    fn bring(&mut self, server: &mut Server) -> Result<(), Error> {
        if std::mem::take(&mut self.given) {
            // One that could not be held is not held.
            if let Err(error) = server.stay() {
                complain(&format!("the listener was not held: {error}"));
            }
        } else if self.enlisted {
            server.adopt(self.carrier.sockets()?)?;
        }
        Ok(())
    }

    /// No request is under way. Clients that cannot be given away connect again; that is no reason not to freeze.
    fn take(&mut self, server: &mut Server) {
        if !self.enlisted {
            return;
        }
        self.given = true;
        match server.keep(&self.carrier) {
            Ok(None) => {}
            Ok(Some((left, why))) => complain(&format!("{left} clients stay behind: {why}")),
            Err(error) => complain(&format!("clients stay behind: {error}")),
        }
    }
}

/// Nobody may be reading.
fn complain(what: &str) {
    let _ = writeln!(io::stderr(), "{NAME}: {what}");
}

/// What comes after serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Frozen,
    Stopped,
}

/// What can be known of the memory while another kernel's service still writes to it.
fn recognise(arena: &Arena) -> Result<(), StoreError> {
    if arena.is_fresh() {
        return Ok(());
    }
    let header = ArenaHeader::read(&arena.first_page()).map_err(ArenaError::from)?;
    Ok(header.alleged().check_identity(arena.len() as u64).map_err(ArenaError::from)?)
}

/// The store, and the seal that was on it (0: fresh), for the agent to compare with the one that the predecessor reported.
fn open<'m>(memory: &'m mut [u8], held: &Held) -> Result<(Store<'m>, u64), StoreError> {
    if held.fresh {
        return Ok((Store::create(memory, NAME, held.epoch, random())?, 0));
    }
    // Only alleged here; attaching checks it.
    let seal = ArenaHeader::read(memory).map_err(ArenaError::from)?.alleged().seal.get();
    let mut store = Store::attach(memory)?;
    if held.resumed {
        // A successor may have had it, and have been stopped.
        store.reclaim(held.epoch)?;
    } else {
        store.unseal(held.epoch)?;
    }
    Ok((store, seal.into()))
}

/// Serves alone, on memory of its own that ends with it.
///
/// # Errors
/// See [`Error`].
pub fn standalone(options: &Options) -> Result<(), Error> {
    let len = usize::try_from(options.arena_mib << 20).unwrap_or(usize::MAX);
    let mut memory = vec![0; len];
    let mut store = Store::create(&mut memory, NAME, 0, random())?;
    let mut server = bind(options)?;
    server.begin(0)?;
    // For whoever let the kernel choose the port. Nobody may be reading.
    let _ = writeln!(io::stdout(), "listening on {}", server.address()?);
    loop {
        server.turn(&mut store, None)?;
    }
}

fn bind(options: &Options) -> Result<Server, Error> {
    Server::bind(options.listen, options.max_clients).map_err(|error| Error::Bind(options.listen, error))
}

fn seal_word(receipt: SealReceipt) -> u64 {
    receipt.crc.into()
}

/// A number that nobody outside can know: the standard library's own hash seeds come from the kernel.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
