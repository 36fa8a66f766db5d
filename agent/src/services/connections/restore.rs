//! A socket is made that goes on with a connection, step by step as [`super::judge::steps`] says. Up to [`Restored::let_go`] nobody hears of
//! it but this kernel; what is dropped before is forgotten without a word.

#![expect(clippy::host_endian_bytes, reason = "the kernel's socket options are words of the machine's own order")]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, socket};
use state_schemas::connections::Bytes;
use state_schemas::latest::connection::{Connection, Endpoint, Family, Settings, State};
use state_schemas::latest::handover_record::Ip;

use super::dump::{RECEIVE_FIXED, SEND_FIXED, raw_window};
use super::judge::segment::{Segment, packet};
use super::judge::{Step, after_repair, state, steps, timestamp_after};
use super::sys::{self, Queue, Repair, SOCKET, TCP, set, set_number};

/// Bytes that are put into a queue at once. Each piece is one block of the kernel's memory in the receive queue.
const PIECE: usize = 8 << 10;
/// How much room the kernel counts for a byte in a queue, at most: small pieces take whole pages.
const ROOM_FOR_BYTE: usize = 4;
/// How long this kernel may take to deliver a segment to itself.
const DELIVERY: Duration = Duration::from_millis(500);

// include/net/tcp.h
const OPTION_SEGMENT: u32 = 2;
const OPTION_SCALE: u32 = 3;
const OPTION_SELECTIVE: u32 = 4;
const OPTION_TIMESTAMP: u32 = 8;

/// A connection that is here and that the peer has not heard of.
#[derive(Debug)]
pub struct Restored {
    socket: Option<OwnedFd>,
    connection: Connection,
    unsent: Vec<u8>,
    /// What the service said of it.
    pub note: Vec<u8>,
}

/// Makes a socket for a connection, `passed` after it was written down. The address of our end must be this kernel's own.
///
/// # Errors
/// Which step this kernel refuses. Nothing is left then.
pub fn restore(connection: Connection, bytes: Bytes, passed: Duration) -> Result<Restored> {
    let (local, peer) = (address(connection.local), address(connection.peer));
    let about = || format!("the connection of {} from {peer} to {local}", connection.service);
    let family = match connection.family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    let made = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).with_context(about)?;
    for step in steps(&connection) {
        take(step, made.as_fd(), &connection, &bytes, passed).with_context(|| format!("{}: {step:?}", about()))?;
    }
    let found = reached(made.as_fd())?;
    let expected = before_its_end(&connection);
    if found != expected {
        bail!("{}: it is {found:?} and should be {expected:?}", about());
    }
    Ok(Restored { socket: Some(made), connection, unsent: bytes.unsent, note: bytes.note })
}

/// Where it stands while our FIN waits behind bytes that are not sent.
fn before_its_end(connection: &Connection) -> State {
    match (connection.state, after_repair(connection).finish) {
        (State::FinWait1, true) => State::Established,
        (State::LastAck | State::Closing, true) => State::CloseWait,
        (state, _) => state,
    }
}

impl Restored {
    /// Whose it is.
    pub fn service(&self) -> &str {
        &self.connection.service
    }

    /// From here on it is an ordinary socket, and the peer hears of it: what was not sent is sent.
    pub fn let_go(mut self) -> Result<(Vec<u8>, OwnedFd)> {
        let Some(made) = self.socket.take() else { bail!("there is no socket") };
        let socket = made.as_fd();
        sys::repair(socket, Repair::Off)?;
        let after = after_repair(&self.connection);
        if after.send {
            fill_all(socket, &self.unsent).context("what was not sent")?;
        }
        if after.finish {
            sys::finish(socket)?;
        }
        settle(socket, &self.connection.settings)?;
        Ok((std::mem::take(&mut self.note), made))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if let Some(made) = &self.socket {
            // Under repair, closing would do, too; an error changes nothing.
            let _ = sys::forget(made.as_fd());
        }
    }
}

fn take(step: Step, socket: BorrowedFd<'_>, connection: &Connection, bytes: &Bytes, passed: Duration) -> Result<()> {
    match step {
        Step::RepairOn => sys::repair(socket, Repair::On)?,
        Step::Prepare => prepare(socket, connection)?,
        Step::Bind => bind_to(socket, address(connection.local))?,
        Step::ReceiveFrom(next) => {
            sys::choose(socket, Queue::Receive)?;
            sys::set_sequence(socket, next)?;
        }
        Step::SendFrom(next) => {
            sys::choose(socket, Queue::Send)?;
            sys::set_sequence(socket, next)?;
        }
        Step::Connect => {
            use std::os::fd::AsRawFd;
            connect(socket.as_raw_fd(), &SockaddrStorage::from(address(connection.peer)))?;
        }
        Step::Agree => agree(socket, connection)?,
        Step::Timestamp(then) => {
            set_number(socket, TCP, libc::TCP_TIMESTAMP, timestamp_after(then, passed).cast_signed())?;
        }
        Step::FillReceived => {
            sys::choose(socket, Queue::Receive)?;
            fill_all(socket, &bytes.received)?;
        }
        Step::FillUnacknowledged => {
            sys::choose(socket, Queue::Send)?;
            fill_all(socket, &bytes.unacknowledged)?;
            sys::choose(socket, Queue::None)?;
        }
        Step::Windows { told_at, receive } => set_windows(socket, connection, told_at, receive)?,
        Step::OwnFinSent => {
            // Said while the send queue is chosen, it counts as sent.
            sys::choose(socket, Queue::Send)?;
            sys::finish(socket)?;
            sys::choose(socket, Queue::None)?;
        }
        Step::PeerFin => {
            let fin = connection.receive_next.wrapping_sub(1);
            receive_again(socket, connection, fin, connection.send_first(), true, State::peer_fin)?;
        }
        Step::OwnFinAcknowledged => {
            let (next, all) = (connection.receive_next, connection.write_next);
            receive_again(socket, connection, next, all, false, State::own_fin_acknowledged)?;
        }
        Step::Set => set_all(socket, &connection.settings)?,
    }
    Ok(())
}

fn address(end: Endpoint) -> SocketAddr {
    let ip = match end.address {
        Ip::V4(v4) => IpAddr::V4(Ipv4Addr::from(v4)),
        Ip::V6(v6) => IpAddr::V6(Ipv6Addr::from(v6)),
    };
    SocketAddr::new(ip, end.port)
}

fn bind_to(socket: BorrowedFd<'_>, local: SocketAddr) -> Result<()> {
    use std::os::fd::AsRawFd;
    Ok(bind(socket.as_raw_fd(), &SockaddrStorage::from(local))?)
}

/// Before anything is in it: room for what will be, and what decides on the way to the peer.
fn prepare(socket: BorrowedFd<'_>, connection: &Connection) -> Result<()> {
    let lengths = connection.lengths;
    let room = |bytes: u64| i32::try_from(bytes * ROOM_FOR_BYTE as u64 / 2).unwrap_or(i32::MAX / 2);
    let unfinished = u64::from(lengths.unacknowledged) + u64::from(lengths.unsent);
    // Fixed for the time being ([`settle`]); not less than the system gives by itself, which the windows were made from.
    for (option, force, bytes) in [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, room(unfinished)),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, room(lengths.received.into())),
    ] {
        if bytes > sys::get_number(socket, SOCKET, option)? / 2 {
            set_number(socket, SOCKET, force, bytes)?;
        }
    }
    let settings = &connection.settings;
    if connection.family == Family::V6 {
        set_number(socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
        set_number(socket, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, settings.traffic_class.into())?;
    }
    set_number(socket, libc::IPPROTO_IP, libc::IP_TOS, settings.tos.into())?;
    set_number(socket, SOCKET, libc::SO_MARK, settings.mark.cast_signed())?;
    set_number(socket, SOCKET, libc::SO_PRIORITY, settings.priority.cast_signed())?;
    Ok(())
}

/// `struct tcp_repair_opt`s.
fn agree(socket: BorrowedFd<'_>, connection: &Connection) -> Result<()> {
    let agreed = connection.agreed;
    let mut options = vec![(OPTION_SEGMENT, u32::from(agreed.segment))];
    options.extend(agreed.scale.map(|scale| (OPTION_SCALE, u32::from(scale.send) | u32::from(scale.receive) << 16)));
    options.extend(agreed.selective.then_some((OPTION_SELECTIVE, 0)));
    options.extend(agreed.timestamp.map(|_| (OPTION_TIMESTAMP, 0)));
    let raw: Vec<u8> = options.into_iter().flat_map(|(code, value)| [code, value]).flat_map(u32::to_ne_bytes).collect();
    Ok(set(socket, TCP, libc::TCP_REPAIR_OPTIONS, &raw)?)
}

fn set_windows(socket: BorrowedFd<'_>, connection: &Connection, told_at: u32, receive: u32) -> Result<()> {
    // What this kernel's structure has beyond these five numbers stays as it is.
    let mut raw = raw_window(socket)?;
    let window = connection.window;
    let words = [window.updated_by, window.send, window.send_most, receive, told_at];
    for (at, word) in raw.chunks_exact_mut(4).zip(words) {
        at.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(set(socket, TCP, libc::TCP_REPAIR_WINDOW, &raw)?)
}

fn fill_all(socket: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let piece = &bytes[done..bytes.len().min(done + PIECE)];
        match sys::fill(socket, piece) {
            Ok(0) => bail!("this kernel takes {done} of {} bytes", bytes.len()),
            Ok(len) => done += len,
            Err(error) => {
                return Err(error).with_context(|| format!("this kernel takes {done} of {} bytes", bytes.len()));
            }
        }
    }
    Ok(())
}

/// Has the socket receive a segment without data that the peer had sent, and waits until it has (`done`).
fn receive_again(
    socket: BorrowedFd<'_>,
    connection: &Connection,
    sequence: u32,
    acknowledges: u32,
    fin: bool,
    done: impl Fn(State) -> bool,
) -> Result<()> {
    // An IPv6 socket's IPv4 peer is one of IPv4 on the wire.
    let wire = |end| {
        let SocketAddr::V6(v6) = address(end) else { return address(end) };
        v6.ip().to_ipv4_mapped().map_or(SocketAddr::V6(v6), |v4| SocketAddr::from((v4, v6.port())))
    };
    let (from, to) = (wire(connection.peer), wire(connection.local));
    // What the peer takes stays what it is. Rounded down, as it was when it came.
    let scale = connection.agreed.scale.map_or(0, |scale| scale.send);
    let window = u16::try_from(connection.window.send >> scale).unwrap_or(u16::MAX);
    let packet = packet(&Segment { from, to, sequence, acknowledges, fin, window }).context("the ends do not match")?;
    let injector = sys::injector(to.is_ipv6())?;
    sys::inject(injector.as_fd(), &packet, to.ip()).context("cannot give this kernel a segment")?;
    let until = Instant::now() + DELIVERY;
    loop {
        if done(reached(socket)?) {
            return Ok(());
        }
        if Instant::now() > until {
            bail!(
                "this kernel has not delivered a segment to itself in {DELIVERY:?}: does a rule drop what comes over `lo`?"
            );
        }
        // It is taken in by this CPU's next softirq, at the latest.
        std::thread::yield_now();
    }
}

fn reached(socket: BorrowedFd<'_>) -> Result<State> {
    let mut info = [0; 8];
    sys::get(socket, TCP, libc::TCP_INFO, &mut info)?;
    Ok(state(info[0])?)
}

/// What its owner had set, as far as it does not touch the queues.
fn set_all(socket: BorrowedFd<'_>, settings: &Settings) -> Result<()> {
    let Settings { keepalive, congestion, .. } = settings;
    for (option, value) in [
        (libc::TCP_NODELAY, i32::from(settings.no_delay)),
        (libc::TCP_CORK, i32::from(settings.cork)),
        (libc::TCP_KEEPIDLE, keepalive.idle_s.cast_signed()),
        (libc::TCP_KEEPINTVL, keepalive.interval_s.cast_signed()),
        (libc::TCP_KEEPCNT, keepalive.count.cast_signed()),
        (libc::TCP_USER_TIMEOUT, settings.user_timeout_ms.cast_signed()),
        (libc::TCP_NOTSENT_LOWAT, settings.unsent_low.cast_signed()),
    ] {
        set_number(socket, TCP, option, value).with_context(|| format!("TCP option {option} to {value}"))?;
    }
    if keepalive.on {
        set_number(socket, SOCKET, libc::SO_KEEPALIVE, 1)?;
    }
    if let Some(seconds) = settings.linger_s {
        let linger: Vec<u8> = [1, seconds].into_iter().flat_map(u32::to_ne_bytes).collect();
        set(socket, SOCKET, libc::SO_LINGER, &linger)?;
    }
    if let Err(error) = set(socket, TCP, libc::TCP_CONGESTION, congestion.as_bytes()) {
        // This kernel may not have it: its own will do.
        tracing::debug!("congestion control {congestion}: {error}");
    }
    let flags = if settings.nonblocking { nix::fcntl::OFlag::O_NONBLOCK } else { nix::fcntl::OFlag::empty() };
    nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Out of repair, which has its own opinion on reuse: what it had, and buffers that the system sizes again where they were not fixed.
fn settle(socket: BorrowedFd<'_>, settings: &Settings) -> io::Result<()> {
    set_number(socket, SOCKET, libc::SO_REUSEADDR, settings.reuse_address.into())?;
    set_number(socket, SOCKET, libc::SO_REUSEPORT, settings.reuse_port.into())?;
    let mut fixed = 0;
    for (buffer, lock, force) in [
        (settings.send_buffer, SEND_FIXED, libc::SO_SNDBUFFORCE),
        (settings.receive_buffer, RECEIVE_FIXED, libc::SO_RCVBUFFORCE),
    ] {
        if let Some(bytes) = buffer {
            set_number(socket, SOCKET, force, i32::try_from(bytes).unwrap_or(i32::MAX))?;
            fixed |= lock;
        }
    }
    set_number(socket, SOCKET, libc::SO_BUF_LOCK, fixed)
}
