//! The server as clients see it, and its whole life under an agent: two processes' worth of it in one.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{ToAgent, ToService};
use handover::arena::Store;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::run::{Options, under_agent};
use super::server::Server;
use crate::load::client::{Client, Reply};

const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough to see that nothing comes.
const SILENCE: Duration = Duration::from_millis(200);

type Deed = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// A server in a thread, whose memory a test can get at between two turns.
pub(crate) struct Local {
    pub(crate) address: SocketAddr,
    deeds: Sender<Deed>,
}

impl Local {
    pub(crate) fn start(arena_len: usize) -> Self {
        let mut server = Server::bind("127.0.0.1:0".parse().expect("an address"), 64).expect("bound");
        let address = server.address().expect("bound");
        let (deeds, orders): (Sender<Deed>, Receiver<Deed>) = channel();
        thread::spawn(move || {
            let mut memory = vec![0; arena_len];
            Store::create(&mut memory, "test", 0, 1).expect("room");
            server.begin(0).expect("registered");
            loop {
                match orders.try_recv() {
                    Ok(deed) => deed(&mut memory),
                    Err(std::sync::mpsc::TryRecvError::Empty) => {}
                    Err(_) => return,
                }
                let mut store = Store::attach(&mut memory).expect("whole");
                server.turn(&mut store, Some(Duration::from_millis(1))).expect("polled");
            }
        });
        Self { address, deeds }
    }

    /// Does something to the memory, between two turns, and waits until it is done.
    pub(crate) fn with_memory<T: Send + 'static>(&self, deed: impl FnOnce(&mut Vec<u8>) -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let deed: Deed = Box::new(move |memory| done.send(deed(memory)).expect("awaited"));
        self.deeds.send(deed).expect("the server runs");
        result.recv().expect("the server runs")
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.address, PATIENCE).expect("connected")
    }
}

fn ask(client: &mut Client, line: &str) -> Reply {
    let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
    client.ask(&words).expect("a reply")
}

fn ok() -> Reply {
    Reply::Status("OK".to_owned())
}

fn bulk(text: &str) -> Reply {
    Reply::Bulk(Some(text.as_bytes().to_vec()))
}

fn bulks(texts: &[&str]) -> Reply {
    Reply::Array(texts.iter().map(|t| bulk(t)).collect())
}

#[test]
fn commands_answer_as_redis_would() {
    let local = Local::start(1 << 20);
    let client = &mut local.client();
    let error = |words: &str| Reply::Error(words.to_owned());
    for (request, reply) in [
        ("PING", Reply::Status("PONG".to_owned())),
        ("ping hello", bulk("hello")),
        ("SET a 1", ok()),
        ("SET a 2 NX", Reply::Bulk(None)),
        ("SET b 2 XX", Reply::Bulk(None)),
        ("SET a 2 EX 9", error("ERR syntax error")),
        ("GET a", bulk("1")),
        ("GET none", Reply::Bulk(None)),
        ("INCR a", Reply::Integer(2)),
        ("DECRBY a 5", Reply::Integer(-3)),
        ("INCRBY a 9223372036854775807", Reply::Integer(i64::MAX - 3)),
        ("INCRBY a 9", error("ERR increment or decrement would overflow")),
        ("INCRBY a x", error("ERR value is not an integer or out of range")),
        ("MSET x 1 y 2", ok()),
        ("MSET x 1 y", error("ERR wrong number of arguments for 'mset' command")),
        ("MGET x none y l", Reply::Array(vec![bulk("1"), Reply::Bulk(None), bulk("2"), Reply::Bulk(None)])),
        ("LPUSH l 1 2", Reply::Integer(2)),
        ("RPUSH l 3", Reply::Integer(3)),
        ("LRANGE l 0 -1", bulks(&["2", "1", "3"])),
        ("LRANGE l 5 9", bulks(&[])),
        ("LLEN l", Reply::Integer(3)),
        ("LPOP l", bulk("2")),
        ("RPOP l", bulk("3")),
        ("RPOP none", Reply::Bulk(None)),
        ("GET l", error("WRONGTYPE Operation against a key holding the wrong kind of value")),
        ("MGET x l", Reply::Array(vec![bulk("1"), Reply::Bulk(None)])),
        ("SADD s m m", Reply::Integer(1)),
        ("SADD s n", Reply::Integer(1)),
        ("SCARD s", Reply::Integer(2)),
        ("SISMEMBER s m", Reply::Integer(1)),
        ("SREM s m z", Reply::Integer(1)),
        ("SMEMBERS s", bulks(&["n"])),
        ("SPOP s", bulk("n")),
        ("EXISTS s a x", Reply::Integer(2)),
        ("TYPE l", Reply::Status("list".to_owned())),
        ("DBSIZE", Reply::Integer(4)),
        ("DEL a x none", Reply::Integer(2)),
        ("SELECT 0", ok()),
        ("SELECT 1", error("ERR DB index is out of range")),
        ("CONFIG GET save", bulks(&["save", ""])),
        ("COMMAND", bulks(&[])),
        ("CLIENT SETNAME me", ok()),
        ("HELLO 3", error("ERR unknown command `HELLO`, with args beginning with: `3`, ")),
        ("GET", error("ERR wrong number of arguments for 'get' command")),
        ("FLUSHALL", ok()),
        ("DBSIZE", Reply::Integer(0)),
        ("QUIT", ok()),
    ] {
        assert_eq!(ask(client, request), reply, "{request}");
    }
    assert!(client.ask(&[b"PING"]).is_err(), "closed after QUIT");
    let Reply::Bulk(Some(info)) = ask(&mut local.client(), "INFO") else { panic!("INFO is a bulk") };
    assert!(String::from_utf8_lossy(&info).contains("baton_epoch:0"));
}

#[test]
fn a_full_arena_is_an_answer_not_an_end() {
    let local = Local::start(64 << 10);
    let client = &mut local.client();
    let value = [b'x'; 1000];
    let mut stored = 0;
    let refused = loop {
        match client.ask(&[b"SET", format!("key{stored}").as_bytes(), &value]).expect("a reply") {
            Reply::Error(words) => break words,
            reply => assert_eq!(reply, ok()),
        }
        stored += 1;
        assert!(stored < 100);
    };
    assert!(refused.starts_with("OOM no room for "), "{refused}");
    assert_eq!(ask(client, "DBSIZE"), Reply::Integer(stored));
    assert_eq!(ask(client, "DEL key0"), Reply::Integer(1));
    assert_eq!(client.ask(&[b"SET", b"again", &value]).expect("a reply"), ok());
}

#[test]
fn pipelines_are_answered_in_order_however_long() {
    let local = Local::start(1 << 20);
    let client = &mut local.client();
    for _ in 0..2000 {
        client.queue(&[b"INCR", b"n"]);
    }
    client.send().expect("sent");
    for n in 1..=2000 {
        assert_eq!(client.receive().expect("a reply"), Reply::Integer(n));
    }
}

#[test]
fn hostile_clients_lose_their_connection_and_nobody_elses() {
    let local = Local::start(1 << 20);
    let mut witness = local.client();
    for (bytes, words) in [
        (&b"*1\r\n$999999999\r\n"[..], "-ERR Protocol error: invalid bulk length\r\n"),
        (b"*99999\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1\r\n!", ""),
        (&[b'a'; 8192], "-ERR Protocol error: too big inline request\r\n"),
    ] {
        let mut socket = TcpStream::connect(local.address).expect("connected");
        socket.write_all(bytes).expect("sent");
        socket.shutdown(std::net::Shutdown::Write).expect("shut");
        let mut reply = String::new();
        // What was sent behind the offence may turn the end into a reset.
        let _ = socket.read_to_string(&mut reply);
        assert_eq!(reply, words);
        assert_eq!(ask(&mut witness, "PING"), Reply::Status("PONG".to_owned()));
    }
}

#[test]
fn a_client_that_does_not_read_is_not_served_further() {
    let local = Local::start(4 << 20);
    let client = &mut local.client();
    let value = vec![b'x'; 256 << 10];
    assert_eq!(client.ask(&[b"SET", b"big", &value]).expect("a reply"), ok());
    let mut greedy = TcpStream::connect(local.address).expect("connected");
    greedy.set_nonblocking(true).expect("set");
    for _ in 0..200 {
        let _ = greedy.write(b"GET big\r\nINCR served\r\n");
    }
    thread::sleep(SILENCE);
    let Reply::Bulk(Some(served)) = ask(client, "GET served") else { panic!("some are served") };
    let served: usize = String::from_utf8_lossy(&served).parse().expect("a number");
    assert!(served < 100, "{served} of 200 served: up to {} MiB kept for one client", served / 4);
}

#[test]
fn more_clients_than_allowed_are_told_so() {
    let local = Local::start(1 << 20);
    let mut clients: Vec<Client> = (0..64).map(|_| local.client()).collect();
    for client in &mut clients {
        assert_eq!(ask(client, "PING"), Reply::Status("PONG".to_owned()));
    }
    let words = "ERR max number of clients reached".to_owned();
    assert_eq!(local.client().receive().expect("a reply"), Reply::Error(words));
    clients.pop();
    // The place is free once the server has seen the end.
    let served = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(10));
        local.client().ask(&[b"PING"]).is_ok_and(|reply| reply == Reply::Status("PONG".to_owned()))
    });
    assert!(served);
}

#[test]
fn the_redis_crate_works_with_it() {
    let local = Local::start(1 << 20);
    let client = redis::Client::open(format!("redis://{}/", local.address)).expect("a url");
    let mut connection = client.get_connection().expect("connected");
    let (old, sum, list): (String, i64, Vec<String>) = redis::pipe()
        .cmd("SET")
        .arg("k")
        .arg("v")
        .ignore()
        .cmd("GET")
        .arg("k")
        .cmd("INCRBY")
        .arg("n")
        .arg(42)
        .cmd("RPUSH")
        .arg("l")
        .arg("a")
        .arg("b")
        .ignore()
        .cmd("LRANGE")
        .arg("l")
        .arg(0)
        .arg(-1)
        .query(&mut connection)
        .expect("answered");
    assert_eq!((old.as_str(), sum, list), ("v", 42, vec!["a".to_owned(), "b".to_owned()]));
    let error = redis::cmd("INCR").arg("k").query::<i64>(&mut connection).expect_err("no number");
    assert!(error.to_string().contains("not an integer"), "{error}");
}

/// A service under an agent, as on one kernel; each kernel has an address of its own here.
pub(crate) struct Kernel {
    pub(crate) agent: AgentEnd,
    service: JoinHandle<Result<(), super::run::Error>>,
    pub(crate) address: SocketAddr,
}

impl Kernel {
    pub(crate) fn boot(folder: &Path, number: u8, arena: &File, fresh: bool) -> Self {
        let mut kernel = Self::begin(folder, number, arena, fresh);
        assert_eq!(kernel.agent.report(PATIENCE).expect("ready"), ToAgent::Ready);
        kernel
    }

    /// Not yet ready.
    fn begin(folder: &Path, number: u8, arena: &File, fresh: bool) -> Self {
        let socket = folder.join(format!("{number}.sock"));
        let listener = UnixListener::bind(&socket).expect("bound");
        // 127.0.0.0/8 is all ours: an address nobody else in this machine's tests has.
        let [.., low, high] = [0, (std::process::id() >> 8) as u8, std::process::id() as u8];
        let address = SocketAddr::from(([127, high | 128, low, number], 16379));
        let options = Options { listen: address, socket, arena_mib: 1, max_clients: 16 };
        let service = thread::spawn(move || under_agent(&options));
        let mut agent = AgentEnd::accept(listener.accept().expect("connected").0, PATIENCE).expect("greeting");
        assert_eq!(agent.hello().name, "baton-kv");
        agent.give_arena(&[(arena.as_fd(), arena.metadata().expect("there").len())], fresh).expect("arena");
        Self { agent, service, address }
    }

    pub(crate) fn order(&mut self, order: ToService) -> ToAgent {
        self.agent.order(&order).expect("in order");
        self.agent.report(PATIENCE).expect("obeyed")
    }

    fn client(&self) -> Client {
        Client::connect(self.address, PATIENCE).expect("it listens even while it must be silent")
    }

    fn answers_probes(&self) -> Option<String> {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
        socket.set_read_timeout(Some(SILENCE)).expect("set");
        socket.send_to(b"PING 7", self.address).expect("sent");
        let mut reply = [0; 64];
        let (len, from) = socket.recv_from(&mut reply).ok()?;
        assert_eq!(from, self.address, "the answer comes from where the question went");
        Some(String::from_utf8_lossy(&reply[..len]).into_owned())
    }

    fn is_silent(&self) -> bool {
        let mut socket = TcpStream::connect(self.address).expect("it listens");
        socket.set_read_timeout(Some(SILENCE)).expect("set");
        socket.write_all(b"PING\r\n").expect("sent");
        socket.read(&mut [0; 16]).is_err() && self.answers_probes().is_none()
    }

    pub(crate) fn stop(mut self) {
        self.agent.order(&ToService::Stop).expect("in order");
        self.service.join().expect("no panic").expect("no error");
    }
}

#[test]
fn data_crosses_to_the_successor_and_back_and_only_one_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let arena = File::from(memfd_create(c"arena", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    arena.set_len(1 << 20).expect("room");

    let mut old = Kernel::boot(folder.path(), 1, &arena, true);
    assert!(old.is_silent(), "not told to serve yet");
    assert_eq!(old.order(ToService::Serve { epoch: 1 }), ToAgent::Activated { epoch: 1, items: 0, seal: 0 });
    let mut client = old.client();
    assert_eq!(ask(&mut client, "SET who incumbent"), ok());
    assert_eq!(ask(&mut client, "RPUSH l 1 2"), Reply::Integer(2));
    assert_eq!(old.answers_probes().as_deref(), Some("PONG 7 1"));

    let mut new = Kernel::boot(folder.path(), 2, &arena, false);
    new.agent.order(&ToService::StandBy).expect("in order");
    assert!(new.is_silent(), "it stands by");
    assert_eq!(ask(&mut client, "GET who"), bulk("incumbent"), "which disturbs nobody");

    let ToAgent::Frozen { epoch: 1, items: 2, seal } = old.order(ToService::Freeze { epoch: 1 }) else {
        panic!("frozen")
    };
    assert!(seal != 0);
    assert!(old.is_silent() && new.is_silent(), "between two kernels nobody answers");
    assert_eq!(new.order(ToService::Activate { epoch: 2 }), ToAgent::Activated { epoch: 2, items: 2, seal });
    let mut there = new.client();
    assert_eq!(ask(&mut there, "LRANGE l 0 -1"), bulks(&["1", "2"]));
    assert_eq!(ask(&mut there, "SET who successor"), ok());
    assert_eq!(new.answers_probes().as_deref(), Some("PONG 7 2"));
    assert!(old.is_silent());

    // Back: the old connection is still good, and sees what the successor wrote.
    client.queue(&[b"GET", b"who"]);
    client.send().expect("sent");
    let ToAgent::Frozen { seal, .. } = new.order(ToService::Freeze { epoch: 2 }) else { panic!("frozen") };
    assert_eq!(old.order(ToService::Unfreeze { epoch: 3 }), ToAgent::Activated { epoch: 3, items: 2, seal });
    assert_eq!(client.receive().expect("the request waited in the socket"), bulk("successor"));
    assert!(new.is_silent());

    old.stop();
    new.stop();
    let mut memory = Vec::new();
    (&arena).read_to_end(&mut memory).expect("read");
    assert!(Store::attach(&mut memory).expect("whole").is_sealed(), "told to leave, it left a sealed arena");
}

#[test]
fn an_arena_of_another_owner_is_refused_with_a_cause() {
    let folder = tempfile::tempdir().expect("a folder");
    let arena = File::from(memfd_create(c"arena", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    (&arena).write_all(&[7; 1 << 20]).expect("written");
    let mut kernel = Kernel::begin(folder.path(), 3, &arena, false);
    let error = kernel.agent.report(PATIENCE).expect_err("refused").to_string();
    assert!(error.starts_with("the service baton-kv failed: arena header refused: "), "{error}");
    assert!(kernel.service.join().expect("no panic").is_err());
}
