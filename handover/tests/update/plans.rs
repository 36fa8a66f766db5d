//! Plans, and what there is no plan for.

use handover::deadline::Deadlines;
use handover::phase::{self, Phase};
use handover::plan::{Cpu, CpuState, Goal, Inventory, Plan, ProbationPolicy, Refusal, Request};
use handover::undo::Effect;
use state_schemas::handover_record::UpdateId;

pub fn inventory(cpus: u32) -> Inventory {
    Inventory {
        cpus: (0..cpus)
            .map(|number| CpuState {
                cpu: Cpu { number, apic_id: 2 * number },
                online: true,
                kernel_boot: number == 0,
                firmware_boot: number == 0,
            })
            .collect(),
        epoch: 7,
        devices: true,
    }
}

pub fn request() -> Request {
    Request {
        update: UpdateId([0xab; 16]),
        goal: Goal::Upgrade,
        cpu: None,
        probation: ProbationPolicy::CommitAtOnce,
        deadlines: Deadlines::default(),
    }
}

pub fn plan(cpus: u32, goal: Goal) -> Plan {
    Plan::make(&inventory(cpus), &Request { goal, ..request() }).unwrap()
}

fn numbers(cpus: &[Cpu]) -> Vec<u32> {
    cpus.iter().map(|cpu| cpu.number).collect()
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
            "granted: place image",
            "booting: start cpu",
            "booting: await hello",
            "trial: stand by",
            "trial: check health",
            "cutover: freeze",
            "cutover: seal",
            "cutover: release address",
            "cutover: activate",
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
            let each_cpu_once = script
                .iter()
                .filter(|(_, effect)| {
                    matches!(effect, Effect::HandCpu { .. } | Effect::StartCpu { .. } | Effect::YieldLastCpu { .. })
                })
                .count();
            assert_eq!(each_cpu_once, if goal == Goal::Upgrade { cpus as usize } else { 1 });
        }
    }
    assert!(phase::ALL.is_sorted());
    assert_eq!(phase::ALL[4], Phase::Cutover);
}

#[test]
fn the_spare_cpu_is_chosen_and_the_firmwares_goes_late() {
    // First hop: kernel and firmware booted on the same CPU.
    let first = plan(4, Goal::Upgrade);
    assert_eq!((first.spare.number, first.last.number), (3, 0));
    assert_eq!(numbers(&first.others), [1, 2]);

    // Second hop: this kernel booted on what it calls CPU 0; the firmware's is its CPU 1.
    let mut second = inventory(4);
    second.cpus[0].firmware_boot = false;
    second.cpus[1].firmware_boot = true;
    let plan = Plan::make(&second, &request()).unwrap();
    assert_eq!((plan.spare.number, plan.last.number), (3, 0));
    assert_eq!(numbers(&plan.others), [2, 1]);

    // An offline CPU costs nothing.
    second.cpus[2].online = false;
    let plan = Plan::make(&second, &request()).unwrap();
    assert_eq!(plan.spare.number, 2);
    assert!(!plan.spare_is_online);
    assert_eq!(numbers(&plan.others), [3, 1]);
    assert!(!plan.script().contains(&(Phase::Granted, Effect::OfflineCpu { cpu: plan.spare })));

    // Or as asked.
    let asked = Request { cpu: Some(3), ..request() };
    assert_eq!(Plan::make(&second, &asked).unwrap().spare.number, 3);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refusal = |change: &dyn Fn(&mut Inventory), cpu: Option<u32>| {
        let mut inventory = inventory(3);
        change(&mut inventory);
        Plan::make(&inventory, &Request { cpu, ..request() }).unwrap_err()
    };
    assert_eq!(refusal(&|i| i.cpus.truncate(1), None), Refusal::TooFewCpus { online: 1 });
    assert_eq!(refusal(&|_| {}, Some(9)), Refusal::NoSuchCpu { number: 9, cpus: 3 });
    assert_eq!(refusal(&|_| {}, Some(0)), Refusal::LastCpu { number: 0 });
    assert_eq!(refusal(&|i| i.cpus[2].firmware_boot = true, Some(2)), Refusal::FirmwareBootCpu { number: 2 });
    assert_eq!(
        refusal(&|i| i.cpus.iter_mut().for_each(|cpu| cpu.firmware_boot = true), None),
        Refusal::NoSpareCpu { cpus: 3 }
    );
    assert_eq!(refusal(&|i| i.cpus[1].kernel_boot = true, None), Refusal::BootCpu { boot: 2 });
    assert_eq!(refusal(&|i| i.epoch = u64::MAX, None), Refusal::Epoch { epoch: u64::MAX });
}
