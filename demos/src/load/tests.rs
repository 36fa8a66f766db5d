//! A checker that cannot complain is worth nothing: against a server that keeps its word it must be content, and against one that
//! forgets, it must say so, each kind of forgetting by itself.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use baton_sdk::protocol::{ToAgent, ToService};
use handover::arena::Store;
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

use super::client::Reply;
use super::ledger::{Found, Ledger, Op};
use super::{Load, LoadOptions, LoadReport};
use crate::kv::tests::{Kernel, Local};

const PATIENCE: Duration = Duration::from_secs(20);

fn options(local: &Local) -> LoadOptions {
    LoadOptions { ops_per_second: 4000, ..LoadOptions::new(local.address) }
}

fn wait_for(load: &Load, acknowledged: u64) {
    let deadline = Instant::now() + PATIENCE;
    while load.acknowledged() < acknowledged {
        assert!(Instant::now() < deadline, "only {} acknowledged", load.acknowledged());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_honest_server_is_found_honest() {
    for pipeline in [1, 16] {
        let local = Local::start(8 << 20);
        let load = Load::start(LoadOptions { pipeline, ..options(&local) }).expect("started");
        wait_for(&load, 2000);
        let report = load.finish(PATIENCE).expect("readable");
        assert!(report.is_clean(), "{report:#?}");
        assert!(report.acknowledged >= 2000 && report.reads > 0, "{report:#?}");
        assert_eq!((report.unknown, report.refused), (0, 0));
        assert_eq!((report.connections.kept, report.connections.reset), (8, 0));
    }
}

#[test]
fn a_server_that_comes_back_with_older_memory_is_found_out() {
    let local = Local::start(8 << 20);
    let load = Load::start(options(&local)).expect("started");
    wait_for(&load, 500);
    let snapshot = local.with_memory(|memory| memory.clone());
    wait_for(&load, 1500);
    local.with_memory(move |memory| *memory = snapshot);
    wait_for(&load, 2000);
    let report = load.finish(PATIENCE).expect("readable");
    // About a thousand were acknowledged between the two; most of them cannot have been made good since.
    assert!(report.lost > 300, "{report:#?}");
    assert!(report.contradictions > 0 && !report.complaints.is_empty() && !report.is_clean(), "{report:#?}");
}

#[test]
fn one_lost_write_among_thousands_is_found() {
    type Loss = fn(&mut Store<'_>, &[u8]) -> bool;
    let losses: [(&str, Loss); 4] = [
        (":s:3", |store, key| store.del(key).expect("writable")),
        (":c", |store, key| store.incr(key, -1).is_ok()),
        (":l", |store, key| store.rpop(key).expect("a list").is_some()),
        (":m", |store, key| store.spop(key).expect("a set").is_some()),
    ];
    for (suffix, loss) in losses {
        let local = Local::start(8 << 20);
        let load = Load::start(options(&local)).expect("started");
        wait_for(&load, 1000);
        let halted = load.halt().expect("no panic");
        let done = local.with_memory(move |memory| {
            let mut store = Store::attach(memory).expect("whole");
            let keys: Vec<Vec<u8>> = store.keys().map(|key| key.expect("whole").to_vec()).collect();
            let key = keys.into_iter().find(|key| key.ends_with(suffix.as_bytes())).expect("there is one");
            loss(&mut store, &key)
        });
        assert!(done, "{suffix}");
        let report = halted.verify(PATIENCE).expect("readable");
        assert!(report.lost == 1 && report.contradictions == 0 && !report.is_clean(), "{suffix}: {report:#?}");
    }
}

#[test]
fn lost_connections_are_counted_and_leave_questions_open() {
    let local = Local::start(8 << 20);
    let mut proxy = Proxy::start(local.address);
    let load = Load::start(LoadOptions { target: proxy.address, ..options(&local) }).expect("started");
    wait_for(&load, 500);
    proxy.cut();
    wait_for(&load, 1500);
    let report = load.finish(PATIENCE).expect("readable");
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(
        (report.connections.kept, report.connections.reset + report.connections.timed_out),
        (0, 8),
        "{report:#?}"
    );
    assert!(report.unknown <= 8);
}

#[test]
fn a_service_that_cannot_be_read_is_an_error_and_not_clean() {
    let gone = TcpListener::bind("127.0.0.1:0").expect("bound").local_addr().expect("bound");
    let load = Load::start(LoadOptions::new(gone)).expect("started");
    let error = load.finish(Duration::from_millis(50)).expect_err("nobody there").to_string();
    assert!(error.starts_with("the service could not be read back within 50ms: "), "{error}");
    assert!(!LoadReport::default().is_clean(), "nothing written, nothing proved");
}

/// The checker, the freeze and the arena together: the service goes back and forth between two kernels while it is written to,
/// and its address with it (each move resets the connections). Nothing that was acknowledged may be missing.
#[test]
fn no_acknowledged_write_is_lost_by_ten_moves_under_load() {
    let folder = tempfile::tempdir().expect("a folder");
    let arena = File::from(memfd_create(c"arena", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    arena.set_len(8 << 20).expect("room");
    let mut old = Kernel::boot(folder.path(), 4, &arena, true);
    old.order(ToService::Serve { epoch: 1 });
    let mut new = Kernel::boot(folder.path(), 5, &arena, false);
    new.agent.order(&ToService::StandBy).expect("in order");
    let mut proxy = Proxy::start(old.address);
    let load = Load::start(LoadOptions {
        target: proxy.address,
        connections: 4,
        ops_per_second: 4000,
        pipeline: 4,
        timeout: Duration::from_secs(10),
        ..LoadOptions::new(proxy.address)
    })
    .expect("started");
    for epoch in 1..=10 {
        wait_for(&load, epoch * 200);
        let ToAgent::Frozen { items, seal, .. } = old.order(ToService::Freeze { epoch }) else { panic!("frozen") };
        *proxy.to.lock().expect("no panic") = new.address;
        proxy.cut();
        let epoch = epoch + 1;
        let order = if epoch == 2 { ToService::Activate { epoch } } else { ToService::Unfreeze { epoch } };
        assert_eq!(new.order(order), ToAgent::Activated { epoch, items, seal });
        std::mem::swap(&mut old, &mut new);
    }
    wait_for(&load, 2200);
    let report = load.finish(PATIENCE).expect("readable");
    assert!(report.is_clean() && report.acknowledged >= 2200, "{report:#?}");
    assert!(report.connections.kept == 0 && report.connections.reset >= 4, "{report:#?}");
    old.stop();
    new.stop();
}

/// Forwards connections, until they are cut.
struct Proxy {
    address: SocketAddr,
    to: Arc<Mutex<SocketAddr>>,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("bound");
        let sockets = Arc::<Mutex<Vec<TcpStream>>>::default();
        let kept = sockets.clone();
        let to = Arc::new(Mutex::new(to));
        let towards = to.clone();
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let far = TcpStream::connect(*towards.lock().expect("no panic")).expect("connected");
                kept.lock().expect("no panic").push(near.try_clone().expect("cloned"));
                for (mut from, mut to) in [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))]
                    .map(|(a, b)| (a.expect("cloned"), b.expect("cloned")))
                {
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Self { address, to, sockets }
    }

    fn cut(&mut self) {
        for socket in self.sockets.lock().expect("no panic").drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A server in a few lines, that does what it is told and says what it found: the ledger's honest counterpart.
#[derive(Default)]
struct Model {
    texts: std::collections::HashMap<usize, u64>,
    counter: u64,
    list: Vec<usize>,
    set: Vec<usize>,
}

impl Model {
    fn execute(&mut self, ledger: &Ledger, op: &Op) -> Reply {
        let ok = Reply::Status("OK".to_owned());
        match *op {
            Op::Set { key, version } => {
                self.texts.insert(key, version);
                ok
            }
            Op::Mset { first } => {
                self.texts.extend((first..first + 4).map(|key| (key, 1)));
                ok
            }
            Op::Incr => {
                self.counter += 1;
                Reply::Integer(self.counter as i64)
            }
            Op::Push(number) => {
                self.list.insert(0, number);
                Reply::Integer(self.list.len() as i64)
            }
            Op::Add(number) => {
                self.set.push(number);
                Reply::Integer(1)
            }
            Op::Get { key } => Reply::Bulk(self.texts.get(&key).map(|v| value(ledger, key, *v))),
        }
    }

    fn found(&self, ledger: &Ledger) -> Found {
        let element = |number: &usize| ledger.request(&Op::Push(*number)).remove(2);
        Found {
            texts: (0..ledger.texts()).map(|key| self.texts.get(&key).map(|v| value(ledger, key, *v))).collect(),
            counter: (self.counter > 0).then(|| self.counter.to_string().into_bytes()),
            list: self.list.iter().map(element).collect(),
            set: self.set.iter().map(element).collect(),
        }
    }
}

fn value(ledger: &Ledger, key: usize, version: u64) -> Vec<u8> {
    ledger.request(&Op::Set { key, version }).remove(2)
}

/// Runs requests; some are executed without an answer, some neither.
fn run(fates: &[u8]) -> (Ledger, Model) {
    let (mut ledger, mut model) = (Ledger::new("t", 4, 50), Model::default());
    for fate in fates {
        let op = ledger.choose();
        match fate {
            0 => ledger.unanswered(&op),
            1 => {
                model.execute(&ledger, &op);
                ledger.unanswered(&op);
            }
            _ => {
                let reply = model.execute(&ledger, &op);
                ledger.answered(&op, &reply);
            }
        }
    }
    (ledger, model)
}

proptest! {
    #[test]
    fn whatever_became_of_unanswered_writes_nothing_is_held_against_the_server(fates in proptest::collection::vec(0u8..10, 1..300)) {
        let (ledger, model) = run(&fates);
        let found = model.found(&ledger);
        let report = ledger.judge(&found);
        prop_assert!(report.lost == 0 && report.contradictions == 0, "{report:#?}");
        prop_assert!(report.unknown <= fates.iter().filter(|f| **f < 2).count() as u64);
    }

    #[test]
    fn every_single_fault_is_named(fates in proptest::collection::vec(2u8..10, 100..300), kind in 0usize..9, at in any::<prop::sample::Index>()) {
        let (ledger, model) = run(&fates);
        let mut found = model.found(&ledger);
        let last = found.list.len().saturating_sub(1);
        let lost = match kind {
            0 => { *at.get_mut(&mut found.texts) = None; true }
            1 => { at.get_mut(&mut found.texts).iter_mut().for_each(|v| v.push(b'!')); true }
            2 => { found.counter = Some((model.counter - 1).to_string().into_bytes()); true }
            3 => { found.list.remove(at.index(found.list.len())); true }
            4 => { found.set.remove(at.index(found.set.len())); true }
            5 => { found.counter = Some((model.counter + 1).to_string().into_bytes()); false }
            6 => { let item = at.get(&found.list).clone(); found.list.push(item); false }
            7 => { found.list.swap(0, last); false }
            _ => { found.set.push(b"stranger".to_vec()); false }
        };
        let report = ledger.judge(&found);
        prop_assert_eq!(report.lost, u64::from(lost), "{:#?}", report);
        prop_assert!(lost || report.contradictions > 0, "{:#?}", report);
        prop_assert!(!report.complaints.is_empty() && !report.is_clean());
    }
}

#[test]
fn a_torn_mset_is_a_contradiction() {
    let mut ledger = Ledger::new("t", 4, 50);
    let op = loop {
        match ledger.choose() {
            op @ Op::Mset { .. } => break op,
            other => ledger.unanswered(&other),
        }
    };
    ledger.unanswered(&op);
    let Op::Mset { first } = op else { unreachable!("chosen above") };
    let mut found = Found { texts: vec![None; ledger.texts()], ..Found::default() };
    found.texts[first + 1] = Some(value(&ledger, first + 1, 1));
    let report = ledger.judge(&found);
    assert_eq!((report.lost, report.contradictions), (0, 1), "{report:#?}");
}
