//! What of a socket can cross, and in which order it is made anew: decisions only.
//!
//! Of the many things that a socket can have, TCP_REPAIR tells and sets those that the peer knows. What it cannot tell would be lost
//! without a word, so a socket that has it is refused when it is kept, with the reason.

#![expect(clippy::big_endian_bytes, reason = "a segment's header is in the network's order")]

use state_schemas::latest::connection::{Connection, State};

/// What a look at a socket shows, before anything is done to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its family: AF_INET or AF_INET6.
    pub family: i32,
    /// Its type.
    pub kind: i32,
    /// Its protocol.
    pub protocol: i32,
    /// `tcpi_state` (`include/net/tcp_states.h`).
    pub state: u8,
    /// It has a peer's address.
    pub connected: bool,
    /// The name of what lies above TCP.
    pub upper: Option<String>,
    /// It has a packet filter.
    pub filtered: bool,
    /// An urgent byte waits.
    pub urgent: bool,
    /// Urgent bytes lie among the others.
    pub urgent_inline: bool,
    /// Its reads tell how much is left (TCP_INQ).
    pub tells_left: bool,
    /// Where its next peek begins (SO_PEEK_OFF); negative: nowhere.
    pub peek_offset: i32,
    /// Somebody has it under repair.
    pub under_repair: bool,
    /// Bound to one interface.
    pub bound_to_device: bool,
    /// It signs its segments (TCP-AO).
    pub signs: bool,
}

impl Seen {
    /// A socket of this sort of which nothing else is known: nothing stands against it.
    pub fn of(family: i32, kind: i32, protocol: i32) -> Seen {
        Seen {
            family,
            kind,
            protocol,
            state: 0,
            connected: false,
            upper: None,
            filtered: false,
            urgent: false,
            urgent_inline: false,
            tells_left: false,
            peek_offset: -1,
            under_repair: false,
            bound_to_device: false,
            signs: false,
        }
    }
}

/// Why a socket cannot cross.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not one of TCP.
    #[error(
        "it is no TCP socket over IP (family {family}, type {kind}, protocol {protocol}): only connections of TCP cross"
    )]
    NotTcp {
        /// Its family.
        family: i32,
        /// Its type.
        kind: i32,
        /// Its protocol.
        protocol: i32,
    },
    /// MPTCP.
    #[error(
        "it is a connection of MPTCP, of whose other paths TCP knows nothing: make plain TCP sockets (GODEBUG=multipathtcp=0)"
    )]
    ManyPaths,
    /// A listener.
    #[error("it listens: hold it (`Listeners`), accept what waits, and bind another in the next kernel")]
    Listens,
    /// Not yet.
    #[error("it is not connected yet: connect again in the next kernel")]
    Opening,
    /// Not any more.
    #[error("its connection is over: close it")]
    Over,
    /// TLS or another.
    #[error("`{0}` in the kernel lies above it, whose keys and records cannot be read: do it in the service itself")]
    Upper(String),
    /// Its own filter.
    #[error("it has a packet filter (SO_ATTACH_FILTER, SO_ATTACH_BPF), which cannot be read: take it off")]
    Filtered,
    /// Urgent data.
    #[error("it has urgent data (MSG_OOB, SO_OOBINLINE), whose place among the others is not told")]
    Urgent,
    /// TCP_INQ.
    #[error("TCP_INQ is on, which does not cross: turn it off")]
    TellsLeft,
    /// SO_PEEK_OFF.
    #[error("SO_PEEK_OFF is {0}, which does not cross: set it to -1")]
    PeekOffset(i32),
    /// Repaired by others.
    #[error("somebody else has it under repair")]
    UnderRepair,
    /// SO_BINDTODEVICE.
    #[error("it is bound to an interface (SO_BINDTODEVICE), which may have another name in the next kernel")]
    BoundToDevice,
    /// TCP-AO.
    #[error("it signs its segments (TCP-AO), and its keys cannot be read")]
    Signs,
}

// include/net/tcp_states.h
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const SYN_RECV: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const LISTEN: u8 = 10;
const CLOSING: u8 = 11;

/// Where a connection stands, by the kernel's number.
pub fn state(number: u8) -> Result<State, Refusal> {
    match number {
        ESTABLISHED => Ok(State::Established),
        FIN_WAIT1 => Ok(State::FinWait1),
        FIN_WAIT2 => Ok(State::FinWait2),
        CLOSE_WAIT => Ok(State::CloseWait),
        LAST_ACK => Ok(State::LastAck),
        CLOSING => Ok(State::Closing),
        LISTEN => Err(Refusal::Listens),
        SYN_SENT | SYN_RECV => Err(Refusal::Opening),
        // TIME_WAIT and CLOSE, and whatever comes to be after them.
        _ => Err(Refusal::Over),
    }
}

/// Whether this socket can cross.
pub fn judge(seen: &Seen) -> Result<State, Refusal> {
    let &Seen { family, kind, protocol, .. } = seen;
    let ip = matches!(family, libc::AF_INET | libc::AF_INET6) && kind == libc::SOCK_STREAM;
    match protocol {
        libc::IPPROTO_TCP if ip => {}
        libc::IPPROTO_MPTCP if ip => return Err(Refusal::ManyPaths),
        _ => return Err(Refusal::NotTcp { family, kind, protocol }),
    }
    let state = state(seen.state)?;
    if !seen.connected {
        return Err(Refusal::Over);
    }
    if let Some(upper) = &seen.upper {
        return Err(Refusal::Upper(upper.clone()));
    }
    let found = [
        (seen.under_repair, Refusal::UnderRepair),
        (seen.filtered, Refusal::Filtered),
        (seen.urgent || seen.urgent_inline, Refusal::Urgent),
        (seen.tells_left, Refusal::TellsLeft),
        (seen.peek_offset >= 0, Refusal::PeekOffset(seen.peek_offset)),
        (seen.bound_to_device, Refusal::BoundToDevice),
        (seen.signs, Refusal::Signs),
    ];
    match found.into_iter().find(|(found, _)| *found) {
        Some((_, refusal)) => Err(refusal),
        None => Ok(state),
    }
}

/// A step on the way back to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing is told to the peer from here on; any address may be bound.
    RepairOn,
    /// Room for the queues, however little the system gives by itself; what the way to the peer depends on.
    Prepare,
    /// To our end.
    Bind,
    /// The next number to receive.
    ReceiveFrom(u32),
    /// The next number to write.
    SendFrom(u32),
    /// To the peer, without a packet: the address must be this kernel's own.
    Connect,
    /// What was agreed in the first packets.
    Agree,
    /// Our timestamp.
    Timestamp(u32),
    /// What was received and not read.
    FillReceived,
    /// What was sent and not acknowledged.
    FillUnacknowledged,
    /// The windows.
    Windows {
        /// What was expected next when the peer was last told, as it was before a FIN that comes again.
        told_at: u32,
        /// Bytes from there on.
        receive: u32,
    },
    /// Our FIN, as one that was sent.
    OwnFinSent,
    /// The peer's FIN, which comes again.
    PeerFin,
    /// The peer's acknowledgment of our FIN, which comes again.
    OwnFinAcknowledged,
    /// What its owner has set.
    Set,
}

/// The steps up to where nobody has heard of it yet.
///
/// A FIN cannot be put back by TCP_REPAIR: ours is said again (under repair, as one that was sent), and the peer's is received again.
/// Which one comes first decides in which state the connection ends up.
pub fn steps(connection: &Connection) -> Vec<Step> {
    let (state, window) = (connection.state, connection.window);
    // A FIN that comes again takes its number and its place in the window again.
    let again = u32::from(state.peer_fin());
    let mut steps = vec![
        Step::RepairOn,
        Step::Prepare,
        Step::Bind,
        Step::ReceiveFrom(connection.receive_first()),
        Step::SendFrom(connection.send_first()),
        Step::Connect,
        Step::Agree,
    ];
    steps.extend(connection.agreed.timestamp.map(Step::Timestamp));
    steps.extend([
        Step::FillReceived,
        Step::FillUnacknowledged,
        Step::Windows { told_at: window.told_at.wrapping_sub(again), receive: window.receive.saturating_add(again) },
    ]);
    // Behind bytes that are not sent it is not sent either: it is said when they are ([`after_repair`]).
    let sent = state.own_fin() && connection.lengths.unsent == 0;
    match state {
        State::Established => {}
        State::FinWait1 => steps.extend(sent.then_some(Step::OwnFinSent)),
        State::FinWait2 => steps.extend([Step::OwnFinSent, Step::OwnFinAcknowledged]),
        State::CloseWait => steps.push(Step::PeerFin),
        State::LastAck => steps.extend([Some(Step::PeerFin), sent.then_some(Step::OwnFinSent)].into_iter().flatten()),
        State::Closing => steps.extend([sent.then_some(Step::OwnFinSent), Some(Step::PeerFin)].into_iter().flatten()),
    }
    steps.push(Step::Set);
    steps
}

/// What is left once repair is off, and the peer may hear: the bytes that were not sent, and our FIN behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AfterRepair {
    /// There are such bytes.
    pub send: bool,
    /// Our FIN follows them.
    pub finish: bool,
}

/// What is to be done when the connection is let go.
pub fn after_repair(connection: &Connection) -> AfterRepair {
    let send = connection.lengths.unsent > 0;
    AfterRepair { send, finish: send && connection.state.own_fin() }
}

/// Where our timestamp is after so many milliseconds. Its lowest bit says in which unit it counts, and stays.
pub fn timestamp_after(timestamp: u32, passed: std::time::Duration) -> u32 {
    let units = if timestamp & 1 == 1 { passed.as_micros() } else { passed.as_millis() };
    // Modulo 2^32, as the peer counts.
    timestamp.wrapping_add(units as u32 & !1)
}

/// A segment without data as the peer would send it: an IP packet with its TCP header.
pub mod segment {
    use std::net::{IpAddr, SocketAddr};

    /// What stands in it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Segment {
        /// The peer.
        pub from: SocketAddr,
        /// Our end.
        pub to: SocketAddr,
        /// The peer's number.
        pub sequence: u32,
        /// What the peer has received of ours.
        pub acknowledges: u32,
        /// It says that it ends.
        pub fin: bool,
        /// The window field, not scaled.
        pub window: u16,
    }

    const TCP_LEN: usize = 20;
    const FIN: u8 = 0x01;
    const ACK: u8 = 0x10;

    /// The packet; nothing where the two ends are not of one family.
    pub fn packet(segment: &Segment) -> Option<Vec<u8>> {
        let Segment { from, to, sequence, acknowledges, fin, window } = *segment;
        let mut tcp = [0u8; TCP_LEN];
        tcp[0..2].copy_from_slice(&from.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&acknowledges.to_be_bytes());
        tcp[12] = (TCP_LEN as u8 / 4) << 4;
        tcp[13] = if fin { ACK | FIN } else { ACK };
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
        // RFC 9293, 3.1: over the addresses, the protocol and the length, too.
        let (mut packet, addresses) = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut ip = vec![0x45, 0, 0, (20 + TCP_LEN) as u8, 0, 0, 0x40, 0, 64, 6, 0, 0];
                ip.extend(from.octets().into_iter().chain(to.octets()));
                let check = checksum(&ip);
                ip[10..12].copy_from_slice(&check.to_be_bytes());
                let addresses = ip[12..20].to_vec();
                (ip, addresses)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut ip = vec![0x60, 0, 0, 0, 0, TCP_LEN as u8, 6, 64];
                ip.extend(from.octets().into_iter().chain(to.octets()));
                let addresses = ip[8..40].to_vec();
                (ip, addresses)
            }
            _ => return None,
        };
        let pseudo = [addresses.as_slice(), &[0, 6, 0, TCP_LEN as u8], &tcp].concat();
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
        packet.extend_from_slice(&tcp);
        Some(packet)
    }

    /// RFC 1071, of an even number of bytes.
    fn checksum(bytes: &[u8]) -> u16 {
        let words = bytes.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_whole_packet_sums_up_to_nothing() {
            let segment = |from: &str, to: &str| Segment {
                from: from.parse().unwrap(),
                to: to.parse().unwrap(),
                sequence: 0xdead_beef,
                acknowledges: 0x0102_0304,
                fin: true,
                window: 502,
            };
            let v4 = packet(&segment("10.77.0.1:40000", "10.77.0.10:6379")).unwrap();
            assert_eq!((v4.len(), checksum(&v4[..20])), (40, 0));
            let pseudo = [&v4[12..20], &[0, 6, 0, 20], &v4[20..]].concat();
            assert_eq!(checksum(&pseudo), 0);
            assert_eq!((v4[33], &v4[24..28]), (0x11, &[0xde, 0xad, 0xbe, 0xef][..]));
            let v6 = packet(&segment("[fd00::1]:40000", "[fd00::10]:6379")).unwrap();
            let pseudo = [&v6[8..40], &[0, 6, 0, 20], &v6[40..]].concat();
            assert_eq!((v6.len(), checksum(&pseudo)), (60, 0));
            assert_eq!(packet(&segment("10.77.0.1:1", "[fd00::1]:1")), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use state_schemas::latest::connection::*;
    use state_schemas::latest::handover_record::Ip;

    use super::*;

    fn plain() -> Seen {
        let seen = Seen::of(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        Seen { state: ESTABLISHED, connected: true, ..seen }
    }

    #[test]
    fn what_cannot_be_told_is_refused_by_its_name() {
        assert_eq!(judge(&plain()), Ok(State::Established));
        let refused = |change: &dyn Fn(&mut Seen)| {
            let mut seen = plain();
            change(&mut seen);
            judge(&seen).unwrap_err()
        };
        assert_eq!(refused(&|s| s.upper = Some("tls".into())), Refusal::Upper("tls".into()));
        assert_eq!(refused(&|s| s.filtered = true), Refusal::Filtered);
        assert_eq!(refused(&|s| s.urgent = true), Refusal::Urgent);
        assert_eq!(refused(&|s| s.urgent_inline = true), Refusal::Urgent);
        assert_eq!(refused(&|s| s.tells_left = true), Refusal::TellsLeft);
        assert_eq!(refused(&|s| s.peek_offset = 0), Refusal::PeekOffset(0));
        assert_eq!(refused(&|s| s.under_repair = true), Refusal::UnderRepair);
        assert_eq!(refused(&|s| s.bound_to_device = true), Refusal::BoundToDevice);
        assert_eq!(refused(&|s| s.signs = true), Refusal::Signs);
        assert_eq!(refused(&|s| s.protocol = libc::IPPROTO_MPTCP), Refusal::ManyPaths);
        assert!(matches!(refused(&|s| s.protocol = libc::IPPROTO_SCTP), Refusal::NotTcp { .. }));
        assert!(matches!(refused(&|s| s.kind = libc::SOCK_DGRAM), Refusal::NotTcp { .. }));
        assert!(matches!(refused(&|s| s.family = libc::AF_UNIX), Refusal::NotTcp { .. }));
        assert_eq!(refused(&|s| s.state = LISTEN), Refusal::Listens);
        assert_eq!(refused(&|s| s.connected = false), Refusal::Over);
    }

    #[test]
    fn every_state_is_one_that_crosses_or_is_refused() {
        let crosses = |number| state(number).ok();
        let expected = [
            (1, Some(State::Established)),
            (2, None),
            (3, None),
            (4, Some(State::FinWait1)),
            (5, Some(State::FinWait2)),
            (6, None),
            (7, None),
            (8, Some(State::CloseWait)),
            (9, Some(State::LastAck)),
            (10, None),
            (11, Some(State::Closing)),
            (12, None),
            (255, None),
        ];
        for (number, found) in expected {
            assert_eq!(crosses(number), found, "state {number}");
        }
    }

    fn connection(state: State, unsent: u32) -> Connection {
        let end = |last, port| Endpoint { address: Ip::V4([10, 0, 0, last]), port };
        Connection {
            service: "kv".into(),
            family: Family::V4,
            local: end(1, 1),
            peer: end(2, 2),
            state,
            tsc: 0,
            receive_next: 100,
            write_next: 200,
            window: Window { updated_by: 90, send: 10, send_most: 10, receive: 50, told_at: 100 },
            agreed: Agreed { segment: 1460, scale: None, selective: true, timestamp: Some(7) },
            settings: Settings {
                nonblocking: true,
                no_delay: true,
                cork: false,
                reuse_address: true,
                reuse_port: false,
                keepalive: Keepalive { on: false, idle_s: 1, interval_s: 1, count: 1 },
                user_timeout_ms: 0,
                unsent_low: 0,
                linger_s: None,
                send_buffer: None,
                receive_buffer: None,
                tos: 0,
                traffic_class: 0,
                mark: 0,
                priority: 0,
                congestion: "cubic".into(),
            },
            lengths: Lengths { note: 0, received: 5, unacknowledged: 6, unsent },
            bytes_crc: 0,
        }
    }

    #[test]
    fn the_steps_come_in_the_order_that_works() {
        use Step::*;
        assert_eq!(
            steps(&connection(State::Established, 3)),
            [
                RepairOn,
                Prepare,
                Bind,
                ReceiveFrom(95),
                SendFrom(191),
                Connect,
                Agree,
                Timestamp(7),
                FillReceived,
                FillUnacknowledged,
                Windows { told_at: 100, receive: 50 },
                Set
            ]
        );
        assert_eq!(after_repair(&connection(State::Established, 3)), AfterRepair { send: true, finish: false });
        // Both ended, the peer first: its FIN takes number 99, ours 199.
        let ended = steps(&connection(State::LastAck, 0));
        assert_eq!(ended[3..5], [ReceiveFrom(94), SendFrom(193)]);
        assert_eq!(ended[10..], [Windows { told_at: 99, receive: 51 }, PeerFin, OwnFinSent, Set]);
    }

    #[test]
    fn which_fin_comes_first_is_what_the_state_says() {
        use Step::*;
        let fins = |state, unsent| {
            let mut steps = steps(&connection(state, unsent));
            steps.retain(|step| matches!(step, OwnFinSent | PeerFin | OwnFinAcknowledged));
            let after = after_repair(&connection(state, unsent));
            (steps, after.finish)
        };
        assert_eq!(fins(State::Established, 0), (vec![], false));
        assert_eq!(fins(State::FinWait1, 0), (vec![OwnFinSent], false));
        assert_eq!(fins(State::FinWait1, 1), (vec![], true));
        assert_eq!(fins(State::FinWait2, 0), (vec![OwnFinSent, OwnFinAcknowledged], false));
        assert_eq!(fins(State::CloseWait, 1), (vec![PeerFin], false));
        assert_eq!(fins(State::LastAck, 0), (vec![PeerFin, OwnFinSent], false));
        assert_eq!(fins(State::LastAck, 1), (vec![PeerFin], true));
        assert_eq!(fins(State::Closing, 0), (vec![OwnFinSent, PeerFin], false));
        assert_eq!(fins(State::Closing, 1), (vec![PeerFin], true));
    }

    #[test]
    fn a_timestamp_goes_on_in_its_own_unit() {
        let passed = Duration::from_micros(41_500);
        assert_eq!(timestamp_after(1000, passed), 1040);
        assert_eq!(timestamp_after(1001, passed), 1001 + 41_500);
        assert_eq!(timestamp_after(u32::MAX, passed), 41_499);
        assert_eq!(timestamp_after(u32::MAX - 1, Duration::ZERO), u32::MAX - 1);
    }
}
