//! One connection's life: requests at its share of the rate; when the connection is lost, a new one, trying ever more slowly.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::client::Client;
use super::ledger::{Ledger, Op};
use super::{ConnectionReport, LoadOptions, Shared};

const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const BACKOFF_MOST: Duration = Duration::from_millis(250);
/// No sleep is longer, so that a stop is seen soon.
const STOP_TURN: Duration = Duration::from_millis(50);

/// A connection that is made when it is needed.
#[derive(Debug)]
pub(super) struct Connection {
    target: SocketAddr,
    timeout: Duration,
    client: Option<Client>,
    backoff: Duration,
    pub(super) report: ConnectionReport,
    first: bool,
}

impl Connection {
    pub(super) fn new(target: SocketAddr, timeout: Duration) -> Self {
        let report = ConnectionReport::default();
        Self { target, timeout, client: None, backoff: BACKOFF_FIRST, report, first: true }
    }

    /// The connection there is, or a new one.
    pub(super) fn get(&mut self) -> io::Result<&mut Client> {
        if self.client.is_none() {
            match Client::connect(self.target, self.timeout) {
                Ok(client) => {
                    self.report.kept = u64::from(std::mem::take(&mut self.first));
                    self.backoff = BACKOFF_FIRST;
                    self.client = Some(client);
                }
                Err(error) => return Err(error),
            }
        }
        self.client.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// It failed: closed here, and counted by how.
    pub(super) fn failed(&mut self, error: &io::Error) {
        if self.client.take().is_some() {
            self.report.kept = 0;
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
                self.report.timed_out += 1;
            } else {
                self.report.reset += 1;
            }
        }
    }

    /// How long to wait before the next try.
    pub(super) fn backoff(&mut self) -> Duration {
        let wait = self.backoff;
        self.backoff = (wait * 2).min(BACKOFF_MOST);
        wait
    }
}

pub(super) fn work(
    options: &LoadOptions,
    index: u32,
    mut ledger: Ledger,
    shared: &Shared,
) -> (Ledger, ConnectionReport) {
    ledger.seed(options.seed);
    let mut connection = Connection::new(options.target, options.timeout);
    let turn = Duration::from_secs(1) * options.connections * options.pipeline / options.ops_per_second;
    // Spread over a turn: together they would come in bursts.
    let mut due = Instant::now() + turn * index / options.connections;
    while pause_until(due, shared) {
        let client = match connection.get() {
            Ok(client) => client,
            Err(_) => {
                due = Instant::now() + connection.backoff();
                continue;
            }
        };
        let ops: Vec<Op> = (0..options.pipeline).map(|_| ledger.choose()).collect();
        if let Err(error) = exchange(client, &mut ledger, &ops, shared) {
            connection.failed(&error);
        }
        // Behind time: no catching up. The rate is a limit, and a silence is for the prober to see.
        due = (due + turn).max(Instant::now());
    }
    (ledger, connection.report)
}

/// Sends all, then takes answers as they come; what has none when the connection fails stays open.
fn exchange(client: &mut Client, ledger: &mut Ledger, ops: &[Op], shared: &Shared) -> io::Result<()> {
    for op in ops {
        let request = ledger.request(op);
        let words: Vec<&[u8]> = request.iter().map(Vec::as_slice).collect();
        client.queue(&words);
    }
    let mut result = client.send();
    for op in ops {
        match result.and_then(|()| client.receive()) {
            Ok(reply) => {
                if ledger.answered(op, &reply) {
                    shared.acknowledged.fetch_add(1, Ordering::Relaxed);
                }
                result = Ok(());
            }
            Err(error) => {
                ledger.unanswered(op);
                result = Err(error);
            }
        }
    }
    result
}

/// False: it is time to stop.
fn pause_until(due: Instant, shared: &Shared) -> bool {
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return false;
        }
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(STOP_TURN));
    }
}
