//! The UDP prober: `PING <run><seq>` datagrams at a fixed rate, answered by the service's own event loop.
//!
//! Pacing: sleep until shortly before the intended time (with the least timer slack), then spin. Both threads ask for real-time
//! priority (through `chrt`, if it is there and allowed), since an emulated machine takes every CPU it can get; without it the
//! samples just show the prober's own lateness. Replies are stamped by the kernel on arrival (`SO_TIMESTAMPNS`).

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;

use super::samples::{Sample, Samples};

/// How to probe.
#[derive(Debug, Clone, Copy)]
pub struct ProbeOptions {
    /// The service.
    pub target: SocketAddr,
    /// Requests a second.
    pub rate_hz: u32,
    /// What still counts as answered in time (see `samples.rs`).
    pub in_time: Duration,
}

impl ProbeOptions {
    /// 1 kHz, and 100 ms to answer.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        Self { target, rate_hz: 1000, in_time: Duration::from_millis(100) }
    }
}

/// Begins to spin this long before a send: about what a sleeping thread needs to wake up.
const SPIN: Duration = Duration::from_micros(60);
/// How long replies may still come after the last request.
const STRAGGLERS: Duration = Duration::from_millis(500);
const RECEIVE_TURN: Duration = Duration::from_millis(20);
const RECEIVE_BUFFER: usize = 1 << 20;

/// A prober at work. Dropping it stops it and throws its samples away.
#[derive(Debug)]
pub struct Prober {
    options: ProbeOptions,
    shared: Arc<Shared>,
    sender: Option<JoinHandle<Vec<Option<u64>>>>,
    receiver: Option<JoinHandle<Vec<Reply>>>,
}

#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    started: Instant,
    period: Duration,
    run: u32,
    stop_sending: AtomicBool,
    stop_receiving: AtomicBool,
    answered: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Reply {
    seq: u32,
    received: u64,
    unread: u64,
    epoch: Option<u64>,
}

impl Prober {
    /// Starts probing. The socket is made in this thread.
    ///
    /// # Errors
    /// A rate of zero or above 100 kHz; no socket; no thread.
    pub fn start(options: ProbeOptions) -> io::Result<Self> {
        if options.rate_hz == 0 || options.rate_hz > 100_000 {
            let words = format!("cannot probe {} times a second: 1 to 100000", options.rate_hz);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        let any: SocketAddr = if options.target.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(options.target)?; // replies from elsewhere are not delivered
        socket.set_read_timeout(Some(RECEIVE_TURN))?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        let shared = Arc::new(Shared {
            // Told from replies to an earlier prober on the same port.
            run: u32::from(socket.local_addr()?.port()) << 16 | (std::process::id() & 0xffff),
            socket,
            started: Instant::now(),
            period: Duration::from_secs(1) / options.rate_hz,
            stop_sending: AtomicBool::new(false),
            stop_receiving: AtomicBool::new(false),
            answered: AtomicU64::new(0),
        });
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        let (for_sender, for_receiver) = (shared.clone(), shared.clone());
        let receiver = spawn("probe-receive").spawn(move || receive(&for_receiver))?;
        let mut prober = Self { options, shared, sender: None, receiver: Some(receiver) };
        prober.sender = Some(spawn("probe-send").spawn(move || send(&for_sender))?);
        Ok(prober)
    }

    /// The zero of all its times.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.shared.started
    }

    /// Replies so far: for a progress display, and to wait for the service.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Stops sending, waits shortly for stragglers, and gives what was seen.
    #[must_use]
    pub fn stop(mut self) -> Samples {
        let (sent, replies) = self.halt();
        let period = self.shared.period.as_nanos() as u64;
        let blank = |(i, sent): (usize, Option<u64>)| Sample {
            intended: i as u64 * period,
            sent,
            received: None,
            epoch: None,
            unread: 0,
        };
        let mut all: Vec<Sample> = sent.into_iter().enumerate().map(blank).collect();
        for reply in replies {
            if let Some(sample @ Sample { received: None, .. }) = all.get_mut(reply.seq as usize) {
                (sample.received, sample.epoch, sample.unread) = (Some(reply.received), reply.epoch, reply.unread);
            }
        }
        Samples { all, period: self.shared.period, in_time: self.options.in_time }
    }

    fn halt(&mut self) -> (Vec<Option<u64>>, Vec<Reply>) {
        self.shared.stop_sending.store(true, Ordering::Relaxed);
        let sent = self.sender.take().and_then(|t| t.join().ok()).unwrap_or_default();
        if !sent.is_empty() {
            thread::sleep(STRAGGLERS);
        }
        self.shared.stop_receiving.store(true, Ordering::Relaxed);
        (sent, self.receiver.take().and_then(|t| t.join().ok()).unwrap_or_default())
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.shared.stop_sending.store(true, Ordering::Relaxed);
        self.shared.stop_receiving.store(true, Ordering::Relaxed);
    }
}

fn send(shared: &Shared) -> Vec<Option<u64>> {
    prefer_this_thread();
    // A minute before the first reallocation, which may take a moment.
    let mut sent = Vec::with_capacity(60_000);
    let mut datagram = Vec::with_capacity(32);
    while !shared.stop_sending.load(Ordering::Relaxed) {
        let seq = sent.len() as u32;
        let due = shared.started + shared.period * seq;
        pause_until(due);
        datagram.clear();
        // Writing to a vector cannot fail.
        let _ = io::Write::write_fmt(&mut datagram, format_args!("PING {:08x}{seq:08x}", shared.run));
        let now = shared.started.elapsed().as_nanos() as u64;
        // An error is also how an earlier datagram's ICMP answer is reported, once: this one is then tried again.
        let went = shared.socket.send(&datagram).or_else(|_| shared.socket.send(&datagram)).is_ok();
        sent.push(went.then_some(now));
    }
    sent
}

fn pause_until(due: Instant) {
    loop {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        if left > SPIN {
            thread::sleep(left - SPIN);
        } else {
            std::hint::spin_loop();
        }
    }
}

fn receive(shared: &Shared) -> Vec<Reply> {
    prefer_this_thread();
    let mut replies = Vec::with_capacity(60_000);
    let mut space = nix::cmsg_space!(TimeSpec);
    while !shared.stop_receiving.load(Ordering::Relaxed) {
        let mut buffer = [0; 128];
        let mut iov = [IoSliceMut::new(&mut buffer)];
        // A time-out looks at the flag again; what ICMP reports is the sender's affair.
        let Ok(message) = recvmsg::<()>(shared.socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty())
        else {
            continue;
        };
        let now = shared.started.elapsed();
        let stamp = message.cmsgs().ok().and_then(|mut c| {
            c.find_map(
                |c| if let ControlMessageOwned::ScmTimestampns(at) = c { Some(Duration::from(at)) } else { None },
            )
        });
        let len = message.bytes;
        // How long it lay there: both ends of this are wall-clock times of this host, microseconds apart.
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unread = stamp.map_or(Duration::ZERO, |at| wall.saturating_sub(at)).min(now);
        if let Some((seq, epoch)) = understand(&buffer[..len], shared.run) {
            let received = (now - unread).as_nanos() as u64;
            replies.push(Reply { seq, received, unread: unread.as_nanos() as u64, epoch });
            shared.answered.fetch_add(1, Ordering::Relaxed);
        }
    }
    replies
}

/// `PONG <run><seq> <epoch>`; a bare echo without the epoch will do.
fn understand(reply: &[u8], run: u32) -> Option<(u32, Option<u64>)> {
    let text = std::str::from_utf8(reply).ok()?.strip_prefix("PONG ")?;
    let (tag, epoch) = text.split_once(' ').map_or((text, None), |(tag, epoch)| (tag, epoch.parse().ok()));
    let plain = tag.len() == 16 && tag.bytes().all(|b| b.is_ascii_hexdigit());
    let tag = u64::from_str_radix(tag, 16).ok().filter(|_| plain)?;
    ((tag >> 32) as u32 == run).then_some((tag as u32, epoch))
}

/// Wakes in time on a busy machine, if the system lets it.
pub(super) fn prefer_this_thread() {
    // Of use without the priority too; a kernel that refuses leaves 50 µs.
    let _ = nix::sys::prctl::set_timerslack(1);
    let mut chrt = Command::new("chrt");
    chrt.args(["--fifo", "--pid", "1", &nix::unistd::gettid().to_string()]);
    let _ = chrt.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_understood_or_ignored() {
        assert_eq!(understand(b"PONG 0000000700000003 2", 7), Some((3, Some(2))));
        assert_eq!(understand(b"PONG 0000000700000003", 7), Some((3, None)));
        for other in
            [&b"PONG 0000000800000003 2"[..], b"PING 0000000700000003", b"PONG 3", b"\xff", b"PONG +000000700000003"]
        {
            assert_eq!(understand(other, 7), None);
        }
    }

    /// A responder that is silent for a while must be seen so. It keeps its own account, since a busy machine may stall it too.
    #[test]
    fn a_silence_of_known_length_is_measured() {
        const SILENCE: Duration = Duration::from_millis(300);
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
        socket.set_read_timeout(Some(Duration::from_millis(400))).expect("set");
        let target = socket.local_addr().expect("bound");
        let responder = thread::spawn(move || {
            let (began, mut silent) = (Instant::now(), None::<Instant>);
            let (mut last, mut longest) = (None::<Instant>, Duration::ZERO);
            let mut buffer = [0; 128];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                if began.elapsed() > Duration::from_millis(500) && silent.is_none_or(|s| s.elapsed() < SILENCE) {
                    silent.get_or_insert_with(Instant::now);
                    continue; // lost
                }
                let epoch = if silent.is_some() { " 2" } else { " 1" };
                let reply = [b"PONG ", &buffer[5..len], epoch.as_bytes()].concat();
                longest = longest.max(last.map_or(Duration::ZERO, |l| l.elapsed()));
                last = Some(Instant::now());
                socket.send_to(&reply, from).expect("sent");
            }
            longest.as_secs_f64() * 1e3
        });
        let prober = Prober::start(ProbeOptions::new(target)).expect("started");
        while prober.started().elapsed() < Duration::from_millis(1200) {
            thread::sleep(Duration::from_millis(10));
        }
        assert!(prober.answered() > 0);
        let samples = prober.stop();
        let longest = responder.join().expect("no panic");
        let report = samples.whole();
        let silence = report.silence.expect("due");
        assert!(longest >= 300.0 && (silence.max_reply_gap_ms - longest).abs() < 20.0, "{longest}: {report:?}");
        assert!(silence.blackout_ms >= 300.0 - 20.0, "{report:?}");
        assert!(report.due > 1000 && report.lost > 200 && report.answered > 300, "{report:?}");
        assert_eq!(report.epoch_regressions, 0);
    }
}
