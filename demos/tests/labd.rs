//! labd alone, on this host, in a network namespace of its own: what a request gives, and what it survives. Needs root, no machine.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use demos::lab::guest::Guest;
use demos::lab::inside::{Door, Inside};
use demos::lab::wire::{self, Kind, Request};
use demos::lab::{Lab, Progress, host, net};

struct Host {
    guest: Guest,
    door: Door,
    _lab: Lab,
    // Dropped before the namespace.
    labd: Child,
    _inside: Inside,
    _folder: tempfile::TempDir,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.labd.kill();
        let _ = self.labd.wait();
    }
}

fn start() -> Host {
    let lab = Lab::open(Progress::auto()).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let (inside, door) = Inside::with_own_network(lab.tree(), folder.path()).unwrap_or_else(|e| panic!("{e}"));
    net::lay(&inside, &[]).unwrap_or_else(|e| panic!("{e}"));
    let mut command = host::leashed(env!("CARGO_BIN_EXE_labd"));
    command.stdout(Stdio::null());
    let labd = inside.spawn(command).unwrap_or_else(|e| panic!("{e}"));
    let guest = Guest::new(door.clone(), Ipv4Addr::LOCALHOST);
    guest.wait_ready(Duration::from_secs(20)).unwrap_or_else(|e| panic!("{e}"));
    Host { guest, door, _lab: lab, labd, _inside: inside, _folder: folder }
}

#[test]
fn commands_come_back_with_output_code_and_signal() {
    let host = start();
    let ran = host.guest.run(&["sh", "-c", "echo out; echo err >&2; exit 7"]).unwrap();
    assert_eq!((ran.text().as_str(), ran.stderr.as_slice(), ran.exit.code), ("out\n", b"err\n".as_slice(), Some(7)));
    let killed = host.guest.run(&["sh", "-c", "kill -9 $$"]).unwrap();
    assert_eq!((killed.exit.code, killed.exit.signal, killed.exit.timed_out), (None, Some(9), false));
    let env = host.guest.command(&["sh", "-c", "echo $GREETING"]).env("GREETING", "hello").check().unwrap();
    assert_eq!(env, "hello\n");
    let absent = host.guest.run(&["/no/such/program"]).unwrap_err().to_string();
    assert!(absent.contains("/no/such/program") && absent.contains("No such file"), "{absent}");
    assert!(host.guest.check(&["false"]).unwrap_err().to_string().contains("`false` in the guest at 127.0.0.1"));
}

#[test]
fn more_input_than_any_pipe_holds_comes_back_whole() {
    let host = start();
    let input: Vec<u8> = (0..5_000_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let ran = host.guest.command(&["cat"]).stdin(input.clone()).run().unwrap();
    assert!(ran.success() && ran.stdout == input);
    // A command that does not read its input is no failure.
    assert!(host.guest.command(&["true"]).stdin(input).run().unwrap().success());
}

#[test]
fn a_command_that_takes_too_long_is_killed_with_its_children_and_others_go_on() {
    let host = start();
    let slow = host.guest.command(&["sh", "-c", "sleep 1000 & echo $!; wait"]).timeout(Duration::from_millis(300));
    let began = Instant::now();
    let (slow, quick) = std::thread::scope(|scope| {
        let slow = scope.spawn(|| slow.run().unwrap());
        let quick = host.guest.check(&["echo", "meanwhile"]).unwrap();
        (slow.join().unwrap(), quick)
    });
    assert_eq!(quick, "meanwhile\n");
    assert!(slow.exit.timed_out && slow.exit.signal == Some(9), "{:?}", slow.exit);
    assert!(began.elapsed() < Duration::from_secs(30));
    let child = slow.text().trim().to_owned();
    let gone =
        host.guest.check(&["sh", "-c", &format!("kill -0 {child} 2>/dev/null && cat /proc/{child}/stat || echo gone")]);
    let gone = gone.unwrap();
    assert!(gone.contains("gone") || gone.contains(") Z "), "{gone}");
}

#[test]
fn a_daemon_left_behind_does_not_hold_the_request_open() {
    let host = start();
    let began = Instant::now();
    let ran = host.guest.run(&["sh", "-c", "sleep 60 & echo started"]).unwrap();
    assert_eq!(ran.text(), "started\n");
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn files_go_both_ways_and_a_broken_put_leaves_nothing() {
    let host = start();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f").to_string_lossy().into_owned();
    let content: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    host.guest.put(&path, 0o640, &content).unwrap();
    assert_eq!(host.guest.get(&path).unwrap(), content);
    let mode = host.guest.check(&["stat", "-c", "%a", &path]).unwrap();
    assert_eq!(mode, "640\n");
    assert!(host.guest.get("/no/such/file").unwrap_err().to_string().contains("No such file"));

    let mut stream = host.guest.connect(Duration::from_secs(5)).unwrap();
    let request = Request::Put { path: path.clone(), mode: 0o600 };
    wire::send_json(&mut stream, Kind::Request, &request).unwrap();
    wire::send(&mut stream, Kind::Data, b"half").unwrap();
    drop(stream);
    assert_eq!(host.guest.get(&path).unwrap(), content, "the old file stays until the new one is whole");
    assert!(host.guest.run(&["true"]).unwrap().success());
}

#[test]
fn a_terminal_is_one() {
    let host = start();
    let mut stream = host.guest.connect(Duration::from_secs(5)).unwrap();
    let argv = ["sh", "-c", "stty size; tty; read line; echo got $line"].map(str::to_owned).to_vec();
    let request = Request::Run { argv, env: Vec::new(), timeout_ms: None, terminal: Some((33, 77)) };
    wire::send_json(&mut stream, Kind::Request, &request).unwrap();
    wire::send(&mut stream, Kind::Data, b"typed\r").unwrap();
    let mut seen = String::new();
    loop {
        match wire::receive(&mut stream).unwrap() {
            (Kind::Out, bytes) => seen += &String::from_utf8_lossy(&bytes),
            (Kind::Exit, bytes) => {
                assert_eq!(wire::parse_json::<wire::Exit>(&bytes).unwrap().code, Some(0));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.contains("33 77") && seen.contains("/dev/pts/") && seen.contains("got typed"), "{seen}");
}

#[test]
fn nonsense_is_answered_and_survived() {
    let host = start();
    for nonsense in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[b'Q', 3, 0, 0, 0, b'x', b'y', b'z'], &[b'D', 0, 0, 0, 0]] {
        let mut stream = host.door.connect(([127, 0, 0, 1], wire::PORT).into(), Duration::from_secs(5)).unwrap();
        stream.write_all(nonsense).unwrap();
        assert_eq!(wire::receive(&mut stream).unwrap().0, Kind::Failed);
    }
    assert!(host.guest.run(&["true"]).unwrap().success());
}
