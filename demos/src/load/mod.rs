//! Clients that keep a machine busy and remember which writes were acknowledged; afterwards every one of them is looked for.
//!
//! Each connection has a thread, keys of its own, and a [`ledger`]: what the server said yes to, and what it was asked without the answer
//! ever coming. The checker's question is not "how many errors" but: *is everything that was acknowledged there, and nothing that
//! was never asked for?* A write without an answer may be there or not, until the very end (a request may lie in a socket for long).
//!
//! | file | what it is |
//! |---|---|
//! | `client.rs` | RESP over one blocking connection |
//! | `ledger.rs` | what one connection knows, and how that is compared with what is found: no I/O |
//! | `worker.rs` | one connection's life: paced requests, reconnects |
//! | `verify.rs` | reads everything back |

pub mod client;
pub mod ledger;
#[cfg(test)]
mod tests;
mod verify;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use ledger::Ledger;
pub use verify::VerifyError;
use worker::{Connection, work};

/// What load to make.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// The service.
    pub target: SocketAddr,
    /// Connections, each with a thread.
    pub connections: u32,
    /// Requests a second, all connections together: an emulated machine drowns easily.
    pub ops_per_second: u32,
    /// Requests sent before their answers are awaited.
    pub pipeline: u32,
    /// Bytes of a value.
    pub value_len: usize,
    /// When a client gives up: on connecting, and on an answer.
    pub timeout: Duration,
    /// Keys, list items and set members made by each connection; from then on existing ones are written again.
    pub items_per_connection: usize,
    /// Decides the order of requests.
    pub seed: u64,
}

impl LoadOptions {
    /// 8 connections, 400 requests a second.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            connections: 8,
            ops_per_second: 400,
            pipeline: 1,
            value_len: 64,
            timeout: Duration::from_secs(3),
            items_per_connection: 4096,
            seed: 1,
        }
    }
}

/// What a load found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Writes that the server said yes to.
    pub acknowledged: u64,
    /// Of these, not there at the end. Must be 0.
    pub lost: u64,
    /// Writes that were sent, and never answered: there or not, both is right.
    pub unknown: u64,
    /// Writes that the server said no to.
    pub refused: u64,
    /// Reads compared with what must be there, while the load ran.
    pub reads: u64,
    /// Answers and content that cannot be: a stale read, an item twice or out of order or never written, a torn MSET. Must be 0.
    pub contradictions: u64,
    /// Connections.
    pub connections: ConnectionReport,
    /// The first of the losses and contradictions, in words.
    pub complaints: Vec<String>,
}

/// What became of connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionReport {
    /// Open from the load's beginning to its end.
    pub kept: u64,
    /// Reset or closed by the other side.
    pub reset: u64,
    /// Given up by the client: no answer in time.
    pub timed_out: u64,
}

impl LoadReport {
    /// Nothing acknowledged is missing and nothing is there that cannot be. A load that wrote nothing is not clean: it proved nothing.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.acknowledged > 0 && self.lost == 0 && self.contradictions == 0
    }

    fn complain(&mut self, words: String) {
        if self.complaints.len() < 20 {
            self.complaints.push(words);
        }
    }
}

/// A load at work. Dropping it stops it without a check.
#[derive(Debug)]
pub struct Load {
    options: LoadOptions,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<(Ledger, ConnectionReport)>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
}

impl Load {
    /// Starts the load, from threads started here (so in this thread's network namespace). The service need not be there yet.
    ///
    /// # Errors
    /// No thread; or nothing to do.
    pub fn start(options: LoadOptions) -> io::Result<Self> {
        if options.connections == 0 || options.ops_per_second == 0 || options.pipeline == 0 {
            let words = format!(
                "a load of {} connections, {} requests a second, {} at a time does nothing",
                options.connections, options.ops_per_second, options.pipeline
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        // Keys of this run only: what lies there from an earlier one is nobody's.
        let run = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let mut load = Self { options, shared: Arc::default(), workers: Vec::new() };
        for index in 0..options.connections {
            let ledger = Ledger::new(&format!("{run:x}:{index}"), options.value_len, options.items_per_connection);
            let shared = load.shared.clone();
            let name = format!("load-{index}");
            let worker = thread::Builder::new().name(name).spawn(move || work(&options, index, ledger, &shared))?;
            load.workers.push(worker);
        }
        Ok(load)
    }

    /// Acknowledged writes so far: for a progress display, and to see that the service answers.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Stops the load and reads everything back, trying for `patience`.
    ///
    /// # Errors
    /// The service could not be read: that is not the same as clean.
    pub fn finish(self, patience: Duration) -> Result<LoadReport, VerifyError> {
        self.halt()?.verify(patience)
    }

    /// Stops the load; nothing is sent any more, nothing is read back yet.
    ///
    /// # Errors
    /// A bug of the load itself.
    pub fn halt(mut self) -> Result<Halted, VerifyError> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut halted = Halted {
            options: self.options,
            ledgers: Vec::new(),
            connections: ConnectionReport::default(),
            acknowledged: 0,
        };
        for worker in std::mem::take(&mut self.workers) {
            let (ledger, connections) = worker.join().map_err(|_| VerifyError::WorkerPanicked)?;
            halted.connections.kept += connections.kept;
            halted.connections.reset += connections.reset;
            halted.connections.timed_out += connections.timed_out;
            halted.ledgers.push(ledger);
        }
        halted.acknowledged = self.acknowledged();
        Ok(halted)
    }
}

/// A load that has stopped, and what it knows.
#[derive(Debug)]
pub struct Halted {
    options: LoadOptions,
    ledgers: Vec<Ledger>,
    connections: ConnectionReport,
    acknowledged: u64,
}

impl Halted {
    /// Writes that were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// What became of its connections.
    #[must_use]
    pub fn connections(&self) -> ConnectionReport {
        self.connections
    }

    /// Reads everything back, trying for `patience`.
    ///
    /// # Errors
    /// The service could not be read: that is not the same as clean.
    pub fn verify(self, patience: Duration) -> Result<LoadReport, VerifyError> {
        let mut report = LoadReport { connections: self.connections, ..LoadReport::default() };
        let mut connection = Connection::new(self.options.target, self.options.timeout);
        verify::verify(&mut connection, self.ledgers, patience, &mut report)?;
        Ok(report)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}
