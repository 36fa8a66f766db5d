//! One TCP connection that crosses: what the kernel knows of it, and how many bytes of its queues follow.
//!
//! A table of connections is any number of these frames, each followed by its bytes ([`crate::connections`]); the bytes are
//! counted and have a CRC of their own here, because a queue may be longer than a frame.
//!
//! Sequence numbers are those of TCP: 32 bits, modulo 2^32. A FIN has one, which counts in them and not in the bytes.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::record::Ip;
use crate::checked::Check;

/// Longest name of a service, in bytes.
pub const SERVICE_LIMIT: usize = 64;
/// Longest name of a congestion control, in bytes: `TCP_CA_NAME_MAX` without its end.
pub const CONGESTION_LIMIT: usize = 15;
/// Most bytes of one queue.
pub const QUEUE_LIMIT: u32 = 32 << 20;
/// Most bytes that a service may say of a connection.
pub const NOTE_LIMIT: u32 = 32 << 20;
/// Largest window scale (RFC 7323).
const SCALE_LIMIT: u8 = 14;
/// Smallest segment that Linux works with (`TCP_MIN_MSS`).
const LEAST_SEGMENT: u16 = 88;
/// Largest window there can be: 65535 with the largest scale.
const WINDOW_LIMIT: u32 = 65_535 << SCALE_LIMIT;

/// Which kind of socket it is. One of IPv6 may carry IPv4: its addresses are then mapped ones (`::ffff:a.b.c.d`), as it is told them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Family {
    /// 0: AF_INET.
    V4,
    /// 1: AF_INET6.
    V6,
}

/// An end of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its address.
    pub address: Ip,
    /// Its port.
    pub port: u16,
}

/// Where the connection stands. Before and after these there is nothing to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// 0: open both ways.
    Established,
    /// 1: we said that we end; the peer has not acknowledged it.
    FinWait1,
    /// 2: it has.
    FinWait2,
    /// 3: the peer said that it ends.
    CloseWait,
    /// 4: and then we did, which it has not acknowledged.
    LastAck,
    /// 5: both said so at the same time, and ours is not acknowledged.
    Closing,
}

impl State {
    /// A FIN of ours has a number among those that were given to what we send.
    pub const fn own_fin(self) -> bool {
        matches!(self, State::FinWait1 | State::FinWait2 | State::LastAck | State::Closing)
    }

    /// The peer has acknowledged it.
    pub const fn own_fin_acknowledged(self) -> bool {
        matches!(self, State::FinWait2)
    }

    /// A FIN of the peer's was received.
    pub const fn peer_fin(self) -> bool {
        matches!(self, State::CloseWait | State::LastAck | State::Closing)
    }
}

/// The windows, as `struct tcp_repair_window` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Sequence number of the segment that last changed `send`.
    pub updated_by: u32,
    /// Bytes that the peer takes.
    pub send: u32,
    /// Most that it ever took.
    pub send_most: u32,
    /// Bytes that we take, counted from `told_at`.
    pub receive: u32,
    /// What was expected next when the peer was last told of `receive`.
    pub told_at: u32,
}

/// Factors of the windows, as powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scale {
    /// Of what the peer takes.
    pub send: u8,
    /// Of what we take.
    pub receive: u8,
}

/// What was agreed when the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Longest segment that the peer takes.
    pub segment: u16,
    /// The windows are scaled.
    pub scale: Option<Scale>,
    /// Selective acknowledgments.
    pub selective: bool,
    /// Timestamps, and ours when the connection was written down (`TCP_TIMESTAMP`): in milliseconds when it is even, in microseconds
    /// when it is odd (Linux 6.7 and newer).
    pub timestamp: Option<u32>,
}

/// Keepalive; the numbers are kept also while it is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keepalive {
    /// It is on.
    pub on: bool,
    /// Seconds of silence before the first probe.
    pub idle_s: u32,
    /// Seconds between two.
    pub interval_s: u32,
    /// Probes before the peer counts as gone.
    pub count: u32,
}

/// What its owner has set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// O_NONBLOCK.
    pub nonblocking: bool,
    /// TCP_NODELAY.
    pub no_delay: bool,
    /// TCP_CORK.
    pub cork: bool,
    /// SO_REUSEADDR.
    pub reuse_address: bool,
    /// SO_REUSEPORT.
    pub reuse_port: bool,
    /// SO_KEEPALIVE and what belongs to it.
    pub keepalive: Keepalive,
    /// TCP_USER_TIMEOUT in milliseconds; 0: the system's.
    pub user_timeout_ms: u32,
    /// TCP_NOTSENT_LOWAT in bytes; 0: the system's.
    pub unsent_low: u32,
    /// SO_LINGER in seconds.
    pub linger_s: Option<u32>,
    /// SO_SNDBUF in bytes, where it was fixed.
    pub send_buffer: Option<u32>,
    /// SO_RCVBUF in bytes, where it was fixed.
    pub receive_buffer: Option<u32>,
    /// IP_TOS.
    pub tos: u8,
    /// IPV6_TCLASS.
    pub traffic_class: u8,
    /// SO_MARK.
    pub mark: u32,
    /// SO_PRIORITY.
    pub priority: u32,
    /// The congestion control's name. One that the other kernel does not have is left out there.
    pub congestion: String,
}

/// How many bytes follow, and of what, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// What the service says of it.
    pub note: u32,
    /// Received, and not read yet.
    pub received: u32,
    /// Sent, and not acknowledged.
    pub unacknowledged: u32,
    /// Not sent yet.
    pub unsent: u32,
}

impl Lengths {
    /// All of them. (Four numbers of 32 bits: their sum has room.)
    pub const fn total(self) -> u64 {
        self.note as u64 + self.received as u64 + self.unacknowledged as u64 + self.unsent as u64
    }
}

/// A connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Whose it is.
    pub service: String,
    /// Of which family its socket is.
    pub family: Family,
    /// Our end.
    pub local: Endpoint,
    /// The peer's.
    pub peer: Endpoint,
    /// Where it stands.
    pub state: State,
    /// When it was written down, on the TSC: its timestamp goes on by what has passed since.
    pub tsc: u64,
    /// The number of what is received next: behind a FIN, if there was one.
    pub receive_next: u32,
    /// The number of what is written next: behind our FIN, if we said one.
    pub write_next: u32,
    /// The windows.
    pub window: Window,
    /// What was agreed.
    pub agreed: Agreed,
    /// What was set.
    pub settings: Settings,
    /// What follows.
    pub lengths: Lengths,
    /// CRC-32 of what follows.
    pub bytes_crc: u32,
}

impl Connection {
    /// The number of the first byte that lies in the receive queue.
    pub fn receive_first(&self) -> u32 {
        self.receive_next.wrapping_sub(u32::from(self.state.peer_fin())).wrapping_sub(self.lengths.received)
    }

    /// The number of the first byte that is not acknowledged.
    pub fn send_first(&self) -> u32 {
        let unfinished = self.lengths.unacknowledged.wrapping_add(self.lengths.unsent);
        self.write_next.wrapping_sub(u32::from(self.state.own_fin())).wrapping_sub(unfinished)
    }
}

/// What no connection can be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// A name that is none.
    #[error("{what} of {len} bytes: 1 to {limit} of printable ASCII are allowed")]
    Name {
        /// Which.
        what: &'static str,
        /// Its length.
        len: usize,
        /// Most allowed.
        limit: usize,
    },
    /// An address that does not go with the socket, or is nobody's.
    #[error("{what} address {address:?} cannot be one of a {family:?} socket's")]
    Address {
        /// Whose.
        what: &'static str,
        /// It.
        address: Ip,
        /// The socket's family.
        family: Family,
    },
    /// One end speaks IPv4, the other IPv6.
    #[error("an end has an IPv4 address and the other one of IPv6")]
    Mixed,
    /// A number that is out of its bounds.
    #[error("{what} is {value}, allowed are {least} to {most}")]
    Bounds {
        /// Which.
        what: &'static str,
        /// It.
        value: u64,
        /// Least allowed.
        least: u64,
        /// Most allowed.
        most: u64,
    },
    /// Unsent bytes with a FIN behind them that was sent.
    #[error("{0} bytes are not sent, and a FIN that comes behind them is acknowledged")]
    Unsent(u32),
}

fn within(what: &'static str, value: u64, least: u64, most: u64) -> Result<(), ConnectionError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ConnectionError::Bounds { what, value, least, most })
}

fn name(what: &'static str, text: &str, limit: usize) -> Result<(), ConnectionError> {
    let len = text.len();
    if (1..=limit).contains(&len) && text.bytes().all(|byte| (b'!'..=b'~').contains(&byte)) {
        return Ok(());
    }
    Err(ConnectionError::Name { what, len, limit })
}

/// The IPv4 address that an IPv6 socket knows as a mapped one.
pub fn mapped(address: [u8; 16]) -> Option<[u8; 4]> {
    match address {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
        _ => None,
    }
}

impl Endpoint {
    /// The address that is on the wire, and whether the socket can have it.
    fn check(&self, what: &'static str, family: Family) -> Result<Ip, ConnectionError> {
        within(what, self.port.into(), 1, u16::MAX.into())?;
        let wrong = ConnectionError::Address { what, address: self.address, family };
        let on_wire = match (family, self.address) {
            (Family::V4, Ip::V4(_)) => self.address,
            (Family::V6, Ip::V6(address)) => mapped(address).map_or(self.address, Ip::V4),
            _ => return Err(wrong),
        };
        let somebodys = match on_wire {
            Ip::V4([first, ..]) => (1..224).contains(&first),
            // Link-local ones say nothing without an interface, whose number is another in each kernel.
            Ip::V6(address) => {
                address != [0; 16] && address[0] != 0xff && !(address[0] == 0xfe && address[1] & 0xc0 == 0x80)
            }
        };
        if somebodys { Ok(on_wire) } else { Err(wrong) }
    }
}

impl Check for Connection {
    type Against = ();
    type Error = ConnectionError;

    fn check(&self, (): &()) -> Result<(), ConnectionError> {
        name("the service's name", &self.service, SERVICE_LIMIT)?;
        name("the congestion control's name", &self.settings.congestion, CONGESTION_LIMIT)?;
        let (local, peer) = (self.local.check("local", self.family)?, self.peer.check("peer", self.family)?);
        if matches!((local, peer), (Ip::V4(_), Ip::V6(_)) | (Ip::V6(_), Ip::V4(_))) {
            return Err(ConnectionError::Mixed);
        }
        let Lengths { note, received, unacknowledged, unsent } = self.lengths;
        within("the note's length", note.into(), 0, NOTE_LIMIT.into())?;
        for (what, len) in [("received", received), ("unacknowledged", unacknowledged), ("unsent", unsent)] {
            within(what, len.into(), 0, QUEUE_LIMIT.into())?;
        }
        if self.state.own_fin_acknowledged() && (unsent > 0 || unacknowledged > 0) {
            return Err(ConnectionError::Unsent(unsent.saturating_add(unacknowledged)));
        }
        within("the longest segment", self.agreed.segment.into(), LEAST_SEGMENT.into(), u16::MAX.into())?;
        if let Some(Scale { send, receive }) = self.agreed.scale {
            within("the peer's window scale", send.into(), 0, SCALE_LIMIT.into())?;
            within("our window scale", receive.into(), 0, SCALE_LIMIT.into())?;
        }
        let Window { send, send_most, receive, .. } = self.window;
        within("the peer's largest window", send_most.into(), send.into(), WINDOW_LIMIT.into())?;
        within("our window", receive.into(), 0, WINDOW_LIMIT.into())?;
        // What Linux takes of these (tcp_setsockopt()).
        let Keepalive { idle_s, interval_s, count, .. } = self.settings.keepalive;
        within("keepalive's idle time", idle_s.into(), 1, 32_767)?;
        within("keepalive's interval", interval_s.into(), 1, 32_767)?;
        within("keepalive's count", count.into(), 1, 127)?;
        within("the user timeout", self.settings.user_timeout_ms.into(), 0, i32::MAX as u64)?;
        for buffer in [self.settings.send_buffer, self.settings.receive_buffer].into_iter().flatten() {
            within("a buffer", buffer.into(), 1, 1 << 30)?;
        }
        Ok(())
    }
}
