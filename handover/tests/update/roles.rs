//! The successor's role, against the words of the incumbent in and out of their order.

use handover::update::successor::{Answer, Order, Stage, Successor, Unheard};
use proptest::prelude::*;
use state_schemas::handover_record::*;
use state_schemas::message::{Counted, Ending, Examination, LiveUpdate, ToIncumbent, ToSuccessor};

pub fn record() -> HandoverRecord {
    let range = |start, len| PhysRange { start, len };
    HandoverRecord {
        update: UpdateId([1; 16]),
        hop: 1,
        epoch: 7,
        incumbent: Program { release: "6.12".into(), agent_version: "0.1".into() },
        clock: ClockPair { tsc: 0, unix_ns: 0, tsc_khz: 1_000_000 },
        machine: Machine {
            ram: vec![range(0, 1 << 30)],
            memory_block: 128 << 20,
            cpus: (0..3).map(|apic_id| Cpu { apic_id, firmware_boot: apic_id == 0 }).collect(),
        },
        grant: Grant {
            instance: 1,
            boot_cpu: 2,
            region: range(256 << 20, 128 << 20),
            low_slot: range(0x10000, 0x20000),
            fragments: vec![],
            blocks: vec![],
        },
        arenas: vec![],
        services: vec![],
        network: Network { service: None, gateway: None, management: None, functions: vec![] },
        ecam: None,
        retired: vec![],
        journal: vec![],
        files: Vec::new(),
        kho: None,
        carried: Vec::new(),
    }
}

pub fn good_answer(order: &Order) -> Answer {
    match order {
        Order::StandBy => Answer::Services(vec!["kv".into()]),
        Order::Activate { .. } => Answer::AnsweringSince(5),
        Order::OnlineCpu { .. } | Order::Drain { .. } => Answer::Online(1),
        Order::TakeConnections { at, bytes, .. } => Answer::Have(at + bytes.len() as u64),
        Order::Examine => Answer::Examined(Box::new(examination())),
        Order::RunCheck { .. } => {
            Answer::CheckEnded { ending: Ending::Exited { code: 0 }, output: "".into(), took_ms: 1 }
        }
        _ => Answer::Done,
    }
}

fn connections(at: u64) -> ToSuccessor {
    ToSuccessor::Connections { at, total: 9, bytes: vec![1, 2] }
}

fn examination() -> Examination {
    Examination {
        cpus: vec![2],
        tsc: 1,
        unix_ns: 1,
        taint: 0,
        services: vec![],
        modules: Counted::default(),
        functions: Counted::default(),
        live_update: LiveUpdate::Absent,
    }
}

#[test]
fn a_candidate_is_examined_and_lent_cpus_while_its_services_stand_by() {
    let mut candidate = Successor::new(&record());
    let check = || ToSuccessor::RunCheck { command: "true".into(), limit_ms: 5 };
    for word in [ToSuccessor::Examine, check(), ToSuccessor::CpuParked { apic_id: 1 }] {
        assert!(matches!(candidate.hear(&word), Err(Unheard::Stage { stage: Stage::Born, .. })), "{word:?}");
    }
    let mut say = |word: ToSuccessor| {
        let order = candidate.hear(&word)?;
        Ok::<_, Unheard>(candidate.answer(&order, good_answer(&order))?.unwrap())
    };
    say(ToSuccessor::StandBy).unwrap();
    for _ in 0..2 {
        assert_eq!(
            say(ToSuccessor::CpuParked { apic_id: 1 }).unwrap(),
            ToIncumbent::CpuOnline { apic_id: 1, cpu: 1 },
            "also when it is asked again"
        );
        assert_eq!(say(ToSuccessor::Examine).unwrap(), ToIncumbent::Examined { examination: examination() });
        assert!(matches!(say(check()).unwrap(), ToIncumbent::CheckEnded { .. }));
    }
    say(ToSuccessor::Activate { epoch: 8 }).unwrap();
    assert!(matches!(say(ToSuccessor::Examine), Err(Unheard::Stage { stage: Stage::Active, .. })));
    assert!(matches!(say(check()), Err(Unheard::Stage { stage: Stage::Active, .. })));
}

#[test]
fn word_by_word_to_the_end() {
    let mut successor = Successor::new(&record());
    let mut say = |word: ToSuccessor| {
        let order = successor.hear(&word)?;
        let reply = successor.answer(&order, good_answer(&order))?;
        Ok::<_, Unheard>((reply, successor.stage()))
    };
    let expected = [
        (ToSuccessor::StandBy, Some(ToIncumbent::Standing { services: vec!["kv".into()] }), Stage::Standing),
        (ToSuccessor::CheckHealth, Some(ToIncumbent::Healthy), Stage::Standing),
        (connections(3), Some(ToIncumbent::ConnectionsTaken { have: 5 }), Stage::Standing),
        (ToSuccessor::Activate { epoch: 8 }, Some(ToIncumbent::Activated { epoch: 8, tsc: 5 }), Stage::Active),
        (ToSuccessor::CpuParked { apic_id: 1 }, Some(ToIncumbent::CpuOnline { apic_id: 1, cpu: 1 }), Stage::Active),
        (ToSuccessor::ReleaseCpu { apic_id: 1 }, Some(ToIncumbent::CpuReleased { apic_id: 1 }), Stage::Active),
        (ToSuccessor::CpuParked { apic_id: 1 }, Some(ToIncumbent::CpuOnline { apic_id: 1, cpu: 1 }), Stage::Active),
        (ToSuccessor::Ping { nonce: 3 }, Some(ToIncumbent::Pong { nonce: 3 }), Stage::Active),
        (ToSuccessor::Commit { timeline: vec![] }, Some(ToIncumbent::Committed), Stage::Committed),
        (ToSuccessor::LastCpu { apic_id: 0 }, None, Stage::Alone),
    ];
    for (word, reply, stage) in expected {
        assert_eq!(say(word).unwrap(), (reply, stage));
    }
    let drain = Order::Drain { last: 0 };
    assert_eq!(successor.answer(&drain, Answer::Done).unwrap(), None);
    assert_eq!(successor.stage(), Stage::Drained);
}

#[test]
fn what_does_not_belong_is_refused_and_changes_nothing() {
    let successor = Successor::new(&record());
    let refused = |word| successor.hear(&word).unwrap_err();
    assert!(matches!(refused(ToSuccessor::Activate { epoch: 8 }), Unheard::Stage { stage: Stage::Born, .. }));
    assert!(matches!(refused(ToSuccessor::Activate { epoch: 7 }), Unheard::Epoch { given: 7, own: 8, .. }));
    assert!(matches!(refused(ToSuccessor::CpuParked { apic_id: 2 }), Unheard::Cpu { apic_id: 2, .. }));
    assert!(matches!(refused(ToSuccessor::ReleaseCpu { apic_id: 1 }), Unheard::Stage { stage: Stage::Born, .. }));
    assert!(matches!(refused(ToSuccessor::ReleaseCpu { apic_id: 9 }), Unheard::Cpu { apic_id: 9, .. }));
    assert!(matches!(refused(ToSuccessor::Abort { reason: "".into() }), Unheard::Unsaid { what: "abort" }));
    assert!(matches!(refused(ToSuccessor::LastCpu { apic_id: 0 }), Unheard::Stage { .. }));
    // Its services do not stand by yet; and once they serve, no table counts any more.
    assert!(matches!(refused(connections(0)), Unheard::Stage { stage: Stage::Born, .. }));
    let mut active = successor.clone();
    for word in [ToSuccessor::StandBy, ToSuccessor::Activate { epoch: 8 }] {
        let order = active.hear(&word).unwrap();
        active.answer(&order, good_answer(&order)).unwrap();
    }
    assert!(matches!(active.hear(&connections(0)), Err(Unheard::Stage { stage: Stage::Active, .. })));
}

#[test]
fn a_failure_is_told_and_changes_nothing() {
    let mut successor = Successor::new(&record());
    let before = successor.clone();
    let reply = successor.answer(&Order::StandBy, Answer::Failed("no arena".into())).unwrap();
    assert_eq!(reply, Some(ToIncumbent::Failed { what: "stand by".into(), cause: "no arena".into() }));
    assert_eq!(successor, before);
    assert!(matches!(successor.answer(&Order::StandBy, Answer::Online(1)), Err(Unheard::Answer { .. })));
    assert_eq!(successor, before);
}

fn word() -> impl Strategy<Value = ToSuccessor> {
    prop_oneof![
        2 => Just(ToSuccessor::StandBy),
        1 => Just(ToSuccessor::CheckHealth),
        3 => (7u64..10).prop_map(|epoch| ToSuccessor::Activate { epoch }),
        3 => (0u32..4).prop_map(|apic_id| ToSuccessor::CpuParked { apic_id }),
        2 => (0u32..4).prop_map(|apic_id| ToSuccessor::ReleaseCpu { apic_id }),
        1 => (7u64..10).prop_map(|epoch| ToSuccessor::StandDown { epoch }),
        1 => Just(ToSuccessor::Commit { timeline: vec![] }),
        1 => (0u32..4).prop_map(|apic_id| ToSuccessor::LastCpu { apic_id }),
        1 => Just(ToSuccessor::Abort { reason: "".into() }),
        1 => (0u64..9).prop_map(connections),
        1 => any::<u64>().prop_map(|nonce| ToSuccessor::Ping { nonce }),
        1 => Just(ToSuccessor::Examine),
        1 => any::<u32>().prop_map(|limit_ms| ToSuccessor::RunCheck { command: "true".into(), limit_ms }),
    ]
}

proptest! {
    /// A lying incumbent cannot make the successor serve in another epoch, hold a CPU twice, or end before it served.
    #[test]
    fn any_words_in_any_order(words in proptest::collection::vec((word(), any::<bool>()), 0..60)) {
        let mut successor = Successor::new(&record());
        let mut online = vec![2];
        let mut served = false;
        for (word, works) in words {
            let before = successor.clone();
            let Ok(order) = successor.hear(&word) else {
                prop_assert_eq!(&successor, &before);
                continue;
            };
            let answer = if works { good_answer(&order) } else { Answer::Failed("no".into()) };
            successor.answer(&order, answer).unwrap();
            if !works {
                prop_assert_eq!(&successor, &before);
                continue;
            }
            match order {
                Order::Activate { epoch } => {
                    prop_assert_eq!(epoch, 8);
                    served = true;
                }
                Order::OnlineCpu { apic_id } | Order::Drain { last: apic_id } => {
                    prop_assert!(!online.contains(&apic_id) && apic_id < 3);
                    online.push(apic_id);
                }
                Order::OfflineCpu { apic_id } => {
                    prop_assert!(online.contains(&apic_id) && apic_id != 2);
                    online.retain(|&id| id != apic_id);
                }
                _ => {}
            }
            prop_assert!(served || successor.stage() <= Stage::Standing);
        }
    }
}

/// An agent that follows one that died asks again for what may be so already.
#[test]
fn what_was_obeyed_is_answered_again_and_not_done_again() {
    let mut successor = Successor::new(&record());
    let words = [
        ToSuccessor::StandBy,
        ToSuccessor::Activate { epoch: 8 },
        ToSuccessor::CpuParked { apic_id: 1 },
        ToSuccessor::ReleaseCpu { apic_id: 1 },
        ToSuccessor::StandDown { epoch: 8 },
        ToSuccessor::Activate { epoch: 8 },
        ToSuccessor::Commit { timeline: vec![] },
    ];
    for word in words {
        let order = successor.hear(&word).unwrap();
        assert!(!matches!(order, Order::Repeat(_)), "{order:?}");
        let reply = successor.answer(&order, good_answer(&order)).unwrap();
        let after = successor.clone();
        for _ in 0..2 {
            let again = successor.hear(&word).unwrap();
            assert_eq!(again, Order::Repeat(reply.clone().unwrap()), "at {word:?}");
            assert_eq!(successor.answer(&again, Answer::Done).unwrap(), reply);
            assert_eq!(successor, after);
        }
    }
}
