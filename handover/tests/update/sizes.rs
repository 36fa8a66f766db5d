//! What is said fits the channel: every message at its longest, and those that grow with the machine, for 4096 CPUs and for any input.

use handover::channel::{Channel, MESSAGE_LIMIT, Side};
use handover::update::plan::Goal;
use handover::update::sizes::{CPU_LIMIT, commit, standing};
use handover::update::successor::{Answer, Successor};
use proptest::prelude::*;
use state_schemas::Payload;
use state_schemas::checked::Check;
use state_schemas::control_block::{HANDOVER, SIZE};
use state_schemas::handover_record::{Cpu, PhaseMark, Program};
use state_schemas::latest::message::TABLE_LIMIT;
use state_schemas::message::{ITEM_LIMIT, MessageError, PART_LIMIT, TEXT_LIMIT, Text, ToIncumbent, ToSuccessor};
use state_schemas::shared::Local;

use crate::plans::plan;
use crate::roles::record;

fn mark(phase: impl Into<String>, start_tsc: u64, end_tsc: u64) -> PhaseMark {
    PhaseMark { phase: phase.into(), start_tsc, end_tsc }
}

/// The steps of an update of this many CPUs, as the incumbent's agent measures them.
fn steps(cpus: u32) -> Vec<PhaseMark> {
    let script = plan(cpus, Goal::Upgrade).script();
    let named = script.iter().enumerate().map(|(number, (_, effect))| match effect.cpu() {
        Some(cpu) => mark(format!("{} {}", effect.name(), cpu.number), number as u64, number as u64 + 1),
        None => mark(effect.name(), number as u64, number as u64 + 1),
    });
    named.collect()
}

fn timeline(word: ToSuccessor) -> Vec<PhaseMark> {
    assert!(word.to_frame(1).unwrap().len() as u64 <= MESSAGE_LIMIT);
    assert_eq!(word.check(&()), Ok(()));
    match word {
        ToSuccessor::Commit { timeline } => timeline,
        other => panic!("{other:?}"),
    }
}

/// Sent and received, as the agents do it.
fn crosses<T>(message: &T, side: Side)
where
    T: Payload + Check<Against = (), Error = MessageError> + PartialEq + std::fmt::Debug,
{
    let memory = Local::new(SIZE);
    Channel::reset(&&memory).unwrap();
    let peer = if side == Side::Incumbent { Side::Successor } else { Side::Incumbent };
    Channel::attach(&memory, side).unwrap().send(message).unwrap();
    assert_eq!(Channel::attach(&memory, peer).unwrap().receive::<T>().unwrap().as_ref(), Some(message));
}

#[test]
fn every_message_at_its_longest_crosses() {
    let text = || Text::from("ä".repeat(TEXT_LIMIT));
    let limits: Vec<String> = (0..226).map(|n| format!("{n:064}")).collect();
    assert_eq!(standing(&limits), Ok(()));
    for word in [
        ToSuccessor::StandBy,
        ToSuccessor::CheckHealth,
        ToSuccessor::Activate { epoch: u64::MAX },
        ToSuccessor::CpuParked { apic_id: u32::MAX },
        ToSuccessor::ReleaseCpu { apic_id: u32::MAX },
        ToSuccessor::StandDown { epoch: u64::MAX },
        commit(&steps(CPU_LIMIT as u32)),
        ToSuccessor::LastCpu { apic_id: u32::MAX },
        ToSuccessor::Abort { reason: text() },
        ToSuccessor::Ping { nonce: u64::MAX },
        ToSuccessor::Connections { at: 0, total: TABLE_LIMIT, bytes: vec![255; PART_LIMIT] },
    ] {
        crosses(&word, Side::Incumbent);
    }
    let program = Program { release: "r".repeat(TEXT_LIMIT), agent_version: "v".repeat(TEXT_LIMIT) };
    for word in [
        ToIncumbent::Hello { program, abi: u32::MAX },
        ToIncumbent::Standing { services: limits },
        ToIncumbent::Healthy,
        ToIncumbent::Activated { epoch: u64::MAX, tsc: u64::MAX },
        ToIncumbent::CpuOnline { apic_id: u32::MAX, cpu: u32::MAX },
        ToIncumbent::CpuReleased { apic_id: u32::MAX },
        ToIncumbent::StoodDown { epoch: u64::MAX },
        ToIncumbent::Committed,
        ToIncumbent::Failed { what: text(), cause: text() },
        ToIncumbent::Pong { nonce: u64::MAX },
        ToIncumbent::ConnectionsTaken { have: u64::MAX },
    ] {
        crosses(&word, Side::Successor);
    }
}

#[test]
fn few_steps_are_sent_as_they_are() {
    for cpus in [2, 8, 64, 100] {
        assert_eq!(timeline(commit(&steps(cpus))), steps(cpus));
    }
}

/// From about 139 CPUs on, the steps of each are too many for one message.
#[test]
fn the_steps_of_many_cpus_become_one_a_kind() {
    for cpus in [150, 512, CPU_LIMIT as u32] {
        let names: Vec<_> = timeline(commit(&steps(cpus))).into_iter().map(|mark| mark.phase).collect();
        let others = cpus - 2;
        // CPU 3 is offline already: it is parked, and not handed over. So is the spare one.
        let expected = [
            "take memory".to_owned(),
            "grant devices".into(),
            "place image".into(),
            format!("start cpu {}", cpus - 1),
            "await hello".into(),
            "stand by".into(),
            "check health".into(),
            "freeze".into(),
            "seal".into(),
            "release address".into(),
            "activate".into(),
            "drop address".into(),
            format!("offline cpu ({} times)", others - 1),
            format!("park cpu ({others} times)"),
            format!("hand cpu over ({} times)", others - 1),
            "watch".into(),
            "commit".into(),
            "quiesce devices".into(),
            "yield last cpu 0".into(),
        ];
        assert_eq!(names, expected);
    }
    let whole = timeline(commit(&steps(512)));
    let hand = whole.iter().find(|mark| mark.phase.starts_with("hand cpu over")).unwrap();
    let each: Vec<_> = steps(512).into_iter().filter(|mark| mark.phase.starts_with("hand cpu over")).collect();
    assert_eq!((hand.start_tsc, hand.end_tsc), (each[0].start_tsc, each.last().unwrap().end_tsc));
}

/// What the successor is born with holds 4096 CPUs, too.
#[test]
fn a_record_of_4096_cpus_fits_its_place() {
    let mut record = record();
    let cpu = |apic_id| Cpu { apic_id, firmware_boot: apic_id == 0 };
    record.machine.cpus = (0..CPU_LIMIT as u32).map(cpu).collect();
    let frame = record.to_frame(2).unwrap();
    assert!((frame.len() as u64) < HANDOVER.size / 4, "{} bytes", frame.len());
    let mut successor = Successor::new(&record);
    let order = successor.hear(&ToSuccessor::StandBy).unwrap();
    successor.answer(&order, Answer::Services(vec![])).unwrap();
}

#[test]
fn a_cause_of_any_length_arrives_as_a_failure() {
    let mut successor = Successor::new(&record());
    let order = successor.hear(&ToSuccessor::StandBy).unwrap();
    for cause in ["no arena".to_owned(), "x".repeat(TEXT_LIMIT + 1), "日".repeat(50_000)] {
        let reply = successor.answer(&order, Answer::Failed(cause.clone())).unwrap().unwrap();
        crosses(&reply, Side::Successor);
        let ToIncumbent::Failed { what, cause: told } = reply else { panic!() };
        assert_eq!(what.as_str(), "stand by");
        assert!(cause.starts_with(told.as_str().trim_end_matches('…')));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the steps are called and however many there are: what is sent is received, and covers the same time.
    #[test]
    fn any_steps_fit(
        names in proptest::collection::vec((".{0,80}", any::<bool>()), 0..40),
        repeat in 1usize..80,
        long in 0usize..3000,
    ) {
        let mut marks = Vec::new();
        for round in 0..repeat {
            for (number, (name, numbered)) in names.iter().enumerate() {
                let name = if *numbered { format!("{name} {round}") } else { name.clone() };
                let start = (round * names.len() + number) as u64;
                marks.push(mark(name, start, start + 2));
            }
        }
        if long > 1000 {
            marks.push(mark("x".repeat(long), 7, 8));
        }
        let sent = timeline(commit(&marks));
        prop_assert!(sent.len() <= ITEM_LIMIT);
        let first = |marks: &[PhaseMark]| marks.iter().map(|mark| mark.start_tsc).min();
        let last = |marks: &[PhaseMark]| marks.iter().map(|mark| mark.end_tsc).max();
        prop_assert_eq!((first(&sent), last(&sent)), (first(&marks), last(&marks)));
    }

    #[test]
    fn what_the_plan_lets_pass_can_be_said(
        services in proptest::collection::vec("[a-z]{1,64}", 0..600),
    ) {
        let mut plan = plan(4, Goal::Upgrade);
        plan.services.clone_from(&services);
        let answer = ToIncumbent::Standing { services };
        let fits = answer.to_frame(1).unwrap().len() as u64 <= MESSAGE_LIMIT;
        prop_assert_eq!(plan.check().is_ok(), fits);
        if fits {
            crosses(&answer, Side::Successor);
        }
    }
}
