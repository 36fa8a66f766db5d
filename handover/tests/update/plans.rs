//! Plans, and what there is no plan for.

use handover::update::cpu::{Cpu, Cpus, Moving};
use std::time::Duration;

use handover::channel::MESSAGE_LIMIT;
use handover::update::deadline::Deadlines;
use handover::update::effect::Effect;
use handover::update::phase::{self, Phase};
use handover::update::plan::{Goal, Plan, Refusal};
use handover::update::probation::{ProbationPolicy, WATCH_LIMITS, WhenWatched};
use state_schemas::handover_record::UpdateId;

pub const DEADLINES: Deadlines = Deadlines {
    granted: Duration::from_secs(60),
    booting: Duration::from_secs(120),
    trial: Duration::from_secs(60),
    checks: Duration::ZERO,
    cutover: Duration::from_secs(5),
    per_cpu: Duration::from_secs(20),
    watch: Duration::ZERO,
    commit: Duration::from_secs(20),
    undo: Duration::from_secs(20),
};

fn watched(cpus: u32) -> ProbationPolicy {
    let (period, then) = (Duration::from_secs(30), WhenWatched::Commit);
    ProbationPolicy::Watch { period, then, held_back: usize::from(cpus.is_multiple_of(4)) }
}

/// A machine of `cpus` CPUs. From five on, one of those that follow is offline; so is the spare one from seven on. Where their number is
/// even and there are more than two, the successor is watched before the commit; where it is a multiple of four, the last of those that follow
/// is held back until then.
pub fn plan(cpus: u32, goal: Goal) -> Plan {
    let cpu = |number| Cpu { number, apic_id: 2 * number };
    let moving = |number| Moving { cpu: cpu(number), online: number != 3 || cpus < 5 };
    let is_watched = cpus > 2 && cpus.is_multiple_of(2);
    Plan {
        update: UpdateId([0xab; 16]),
        boot: "b".into(),
        services: vec!["kv".into()],
        goal,
        epoch: 7,
        cpus: Cpus {
            spare: Moving { cpu: cpu(cpus - 1), online: cpus < 7 },
            others: (1..cpus - 1).map(moving).collect(),
            last: cpu(0),
        },
        devices: true,
        probation: if is_watched { watched(cpus) } else { ProbationPolicy::CommitAtOnce },
        deadlines: Deadlines {
            watch: Duration::from_secs(if is_watched { 35 } else { 0 }),
            checks: Duration::from_secs(if goal == Goal::Canary { 90 } else { 0 }),
            ..DEADLINES
        },
    }
}

#[test]
fn the_script_can_be_read_before_it_is_taken() {
    let script: Vec<_> =
        plan(3, Goal::Upgrade).script().iter().map(|(phase, effect)| format!("{phase}: {}", effect.name())).collect();
    assert_eq!(
        script,
        [
            "granted: take memory",
            "granted: grant devices",
            "granted: offline cpu",
            "booting: place image",
            "booting: start cpu",
            "booting: await hello",
            "trial: stand by",
            "trial: check health",
            "cutover: freeze",
            "cutover: seal",
            "cutover: release address",
            "cutover: activate",
            "probation: drop address",
            "probation: offline cpu",
            "probation: park cpu",
            "probation: hand cpu over",
            "commit: commit",
            "commit: quiesce devices",
            "commit: yield last cpu",
        ]
    );
}

#[test]
fn a_trial_ends_with_its_checks() {
    let script: Vec<_> =
        plan(3, Goal::Canary).script().iter().map(|(phase, effect)| format!("{phase}: {}", effect.name())).collect();
    assert_eq!(
        script[3..],
        [
            "booting: place image",
            "booting: start cpu",
            "booting: await hello",
            "trial: stand by",
            "trial: check health",
            "trial: offline cpu",
            "trial: park cpu",
            "trial: hand cpu over",
            "trial: run checks",
        ]
    );
}

#[test]
fn phases_of_every_script_follow_each_other() {
    for cpus in 2..9 {
        for goal in [Goal::Upgrade, Goal::Canary] {
            let script = plan(cpus, goal).script();
            assert!(script.is_sorted_by_key(|(phase, _)| phase));
            let goes_over = |effect: &Effect| {
                matches!(effect, Effect::ParkCpu { .. } | Effect::StartCpu { .. } | Effect::YieldLastCpu { .. })
            };
            let each_cpu_once = script.iter().filter(|(_, effect)| goes_over(effect)).count();
            // A candidate is not given the last one, nor one that is offline.
            let offline = usize::from(cpus >= 5);
            assert_eq!(each_cpu_once, if goal == Goal::Upgrade { cpus as usize } else { cpus as usize - 1 - offline });
        }
    }
    assert!(phase::ALL.is_sorted());
    assert_eq!(phase::ALL[4], Phase::Cutover);
}

#[test]
fn a_cpu_that_is_offline_is_not_taken_offline() {
    let plan = plan(8, Goal::Upgrade);
    let offlined: Vec<u32> = plan
        .script()
        .iter()
        .filter_map(|(_, effect)| match effect {
            Effect::OfflineCpu { cpu } => Some(cpu.number),
            _ => None,
        })
        .collect();
    assert_eq!(offlined, [1, 2, 4, 5, 6]);
}

#[test]
fn a_cpu_that_is_offline_goes_over_and_stays_offline() {
    let script = plan(8, Goal::Upgrade).script();
    let of = |wanted: fn(Cpu) -> Effect| {
        (1..7)
            .filter(|&number| script.iter().any(|(_, effect)| *effect == wanted(Cpu { number, apic_id: 2 * number })))
            .collect::<Vec<_>>()
    };
    assert_eq!(of(|cpu| Effect::ParkCpu { cpu }), [1, 2, 3, 4, 5, 6]);
    assert_eq!(of(|cpu| Effect::HandCpu { cpu }), [1, 2, 4, 5, 6]);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mut twice = plan(4, Goal::Upgrade);
    twice.cpus.last = twice.cpus.others[1].cpu;
    assert_eq!(twice.check(), Err(Refusal::CpuTwice { number: 2, apic_id: 4 }));
    let mut many = plan(4097, Goal::Upgrade);
    assert_eq!(many.clone().check().as_ref(), Err(&Refusal::TooManyCpus { count: 4097 }));
    many.cpus.others.pop();
    many.check().unwrap();
    let mut crowded = plan(4, Goal::Upgrade);
    crowded.services = (0..226).map(|n| format!("{n:064}")).collect();
    crowded.clone().check().unwrap();
    crowded.services.push("x".repeat(64));
    let refusal = crowded.check().unwrap_err();
    assert!(
        matches!(refusal, Refusal::Services { count: 227, len, limit: MESSAGE_LIMIT } if len > MESSAGE_LIMIT),
        "{refusal}"
    );
    let mut late = plan(4, Goal::Upgrade);
    late.epoch = u64::MAX;
    assert_eq!(late.check(), Err(Refusal::Epoch { epoch: u64::MAX }));
}

#[test]
fn a_plan_can_be_written_down() {
    let plan = plan(5, Goal::Upgrade);
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

/// The watch is one step of the script, between the last CPU that moves and the commit.
#[test]
fn a_probation_is_one_step_more() {
    let at_once = Plan { probation: ProbationPolicy::CommitAtOnce, ..plan(6, Goal::Upgrade) }.script();
    let watched = plan(6, Goal::Upgrade).script();
    let more: Vec<_> = watched.iter().filter(|step| !at_once.contains(step)).collect();
    assert!(matches!(more[..], [(Phase::Probation, Effect::Watch { .. })]));
    let at = watched.iter().position(|step| step == more[0]).unwrap();
    assert!(matches!(watched[at - 1].1, Effect::HandCpu { .. }) && watched[at + 1].1 == Effect::Commit);

    // A CPU that could not be stopped under a dead kernel follows when the watch is over.
    let (period, then) = (Duration::from_secs(30), WhenWatched::Commit);
    let held_back = ProbationPolicy::Watch { period, then, held_back: 1 };
    let script = Plan { probation: held_back, ..plan(4, Goal::Upgrade) }.script();
    let names: Vec<_> = script.iter().skip_while(|(_, e)| *e != Effect::DropAddress).map(|(_, e)| e.name()).collect();
    let moves = ["offline cpu", "park cpu", "hand cpu over"];
    let expected: [&[&str]; 5] =
        [&["drop address"], &moves, &["watch"], &moves, &["commit", "quiesce devices", "yield last cpu"]];
    assert_eq!(names, expected.concat());
}

#[test]
fn a_probation_has_limits() {
    let of = |period| {
        let probation = ProbationPolicy::Watch { period, then: WhenWatched::RollBack, held_back: 0 };
        Plan { probation, ..plan(4, Goal::Upgrade) }.check()
    };
    assert!(of(WATCH_LIMITS.0).is_ok() && of(WATCH_LIMITS.1).is_ok());
    for period in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(365 * 24 * 3600)] {
        let refusal = of(period).unwrap_err();
        assert_eq!(refusal, Refusal::Probation { period });
        assert!(refusal.to_string().contains("from 1 s to 86400 s"), "{refusal}");
    }
}

/// As it stands in journals.
#[test]
fn golden_watch() {
    let json = r#"{"effect":"watch","period":{"secs":30,"nanos":0},"then":"roll_back"}"#;
    let effect = Effect::Watch { period: Duration::from_secs(30), then: WhenWatched::RollBack };
    assert_eq!(serde_json::to_string(&effect).unwrap(), json);
    assert_eq!(serde_json::from_str::<Effect>(json).unwrap(), effect);
}
