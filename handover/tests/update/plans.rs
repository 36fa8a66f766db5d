//! Plans, and what there is no plan for.

use handover::update::cpu::{Cpu, Cpus, Moving};
use std::time::Duration;

use handover::channel::MESSAGE_LIMIT;
use handover::update::deadline::Deadlines;
use handover::update::effect::Effect;
use handover::update::phase::{self, Phase};
use handover::update::plan::{Goal, Plan, ProbationPolicy, Refusal};
use state_schemas::handover_record::UpdateId;

pub const DEADLINES: Deadlines = Deadlines {
    granted: Duration::from_secs(60),
    booting: Duration::from_secs(120),
    trial: Duration::from_secs(60),
    cutover: Duration::from_secs(5),
    per_cpu: Duration::from_secs(20),
    commit: Duration::from_secs(20),
    undo: Duration::from_secs(20),
};

/// A machine of `cpus` CPUs. From five on, one of those that follow is offline; so is the spare one from seven on.
pub fn plan(cpus: u32, goal: Goal) -> Plan {
    let cpu = |number| Cpu { number, apic_id: 2 * number };
    let moving = |number| Moving { cpu: cpu(number), online: number != 3 || cpus < 5 };
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
        probation: ProbationPolicy::CommitAtOnce,
        deadlines: DEADLINES,
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
fn phases_of_every_script_follow_each_other() {
    for cpus in 2..9 {
        for goal in [Goal::Upgrade, Goal::Canary] {
            let script = plan(cpus, goal).script();
            assert!(script.is_sorted_by_key(|(phase, _)| phase));
            let goes_over = |effect: &Effect| {
                matches!(effect, Effect::ParkCpu { .. } | Effect::StartCpu { .. } | Effect::YieldLastCpu { .. })
            };
            let each_cpu_once = script.iter().filter(|(_, effect)| goes_over(effect)).count();
            assert_eq!(each_cpu_once, if goal == Goal::Upgrade { cpus as usize } else { 1 });
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
