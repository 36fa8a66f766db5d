//! Whole updates on a played machine: what is done, what is undone, and what a batond that follows a dead one makes of it. The successor
//! is a thread that answers on the real channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use handover::channel::{Channel, Side};
use handover::update::cpu::{Cpu, Cpus, Moving};
use handover::update::deadline::Deadlines;
use handover::update::effect::Effect;
use handover::update::error::{Left, Outcome};
use handover::update::machine::{Event, JournalLine, Next, Update};
use handover::update::plan::{Goal, Plan as Steps};
use handover::update::probation::{ProbationPolicy, WhenWatched};
use handover::update::successor::name;
use kexec_core::cpus::{CpuFacts, Move};
use kexec_core::device::Device;
use state_schemas::control_block::{self, words};
use state_schemas::latest::handover_record::{Program, UpdateId};
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};
use tempfile::TempDir;

use crate::daemon::config::{Cidr, Config, Nic};
use crate::daemon::kernel::Kernel;
use crate::machine::facts::{Ecam, Facts};
use crate::machine::net::mac_name;
use crate::machine::played::{At, BLOCK, FUNCTION, GOES, Machine, OWN, SERVICE, STAYS, ram};
use crate::recovery::journal::{self, boot_id};
use crate::recovery::recover::recover;
use crate::services::Admission;
use crate::update::hands::Hands;
use crate::update::plan::{GrantedNic, Plan, Target};
use crate::update::report::Report;
use crate::update::upgrade::{self, drive};

#[path = "../../../kexec-core/tests/support/bzimage.rs"]
mod bzimage;

/// CPUs of the machine: 3 is the spare one, 0 goes last.
const CPUS: u32 = 4;
/// The epoch in which the incumbent serves at first.
const EPOCH: u64 = 7;

/// How the successor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mood {
    #[default]
    Well,
    /// It answers nothing from this word on.
    SilentFrom(&'static str),
    /// It says that it cannot do this.
    Refuses(&'static str),
}

/// The successor's agent: a thread that lives as long as its CPU is not fenced.
struct Partner {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Partner {
    fn start(machine: &Arc<Machine>, base: u64, mood: Mood) -> Partner {
        let ends = Arc::new(AtomicBool::new(false));
        let (machine, stop) = (machine.clone(), ends.clone());
        let thread = thread::spawn(move || {
            let memory = machine.map(base, control_block::SIZE);
            let mut channel = Channel::attach(&memory, Side::Successor).unwrap();
            let program = Program { release: "7.3.1-played".into(), agent_version: "1".into() };
            channel.send(&ToIncumbent::Hello { program, abi: words::VERSION }).unwrap();
            let mut silent = false;
            while !stop.load(Ordering::SeqCst) {
                let Some(word) = channel.receive::<ToSuccessor>().unwrap() else {
                    thread::sleep(Duration::from_micros(100));
                    continue;
                };
                silent |= mood == Mood::SilentFrom(name(&word));
                if silent || !matches!(machine.inside().cpus[3], Some(At::Runs(_))) {
                    continue;
                }
                machine.inside().acts.push(format!("asked to {}", name(&word)));
                if mood == Mood::Refuses(name(&word)) {
                    channel.send(&ToIncumbent::Failed { what: name(&word).into(), cause: "played".into() }).unwrap();
                    continue;
                }
                let move_cpu = |apic_id: u32, to: fn(u32) -> At, parked| {
                    let mut inside = machine.inside();
                    let id = *inside.rows.keys().next().unwrap();
                    inside.cpus[apic_id as usize] = Some(to(id));
                    drop(inside);
                    machine.park(base, apic_id, parked);
                };
                let answer = match word {
                    ToSuccessor::StandBy => ToIncumbent::Standing { services: Vec::new() },
                    ToSuccessor::CheckHealth => ToIncumbent::Healthy,
                    ToSuccessor::Activate { epoch } => ToIncumbent::Activated { epoch, tsc: 1 },
                    ToSuccessor::CpuParked { apic_id } => {
                        move_cpu(apic_id, At::Runs, false);
                        ToIncumbent::CpuOnline { apic_id, cpu: apic_id }
                    }
                    ToSuccessor::ReleaseCpu { apic_id } => {
                        move_cpu(apic_id, At::Parked, true);
                        ToIncumbent::CpuReleased { apic_id }
                    }
                    ToSuccessor::StandDown { epoch } => ToIncumbent::StoodDown { epoch },
                    ToSuccessor::Commit { .. } => ToIncumbent::Committed,
                    ToSuccessor::Ping { nonce } => ToIncumbent::Pong { nonce },
                    ToSuccessor::Connections { at, bytes, .. } => {
                        ToIncumbent::ConnectionsTaken { have: at + bytes.len() as u64 }
                    }
                    // Nobody is tried here: this partner is an update's.
                    ToSuccessor::LastCpu { .. }
                    | ToSuccessor::Abort { .. }
                    | ToSuccessor::Examine
                    | ToSuccessor::RunCheck { .. } => continue,
                };
                channel.send(&answer).unwrap();
            }
        });
        Partner { ends, thread: Some(thread) }
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A machine, what a batond keeps on it, and the update that is planned.
struct Scene {
    machine: Arc<Machine>,
    folder: TempDir,
    plan: Plan,
    steps: Steps,
    /// Both interfaces are on one network.
    near: bool,
    mood: Mood,
}

impl Scene {
    fn new() -> Scene {
        let cpu = |number: u32| CpuFacts { cpu: number, apic_id: number, online: true, ..CpuFacts::default() };
        let target = Target {
            release: "7.3.1-played".to_owned(),
            nic: Some(GrantedNic { nic: Nic { mac: mac_name(GOES), address: OWN }, mac: GOES, bdf: FUNCTION }),
            facts: Facts {
                ram: ram(),
                epoch: EPOCH,
                ecam: Some(Ecam { base: 0xe000_0000, bus_end: 255 }),
                nics: [(GOES, FUNCTION)].into(),
                ..Facts::default()
            },
        };
        let plan = Plan {
            trial: None,
            lent: Vec::new(),
            target,
            image: bzimage::with_payload(b"", 0),
            initrd: vec![0; 4096],
            cmdline: "quiet".to_owned(),
            kho: None,
            spare: cpu(3),
            moves: vec![(cpu(1), Move::Ordinary), (cpu(2), Move::Ordinary), (cpu(0), Move::Yield)],
            region_len: 2 * BLOCK,
            block_size: BLOCK,
            probation: ProbationPolicy::CommitAtOnce,
            record_version: 2,
        };
        let at = |number: u32| Cpu { number, apic_id: number };
        let moving = |number| Moving { cpu: at(number), online: true };
        let long = Duration::from_secs(60);
        let steps = Steps {
            update: UpdateId([9; 16]),
            boot: boot_id().unwrap(),
            services: Vec::new(),
            goal: Goal::Upgrade,
            epoch: EPOCH,
            cpus: Cpus { spare: moving(3), others: vec![moving(1), moving(2)], last: at(0) },
            devices: true,
            probation: ProbationPolicy::CommitAtOnce,
            deadlines: Deadlines {
                checks: Duration::ZERO,
                granted: long,
                booting: long,
                trial: long,
                cutover: long,
                per_cpu: long,
                watch: long,
                commit: long,
                undo: long,
            },
        };
        let folder = tempfile::tempdir().unwrap();
        Scene { machine: Machine::with_cpus(CPUS as usize), folder, plan, steps, near: false, mood: Mood::Well }
    }

    /// With a successor that is like this. One that is silent is waited for as long as the deadlines say.
    fn with_mood(mood: Mood) -> Scene {
        let mut scene = Scene { mood, ..Scene::new() };
        if let Mood::SilentFrom(_) = mood {
            let short = Duration::from_secs(1);
            let deadlines = &mut scene.steps.deadlines;
            (deadlines.trial, deadlines.cutover, deadlines.per_cpu, deadlines.commit) = (short, short, short, short);
            deadlines.undo = 3 * short;
        }
        scene
    }

    /// A batond that is started now.
    fn kernel(&self) -> Kernel {
        let near = Cidr { address: OWN.address, prefix: 16 };
        let own = if self.near { near } else { OWN };
        let nic = |mac, address| Nic { mac: mac_name(mac), address };
        let mut config = Config::default();
        config.network.service_address = Some(if self.near { Cidr { prefix: 16, ..SERVICE } } else { SERVICE });
        config.network.nic = vec![nic(STAYS, Cidr { address: [10, 77, 0, 1].into(), ..SERVICE }), nic(GOES, own)];
        config.network.skip_reach_check = true;
        let device = Device::played(self.machine.clone());
        let net = Box::new(self.machine.clone());
        let kernel = Kernel::played(self.folder.path(), config, device, net, self.machine.clone(), None);
        let mut state = kernel.state();
        let facts = self.plan.target.facts.clone();
        state.facts = Facts { epoch: facts.epoch.max(state.facts.epoch), ..facts };
        drop(state);
        kernel
    }

    /// The same, with services and programs let in.
    fn open_kernel(&self) -> Kernel {
        let kernel = self.kernel();
        kernel.files.begin();
        kernel.services.open(EPOCH);
        kernel.ledger.change(|pages| pages.epoch = EPOCH).unwrap();
        kernel
    }

    fn run(&self, kernel: &Kernel, cut: usize) -> (Update, Next, Option<Partner>) {
        self.run_and_die(kernel, cut, false)
    }

    /// Makes the update up to `cut` effects, as batond does; then it dies, with the effect under way not begun, or done.
    fn run_and_die(&self, kernel: &Kernel, cut: usize, done: bool) -> (Update, Next, Option<Partner>) {
        let mut hands = Hands::new(kernel, &self.plan, self.steps.update).unwrap();
        let mut update = Update::new(self.steps.clone());
        let mut file = journal::create(&kernel.journal, journal::room(4)).unwrap();
        let (mut unwritten, mut partner) = (Vec::<JournalLine>::new(), None);
        let clock = Instant::now();
        let mut next = update.step(clock.elapsed(), Event::Begin).unwrap();
        for number in 0.. {
            let Next::Do(effect) = &next else { break };
            unwritten.extend(update.take_journal());
            if update.may_write_journal() {
                journal::write(&mut file, &unwritten).unwrap();
                unwritten.clear();
            }
            if number == cut && !done {
                break;
            }
            let event = hands.carry_out(effect, clock + update.deadline().min(Duration::from_secs(3600)));
            if matches!((effect, &event), (Effect::StartCpu { .. }, Event::Done)) {
                partner = Some(Partner::start(&self.machine, self.base(), self.mood));
            }
            if number == cut {
                break;
            }
            next = update.step(clock.elapsed(), event).unwrap();
        }
        (update, next, partner)
    }

    fn base(&self) -> u64 {
        let inside = self.machine.inside();
        let row = inside.rows.values().next().unwrap();
        row.ranges.iter().max_by_key(|range| range.len()).unwrap().start()
    }

    fn no_harm(&self, when: &str) {
        let inside = self.machine.inside();
        assert!(inside.harm.is_empty(), "{when}: {:?}\n{:#?}", inside.harm, inside.acts);
    }
}

fn left(outcome: &Next) -> Vec<Left> {
    match outcome {
        Next::End(Outcome::RolledBack { left, .. } | Outcome::TrialPassed { left } | Outcome::Committed { left }) => {
            left.clone()
        }
        Next::Do(effect) => panic!("it ends before {}", effect.name()),
    }
}

/// A successor that is watched stays when its time is over or an operator says so, and is taken back when one had to and did not, or
/// when one says so; then everything is as before.
#[test]
fn a_watched_successor_stays_or_is_taken_back() {
    let watched = |seconds, then, operator: fn(&Kernel)| {
        let mut scene = Scene::new();
        scene.steps.probation = ProbationPolicy::Watch { period: Duration::from_secs(seconds), then, held_back: 0 };
        let before = scene.machine.state();
        let kernel = scene.open_kernel();
        let next = std::thread::scope(|scope| {
            let operator = scope.spawn(|| {
                let patience = Instant::now() + Duration::from_secs(30);
                while !kernel.probation.is_watching() && Instant::now() < patience {
                    std::thread::sleep(Duration::from_millis(1));
                }
                operator(&kernel);
            });
            let (_, next, _partner) = scene.run(&kernel, usize::MAX);
            operator.join().unwrap();
            next
        });
        scene.no_harm("watched");
        let as_before = scene.machine.state() == before;
        (next, as_before)
    };
    let committed = |next: &Next| matches!(next, Next::End(Outcome::Committed { .. }));
    assert!(committed(&watched(1, WhenWatched::Commit, |_| {}).0));
    let said = |kernel: &Kernel| assert!(kernel.probation.commit());
    assert!(committed(&watched(3600, WhenWatched::RollBack, said).0));
    for (seconds, operator, said) in [
        (1, (|_| {}) as fn(&Kernel), "nobody committed it within 1 s"),
        (3600, |kernel| kernel.called_off.store(true, Ordering::SeqCst), "called off by the operator"),
    ] {
        let (next, as_before) = watched(seconds, WhenWatched::RollBack, operator);
        let Next::End(Outcome::RolledBack { cause, left, .. }) = &next else { panic!("{next:?}") };
        assert!(cause.what.contains(said) && left.is_empty() && as_before, "{next:?}");
    }
}

/// All effects of an update that goes well, by what the machine calls them when it does them; each made to fail once.
#[test]
fn what_fails_at_each_step_is_undone() {
    let acts = {
        let scene = Scene::new();
        let before = scene.machine.state();
        let (_, next, _partner) = scene.run(&scene.open_kernel(), usize::MAX);
        // A played machine cannot be left.
        assert!(matches!(next, Next::End(Outcome::Committed { ref left }) if left.len() == 1), "{next:?}");
        assert_ne!(scene.machine.state(), before);
        scene.no_harm("all goes well");
        scene.machine.inside().acts.clone()
    };
    let machines: Vec<String> = acts.iter().filter(|act| !act.starts_with("asked to")).cloned().collect();
    assert!(machines.len() > 12, "{machines:?}");
    let mut tried = 0;
    for act in machines.iter().filter(|act| !matches!(act.as_str(), "quiesce" | "yield")) {
        let scene = Scene::new();
        let before = scene.machine.state();
        scene.machine.fail(act, 1);
        let kernel = scene.open_kernel();
        let (_, next, _partner) = scene.run(&kernel, usize::MAX);
        scene.no_harm(act);
        // What nothing hangs on goes on (the address is silent already, dropped or not).
        if matches!(next, Next::End(Outcome::Committed { .. })) {
            assert_eq!(act, "drop address");
            continue;
        }
        assert!(left(&next).is_empty(), "{act}: {next:?}");
        assert_eq!(scene.machine.state(), before, "{act}: {:#?}", scene.machine.inside().acts);
        tried += 1;
    }
    assert!(tried > 10, "{tried}");
}

/// The successor says that it cannot, or says nothing, at each word: everything comes back.
#[test]
fn a_successor_that_refuses_or_is_silent_is_undone() {
    let words = ["stand by", "check health", "activate", "cpu parked", "commit"];
    for (word, near) in words.into_iter().flat_map(|word| [(word, false), (word, true)]) {
        for mood in [Mood::Refuses(word), Mood::SilentFrom(word)] {
            let scene = Scene { near, ..Scene::with_mood(mood) };
            let before = scene.machine.state();
            let kernel = scene.open_kernel();
            let (update, next, _partner) = scene.run(&kernel, usize::MAX);
            scene.no_harm(&format!("{mood:?}"));
            assert!(left(&next).is_empty(), "{mood:?}: {next:?}");
            assert_eq!(scene.machine.state(), before, "{mood:?}: {:#?}", scene.machine.inside().acts);
            let told = matches!(word, "activate" | "cpu parked" | "commit");
            let epoch = if told { EPOCH + 2 } else { EPOCH };
            assert_eq!((kernel.ledger.pages().epoch, update.incumbent_epoch()), (epoch, epoch), "{mood:?}");
        }
    }
}

/// A batond that dies at each step, before the effect under way or after it: the one that follows takes everything back, or, once the
/// successor has answered that it serves, goes on to the end.
#[test]
fn a_batond_that_dies_at_each_step_is_followed() {
    let script = Scene::new().steps.script();
    let (mut back, mut on) = (0, 0);
    for (cut, done) in (0..script.len()).flat_map(|cut| [(cut, false), (cut, true)]) {
        let effect = &script[cut].1;
        // Two kinds of network by turns: whether the interfaces are on one network is of no matter to the rest.
        let scene = Scene { near: cut % 2 == 0, ..Scene::new() };
        let when = format!("dies {} `{}`", if done { "after" } else { "before" }, effect.name());
        let before = scene.machine.state();
        let (_, _, _partner) = scene.run_and_die(&scene.open_kernel(), cut, done);
        let kernel = scene.kernel();
        match recover(&kernel) {
            None => {
                back += 1;
                assert_eq!(scene.machine.state(), before, "{when}: {:#?}", scene.machine.inside().acts);
                let pages = kernel.ledger.pages();
                assert_eq!((pages.granted, pages.crossing), (None, None), "{when}");
                assert_eq!(kernel.services.admission(), Admission::Open { epoch: pages.epoch }, "{when}");
                assert_eq!(pages.epoch, EPOCH, "{when}: the successor was never told");
                // There is nothing left to do for one that follows again.
                let acts = scene.machine.inside().acts.len();
                assert!(recover(&scene.kernel()).is_none());
                assert_eq!(scene.machine.inside().acts.len(), acts, "{when}");
            }
            Some(going_on) => {
                on += 1;
                let moved = going_on.resumed.update.cpus_handed();
                kernel.begin().unwrap();
                assert!(matches!(kernel.services.admission(), Admission::Elsewhere { .. }), "{when}");
                let ended = upgrade::go_on(&kernel, going_on.resumed, &going_on.found).unwrap();
                assert!(ended.cause.contains("could not leave"), "{when}: {ended:?}");
                let status = kernel.status().update.unwrap();
                assert!(
                    (moved..=2).contains(&status.cpus_moved) && status.cpus_moved == 2,
                    "{when}: {moved} {status:?}"
                );
                let inside = scene.machine.inside();
                assert!(
                    matches!(inside.cpus[..], [_, Some(At::Runs(1)), Some(At::Runs(1)), Some(At::Runs(1))]),
                    "{when}"
                );
            }
        }
        scene.no_harm(&when);
    }
    assert!(back > 20 && on > 10, "{back} {on}");
}

/// batond dies when the successor was told to answer, and nobody knows whether it does: it is asked to stand down, and if it does not
/// answer it is stopped. Either way the incumbent serves in an epoch that no successor has had.
#[test]
fn a_batond_that_dies_when_the_successor_was_told_to_answer_takes_the_epoch_back() {
    for mood in [Mood::Well, Mood::SilentFrom("ping")] {
        let scene = Scene::with_mood(mood);
        let before = scene.machine.state();
        // The successor answers, and that cannot be written down.
        scene.machine.fail("state 4", 1);
        let script = scene.steps.script();
        let activate = script.iter().position(|(_, effect)| matches!(effect, Effect::Activate { .. })).unwrap();
        let (_, _, _partner) = scene.run_and_die(&scene.open_kernel(), activate, true);
        assert_eq!(scene.machine.arp_ignore(), "8", "the service address is silent");
        let kernel = scene.kernel();
        assert!(recover(&kernel).is_none());
        scene.no_harm("told");
        let asked = scene.machine.inside().acts.iter().any(|act| act == "asked to stand down");
        assert_eq!(asked, mood == Mood::Well);
        assert_eq!(scene.machine.state(), before, "{:#?}", scene.machine.inside().acts);
        assert_eq!(kernel.ledger.pages().epoch, EPOCH + 2);
        assert_eq!(kernel.services.admission(), Admission::Open { epoch: EPOCH + 2 });
    }
}

/// Ledger and journal are gone: what the module knows is taken back all the same.
#[test]
fn without_a_journal_everything_that_the_module_knows_of_is_taken_back() {
    let script = Scene::new().steps.script();
    let freeze = script.iter().position(|(_, effect)| *effect == Effect::Freeze).unwrap();
    for cut in 1..=freeze {
        let scene = Scene::new();
        let before = scene.machine.state();
        let (_, _, _partner) = scene.run(&scene.open_kernel(), cut);
        std::fs::remove_file(scene.folder.path().join("journal.jsonl")).unwrap();
        std::fs::remove_file(scene.folder.path().join("arenas.json")).unwrap();
        assert!(recover(&scene.kernel()).is_none());
        scene.no_harm("no journal");
        let offline = scene.machine.inside().cpus.clone();
        if cut == 3 || cut == 4 {
            // It was taken offline, and nobody knows by whom: the operator may have.
            assert_eq!(offline[3], Some(At::Offline));
            continue;
        }
        assert_eq!(scene.machine.state(), before, "{cut}: {:#?}", scene.machine.inside().acts);
    }
}

/// A successor that serves and cannot be stopped keeps everything, and nobody serves here.
#[test]
fn nobody_serves_beside_a_successor_that_cannot_be_stopped() {
    let scene = Scene::with_mood(Mood::SilentFrom("cpu parked"));
    scene.machine.fail("fence 3", 9);
    let kernel = scene.open_kernel();
    let mut hands = Hands::new(&kernel, &scene.plan, scene.steps.update).unwrap();
    let mut update = Update::new(scene.steps.clone());
    let (replies, _) = tokio::sync::mpsc::unbounded_channel();
    let journal = journal::create(&kernel.journal, journal::room(4)).unwrap();
    let mut report = Report::with_journal(journal, &kernel, &scene.steps, "played", &replies);
    let first = update.step(Duration::ZERO, Event::Begin).unwrap();
    let machine = scene.machine.clone();
    // The successor's agent comes up as soon as there is a CPU for it.
    let waits = thread::spawn(move || {
        loop {
            let runs = machine.inside().cpus[3].is_some_and(|at| matches!(at, At::Runs(_)));
            if runs {
                let base = machine
                    .inside()
                    .rows
                    .values()
                    .next()
                    .unwrap()
                    .ranges
                    .iter()
                    .max_by_key(|r| r.len())
                    .unwrap()
                    .start();
                return Partner::start(&machine, base, Mood::SilentFrom("cpu parked"));
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
    let outcome = drive(&mut update, first, &mut hands, &mut report);
    upgrade::ended(&kernel, &mut update, outcome.clone(), &hands, &mut report);
    drop(waits.join().unwrap());
    let kept = left(&Next::End(outcome));
    assert!(kept.iter().any(|left| matches!(left.effect, Effect::GiveBackMemory)), "{kept:?}");
    assert!(matches!(kernel.services.admission(), Admission::Elsewhere { .. }), "{:?}", kernel.services.admission());
    assert_eq!(scene.machine.inside().rows.len(), 1);
    scene.no_harm("not stopped");
}

/// The disk is full at the first line, or at a later one: what the journal does not announce is not done, and what was done is undone.
#[test]
fn a_full_disk_under_the_journal_turns_the_update_back() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut begun = Update::new(Scene::new().steps);
    begun.step(Duration::ZERO, Event::Begin).unwrap();
    let first_line = serde_json::to_vec(&begun.take_journal()).unwrap().len() as u64;
    for (room, not_done) in [(0, "create"), (first_line + 50, "unbind")] {
        let scene = Scene::new();
        let before = scene.machine.state();
        let kernel = scene.open_kernel();
        // It takes so many bytes and no more.
        let disk = memfd_create("journal", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let disk = std::fs::File::from(disk);
        disk.set_len(room).unwrap();
        fcntl(&disk, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        let (replies, _) = tokio::sync::mpsc::unbounded_channel();
        let mut hands = Hands::new(&kernel, &scene.plan, scene.steps.update).unwrap();
        let mut report = Report::with_journal(disk, &kernel, &scene.steps, "played", &replies);
        let mut update = Update::new(scene.steps.clone());
        let first = update.step(Duration::ZERO, Event::Begin).unwrap();
        let outcome = drive(&mut update, first, &mut hands, &mut report);
        let Outcome::RolledBack { cause, left, .. } = outcome else { panic!("{outcome:?}") };
        assert!(cause.what.contains("journal cannot be written") && left.is_empty(), "{cause:?} {left:?}");
        let acts = scene.machine.inside().acts.clone();
        assert!(!acts.iter().any(|act| act == not_done), "{room}: {acts:?}");
        assert_eq!(acts.is_empty(), room == 0, "{acts:?}");
        assert_eq!(scene.machine.state(), before);
    }
}
