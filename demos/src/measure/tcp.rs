//! The same question over TCP: RESP `PING`, on one kept connection or on a fresh one each time, at a low rate.
//!
//! What UDP cannot tell: whether connections survive, and how soon a new client gets in. One thread, one request at a time: while it
//! waits for an answer, requests become due; they are sent late and judged by when they were due, and those that are older than the time-out by then
//! count as unsent.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::samples::{Sample, Samples};

/// How to probe over TCP.
#[derive(Debug, Clone, Copy)]
pub struct TcpOptions {
    /// The service.
    pub target: SocketAddr,
    /// Requests a second.
    pub rate_hz: u32,
    /// When a client gives up: on connecting, and on an answer.
    pub timeout: Duration,
    /// A new connection for each request.
    pub fresh: bool,
}

/// What became of connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Made.
    pub made: u64,
    /// Reset or closed by the other side.
    pub reset: u64,
    /// Given up: no answer in time.
    pub timed_out: u64,
    /// Could not be made (refused, unreachable, or no answer in time).
    pub refused: u64,
}

/// A TCP prober at work. Dropping it stops it.
#[derive(Debug)]
pub struct TcpProber {
    options: TcpOptions,
    started: Instant,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(Vec<Sample>, Connections)>>,
}

impl TcpProber {
    /// Starts probing, from a thread started here (so in this thread's network namespace).
    ///
    /// # Errors
    /// A rate of zero or above 1000; no thread.
    pub fn start(options: TcpOptions) -> io::Result<Self> {
        if options.rate_hz == 0 || options.rate_hz > 1000 {
            let words = format!("cannot probe {} times a second over TCP: 1 to 1000", options.rate_hz);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, started) = (stop.clone(), Instant::now());
        let thread =
            thread::Builder::new().name("probe-tcp".to_owned()).spawn(move || probe(&options, started, &stopped))?;
        Ok(Self { options, started, stop, thread: Some(thread) })
    }

    /// The zero of all its times.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Stops, and gives what was seen.
    #[must_use]
    pub fn stop(mut self) -> (Samples, Connections) {
        self.stop.store(true, Ordering::Relaxed);
        let (all, connections) = self.thread.take().and_then(|t| t.join().ok()).unwrap_or_default();
        let period = Duration::from_secs(1) / self.options.rate_hz;
        (Samples { all, period, in_time: self.options.timeout }, connections)
    }
}

impl Drop for TcpProber {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn probe(options: &TcpOptions, started: Instant, stop: &AtomicBool) -> (Vec<Sample>, Connections) {
    let period = Duration::from_secs(1) / options.rate_hz;
    let (mut all, mut count, mut kept) = (Vec::new(), Connections::default(), None);
    while !stop.load(Ordering::Relaxed) {
        let due = period * all.len() as u32;
        thread::sleep(due.saturating_sub(started.elapsed()));
        let mut sample = Sample { intended: due.as_nanos() as u64, sent: None, received: None, epoch: None, unread: 0 };
        if started.elapsed().saturating_sub(due) <= options.timeout {
            kept = kept.take().or_else(|| connect(options, &mut count));
            if let Some(mut socket) = kept.take() {
                sample.sent = Some(started.elapsed().as_nanos() as u64);
                match ask(&mut socket) {
                    Ok(()) => {
                        sample.received = Some(started.elapsed().as_nanos() as u64);
                        kept = (!options.fresh).then_some(socket);
                    }
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                        count.timed_out += 1;
                    }
                    Err(_) => count.reset += 1,
                }
            }
        }
        all.push(sample);
    }
    (all, count)
}

fn connect(options: &TcpOptions, count: &mut Connections) -> Option<TcpStream> {
    let made = TcpStream::connect_timeout(&options.target, options.timeout).and_then(|socket| {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(options.timeout))?;
        Ok(socket)
    });
    match made {
        Ok(socket) => {
            count.made += 1;
            Some(socket)
        }
        Err(_) => {
            count.refused += 1;
            None
        }
    }
}

fn ask(socket: &mut TcpStream) -> io::Result<()> {
    socket.write_all(b"PING\r\n")?;
    let mut reply = [0; 7];
    socket.read_exact(&mut reply)?;
    if &reply != b"+PONG\r\n" {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no PONG"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Answers each connection's requests; hangs up after a number of them.
    fn service(listener: TcpListener, hang_up_after: usize) {
        for socket in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut socket = socket;
                let mut line = [0; 6];
                for _ in 0..hang_up_after {
                    if socket.read_exact(&mut line).is_err() || socket.write_all(b"+PONG\r\n").is_err() {
                        return;
                    }
                }
            });
        }
    }

    fn run(fresh: bool) -> (Samples, Connections) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let target = listener.local_addr().expect("bound");
        thread::spawn(move || service(listener, 10));
        let options = TcpOptions { target, rate_hz: 100, timeout: Duration::from_secs(2), fresh };
        let prober = TcpProber::start(options).expect("started");
        while prober.started().elapsed() < Duration::from_secs(1) {
            thread::sleep(Duration::from_millis(10));
        }
        prober.stop()
    }

    #[test]
    fn resets_of_a_kept_connection_are_counted() {
        let (samples, connections) = run(false);
        let report = samples.whole();
        assert!(connections.reset >= 2 && connections.made >= connections.reset, "{connections:?}");
        assert_eq!(report.lost as u64, connections.reset, "{report:?}");
        assert!(report.answered >= 20, "{report:?}");
    }

    #[test]
    fn fresh_connections_know_no_resets() {
        let (samples, connections) = run(true);
        assert_eq!((connections.reset, connections.timed_out, connections.refused), (0, 0, 0));
        assert_eq!(samples.whole().answered as u64, connections.made);
    }
}
