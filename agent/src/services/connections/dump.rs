//! A connection is taken from its socket: looked at, held, put under repair, written down.

#![expect(clippy::host_endian_bytes, reason = "the kernel's socket options are words of the machine's own order")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail};
use state_schemas::connections::Bytes;
use state_schemas::latest::connection::{
    Agreed, Connection, Endpoint, Family, Keepalive, Lengths, Scale, Settings, State, Window,
};
use state_schemas::latest::handover_record::Ip;

use super::judge::{Seen, judge, state};
use super::sys::{self, Queue, Repair, SIOCINQ, SIOCOUTQ, SIOCOUTQNSD, SOCKET, TCP, get, get_number};
use crate::machine::sys::tsc;

// tcpi_options (include/uapi/linux/tcp.h).
const TIMESTAMPS: u8 = 1;
const SELECTIVE: u8 = 2;
const SCALED: u8 = 4;

// SO_BUF_LOCK (include/uapi/linux/socket.h).
pub(super) const SEND_FIXED: i32 = 1;
pub(super) const RECEIVE_FIXED: i32 = 2;

/// How often a connection is written down again when a segment that had passed its filter before was still on its way in.
const TRIES: usize = 3;

/// The numbers of `struct tcp_repair_window` that every kernel knows. It may be longer in a newer one.
pub(super) const WINDOW_LEN: usize = 20;
/// And what it may have at most.
pub(super) const WINDOW_ROOM: usize = 64;

/// A socket whose connection is about to cross: silent, whatever comes for it. Dropped, it goes on as if nothing had happened.
#[derive(Debug)]
pub struct Held {
    socket: OwnedFd,
    /// Its SO_REUSEADDR, which repair overwrites (net/ipv4/tcp.c, TCP_REPAIR).
    reuse: i32,
    gone: bool,
}

impl Held {
    /// Holds a socket that can cross.
    fn new(socket: OwnedFd) -> Result<(Held, State)> {
        let state = judge(&look(socket.as_fd())?)?;
        let reuse = get_number(socket.as_fd(), SOCKET, libc::SO_REUSEADDR)?;
        sys::hold(socket.as_fd()).context("cannot give it a filter")?;
        let held = Held { socket, reuse, gone: false };
        sys::repair(held.socket.as_fd(), Repair::On).context("cannot put it under repair")?;
        Ok((held, state))
    }

    /// The connection is another kernel's now: this end is forgotten, and the peer hears nothing of that.
    pub fn forget(mut self) {
        self.gone = true;
        // Under repair as it is, only a socket that has none any more can refuse that.
        if let Err(error) = sys::forget(self.socket.as_fd()) {
            tracing::warn!("a connection that has crossed cannot be forgotten here: {error}");
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        // Repair first: what comes from then on is for a connection that can hear it.
        let socket = self.socket.as_fd();
        let undone = sys::repair(socket, Repair::Off)
            .and_then(|()| sys::set_number(socket, SOCKET, libc::SO_REUSEADDR, self.reuse))
            .and_then(|()| sys::release(socket));
        if let Err(error) = undone {
            tracing::error!("a connection that does not cross cannot go on: {error}");
        }
    }
}

/// Takes a connection from its socket, for the service of this name. When it cannot cross, or an error comes, the socket is as it was.
///
/// # Errors
/// A [`super::judge::Refusal`], or what the kernel says.
pub fn take(socket: OwnedFd, service: &str, note: Vec<u8>) -> Result<(Held, Connection, Bytes)> {
    let (held, _) = Held::new(socket)?;
    for _ in 0..TRIES {
        let before = marks(held.socket.as_fd())?;
        let (mut connection, bytes) = read(held.socket.as_fd(), service, note.clone())?;
        if marks(held.socket.as_fd())? == before {
            connection.settings.reuse_address = held.reuse != 0;
            // What the service writes by mistake is refused then, and does not get into a queue.
            sys::choose(held.socket.as_fd(), Queue::None)?;
            return Ok((held, connection, bytes));
        }
    }
    bail!("it changes while it is written down, {TRIES} times over");
}

/// What changes when a segment is taken in.
fn marks(socket: BorrowedFd<'_>) -> Result<(u8, u32, u32, u32)> {
    let info = information(socket)?;
    sys::choose(socket, Queue::Receive)?;
    let receive = sys::sequence(socket)?;
    Ok((info.state, receive, sys::count(socket, SIOCOUTQ)?, sys::count(socket, SIOCOUTQNSD)?))
}

/// The begin of `struct tcp_info`, which has not changed since there is TCP_REPAIR.
struct Information {
    state: u8,
    options: u8,
    scale: u8,
}

fn information(socket: BorrowedFd<'_>) -> io::Result<Information> {
    let mut info = [0; 8];
    get(socket, TCP, libc::TCP_INFO, &mut info)?;
    Ok(Information { state: info[0], options: info[5], scale: info[6] })
}

/// Looks at a socket and changes nothing.
pub fn look(socket: BorrowedFd<'_>) -> Result<Seen> {
    let number = |option| get_number(socket, SOCKET, option);
    let (family, kind, protocol) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?, number(libc::SO_PROTOCOL)?);
    let mut seen = Seen::of(family, kind, protocol);
    // Of another kind of socket the rest would mean something else.
    if protocol != libc::IPPROTO_TCP || kind != libc::SOCK_STREAM {
        return Ok(seen);
    }
    seen.state = information(socket)?.state;
    seen.connected = sys::ends(socket)?.is_some();
    seen.upper = text(socket, libc::TCP_ULP)?;
    seen.filtered = sys::has_filter(socket)?;
    seen.urgent_inline = number(libc::SO_OOBINLINE)? != 0;
    seen.tells_left = get_number(socket, TCP, libc::TCP_INQ)? != 0;
    seen.peek_offset = number(libc::SO_PEEK_OFF)?;
    seen.under_repair = get_number(socket, TCP, libc::TCP_REPAIR)? == 1;
    seen.bound_to_device = get(socket, SOCKET, libc::SO_BINDTODEVICE, &mut [0; libc::IFNAMSIZ])? > 0;
    seen.signs = signs(socket);
    if state(seen.state).is_ok() && !seen.urgent_inline {
        seen.urgent = sys::has_urgent(socket)?;
    }
    Ok(seen)
}

/// Whether it has keys of TCP-AO. A kernel that knows no TCP-AO has an error for this, and so has a socket without keys.
fn signs(socket: BorrowedFd<'_>) -> bool {
    const TCP_AO_INFO: i32 = 40;
    get(socket, TCP, TCP_AO_INFO, &mut [0; 56]).is_ok()
}

/// An option that is a short text; nothing where it is empty.
fn text(socket: BorrowedFd<'_>, option: i32) -> io::Result<Option<String>> {
    let mut name = [0; 16];
    let len = get(socket, TCP, option, &mut name)?.min(name.len());
    let text = name[..len].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned()))
}

fn read(socket: BorrowedFd<'_>, service: &str, note: Vec<u8>) -> Result<(Connection, Bytes)> {
    let written = tsc();
    let info = information(socket)?;
    let state = state(info.state)?;
    let (local, peer) = sys::ends(socket)?.context("it has lost its peer")?;
    let family = if local.is_ipv4() { Family::V4 } else { Family::V6 };
    let agreed = agreed(socket, &info).context("what was agreed")?;
    let window = window(socket).context("the windows")?;

    sys::choose(socket, Queue::Receive)?;
    let receive_next = sys::sequence(socket)?;
    // Asked for one more than there should be: what there is counts, and not what is told of it.
    let most = sys::count(socket, SIOCINQ)? as usize + 1;
    let received = sys::peek(socket, most).context("the receive queue")?;
    if received.len() > most - 1 {
        bail!("its receive queue has more than the {} bytes that are told of it", most - 1);
    }

    sys::choose(socket, Queue::Send)?;
    let write_next = sys::sequence(socket)?;
    // A FIN that waits for its acknowledgment counts as a byte in both numbers.
    let waiting = u32::from(state.own_fin() && !state.own_fin_acknowledged());
    let unacknowledged = sys::count(socket, SIOCOUTQ)?.saturating_sub(waiting) as usize;
    let unsent = (sys::count(socket, SIOCOUTQNSD)?.saturating_sub(waiting) as usize).min(unacknowledged);
    let mut sent = sys::peek(socket, unacknowledged + 1).context("the send queue")?;
    if sent.len() != unacknowledged {
        bail!("its send queue has {} bytes, and {unacknowledged} are told of it", sent.len());
    }
    let unsent = sent.split_off(unacknowledged - unsent);
    sys::choose(socket, Queue::None)?;

    let connection = Connection {
        service: service.to_owned(),
        family,
        local: endpoint(local),
        peer: endpoint(peer),
        state,
        tsc: written,
        receive_next,
        write_next,
        window,
        agreed,
        settings: settings(socket).context("what was set")?,
        lengths: Lengths { note: 0, received: 0, unacknowledged: 0, unsent: 0 },
        bytes_crc: 0,
    };
    Ok((connection, Bytes { note, received, unacknowledged: sent, unsent }))
}

fn endpoint(address: SocketAddr) -> Endpoint {
    let ip = match address.ip() {
        IpAddr::V4(v4) => Ip::V4(v4.octets()),
        IpAddr::V6(v6) => Ip::V6(v6.octets()),
    };
    Endpoint { address: ip, port: address.port() }
}

fn agreed(socket: BorrowedFd<'_>, info: &Information) -> Result<Agreed> {
    // Under repair it is what the peer said, and not what one segment holds now.
    let segment = get_number(socket, TCP, libc::TCP_MAXSEG)?;
    let segment = u16::try_from(segment).with_context(|| format!("a segment of {segment} bytes"))?;
    let has = |option| info.options & option != 0;
    let timestamp =
        if has(TIMESTAMPS) { Some(get_number(socket, TCP, libc::TCP_TIMESTAMP)?.cast_unsigned()) } else { None };
    let scale = has(SCALED).then_some(Scale { send: info.scale & 0x0f, receive: info.scale >> 4 });
    Ok(Agreed { segment, scale, selective: has(SELECTIVE), timestamp })
}

/// The windows as the kernel has them, in a structure that is as long as this kernel's is.
pub(super) fn raw_window(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    // The kernel takes its own length only.
    for len in (WINDOW_LEN..=WINDOW_ROOM).step_by(4) {
        let mut raw = vec![0; len];
        match get(socket, TCP, libc::TCP_REPAIR_WINDOW, &mut raw) {
            Ok(_) => return Ok(raw),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
            Err(error) => return Err(error),
        }
    }
    Err(refused)
}

fn window(socket: BorrowedFd<'_>) -> Result<Window> {
    let raw = raw_window(socket)?;
    let word = |n: usize| u32::from_ne_bytes([raw[4 * n], raw[4 * n + 1], raw[4 * n + 2], raw[4 * n + 3]]);
    Ok(Window { updated_by: word(0), send: word(1), send_most: word(2), receive: word(3), told_at: word(4) })
}

fn settings(socket: BorrowedFd<'_>) -> Result<Settings> {
    let of_socket = |option| get_number(socket, SOCKET, option);
    let of_tcp = |option| get_number(socket, TCP, option);
    let on = |value: io::Result<i32>| value.map(|value| value != 0);
    let seconds = |value: io::Result<i32>| value.map(i32::cast_unsigned);
    let mut linger = [0; 8];
    get(socket, SOCKET, libc::SO_LINGER, &mut linger)?;
    let [lingers, linger_s] =
        [0, 4].map(|at| u32::from_ne_bytes([linger[at], linger[at + 1], linger[at + 2], linger[at + 3]]));
    let fixed = of_socket(libc::SO_BUF_LOCK)?;
    // Linux doubles what is asked for, and tells the double (socket(7)).
    let buffer = |lock, option| -> io::Result<Option<u32>> {
        if fixed & lock == 0 {
            return Ok(None);
        }
        of_socket(option).map(|doubled| Some((doubled / 2).max(1).cast_unsigned()))
    };
    let v6 = of_socket(libc::SO_DOMAIN)? == libc::AF_INET6;
    let traffic_class = if v6 { get_number(socket, libc::IPPROTO_IPV6, libc::IPV6_TCLASS)? as u8 } else { 0 };
    let flags = nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_GETFL)?;
    Ok(Settings {
        nonblocking: flags & libc::O_NONBLOCK != 0,
        no_delay: on(of_tcp(libc::TCP_NODELAY))?,
        cork: on(of_tcp(libc::TCP_CORK))?,
        // Under repair it is not told: see [`Held::reuse`].
        reuse_address: true,
        reuse_port: on(of_socket(libc::SO_REUSEPORT))?,
        keepalive: Keepalive {
            on: on(of_socket(libc::SO_KEEPALIVE))?,
            idle_s: seconds(of_tcp(libc::TCP_KEEPIDLE))?,
            interval_s: seconds(of_tcp(libc::TCP_KEEPINTVL))?,
            count: seconds(of_tcp(libc::TCP_KEEPCNT))?,
        },
        user_timeout_ms: seconds(of_tcp(libc::TCP_USER_TIMEOUT))?,
        unsent_low: seconds(of_tcp(libc::TCP_NOTSENT_LOWAT))?,
        linger_s: (lingers != 0).then_some(linger_s),
        send_buffer: buffer(SEND_FIXED, libc::SO_SNDBUF)?,
        receive_buffer: buffer(RECEIVE_FIXED, libc::SO_RCVBUF)?,
        tos: get_number(socket, libc::IPPROTO_IP, libc::IP_TOS)? as u8,
        traffic_class,
        mark: of_socket(libc::SO_MARK)?.cast_unsigned(),
        priority: of_socket(libc::SO_PRIORITY)?.cast_unsigned(),
        congestion: text(socket, libc::TCP_CONGESTION)?.context("it has no congestion control")?,
    })
}
