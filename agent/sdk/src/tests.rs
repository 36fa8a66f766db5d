//! Both ends against each other, in one process, over a real socket and a real memory file.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::Error;
use super::agent_end::AgentEnd;
use super::client::{Client, Order};
use super::held::Held;
use super::protocol::{
    Hello, Inbox, MAX_CAUSE, MAX_FRAME, Standing, ToAgent, ToService, bounded_cause, encode, send_with_fd,
};

const KIND: u32 = u32::from_le_bytes(*b"cntr");
const LEN: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

fn memory_file(len: u64) -> OwnedFd {
    let file = File::from(memfd_create(c"arena", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(len).expect("room");
    file.into()
}

fn hello() -> Hello {
    Hello::new("counter", KIND, 1, LEN)
}

/// The epoch, and whether the arena was fresh, the service resumed.
type Activation = (u64, bool, bool);

/// A service that counts its activations in the arena's first byte.
fn counter(socket: UnixStream) -> Result<Vec<Activation>, Error> {
    let mut held_epochs = Vec::new();
    let (mut agent, mut arena) = Client::over(socket, hello())?;
    agent.ready()?;
    while let Some(order) = agent.wait(Some(PATIENCE))? {
        match order {
            Order::StandBy => assert_eq!(agent.serving(), None),
            Order::Serve(held) => {
                assert_eq!(agent.serving(), None, "not before it has attached");
                let count = &mut arena.memory(&held)[0];
                *count += 1;
                agent.activated(&held, u64::from(*count), 7)?;
                assert_eq!(agent.serving(), Some(held.epoch));
                held_epochs.push((held.epoch, held.fresh, held.resumed));
                assert!(matches!(agent.wait(Some(PATIENCE))?, Some(Order::Freeze { .. })));
                assert_eq!(agent.serving(), None);
                let count = u64::from(arena.memory(&held)[0]);
                agent.frozen(held, count, 8)?;
            }
            Order::Freeze { .. } => {
                unreachable!("the table of legal steps lets it through only while serving")
            }
            Order::AgentIsBack => unreachable!("there is no way back to a socket that was given"),
            Order::Stop => break,
        }
    }
    Ok(held_epochs)
}

fn start() -> (AgentEnd, thread::JoinHandle<Result<Vec<Activation>, Error>>) {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let service = thread::spawn(move || counter(theirs));
    (AgentEnd::accept(ours, PATIENCE).expect("greeting"), service)
}

#[test]
fn state_goes_on_in_the_successor_on_the_same_memory() {
    let file = memory_file(LEN);
    let (mut old, old_service) = start();
    assert_eq!(old.hello(), &hello());
    old.give_arena(&[(file.as_fd(), LEN)], true).expect("arena");
    assert_eq!(old.report(PATIENCE).expect("ready"), ToAgent::Ready);
    old.order(&ToService::Serve { epoch: 1 }).expect("serve");
    assert_eq!(old.report(PATIENCE).expect("serves"), ToAgent::Activated { epoch: 1, items: 1, seal: 7 });

    let (mut new, new_service) = start();
    new.give_arena(&[(file.as_fd(), LEN)], false).expect("arena");
    assert_eq!(new.report(PATIENCE).expect("ready"), ToAgent::Ready);
    new.order(&ToService::StandBy).expect("stand by");

    old.order(&ToService::Freeze { epoch: 1 }).expect("freeze");
    assert_eq!(old.report(PATIENCE).expect("frozen"), ToAgent::Frozen { epoch: 1, items: 1, seal: 8 });
    new.order(&ToService::Activate { epoch: 2 }).expect("activate");
    assert_eq!(new.report(PATIENCE).expect("active"), ToAgent::Activated { epoch: 2, items: 2, seal: 7 });

    // And back: the incumbent goes on with what the successor wrote.
    new.order(&ToService::Freeze { epoch: 2 }).expect("freeze");
    new.report(PATIENCE).expect("frozen");
    old.order(&ToService::Unfreeze { epoch: 3 }).expect("unfreeze");
    assert_eq!(old.report(PATIENCE).expect("active"), ToAgent::Activated { epoch: 3, items: 3, seal: 7 });
    old.order(&ToService::Freeze { epoch: 3 }).expect("freeze");
    old.report(PATIENCE).expect("frozen");

    old.order(&ToService::Stop).expect("stop");
    new.order(&ToService::Stop).expect("stop");
    assert_eq!(old_service.join().expect("no panic").expect("no error"), [(1, true, false), (3, false, true)]);
    assert_eq!(new_service.join().expect("no panic").expect("no error"), [(2, false, false)]);
}

#[test]
fn orders_that_come_together_keep_their_descriptor() {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let service = thread::spawn(move || counter(theirs));
    let mut greeting = [0; 512];
    let _ = nix::unistd::read(&ours, &mut greeting).expect("greeting");
    let file = memory_file(LEN);
    let mut bytes = encode(&ToService::Arena { len: LEN, fresh: true, first: LEN }).expect("fits");
    bytes.extend(encode(&ToService::Stop).expect("fits"));
    send_with_fd(ours.as_fd(), &bytes, Some(file.as_fd())).expect("sent");
    assert!(service.join().expect("no panic").expect("no error").is_empty());
}

#[test]
fn an_old_epoch_is_never_obeyed() {
    let refused =
        |standing: Standing, order| assert!(matches!(standing.ordered(&order), Err(Error::OutOfOrder { .. })));
    refused(Standing::Serving(5), ToService::Freeze { epoch: 4 });
    refused(Standing::Serving(5), ToService::Freeze { epoch: 6 });
    refused(Standing::Serving(5), ToService::Activate { epoch: 6 });
    refused(Standing::Frozen(5), ToService::Unfreeze { epoch: 4 });
    refused(Standing::Frozen(5), ToService::Activate { epoch: 6 });
    refused(Standing::StandingBy, ToService::Activate { epoch: 0 });
    refused(Standing::StandingBy, ToService::Serve { epoch: 1 });
    refused(Standing::Over, ToService::StandBy);
    assert!(Standing::Activating(5).reported(&ToAgent::Activated { epoch: 4, items: 0, seal: 0 }).is_err());
    assert!(Standing::Serving(5).reported(&ToAgent::Frozen { epoch: 5, items: 0, seal: 0 }).is_err());
    for silent in
        [Standing::StandingBy, Standing::Activating(5), Standing::Freezing(5), Standing::Frozen(5), Standing::Over]
    {
        assert_eq!(silent.serving(), None);
    }
}

#[test]
fn an_arena_that_is_not_what_was_announced_is_refused() {
    for (held, announced) in [(LEN, LEN + 4096), (LEN, 0), (LEN, 100), (0, 4096), (LEN, !4095)] {
        let (mut agent, service) = start();
        agent.give_arena(&[(memory_file(held).as_fd(), announced)], true).expect("sent");
        let error = service.join().expect("no panic").expect_err("refused");
        assert!(matches!(error, Error::ArenaLength { .. }), "{error}");
    }
    // No descriptor at all.
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let service = thread::spawn(move || counter(theirs));
    (&ours).write_all(&encode(&ToService::Arena { len: LEN, fresh: true, first: LEN }).expect("fits")).expect("sent");
    assert!(matches!(service.join().expect("no panic"), Err(Error::Descriptors(0, 1))));
}

#[test]
fn an_arena_of_several_pieces_is_one_memory() {
    let (first, second) = (memory_file(LEN), memory_file(4096));
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let agent = thread::spawn(move || {
        let mut agent = AgentEnd::accept(ours, PATIENCE).expect("greeting");
        agent.give_arena(&[(first.as_fd(), LEN), (second.as_fd(), 4096)], true).expect("arena");
        assert_eq!(agent.report(PATIENCE).expect("ready"), ToAgent::Ready);
        agent.order(&ToService::Serve { epoch: 1 }).expect("serve");
        agent.report(PATIENCE).expect("serves");
        [first, second].map(|file| {
            let mut byte = [0];
            File::from(file).read_exact_at(&mut byte, 0).expect("read");
            byte[0]
        })
    });
    let (mut client, mut arena) = Client::over(theirs, hello()).expect("arena");
    client.ready().expect("sent");
    let Some(Order::Serve(held)) = client.wait(Some(PATIENCE)).expect("order") else { panic!("another order") };
    let memory = arena.memory(&held);
    assert_eq!(memory.len() as u64, LEN + 4096);
    (memory[0], memory[LEN as usize]) = (1, 2);
    client.activated(&held, 0, 0).expect("sent");
    assert_eq!(agent.join().expect("no panic"), [1, 2]);
}

#[test]
fn a_service_that_serves_outlives_its_agent_and_a_silent_one_does_not() {
    let file = memory_file(LEN);
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let agent = thread::spawn(move || {
        let mut agent = AgentEnd::accept(ours, PATIENCE).expect("greeting");
        agent.give_arena(&[(file.as_fd(), LEN)], true).expect("arena");
        agent.report(PATIENCE).expect("ready");
        agent.order(&ToService::Serve { epoch: 1 }).expect("serve");
        agent.report(PATIENCE).expect("serves");
    });
    let (mut client, mut arena) = Client::over(theirs, hello()).expect("arena");
    client.ready().expect("sent");
    let Some(Order::Serve(held)) = client.wait(Some(PATIENCE)).expect("order") else { panic!("another order") };
    client.activated(&held, 0, 0).expect("sent");
    agent.join().expect("no panic");
    assert!(client.wait(Some(PATIENCE)).expect("no error").is_none());
    assert_eq!(client.serving(), Some(1));
    arena.memory(&held)[0] = 1;

    let (mut agent, service) = start();
    agent.give_arena(&[(memory_file(LEN).as_fd(), LEN)], false).expect("arena");
    agent.report(PATIENCE).expect("ready");
    drop(agent);
    assert!(matches!(service.join().expect("no panic"), Err(Error::Closed)));
}

/// An agent at a path, as `batond` makes one: what a dead one has left there is replaced, and the mode is set last.
fn agent_at(path: &Path) -> UnixListener {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).expect("listens");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("its own");
    listener
}

fn next_at(listener: &UnixListener) -> AgentEnd {
    AgentEnd::accept(listener.accept().expect("connected").0, PATIENCE).expect("greeting")
}

/// A service that serves in epoch 1, and the agent that told it to.
fn serving_at(path: &Path) -> (Client, Held, AgentEnd) {
    let listener = agent_at(path);
    let agent = thread::spawn(move || {
        let mut agent = next_at(&listener);
        agent.give_arena(&[(memory_file(LEN).as_fd(), LEN)], true).expect("arena");
        agent.report(PATIENCE).expect("ready");
        agent.order(&ToService::Serve { epoch: 1 }).expect("serve");
        agent.report(PATIENCE).expect("serves");
        agent
    });
    let (mut client, _arena) = Client::connect(path, hello()).expect("arena");
    client.ready().expect("sent");
    let Some(Order::Serve(held)) = client.wait(Some(PATIENCE)).expect("order") else { panic!("another order") };
    client.activated(&held, 0, 0).expect("sent");
    (client, held, agent.join().expect("no panic"))
}

/// Waits until there is something to look at, as a program with an event loop does; looks; no order was there.
fn look_without_an_order(client: &mut Client) {
    let deadline = Some(Instant::now() + PATIENCE);
    assert!(super::protocol::wait_until(client.as_fd(), PollFlags::POLLIN, deadline).expect("polled"), "readable");
    assert!(client.poll_order().expect("no error").is_none());
    assert_eq!((client.serving(), client.agent_gone()), (Some(1), true));
}

#[test]
fn a_service_that_serves_finds_the_next_agent_by_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("services.sock");
    let (mut client, held, agent) = serving_at(&path);
    let descriptor = client.as_raw_fd();
    drop(agent);
    look_without_an_order(&mut client);
    assert!(
        matches!(client.wait(Some(Duration::from_millis(20))), Err(Error::TimedOut(_))),
        "quiet while nobody comes"
    );

    // One that does not know it, and one of a release that takes it for a new service.
    let refuses = agent_at(&path);
    look_without_an_order(&mut client);
    drop(next_at(&refuses));
    look_without_an_order(&mut client);
    let misunderstands = agent_at(&path);
    look_without_an_order(&mut client);
    let mut agent = next_at(&misunderstands);
    assert_eq!(agent.hello(), &Hello { serving: Some(1), ..hello() });
    assert!(agent.give_arena(&[(memory_file(LEN).as_fd(), LEN)], true).is_err());
    drop(agent);
    look_without_an_order(&mut client);

    let listener = agent_at(&path);
    look_without_an_order(&mut client);
    let mut agent = next_at(&listener);
    assert!(agent.order(&ToService::Welcome { epoch: 2 }).is_err(), "another epoch than it holds");
    agent.order(&ToService::Welcome { epoch: 1 }).expect("welcome");
    assert!(matches!(client.wait(Some(PATIENCE)), Ok(Some(Order::AgentIsBack))));
    assert_eq!((client.serving(), client.agent_gone(), client.as_raw_fd()), (Some(1), false, descriptor));
    agent.order(&ToService::Freeze { epoch: 1 }).expect("freeze");
    assert!(matches!(client.wait(Some(PATIENCE)), Ok(Some(Order::Freeze { epoch: 1 }))));
    client.frozen(held, 5, 6).expect("sent");
    assert_eq!(agent.report(PATIENCE).expect("frozen"), ToAgent::Frozen { epoch: 1, items: 5, seal: 6 });
    // Frozen, it has no right to go on alone.
    drop(agent);
    assert!(matches!(client.wait(Some(PATIENCE)), Err(Error::Closed)));
}

#[test]
fn an_agent_that_is_there_before_the_loss_is_noticed_is_found_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("services.sock");
    let (mut client, _held, agent) = serving_at(&path);
    drop(agent);
    let listener = agent_at(&path);
    look_without_an_order(&mut client);
    next_at(&listener).order(&ToService::Welcome { epoch: 1 }).expect("welcome");
    assert!(matches!(client.wait(Some(PATIENCE)), Ok(Some(Order::AgentIsBack))));
}

#[test]
fn a_greeting_is_checked_before_anything_is_done_with_it() {
    let refused = |change: fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        hello.check().expect_err("refused").to_string()
    };
    assert!(refused(|h| h.protocol = 9).contains("speaks protocol version 9, this agent 2"));
    for name in ["", "../etc", "A", "a b", ".", &"x".repeat(65)] {
        let hello = Hello::new(name, KIND, 1, 1);
        assert!(matches!(hello.check(), Err(Error::BadGreeting { field: "name", .. })), "{name:?}");
    }
    assert!(refused(|h| h.wanted_arena_len = u64::MAX).contains("1 byte to 1 TiB"));
    let (ours, theirs) = UnixStream::pair().expect("pair");
    (&theirs).write_all(&encode(&ToAgent::Ready).expect("fits")).expect("sent");
    assert!(matches!(AgentEnd::accept(ours, PATIENCE), Err(Error::OutOfOrder { .. })));
}

#[test]
fn a_failure_names_the_service_and_its_cause_always_fits() {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let service = thread::spawn(move || {
        let (mut client, _arena) = Client::over(theirs, hello()).expect("arena");
        client.failed(&"\u{1}".repeat(100_000))
    });
    let mut agent = AgentEnd::accept(ours, PATIENCE).expect("greeting");
    agent.give_arena(&[(memory_file(LEN).as_fd(), LEN)], true).expect("arena");
    let error = agent.report(PATIENCE).expect_err("failed").to_string();
    assert!(error.starts_with("the service counter failed: "), "{error}");
    service.join().expect("no panic").expect("sent");
    assert!(encode(&ToAgent::Failed { cause: bounded_cause(&"\u{1}".repeat(9999)) }).expect("fits").len() < MAX_FRAME);
    assert_eq!(bounded_cause(&"é".repeat(9999)).chars().count(), MAX_CAUSE);
}

#[test]
fn a_silent_peer_is_a_time_out() {
    let (ours, _theirs) = UnixStream::pair().expect("pair");
    let patience = Duration::from_millis(20);
    assert!(matches!(AgentEnd::accept(ours, patience), Err(Error::TimedOut(t)) if t == patience));
}

/// A message is waited for as long as was said, in however many pieces it comes.
#[test]
fn pieces_do_not_stretch_a_time_out() {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    // A frame of 4 KiB, of which a byte comes each millisecond: a patience that began anew would last four seconds.
    let dripping = thread::spawn(move || {
        let frame = [&4096u32.to_le_bytes()[..], &[b' '; 4000]].concat();
        for byte in frame {
            thread::sleep(Duration::from_millis(1));
            if (&theirs).write_all(&[byte]).is_err() {
                return true;
            }
        }
        false
    });
    assert!(matches!(AgentEnd::accept(ours, Duration::from_millis(50)), Err(Error::TimedOut(_))));
    assert!(dripping.join().expect("no panic"), "it was given up before the last piece");
}

#[test]
fn the_wire_is_readable() {
    let frame = encode(&ToService::Freeze { epoch: 3 }).expect("fits");
    assert_eq!(frame, b"\x16\0\0\0{\"Freeze\":{\"epoch\":3}}");
    let frame = encode(&ToAgent::Frozen { epoch: 3, items: 2, seal: 1 }).expect("fits");
    assert_eq!(&frame[4..], br#"{"Frozen":{"epoch":3,"items":2,"seal":1}}"#);
    assert_eq!(&encode(&ToService::StandBy).expect("fits")[4..], br#""StandBy""#);
}

proptest! {
    #[test]
    fn hostile_bytes_end_in_an_error_or_a_message(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..16)) {
        let mut inbox = Inbox::default();
        for chunk in chunks {
            inbox.push(&chunk, None).expect("no descriptors");
            while let Ok(Some(_)) = inbox.take::<ToAgent>() {}
        }
    }

    #[test]
    fn frames_survive_any_fragmentation(epochs in proptest::collection::vec(any::<u64>(), 1..20), cut in 1usize..40) {
        let messages: Vec<_> = epochs.iter().map(|&epoch| ToService::Unfreeze { epoch }).collect();
        let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).expect("fits")).collect();
        let mut inbox = Inbox::default();
        let mut read = Vec::new();
        for piece in bytes.chunks(cut) {
            inbox.push(piece, None).expect("no descriptors");
            while let Some(message) = inbox.take::<ToService>().expect("whole frames only") {
                read.push(message);
            }
        }
        prop_assert_eq!(read, messages);
    }
}
