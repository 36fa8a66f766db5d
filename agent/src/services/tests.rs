//! Services that behave in every way they can, on a played machine: memory is memfds, and who has it mapped is what the test says.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{Hello, Inbox, encode, receive, send_all};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::*;
use crate::daemon::control::ServiceState;
use crate::daemon::listen::Peer;
use crate::services::access::Access;
use crate::services::coming::{Admitted, PATIENCE, patience_for};

/// No test waits as long: it is for what never comes.
const FAR: Duration = Duration::from_secs(20);
const PAGE: u64 = 4096;

/// What a played machine does while it takes memory.
type WhileTaking = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Played {
    next: AtomicU64,
    /// Where arenas are now.
    taken: Mutex<Vec<Range>>,
    /// Whoever has any of it mapped.
    holders: Mutex<Vec<i32>>,
    while_taking: Mutex<Option<WhileTaking>>,
}

impl Land for Played {
    fn take(&self, len: u64, _: &RangeSet) -> Result<Arena> {
        let meanwhile = self.while_taking.lock().unwrap().take();
        meanwhile.into_iter().for_each(|meanwhile| meanwhile());
        let len = len.next_multiple_of(PAGE);
        let start = self.next.fetch_add(len, Ordering::Relaxed) + (1 << 30);
        let range = Range::new(start, start + len);
        let file = std::fs::File::from(memfd_create("arena", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len)?;
        self.taken.lock().unwrap().push(range);
        Ok(Arena { pieces: vec![Piece { range, file: file.into() }], fresh: true })
    }

    fn give_back(&self, arena: Arena) -> Result<(), (Arena, anyhow::Error)> {
        if !self.holders.lock().unwrap().is_empty() {
            return Err((arena, anyhow::anyhow!("it is in use")));
        }
        let gone: Vec<Range> = arena.pieces.iter().map(|piece| piece.range).collect();
        self.taken.lock().unwrap().retain(|range| !gone.contains(range));
        Ok(())
    }

    fn holders(&self, _: &[Range]) -> Result<Vec<i32>> {
        Ok(self.holders.lock().unwrap().clone())
    }
}

/// What a service does when it is told to freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It freezes.
    Well,
    /// A little later.
    Slowly,
    /// Not before the test lets it: it is stopped.
    Hangs,
    /// One byte after the other, and the last ones not before the test lets it.
    Drips,
    /// It ends.
    Dies,
    /// It says that it froze in another epoch.
    Lies,
    /// It says something that is no word.
    Babbles,
    /// It says that it cannot.
    Fails,
}

impl Way {
    fn is_alive(self) -> bool {
        matches!(self, Way::Well | Way::Slowly | Way::Hangs | Way::Drips)
    }
}

/// A service at work.
struct Player {
    /// Orders that it has obeyed.
    obeyed: Receiver<ToService>,
    /// Lets it go on that hangs.
    gate: Sender<()>,
    /// Ends it, wherever it is.
    own_end: UnixStream,
}

impl Player {
    fn next(&self) -> ToService {
        self.obeyed.recv_timeout(FAR).expect("an order")
    }

    fn is_told_nothing(&self) -> bool {
        self.obeyed.try_recv().is_err()
    }

    fn leave(&self) {
        self.own_end.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

fn play(socket: &UnixStream, hello: Hello, way: Way, obeyed: &Sender<ToService>, gate: &Receiver<()>) -> Result<()> {
    let say = |report: &ToAgent| send_all(socket.as_fd(), &encode(report)?, None);
    let mut epoch_held = hello.serving.unwrap_or(0);
    say(&ToAgent::Hello(hello))?;
    let mut inbox = Inbox::default();
    loop {
        let order: ToService = receive(socket.as_fd(), &mut inbox, None)?;
        // Before it answers: the test may look as soon as the agent has heard the answer.
        let _ = obeyed.send(order);
        match order {
            ToService::Arena { .. } => {
                inbox.descriptor()?;
                say(&ToAgent::Ready)?;
            }
            ToService::Serve { epoch } | ToService::Activate { epoch } | ToService::Unfreeze { epoch } => {
                epoch_held = epoch;
                say(&ToAgent::Activated { epoch, items: 1, seal: 1 })?;
            }
            ToService::Freeze { epoch } => {
                assert_eq!(epoch, epoch_held, "it is told of the epoch that it holds");
                let frozen = ToAgent::Frozen { epoch, items: 1, seal: 1 };
                match way {
                    Way::Well => say(&frozen)?,
                    Way::Slowly => {
                        thread::sleep(Duration::from_millis(3));
                        say(&frozen)?;
                    }
                    Way::Hangs => {
                        gate.recv()?;
                        say(&frozen)?;
                    }
                    Way::Drips => {
                        let bytes = encode(&frozen)?;
                        let (first, last) = bytes.split_at(bytes.len() - 2);
                        for byte in first {
                            send_all(socket.as_fd(), &[*byte], None)?;
                            thread::sleep(Duration::from_millis(1));
                        }
                        gate.recv()?;
                        send_all(socket.as_fd(), last, None)?;
                    }
                    Way::Dies => return Ok(()),
                    Way::Lies => say(&ToAgent::Frozen { epoch: epoch + 1, items: 1, seal: 1 })?,
                    Way::Babbles => send_all(socket.as_fd(), b"\x04\0\0\0what", None)?,
                    Way::Fails => say(&ToAgent::Failed { cause: "no".into() })?,
                }
            }
            ToService::Stop => return Ok(()),
            ToService::Piece { .. } | ToService::Welcome { .. } | ToService::StandBy => {}
        }
    }
}

/// A kernel's services, with somebody who minds them.
struct Stage {
    services: Arc<Services>,
    land: Arc<Played>,
    access: Access,
    over: Arc<AtomicBool>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

impl Stage {
    fn new() -> Stage {
        let services = Arc::new(Services::new(Arc::default()).unwrap());
        let (land, over) = (Arc::new(Played::default()), Arc::new(AtomicBool::new(false)));
        let (minded, at, until) = (services.clone(), land.clone(), over.clone());
        thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                minded.mind(&*at, PollTimeout::from(20u16)).unwrap();
            }
        });
        Stage { services, land, access: Access::default(), over }
    }

    fn open() -> Stage {
        let stage = Stage::new();
        stage.services.open(1);
        stage
    }

    /// A service begins and asks to be admitted; what comes of that is said at the end of the thread.
    fn begin_as(&self, peer: Peer, hello: Hello, way: Way) -> (Player, thread::JoinHandle<Result<Admitted>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let own_end = theirs.try_clone().unwrap();
        let ((tell, obeyed), (gate, open)) = (channel(), channel());
        thread::spawn(move || {
            // It ends when it hears that it has to, or that the agent has gone.
            let _ = play(&theirs, hello, way, &tell, &open);
            let _ = theirs.shutdown(std::net::Shutdown::Both);
        });
        let (services, land, access) = (self.services.clone(), self.land.clone(), self.access.clone());
        let admitted = thread::spawn(move || {
            let end = AgentEnd::accept(ours, FAR)?;
            services.admit(peer, end, &access, &*land)
        });
        (Player { obeyed, gate, own_end }, admitted)
    }

    fn begin(&self, name: &str, way: Way) -> (Player, thread::JoinHandle<Result<Admitted>>) {
        self.begin_as(root(), Hello::new(name, 7, 1, 1 << 20), way)
    }

    fn serving(&self, name: &str, way: Way) -> Player {
        let (player, admitted) = self.begin(name, way);
        admitted.join().unwrap().unwrap();
        self.await_state(name, ServiceState::Serving);
        assert!(matches!(player.next(), ToService::Arena { fresh: true, .. }));
        assert!(matches!(player.next(), ToService::Serve { .. }));
        player
    }

    fn state(&self, name: &str) -> Option<ServiceState> {
        self.services.status().into_iter().find(|status| status.name == name).map(|status| status.state)
    }

    fn await_that(&self, what: &str, is_so: impl Fn() -> bool) {
        let until = Instant::now() + FAR;
        while !is_so() {
            assert!(Instant::now() < until, "{what}: {:?}", self.services.status());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn await_state(&self, name: &str, state: ServiceState) {
        self.await_that(&format!("{name} is {state}"), || self.state(name) == Some(state));
    }
}

fn root() -> Peer {
    Peer { pid: std::process::id().cast_signed(), uid: 0 }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(40)
}

fn far() -> Instant {
    Instant::now() + FAR
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 4, ..ProptestConfig::default() })]

    /// Whatever some services do when they are told to freeze: every one that lives is told to go on, and serves.
    #[test]
    fn an_undo_reaches_every_service_that_lives(
        ways in proptest::collection::vec(proptest::sample::select(vec![
            Way::Well, Way::Well, Way::Slowly, Way::Hangs, Way::Drips, Way::Dies, Way::Lies, Way::Babbles, Way::Fails,
        ]), 1..7),
        after_cutover in any::<bool>(),
    ) {
        let stage = Stage::open();
        let names: Vec<String> = (0..ways.len()).map(|n| format!("s{n}")).collect();
        let players: Vec<Player> = names.iter().zip(&ways).map(|(name, way)| stage.serving(name, *way)).collect();
        let listed = stage.services.list(&*stage.land).unwrap();
        prop_assert_eq!(listed.len(), ways.len());
        stage.services.wait();

        let waits = ways.iter().any(|way| matches!(way, Way::Hangs | Way::Drips));
        let frozen = stage.services.freeze(1, if waits { soon() } else { far() });
        let all_well = ways.iter().all(|way| matches!(way, Way::Well | Way::Slowly));
        prop_assert_eq!(frozen.is_ok(), all_well, "{:?}", frozen);
        if let Ok(sealed) = &frozen {
            prop_assert_eq!(sealed.len(), ways.len());
        }
        // Everybody was told, also those behind one that failed.
        for player in &players {
            prop_assert_eq!(player.next(), ToService::Freeze { epoch: 1 });
        }

        let epoch = if after_cutover { 3 } else { 1 };
        let resumed = stage.services.unfreeze(epoch, far());
        prop_assert_eq!(&resumed.failed, &BTreeMap::new());
        for ((name, way), player) in names.iter().zip(&ways).zip(&players) {
            let hangs = matches!(way, Way::Hangs | Way::Drips);
            if *way == Way::Well && !waits || !way.is_alive() {
                prop_assert_eq!(resumed.serving.contains(name), way.is_alive(), "{}", name);
            }
            prop_assert!(!hangs || resumed.late.contains(name) && player.is_told_nothing());
            if hangs {
                player.gate.send(()).unwrap();
            }
            if way.is_alive() {
                prop_assert_eq!(player.next(), ToService::Unfreeze { epoch });
                stage.await_state(name, ServiceState::Serving);
            } else {
                stage.await_state(name, ServiceState::Absent);
            }
        }
        // And the next update finds those that live as if nothing had been.
        let serve: Vec<Crossing> =
            listed.iter().zip(&ways).filter(|(_, way)| way.is_alive()).map(|(crossing, _)| crossing.clone()).collect();
        prop_assert!(stage.services.all_serve(&serve, epoch).is_ok());
    }
}

#[test]
fn one_that_is_stopped_does_not_keep_another_from_serving_again() {
    let stage = Stage::open();
    let (stopped, well) = (stage.serving("a-stopped", Way::Hangs), stage.serving("b-well", Way::Well));
    let failed = stage.services.freeze(1, soon()).unwrap_err().to_string();
    assert!(failed.starts_with("service a-stopped was told to freeze: it has not answered in"), "{failed}");
    assert!(!failed.contains("b-well"), "{failed}");
    let resumed = stage.services.unfreeze(1, far());
    assert_eq!(resumed.serving, BTreeSet::from(["b-well".to_owned()]));
    assert_eq!(resumed.late, BTreeSet::from(["a-stopped".to_owned()]));
    assert_eq!([well.next(), well.next()], [ToService::Freeze { epoch: 1 }, ToService::Unfreeze { epoch: 1 }]);
    stage.await_state("a-stopped", ServiceState::Frozen);

    stopped.gate.send(()).unwrap();
    stage.await_state("a-stopped", ServiceState::Serving);
    assert_eq!([stopped.next(), stopped.next()], [ToService::Freeze { epoch: 1 }, ToService::Unfreeze { epoch: 1 }]);
}

#[test]
fn one_that_comes_during_an_update_waits_and_serves_when_it_is_undone() {
    let stage = Stage::open();
    let kv = stage.serving("kv", Way::Well);
    let listed = stage.services.list(&*stage.land).unwrap();
    assert_eq!(listed.iter().map(|crossing| crossing.name.as_str()).collect::<Vec<_>>(), ["kv"]);

    // A new name gets no memory while a list is with the successor; one that is listed serves on.
    let (newcomer, admitted) = stage.begin("new", Way::Well);
    kv.leave();
    stage.await_state("kv", ServiceState::Absent);
    let (again, back) = stage.begin("kv", Way::Well);
    back.join().unwrap().unwrap();
    assert!(matches!(again.next(), ToService::Arena { fresh: false, .. }));
    assert_eq!(again.next(), ToService::Serve { epoch: 1 });
    stage.await_state("kv", ServiceState::Serving);

    // From the trial on nobody begins to serve, and what was handed over is compared with who does.
    stage.services.wait();
    assert!(stage.services.all_serve(&listed, 1).is_ok());
    again.leave();
    stage.await_state("kv", ServiceState::Absent);
    let (third, back) = stage.begin("kv", Way::Well);
    back.join().unwrap().unwrap();
    stage.await_state("kv", ServiceState::Standby);
    let missing = stage.services.all_serve(&listed, 1).unwrap_err().to_string();
    assert_eq!(missing, "service kv is standby, not serving in epoch 1");
    assert_eq!(stage.services.freeze(1, far()).unwrap(), BTreeMap::new(), "nobody is sealed who did not serve");
    assert_eq!(stage.land.taken.lock().unwrap().len(), 1);
    assert!(newcomer.is_told_nothing());

    // After an undo that came from behind the cutover, the epoch is another: also for those who came before it.
    let resumed = stage.services.unfreeze(3, far());
    assert_eq!(resumed.serving, BTreeSet::from(["kv".to_owned()]));
    assert!(matches!(third.next(), ToService::Arena { .. }));
    assert_eq!([third.next(), third.next()], [ToService::StandBy, ToService::Activate { epoch: 3 }]);
    admitted.join().unwrap().unwrap();
    assert!(matches!(newcomer.next(), ToService::Arena { fresh: true, .. }));
    assert_eq!(newcomer.next(), ToService::Serve { epoch: 3 });
}

#[test]
fn an_update_that_begins_while_memory_is_taken_does_not_get_that_memory() {
    let stage = Stage::open();
    let (services, land) = (stage.services.clone(), stage.land.clone());
    // Also: how things stand can be said meanwhile, so nobody holds the lock on it.
    let begin = move || {
        assert_eq!(services.status().len(), 1);
        assert_eq!(services.list(&*land).unwrap(), []);
    };
    *stage.land.while_taking.lock().unwrap() = Some(Box::new(begin));
    let (player, admitted) = stage.begin("new", Way::Well);
    stage.await_that("the memory is back", || {
        matches!(stage.services.admission(), Admission::Listed { .. }) && stage.land.taken.lock().unwrap().is_empty()
    });
    assert!(player.is_told_nothing());
    stage.services.open(1);
    admitted.join().unwrap().unwrap();
    assert!(matches!(player.next(), ToService::Arena { .. }));
}

#[test]
fn a_service_that_is_not_ready_keeps_an_update_from_beginning() {
    let stage = Stage::open();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_all(theirs.as_fd(), &encode(&ToAgent::Hello(Hello::new("kv", 7, 1, PAGE))).unwrap(), None).unwrap();
    let (services, land) = (stage.services.clone(), stage.land.clone());
    let admitted =
        thread::spawn(move || services.admit(root(), AgentEnd::accept(ours, FAR).unwrap(), &Access::default(), &*land));
    let mut inbox = Inbox::default();
    theirs.set_nonblocking(true).unwrap();
    let order: ToService = receive(theirs.as_fd(), &mut inbox, Some(FAR)).unwrap();
    assert!(matches!(order, ToService::Arena { .. }));
    stage.await_state("kv", ServiceState::Starting);
    // It has an arena and has never served: it crosses with no list, and when it leaves, nothing of it is left.
    drop(theirs);
    assert!(admitted.join().unwrap().is_err());
    assert_eq!(stage.state("kv"), None);
    assert_eq!(stage.land.taken.lock().unwrap().len(), 0);
    assert_eq!(stage.services.list(&*stage.land).unwrap(), []);
}

#[test]
fn what_never_served_leaves_nothing_and_what_did_is_kept() {
    let stage = Stage::open();
    stage.serving("kv", Way::Well).leave();
    stage.await_state("kv", ServiceState::Absent);
    assert_eq!(stage.land.taken.lock().unwrap().len(), 1, "its data is in there");

    // It leaves, and keeps the memory mapped: it is nobody's service, and no other gets that memory.
    stage.land.holders.lock().unwrap().push(4711);
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_all(theirs.as_fd(), &encode(&ToAgent::Hello(Hello::new("late", 7, 1, PAGE))).unwrap(), None).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let end = AgentEnd::accept(ours, FAR).unwrap();
    assert!(stage.services.admit(root(), end, &stage.access, &*stage.land).is_err());
    assert_eq!((stage.state("late"), stage.services.crossings().len()), (None, 1));
    let (_player, refused) = stage.begin("late", Way::Well);
    let refused = refused.join().unwrap().unwrap_err().to_string();
    assert!(refused.contains("its process still has that memory"), "{refused}");

    stage.land.holders.lock().unwrap().clear();
    let (_player, admitted) = stage.begin("late", Way::Well);
    admitted.join().unwrap().unwrap();
    assert_eq!(stage.land.taken.lock().unwrap().len(), 2);
}

#[test]
fn another_user_gets_nothing() {
    let mut stage = Stage::open();
    stage.serving("kv", Way::Well).leave();
    stage.await_state("kv", ServiceState::Absent);
    let nobody = Peer { uid: 65534, ..root() };
    let hello = |name| Hello::new(name, 7, 1, 1 << 20);
    for name in ["kv", "unknown"] {
        let (player, refused) = stage.begin_as(nobody, hello(name), Way::Well);
        let refused = refused.join().unwrap().unwrap_err().to_string();
        assert!(refused.contains(&format!("service {name} is not in the configuration")), "{refused}");
        assert!(player.is_told_nothing());
    }
    assert_eq!((stage.services.status().len(), stage.land.taken.lock().unwrap().len()), (1, 1));

    // Where strangers may have something, it is not another's, and not more than was said.
    let config: crate::daemon::config::Config = toml::from_str("[limits]\nunlisted_mib = 1").unwrap();
    stage.access = Access::of(&config);
    let (_player, refused) = stage.begin_as(nobody, hello("kv"), Way::Well);
    let refused = refused.join().unwrap().unwrap_err().to_string();
    assert!(refused.contains("service kv is user 0's, and user 65534 asks for it"), "{refused}");
    let (_own, admitted) = stage.begin_as(nobody, hello("own"), Way::Well);
    admitted.join().unwrap().unwrap();
    let (_more, refused) = stage.begin_as(nobody, hello("more"), Way::Well);
    let refused = refused.join().unwrap().unwrap_err().to_string();
    assert!(refused.contains("1024 of 1024 KiB"), "{refused}");
    assert_eq!(stage.state("more"), None);
}

#[test]
fn two_do_not_write_to_one_arena() {
    let stage = Stage::open();
    let parent = stage.serving("kv", Way::Well);
    // Its first process has ended, a child of it serves on: that one has the arena mapped.
    stage.land.holders.lock().unwrap().push(4711);
    parent.leave();
    stage.await_state("kv", ServiceState::Absent);
    let (_second, refused) = stage.begin("kv", Way::Well);
    let refused = refused.join().unwrap().unwrap_err().to_string();
    assert_eq!(refused, "process 4711 still has the arena of kv: end it first");
    let kept = stage.services.remove("kv", &*stage.land).unwrap_err().to_string();
    assert_eq!(kept, "process 4711 still has the arena of kv: end it first");

    let returning = |pid, epoch| {
        let hello = Hello { serving: Some(epoch), ..Hello::new("kv", 7, 1, 1 << 20) };
        stage.begin_as(Peer { pid, uid: 0 }, hello, Way::Well)
    };
    let (_liar, refused) = returning(1, 1);
    let refused = refused.join().unwrap().unwrap_err().to_string();
    assert!(refused.contains("is not the process that has its arena"), "{refused}");
    let (_old, refused) = returning(4711, 9);
    assert!(refused.join().unwrap().unwrap_err().to_string().contains("serves in epoch 9"));
    let (child, admitted) = returning(4711, 1);
    assert_eq!(admitted.join().unwrap().unwrap(), Admitted { name: "kv".into(), was_serving: true });
    assert_eq!(child.next(), ToService::Welcome { epoch: 1 });
    assert_eq!(stage.state("kv"), Some(ServiceState::Serving));
    let (_second, refused) = stage.begin("kv", Way::Well);
    assert!(refused.join().unwrap().unwrap_err().to_string().contains("is connected already"));
}

#[test]
fn nobody_serves_where_another_kernel_does() {
    let stage = Stage::open();
    stage.serving("kv", Way::Well).leave();
    stage.await_state("kv", ServiceState::Absent);
    stage.services.elsewhere("the successor serves".to_owned());
    for name in ["kv", "new"] {
        let (player, refused) = stage.begin(name, Way::Well);
        assert_eq!(refused.join().unwrap().unwrap_err().to_string(), "the successor serves");
        assert!(player.is_told_nothing());
    }
    assert_eq!(stage.services.remove("kv", &*stage.land).unwrap_err().to_string(), "the successor serves");
    assert!(stage.services.list(&*stage.land).is_err());
    assert_eq!(stage.land.taken.lock().unwrap().len(), 1);
}

#[test]
fn in_a_successor_services_stand_by_and_serve_when_they_are_told() {
    let stage = Stage::new();
    let arena = stage.land.take(1 << 20, &RangeSet::default()).unwrap();
    let (player, admitted) = stage.begin("kv", Way::Well);
    stage.services.expect_content("kv", 7, 1);
    stage.services.expect("kv", Arena { fresh: false, ..arena });
    assert!(player.is_told_nothing(), "its arena may not be there yet");
    stage.services.all_inherited();
    admitted.join().unwrap().unwrap();
    assert_eq!(stage.services.await_standby(FAR).unwrap(), ["kv"]);
    stage.services.activate(2, far()).unwrap();
    assert_eq!(stage.state("kv"), Some(ServiceState::Serving));
    assert!(matches!(player.next(), ToService::Arena { fresh: false, .. }));
    assert_eq!([player.next(), player.next()], [ToService::StandBy, ToService::Activate { epoch: 2 }]);
    // One that is started again before there is no way back serves when that is so.
    player.leave();
    stage.await_state("kv", ServiceState::Absent);
    let (again, admitted) = stage.begin("kv", Way::Well);
    admitted.join().unwrap().unwrap();
    stage.await_state("kv", ServiceState::Standby);
    stage.services.open(2);
    stage.await_state("kv", ServiceState::Serving);
    assert!(matches!(again.next(), ToService::Arena { .. }));
    assert_eq!([again.next(), again.next()], [ToService::StandBy, ToService::Activate { epoch: 2 }]);
}

#[test]
fn a_service_must_read_what_it_was_left() {
    let inner = Inner { left: [("kv".to_owned(), (7, 2))].into(), ..Inner::default() };
    let reads = |kind, version| inner.understands(&Hello::new("kv", kind, version, 0));
    assert!(reads(7, 2).is_ok() && reads(7, 3).is_ok());
    let older = reads(7, 1).unwrap_err().to_string();
    assert_eq!(older, "it reads kind 0x7 up to version 1, and was left kind 0x7 version 2");
    assert!(reads(8, 2).is_err());
    assert!(inner.understands(&Hello::new("new", 8, 1, 0)).is_ok());
}

#[test]
fn large_arenas_may_take_longer_to_map() {
    assert_eq!(patience_for(64 << 20).as_secs(), 20);
    assert_eq!(patience_for(256 << 30), PATIENCE + Duration::from_millis(2 * 256 * 1024));
}
