//! Connections cross between two network namespaces that stand for the two kernels, with a client in a third: real sockets, real
//! segments, and a capture of all of them in which no RST may be.
//!
//! Needs root and network namespaces; where they cannot be made, each test says `SKIPPED` with the reason.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agent::services::connections::dump::{self, look};
use agent::services::connections::judge::{Refusal, judge};
use agent::services::connections::restore::restore;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use state_schemas::connections::{append, read};
use state_schemas::latest::connection::{Connection, State};

const PORT: u16 = 6379;
const V4: &str = "10.99.0.10";
const V6: &str = "fd99::10";
/// For what other threads and the peer's kernel have to do first.
const PATIENCE: Duration = Duration::from_secs(20);

/// A client's namespace with a bridge, and two machines on it: the service's addresses are on the first.
struct Net {
    name: String,
}

fn ip(arguments: &str) -> Result<(), String> {
    let done =
        Command::new("ip").args(arguments.split_whitespace()).output().map_err(|error| format!("ip: {error}"))?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&done.stderr).trim()))
}

impl Net {
    /// Nothing where it cannot be made, which is said.
    fn make() -> Option<Net> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("btcp{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let net = Net { name };
        match net.build() {
            Ok(()) => Some(net),
            Err(why) => {
                eprintln!("SKIPPED: network namespaces cannot be made: {why}");
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        for side in ["c", "old", "new"] {
            ip(&format!("netns add {}", self.at(side)))?;
            ip(&format!("-n {} link set lo up", self.at(side)))?;
        }
        let client = self.at("c");
        ip(&format!("-n {client} link add br0 type bridge"))?;
        ip(&format!("-n {client} addr add 10.99.0.1/24 dev br0"))?;
        ip(&format!("-n {client} addr add fd99::1/64 dev br0 nodad"))?;
        for (side, own) in [("old", 2), ("new", 3)] {
            let there = self.at(side);
            ip(&format!("-n {client} link add p-{side} type veth peer name eth0 netns {there}"))?;
            ip(&format!("-n {client} link set p-{side} master br0 up"))?;
            ip(&format!("-n {there} addr add 10.99.0.{own}/24 dev eth0"))?;
            ip(&format!("-n {there} addr add fd99::{own}/64 dev eth0 nodad"))?;
            ip(&format!("-n {there} link set eth0 up"))?;
        }
        ip(&format!("-n {client} link set br0 up"))?;
        self.give_address("old")
    }

    fn at(&self, side: &str) -> String {
        format!("{}{side}", self.name)
    }

    fn give_address(&self, side: &str) -> Result<(), String> {
        ip(&format!("-n {} addr add {V4}/24 dev eth0", self.at(side)))?;
        ip(&format!("-n {} addr add {V6}/64 dev eth0 nodad", self.at(side)))
    }

    /// The service's addresses change hands; the client is told at once.
    fn move_address(&self) {
        let old = self.at("old");
        ip(&format!("-n {old} addr del {V4}/24 dev eth0")).unwrap();
        ip(&format!("-n {old} addr del {V6}/64 dev eth0")).unwrap();
        self.give_address("new").unwrap();
    }

    /// From here on the client's segments go to the new machine.
    fn announce(&self) {
        let shown = Command::new("ip").args(["-n", &self.at("new"), "-br", "link", "show", "eth0"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let mac = shown.split_whitespace().nth(2).unwrap();
        for address in [V4, V6] {
            ip(&format!("-n {} neigh replace {address} lladdr {mac} dev br0", self.at("c"))).unwrap();
        }
    }

    /// Does something in a namespace. What it opens stays there.
    fn inside<T: Send>(&self, side: &str, what: impl FnOnce() -> T + Send) -> T {
        let name = std::fs::File::open(format!("/run/netns/{}", self.at(side))).unwrap();
        thread::scope(|scope| {
            let done = scope.spawn(move || {
                setns(&name, CloneFlags::CLONE_NEWNET).unwrap();
                what()
            });
            done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn listen(&self, side: &str, address: SocketAddr) -> TcpListener {
        self.inside(side, || TcpListener::bind(address).unwrap())
    }

    fn connect(&self, address: SocketAddr) -> TcpStream {
        let stream = self.inside("c", || TcpStream::connect(address).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection: the server's end on the old machine, and the client's.
    fn pair(&self, listen: SocketAddr, connect: SocketAddr) -> (TcpListener, TcpStream, TcpStream) {
        let listener = self.listen("old", listen);
        let client = self.connect(connect);
        let server = listener.accept().unwrap().0;
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        (listener, server, client)
    }

    /// The server's end crosses: the bytes of its table are all that the other side gets.
    fn cross(&self, server: TcpStream) -> Crossed {
        let (held, connection, bytes) = dump::take(server.into(), "test", b"note".to_vec()).unwrap();
        let mut table = Vec::new();
        append(&mut table, 0, connection, &bytes).unwrap();
        self.move_address();
        let [(connection, bytes)] = <[_; 1]>::try_from(read(&table).unwrap()).unwrap();
        let (state, agreed) = (connection.state, connection.clone());
        let (note, socket) = self.inside("new", || {
            let restored = restore(connection, bytes, Duration::from_millis(5)).unwrap();
            restored.let_go().unwrap()
        });
        self.announce();
        held.forget();
        assert_eq!(note, b"note");
        let server = TcpStream::from(socket);
        Crossed { server, state, connection: agreed }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for side in ["c", "old", "new"] {
            let _ = ip(&format!("netns del {}", self.at(side)));
        }
    }
}

struct Crossed {
    server: TcpStream,
    state: State,
    connection: Connection,
}

/// All TCP segments that pass the client's bridge.
struct Capture {
    ends: Arc<AtomicBool>,
    reader: thread::JoinHandle<(usize, Vec<String>)>,
}

impl Capture {
    fn start(net: &Net) -> Capture {
        let all = net.inside("c", || {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::EthAll,
            )
            .unwrap()
        });
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        let reader = thread::spawn(move || {
            let (mut seen, mut resets) = (0, Vec::new());
            let mut frame = [0; 256];
            loop {
                match recv(all.as_raw_fd(), &mut frame, MsgFlags::MSG_TRUNC) {
                    Ok(len) => {
                        if let Some((flags, shown)) = tcp_flags(&frame[..len.min(frame.len())]) {
                            seen += 1;
                            if flags & 0x04 != 0 {
                                resets.push(shown);
                            }
                        }
                    }
                    Err(nix::errno::Errno::EAGAIN) if told.load(Ordering::SeqCst) => return (seen, resets),
                    Err(nix::errno::Errno::EAGAIN) => thread::sleep(Duration::from_millis(1)),
                    Err(errno) => panic!("{errno}"),
                }
            }
        });
        Capture { ends, reader }
    }

    /// How many there were; no RST was among them.
    fn finish(self) -> usize {
        self.ends.store(true, Ordering::SeqCst);
        let (seen, resets) = self.reader.join().unwrap();
        assert_eq!(resets, [""; 0], "of {seen} segments");
        assert!(seen > 0, "the capture saw nothing, so it proves nothing");
        seen
    }
}

fn tcp_flags(frame: &[u8]) -> Option<(u8, String)> {
    let ip = frame.get(14..)?;
    let (tcp, ends) = match frame.get(12..14)? {
        [0x08, 0x00] if *ip.get(9)? == 6 => (ip.get(usize::from(ip[0] & 15) * 4..)?, format!("{:?}", ip.get(12..20)?)),
        [0x86, 0xdd] if *ip.get(6)? == 6 => (ip.get(40..)?, format!("{:?}", ip.get(8..40)?)),
        _ => return None,
    };
    let flags = *tcp.get(13)?;
    Some((flags, format!("{ends} {:?} flags {flags:#x}", tcp.get(..4)?)))
}

fn v4() -> SocketAddr {
    SocketAddr::new(V4.parse::<IpAddr>().unwrap(), PORT)
}

fn v6() -> SocketAddr {
    SocketAddr::new(V6.parse::<IpAddr>().unwrap(), PORT)
}

/// Bytes that are never the same at two places near each other.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|n| ((n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn says(mut from: &TcpStream, mut to: &TcpStream, what: &[u8]) {
    from.write_all(what).unwrap();
    let mut heard = vec![0; what.len()];
    to.read_exact(&mut heard).unwrap();
    assert_eq!(heard, what);
}

/// Both go on, byte by byte.
fn talk(server: &TcpStream, client: &TcpStream) {
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    for round in 0..3 {
        says(client, server, &pattern(round * 7, 1000));
        says(server, client, &pattern(round * 5, 70_000));
    }
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn state_of(socket: &impl AsFd) -> u8 {
    look(socket.as_fd()).unwrap().state
}

/// Writes until the socket takes no more; says how much it took.
fn fill(mut socket: &TcpStream) -> usize {
    socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut quiet = Instant::now();
    // Full is what stays full while the peer's kernel takes what it takes.
    while quiet.elapsed() < Duration::from_millis(300) {
        match socket.write(&pattern(sent, 10_000)) {
            Ok(len) => (sent, quiet) = (sent + len, Instant::now()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(5)),
            Err(error) => panic!("{error}"),
        }
    }
    socket.set_nonblocking(false).unwrap();
    sent
}

fn reads_exactly(mut socket: &TcpStream, len: usize) {
    let mut heard = vec![0; len];
    socket.read_exact(&mut heard).unwrap();
    assert!(heard == pattern(0, len), "{len} bytes are not those that were sent");
}

fn reads_end(mut socket: &TcpStream) {
    assert_eq!(socket.read(&mut [0; 10]).unwrap(), 0, "nothing comes after it");
}

#[test]
fn an_idle_connection_goes_on_in_every_family() {
    let any6 = SocketAddr::new("::".parse().unwrap(), PORT);
    for (listen, connect) in [(v4(), v4()), (v6(), v6()), (any6, v4())] {
        let Some(net) = Net::make() else { return };
        let capture = Capture::start(&net);
        let (_listener, server, client) = net.pair(listen, connect);
        talk(&server, &client);
        let Crossed { server, state, connection } = net.cross(server);
        assert_eq!(
            (state, connection.agreed.selective, connection.agreed.timestamp.is_some()),
            (State::Established, true, true)
        );
        assert!(connection.agreed.scale.is_some());
        talk(&server, &client);
        assert_eq!(server.peer_addr().unwrap().port(), client.local_addr().unwrap().port());
        drop(client);
        reads_end(&server);
        drop(server);
        eprintln!("{connect} at {listen}: {} segments, no RST", capture.finish());
    }
}

#[test]
fn what_was_not_read_and_what_was_not_sent_crosses() {
    let Some(net) = Net::make() else { return };
    let capture = Capture::start(&net);
    let (_listener, server, client) = net.pair(v4(), v4());
    // Neither side reads: windows are closed both ways, and both queues are full.
    let (to_client, to_server) = (fill(&server), fill(&client));
    let Crossed { server, state, connection } = net.cross(server);
    let lengths = connection.lengths;
    assert_eq!(state, State::Established);
    assert!(lengths.received > 0 && lengths.unsent > 0, "{lengths:?}");
    eprintln!("{to_client} bytes to the client, {to_server} to the server; {lengths:?}, {:?}", connection.window);
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| reads_exactly(&client, to_client));
        reads_exactly(&server, to_server);
    });
    talk(&server, &client);
    capture.finish();
}

#[test]
fn both_directions_in_full_flow() {
    let Some(net) = Net::make() else { return };
    let capture = Capture::start(&net);
    let (_listener, server, client) = net.pair(v4(), v4());
    const LEN: usize = 16 << 20;
    thread::scope(|scope| {
        scope.spawn(|| (&client).write_all(&pattern(0, LEN)).unwrap());
        let hears = scope.spawn(|| reads_exactly(&client, LEN));
        // A quarter here, the rest there.
        let (mut heard, mut said) = (Vec::new(), 0);
        server.set_nonblocking(true).unwrap();
        let mut buffer = vec![0; 64 << 10];
        while heard.len() < LEN / 4 || said < LEN / 4 {
            let mut still = true;
            if let Ok(len) = (&server).read(&mut buffer) {
                heard.extend_from_slice(&buffer[..len]);
                still = false;
            }
            if said < LEN / 2
                && let Ok(len) = (&server).write(&pattern(said, LEN.min(said + 20_000) - said))
            {
                said += len;
                still = false;
            }
            if still {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let Crossed { server, connection, .. } = net.cross(server);
        assert!(connection.settings.nonblocking);
        server.set_nonblocking(false).unwrap();
        eprintln!("{} and {said} bytes had passed; {:?}", heard.len(), connection.lengths);
        let rest = scope.spawn({
            let server = server.try_clone().unwrap();
            move || (&server).write_all(&pattern(said, LEN - said)).unwrap()
        });
        let mut others = vec![0; LEN - heard.len()];
        (&server).read_exact(&mut others).unwrap();
        heard.extend_from_slice(&others);
        assert!(heard == pattern(0, LEN));
        rest.join().unwrap();
        hears.join().unwrap();
    });
    capture.finish();
}

#[test]
fn the_client_has_ended_and_still_listens() {
    for unread in [0, 5000] {
        let Some(net) = Net::make() else { return };
        let capture = Capture::start(&net);
        let (_listener, server, client) = net.pair(v4(), v4());
        (&client).write_all(&pattern(0, unread)).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        wait_until("CLOSE_WAIT", || state_of(&server) == 8);
        let Crossed { server, state, connection } = net.cross(server);
        assert_eq!((state, connection.lengths.received as usize), (State::CloseWait, unread));
        reads_exactly(&server, unread);
        reads_end(&server);
        says(&server, &client, &pattern(3, 50_000));
        drop(server);
        reads_end(&client);
        capture.finish();
    }
}

#[test]
fn the_server_has_ended_and_still_listens() {
    // Acknowledged; sent and not acknowledged; not sent, because the client takes nothing more.
    for (expected, number) in [(State::FinWait2, 5), (State::FinWait1, 4), (State::FinWait1, 4)].into_iter().zip(0..) {
        let Some(net) = Net::make() else { return };
        let capture = Capture::start(&net);
        let (_listener, server, client) = net.pair(v4(), v4());
        let (expected, kernels) = expected;
        let filled = if number == 2 { fill(&server) } else { 0 };
        if number == 1 {
            ip(&format!("-n {} link set p-old down", net.at("c"))).unwrap();
        }
        server.shutdown(std::net::Shutdown::Write).unwrap();
        wait_until("its state", || state_of(&server) == kernels);
        let Crossed { server, state, connection } = net.cross(server);
        assert_eq!((state, connection.lengths.unsent > 0), (expected, number == 2), "{connection:?}");
        reads_exactly(&client, filled);
        reads_end(&client);
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        says(&client, &server, &pattern(9, 40_000));
        drop(client);
        reads_end(&server);
        capture.finish();
    }
}

#[test]
fn both_have_ended_and_something_is_still_on_its_way() {
    for (state_there, number, client_first) in [(State::LastAck, 9, true), (State::Closing, 11, false)] {
        let Some(net) = Net::make() else { return };
        let capture = Capture::start(&net);
        let (_listener, server, client) = net.pair(v4(), v4());
        let filled = fill(&server);
        let ends: [&TcpStream; 2] = if client_first { [&client, &server] } else { [&server, &client] };
        ends[0].shutdown(std::net::Shutdown::Write).unwrap();
        if client_first {
            wait_until("CLOSE_WAIT", || state_of(&server) == 8);
        }
        ends[1].shutdown(std::net::Shutdown::Write).unwrap();
        wait_until("its state", || state_of(&server) == number);
        let Crossed { server, state, .. } = net.cross(server);
        assert_eq!(state, state_there);
        reads_exactly(&client, filled);
        reads_end(&client);
        reads_end(&server);
        capture.finish();
    }
}

#[test]
fn what_its_owner_has_set_is_set_again() {
    let Some(net) = Net::make() else { return };
    let (_listener, server, client) = net.pair(v4(), v4());
    let set = |level, option, value: i32| {
        agent::services::connections::test_set(server.as_fd(), level, option, value).unwrap();
    };
    let tcp = libc::IPPROTO_TCP;
    set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    set(tcp, libc::TCP_KEEPIDLE, 33);
    set(tcp, libc::TCP_KEEPINTVL, 7);
    set(tcp, libc::TCP_KEEPCNT, 4);
    set(tcp, libc::TCP_USER_TIMEOUT, 12_345);
    set(tcp, libc::TCP_NODELAY, 1);
    set(libc::SOL_SOCKET, libc::SO_RCVBUF, 100_000);
    set(libc::IPPROTO_IP, libc::IP_TOS, 0x10);
    let Crossed { server, connection: before, .. } = net.cross(server);
    talk(&server, &client);
    let (held, after, _) = dump::take(server.into(), "test", vec![]).unwrap();
    drop(held);
    assert_eq!(after.settings, before.settings);
    let settings = after.settings;
    assert_eq!((settings.keepalive.on, settings.keepalive.idle_s, settings.user_timeout_ms), (true, 33, 12_345));
    assert_eq!((settings.receive_buffer, settings.send_buffer, settings.no_delay), (Some(100_000), None, true));
    assert_eq!(after.agreed.segment, before.agreed.segment);
    assert_eq!((after.agreed.scale, after.agreed.selective), (before.agreed.scale, before.agreed.selective));
}

/// The accept queue is drained once nobody new gets into it; whoever begins meanwhile is not refused, and gets in at the next listener.
#[test]
fn who_waits_to_be_accepted_crosses_and_who_comes_meanwhile_gets_in_later() {
    let Some(net) = Net::make() else { return };
    let capture = Capture::start(&net);
    let listener = net.listen("old", v4());
    let next = net.listen("new", SocketAddr::new("0.0.0.0".parse().unwrap(), PORT));
    let waiting = net.connect(v4());
    (&waiting).write_all(&pattern(0, 3000)).unwrap();
    baton_sdk::connections::hold(&listener).unwrap();
    thread::scope(|scope| {
        let comes = scope.spawn(|| net.connect(v4()));
        listener.set_nonblocking(true).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert!(listener.accept().is_err(), "one was there before");
        server.set_nonblocking(false).unwrap();
        let Crossed { server, connection, .. } = net.cross(server);
        assert_eq!(connection.lengths.received, 3000);
        reads_exactly(&server, 3000);
        talk(&server, &waiting);
        let (newcomer, _) = next.accept().unwrap();
        talk(&newcomer, &comes.join().unwrap());
    });
    capture.finish();
}

/// A cutover that is taken back: the socket is as it was, with what came meanwhile sent again by the peer.
#[test]
fn a_connection_that_does_not_cross_goes_on() {
    let Some(net) = Net::make() else { return };
    let capture = Capture::start(&net);
    let (_listener, server, client) = net.pair(v4(), v4());
    talk(&server, &client);
    let (held, _, _) = dump::take(server.try_clone().unwrap().into(), "test", vec![]).unwrap();
    (&client).write_all(b"meanwhile").unwrap();
    assert!((&server).write(b"not now").is_err(), "under repair nothing can be written");
    drop(held);
    let mut heard = [0; 9];
    (&server).read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"meanwhile");
    talk(&server, &client);
    capture.finish();
}

/// Silent while it is held, however the peer insists; and a descriptor that the service still has cannot speak either.
#[test]
fn a_connection_that_has_crossed_is_forgotten_without_a_word() {
    let Some(net) = Net::make() else { return };
    let capture = Capture::start(&net);
    let (listener, server, client) = net.pair(v4(), v4());
    let left = server.try_clone().unwrap();
    let Crossed { server, .. } = net.cross(server);
    drop((left, listener));
    talk(&server, &client);
    capture.finish();
}

#[test]
fn what_cannot_cross_is_refused_and_stays_as_it_was() {
    let Some(net) = Net::make() else { return };
    let refusal = |socket: OwnedFd| match dump::take(socket, "test", vec![]) {
        Err(error) => error.downcast::<Refusal>().expect("a refusal"),
        Ok(_) => panic!("it was taken"),
    };
    let set = |socket: &TcpStream, level, option, value| {
        agent::services::connections::test_set(socket.as_fd(), level, option, value).unwrap();
    };
    let (listener, server, client) = net.pair(v4(), v4());
    assert_eq!(refusal(listener.try_clone().unwrap().into()), Refusal::Listens);
    assert!(matches!(refusal(std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into()), Refusal::NotTcp { .. }));
    assert!(matches!(refusal(std::os::unix::net::UnixStream::pair().unwrap().0.into()), Refusal::NotTcp { .. }));
    let again = || OwnedFd::from(server.try_clone().unwrap());
    set(&server, libc::IPPROTO_TCP, libc::TCP_INQ, 1);
    assert_eq!(refusal(again()), Refusal::TellsLeft);
    set(&server, libc::IPPROTO_TCP, libc::TCP_INQ, 0);
    set(&server, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 3);
    assert_eq!(refusal(again()), Refusal::PeekOffset(3));
    set(&server, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1);
    nix::sys::socket::send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    wait_until("the urgent byte", || look(server.as_fd()).unwrap().urgent);
    assert_eq!(refusal(again()), Refusal::Urgent);
    let mut urgent = [0];
    assert_eq!(recv(server.as_raw_fd(), &mut urgent, MsgFlags::MSG_OOB).unwrap(), 1);
    // Held twice: the first one's filter is found.
    let (held, _, _) = dump::take(again(), "test", vec![]).unwrap();
    assert!(matches!(refusal(again()), Refusal::Filtered | Refusal::UnderRepair));
    drop(held);
    talk(&server, &client);
    drop(client);
    reads_end(&server);
    server.shutdown(std::net::Shutdown::Write).unwrap();
    wait_until("its end", || judge(&look(server.as_fd()).unwrap()) == Err(Refusal::Over));
    let many = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).unwrap();
    assert_eq!(refusal(many), Refusal::Over);
}
