//! Histories: one failure at each point, exhaustively; and thousands with many.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use handover::update::blame::Blame;
use handover::update::deadline::Share;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Outcome, Sort};
use handover::update::machine::{CallOff, Event, JournalLine, Next, Serves, Update};
use handover::update::phase::Phase;
use handover::update::plan::{Goal, Plan};
use proptest::prelude::*;

use crate::plans::plan;
use crate::world::{Fate, Kernel, World, is_undo};

/// Runs an update to its end; `fate` decides how each effect goes, given its number.
fn run(plan: &Plan, mut fate: impl FnMut(usize, &Effect, &mut World) -> (Fate, Duration)) -> (World, Outcome, Update) {
    let mut world = World::before(plan);
    let mut update = Update::new(plan.clone());
    let mut now = Duration::ZERO;
    let mut event = Event::Begin;
    let mut lines: Vec<JournalLine> = Vec::new();
    let most = 3 * plan.script().len() + 10;
    for number in 0.. {
        assert!(number < most, "an update that does not end");
        let next = update.step(now, event).unwrap();
        lines.extend(update.take_journal());
        let effect = match next {
            Next::Do(effect) => {
                world.check(&update);
                effect
            }
            Next::End(outcome) => {
                ended(&mut update, &world, &outcome, plan, &lines);
                return (world, outcome, update);
            }
        };
        let (fate, takes) = fate(number, &effect, &mut world);
        now += takes;
        event = world.carry_out(&effect, fate);
        assert!(!(world.incumbent_answers() && world.successor_answers()), "two kernels answer");
    }
    unreachable!()
}

fn ended(update: &mut Update, world: &World, outcome: &Outcome, plan: &Plan, lines: &[JournalLine]) {
    assert_eq!(update.undo_list().count(), 0, "ended with something to undo");
    assert!(update.under_way().is_none());
    for event in [Event::Begin, Event::Done, Event::Failed(Cause::called_off("the test"))] {
        let before = update.clone();
        update.step(Duration::MAX, event).unwrap_err();
        assert_eq!(*update, before, "an event after the end changed something");
    }
    match outcome {
        Outcome::Committed { left } => {
            assert!(world.confirmed);
            if left.is_empty() {
                assert!(world.gone && world.cpus.iter().all(|(id, &at)| at == world.destination(*id)));
            }
        }
        Outcome::RolledBack { left, .. } | Outcome::TrialPassed { left } => {
            assert!(!world.gone);
            world.is_as_before(&World::before(plan), left);
            if left.is_empty() {
                assert!(world.incumbent_answers());
                assert_eq!(update.serves(), Serves::Incumbent);
                assert!(world.arena_epoch <= update.incumbent_epoch());
            }
        }
    }
    // The lines alone say the same again, also after they were written down and read.
    let text: Vec<String> = lines.iter().map(|line| serde_json::to_string(line).unwrap()).collect();
    let read: Vec<JournalLine> = text.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(read, lines);
    assert!(!read.is_empty());
    let again = Update::replay(&read).unwrap();
    assert_eq!(facts(&again), facts(update));
}

/// All that an update knows but for the time.
pub fn facts(update: &Update) -> impl PartialEq + std::fmt::Debug {
    let undo_list: Vec<Effect> = update.undo_list().cloned().collect();
    let epoch = update.incumbent_epoch();
    let ends = (update.is_rolling_back(), update.is_committed(), update.may_write_journal());
    (undo_list, update.left().to_vec(), update.phase(), update.serves(), update.under_way().cloned(), epoch, ends)
}

const MOMENT: Duration = Duration::from_millis(1);

#[test]
fn all_goes_well() {
    for plan in [plan(2, Goal::Upgrade), plan(4, Goal::Upgrade), plan(8, Goal::Upgrade)] {
        let mut blackout = Vec::new();
        let (world, outcome, _) = run(&plan, |_, effect, world| {
            if effect.is_in_blackout() {
                blackout.push(effect.name());
            }
            assert_eq!(
                effect.is_in_blackout(),
                matches!(effect, Effect::Freeze) || (world.frozen && world.successor_active.is_none())
            );
            (Fate::Done, MOMENT)
        });
        assert_eq!(outcome, Outcome::Committed { left: vec![] });
        assert_eq!(world.arena_epoch, plan.epoch + 1);
        assert_eq!(blackout, ["freeze", "seal", "release address", "activate"]);
    }
}

#[test]
fn a_canary_comes_back() {
    let (world, outcome, update) = run(&plan(4, Goal::Canary), |_, _, _| (Fate::Done, MOMENT));
    assert_eq!(outcome, Outcome::TrialPassed { left: vec![] });
    assert_eq!(update.phase(), Phase::Trial);
    assert_eq!(world, World::before(&plan(4, Goal::Canary)));
}

/// Whatever goes wrong once before the commit, everything comes back: for every effect, and so for every k of n CPUs.
#[test]
fn one_failure_at_each_point_is_undone() {
    one_failure_is_undone(&plan(5, Goal::Upgrade));
}

/// The same of a trial, up to its last check.
#[test]
fn one_failure_at_each_point_of_a_trial_is_undone() {
    one_failure_is_undone(&plan(5, Goal::Canary));
}

fn one_failure_is_undone(plan: &Plan) {
    let script = plan.script();
    // A trial has none: it turns back at any point.
    let commit = script.iter().position(|(_, effect)| *effect == Effect::Commit).unwrap_or(script.len());
    let fates = [
        Fate::Failed,
        Fate::UnknownDone,
        Fate::UnknownNot,
        Fate::UnknownLater,
        Fate::Died,
        Fate::DiedAfter,
        Fate::CalledOff,
        Fate::DoneCalledOff,
    ];
    for (at, (in_phase, doing)) in script.iter().enumerate().take(commit + 1) {
        for fate in fates {
            if at == commit && matches!(fate, Fate::UnknownDone | Fate::DiedAfter) {
                continue; // told it that it stays, and then fenced it: looked at in the histories
            }
            if at == commit && fate == Fate::DoneCalledOff {
                continue; // too late: see `what_is_called_off_turns_back_at_each_step`
            }
            let (_, outcome, _) = run(plan, |number, effect, world| {
                let fate = if number == at { fate } else { Fate::Done };
                assert!(number != at || *effect == *doing);
                // A successor that is late does at the worst moment what it was told.
                if number > at {
                    world.catch_up();
                }
                (fate, MOMENT)
            });
            let Outcome::RolledBack { cause, phase, left } = outcome else {
                panic!("{fate:?} at {:?}: {outcome:?}", doing)
            };
            assert!(left.is_empty(), "{fate:?} at {:?}: {left:?}", doing);
            assert_eq!(phase, *in_phase);
            assert!(!cause.what.is_empty());
            assert_eq!(matches!(fate, Fate::CalledOff | Fate::DoneCalledOff), cause.blame == Blame::Operator);
        }
    }
}

#[test]
fn late_steps_turn_back_and_name_their_limit() {
    let plan = plan(4, Goal::Upgrade);
    let script = plan.script();
    let share = |number: usize| script.get(number).map(|(phase, effect)| Share::of(*phase, effect));
    for (at, (phase, _)) in script.iter().enumerate() {
        let limit = plan.deadlines.of(share(at).unwrap());
        let (_, outcome, _) =
            run(&plan, |number, _, _| (Fate::Done, if number == at { limit + MOMENT } else { Duration::ZERO }));
        // Done too late is too late, unless what comes next has time of its own.
        match outcome {
            Outcome::Committed { left } => {
                assert!(left.is_empty());
                assert!(
                    share(at) != share(at + 1) || *phase == Phase::Commit,
                    "{phase} may take for ever at step {at}"
                );
            }
            Outcome::RolledBack { cause, left, .. } => {
                assert!(left.is_empty() && share(at) == share(at + 1));
                assert_eq!(cause.sort, Sort::Deadline);
                assert!(cause.what.contains(phase.name()), "{cause}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// However many CPUs there are: each has its own time and cannot use up another one's, and the cutover has one for all its steps.
#[test]
fn no_step_of_4096_cpus_waits_longer_than_one_cpu_may() {
    let plan = plan(4096, Goal::Upgrade).check().unwrap();
    let (limits, script) = (plan.deadlines, plan.script().len());
    let mut update = Update::new(plan);
    let mut now = Duration::ZERO;
    let mut frozen_at = Duration::ZERO;
    let (mut next, mut steps) = (update.step(now, Event::Begin).unwrap(), 0);
    let mut cpu_began = BTreeMap::new();
    while let Next::Do(effect) = next {
        let left = update.deadline() - now;
        match &effect {
            Effect::OfflineCpu { cpu } | Effect::ParkCpu { cpu } | Effect::HandCpu { cpu }
                if update.phase() == Phase::Probation =>
            {
                let began = *cpu_began.entry(cpu.apic_id).or_insert(now);
                assert_eq!(update.deadline(), began + limits.per_cpu);
            }
            Effect::DropAddress => assert_eq!(left, limits.per_cpu),
            effect if effect.is_in_blackout() => {
                if *effect == Effect::Freeze {
                    frozen_at = now;
                }
                assert_eq!(update.deadline(), frozen_at + limits.cutover);
            }
            _ => {}
        }
        // Each step takes as long as it may, shared with those that follow it.
        now += left / 4;
        next = update.step(now, Event::Done).unwrap();
        update.take_journal();
        steps += 1;
    }
    assert_eq!(next, Next::End(Outcome::Committed { left: vec![] }));
    assert_eq!((cpu_began.len(), steps), (4094, script));
}

/// Whatever fails, and however often: from the turn on, the incumbent's clients wait 1.5 times the cutover's limit at most, also when 4096
/// CPUs have moved.
#[test]
fn the_way_back_to_a_serving_incumbent_has_one_deadline() {
    for (cpus, moved) in [(6, 0), (6, 2), (4096, 4000)] {
        let plan = plan(cpus, Goal::Upgrade);
        let limits = plan.deadlines;
        for stand_down_works in [true, false] {
            let mut update = Update::new(plan.clone());
            let mut now = Duration::ZERO;
            let mut next = update.step(now, Event::Begin).unwrap();
            let (mut handed, mut silent_since, mut served_again) = (0, None, None);
            while let Next::Do(effect) = next {
                update.take_journal();
                handed += usize::from(matches!(effect, Effect::HandCpu { .. }));
                let fails = match effect {
                    Effect::HandCpu { .. } => handed > moved,
                    Effect::StandDown { .. } => !stand_down_works,
                    _ => false,
                };
                if is_undo(&effect) {
                    if update.serves() == Serves::Nobody {
                        silent_since.get_or_insert(now);
                    }
                    now = update.deadline(); // it takes all the time that it has
                }
                let cause = Cause::broken(Blame::Successor, "no");
                let unfreezes = matches!(effect, Effect::Unfreeze { .. });
                next = update.step(now, if fails { Event::Unknown(cause) } else { Event::Done }).unwrap();
                if unfreezes {
                    served_again = Some(now);
                }
            }
            let silence = served_again.unwrap() - silent_since.unwrap();
            assert!(silence <= limits.cutover * 3 / 2, "{cpus} CPUs: {silence:?}");
            assert!(matches!(next, Next::End(Outcome::RolledBack { ref left, .. }) if left.is_empty()), "{next:?}");
        }
    }
}

#[test]
fn what_is_called_off_turns_back_at_each_step() {
    for goal in [Goal::Upgrade, Goal::Canary] {
        let plan = plan(5, goal);
        for (at, (_, doing)) in plan.script().iter().enumerate() {
            let mut world = World::before(&plan);
            let mut update = Update::new(plan.clone());
            assert_eq!(update.call_off("baton cancel"), CallOff::NotUnderWay);
            let mut next = update.step(Duration::ZERO, Event::Begin).unwrap();
            let (mut number, mut back) = (0, Vec::new());
            while let Next::Do(effect) = next {
                if update.is_rolling_back() {
                    assert_eq!(update.call_off("baton cancel"), CallOff::GoingBack);
                    back.push(effect.clone());
                }
                if number == at {
                    let late = matches!(doing, Effect::Commit | Effect::QuiesceDevices | Effect::YieldLastCpu { .. });
                    let expected = if late { CallOff::TooLate } else { CallOff::Accepted };
                    assert_eq!(update.call_off("baton cancel"), expected, "at {doing:?}");
                }
                let event = world.carry_out(&effect, Fate::Done);
                next = update.step(Duration::ZERO, event).unwrap();
                if number == at && back.is_empty() && update.under_way().is_some() {
                    // Nothing more is done forward, not even what would have been next.
                    assert!(update.is_rolling_back() || update.is_committed() || *doing == Effect::Commit);
                }
                number += 1;
            }
            let Next::End(outcome) = next else { unreachable!() };
            match outcome {
                Outcome::RolledBack { cause, left, .. } => {
                    assert_eq!((cause.blame, cause.sort, left), (Blame::Operator, Sort::CalledOff, vec![]));
                    assert_eq!(cause.what, "called off by baton cancel");
                    world.is_as_before(&World::before(&plan), &[]);
                }
                Outcome::Committed { left } => assert!(left.is_empty() && back.is_empty()),
                other => panic!("{other:?}"),
            }
            assert_eq!(update.call_off("baton cancel"), CallOff::NotUnderWay);
        }
    }
}

/// No path frees memory before what may write it is stopped: each undo fails once, for every point at which the update turns back.
#[test]
fn memory_that_may_still_be_written_is_kept() {
    let plan = plan(5, Goal::Upgrade);
    let mut kept_for = BTreeSet::new();
    for turn in 0..plan.script().len() {
        for failing in 0..30 {
            let mut failed: Option<Effect> = None;
            let mut back = 0;
            let mut tried = Vec::new();
            let (_, outcome, _) = run(&plan, |number, effect, _| {
                if number == turn {
                    return (Fate::Failed, MOMENT);
                }
                if !is_undo(effect) {
                    return (Fate::Done, MOMENT);
                }
                back += 1;
                if back - 1 == failing {
                    failed = Some(effect.clone());
                    return (Fate::Failed, MOMENT);
                }
                tried.extend(failed.is_some().then(|| effect.clone()));
                (Fate::Done, MOMENT)
            });
            let Some(failed) = failed else { break };
            let (Outcome::RolledBack { left, .. } | Outcome::Committed { left } | Outcome::TrialPassed { left }) =
                outcome;
            for effect in &tried {
                assert!(!failed.forbids(effect), "{effect:?} was tried after {failed:?} had failed");
            }
            for left in &left {
                match left.cause.sort {
                    Sort::Kept => {
                        kept_for.insert((failed.name(), left.effect.name()));
                        assert!(failed.forbids(&left.effect));
                        assert!(left.cause.what.contains(failed.name()), "{}", left.cause);
                    }
                    _ => assert_eq!(left.effect, failed),
                }
            }
            if matches!(failed, Effect::TakeDevicesBack) {
                // Before `Place` there is no instance to keep.
                let left: Vec<_> = left.iter().map(|left| left.effect.name()).collect();
                let whole = ["take devices back", "destroy instance", "give back memory"];
                assert!(left == whole || left == [whole[0], whole[2]], "{left:?}");
            }
        }
    }
    for expected in [
        ("take devices back", "give back memory"),
        ("take devices back", "destroy instance"),
        ("destroy instance", "give back memory"),
        ("fence", "give back memory"),
        ("fence", "take devices back"),
        ("unpark cpu", "online cpu"),
        ("unpark cpu", "give back memory"),
    ] {
        assert!(kept_for.contains(&expected), "{expected:?} never happened: {kept_for:?}");
    }
}

/// The first failure on the way back is not the last word for anybody else, and that of the services neither.
#[test]
fn an_undo_that_fails_does_not_keep_the_others_from_being_done() {
    let plan = plan(4, Goal::Upgrade);
    let (world, outcome, _) = run(&plan, |_, effect, _| match effect {
        Effect::ReleaseAddress | Effect::Unseal { .. } | Effect::Unfreeze { .. } | Effect::OnlineCpu { .. } => {
            (Fate::Failed, MOMENT)
        }
        _ => (Fate::Done, MOMENT),
    });
    let Outcome::RolledBack { left, .. } = outcome else { panic!("{outcome:?}") };
    let left: Vec<_> = left.iter().map(|left| left.effect.name()).collect();
    assert_eq!(left, ["unseal", "unfreeze", "online cpu"]);
    assert!(!world.memory_taken && !world.devices_granted && !world.instance && world.successor == Kernel::Absent);
}

#[test]
fn a_successor_that_cannot_be_stopped_keeps_what_it_may_use() {
    let plan = plan(4, Goal::Upgrade);
    let activate = plan.script().iter().position(|(_, e)| matches!(e, Effect::Activate { .. })).unwrap();
    let (world, outcome, update) = run(&plan, |number, effect, _| match effect {
        Effect::Fence { .. } => (Fate::UnknownNot, MOMENT),
        _ if number == activate => (Fate::UnknownLater, MOMENT),
        _ => (Fate::Done, MOMENT),
    });
    let Outcome::RolledBack { left, .. } = outcome else { panic!("{outcome:?}") };
    assert!(!world.incumbent_answers() && world.memory_taken && world.successor == Kernel::Deaf);
    assert_eq!(update.serves(), Serves::Nobody);
    assert!(left.iter().any(|left| matches!(left.effect, Effect::Unfreeze { .. })));
    assert!(left.iter().any(|left| left.effect == Effect::GiveBackMemory));
    assert_eq!(left[1].cause.sort, Sort::Kept);
    assert!(left[1].cause.what.contains("fence failed"), "{}", left[1].cause);
}

#[test]
fn devices_that_do_not_stop_keep_the_last_cpu() {
    let plan = plan(3, Goal::Upgrade);
    let (world, outcome, _) = run(&plan, |_, effect, _| match effect {
        Effect::QuiesceDevices => (Fate::Failed, MOMENT),
        _ => (Fate::Done, MOMENT),
    });
    let Outcome::Committed { left } = outcome else { panic!("{outcome:?}") };
    let left: Vec<_> = left.iter().map(|left| left.effect.name()).collect();
    assert_eq!(left, ["quiesce devices", "yield last cpu"]);
    assert!(!world.gone && world.successor_answers());
}

#[test]
fn the_successor_is_fenced_before_anything_is_taken_back_from_it() {
    let plan = plan(3, Goal::Upgrade);
    let mut order = Vec::new();
    let (_, outcome, _) = run(&plan, |_, effect, world| {
        if world.successor == Kernel::Dead || !order.is_empty() {
            order.push(effect.name());
        }
        let dies = matches!(effect, Effect::HandCpu { .. });
        (if dies { Fate::DiedAfter } else { Fate::Done }, MOMENT)
    });
    assert!(matches!(outcome, Outcome::RolledBack { .. }));
    assert_eq!(
        order,
        [
            "fence",
            "take address back",
            "unseal",
            "unfreeze",
            "unpark cpu",
            "online cpu",
            "read last words",
            "online cpu",
            "take devices back",
            "destroy instance",
            "give back memory",
        ]
    );
}

#[test]
fn a_failed_cutover_serves_again_before_anything_else() {
    let plan = plan(3, Goal::Upgrade);
    let mut order = Vec::new();
    run(&plan, |_, effect, world| {
        if world.frozen && matches!(effect, Effect::ReleaseAddress) {
            return (Fate::Failed, MOMENT);
        }
        if world.frozen && !matches!(effect, Effect::Seal) {
            order.push(effect.name());
        }
        (Fate::Done, MOMENT)
    });
    assert_eq!(order, ["unseal", "unfreeze"]);
}

/// Asking would cost the time it takes not to be answered, and that in the blackout.
#[test]
fn a_successor_that_did_not_answer_at_activation_is_not_asked_but_fenced() {
    let plan = plan(3, Goal::Upgrade);
    let mut order = Vec::new();
    run(&plan, |_, effect, _| {
        order.push(effect.name());
        let late = matches!(effect, Effect::Activate { .. });
        (if late { Fate::UnknownLater } else { Fate::Done }, MOMENT)
    });
    let at = order.iter().position(|name| *name == "activate").unwrap();
    assert_eq!(order[at + 1..at + 5], ["fence", "take address back", "unseal", "unfreeze"]);
}

/// One that dies before it was told to answer holds nothing that the services need.
#[test]
fn a_successor_that_dies_before_activation_is_fenced_after_the_services_go_on() {
    let plan = plan(3, Goal::Upgrade);
    let mut order = Vec::new();
    run(&plan, |_, effect, _| {
        order.push(effect.name());
        (if *effect == Effect::ReleaseAddress { Fate::Died } else { Fate::Done }, MOMENT)
    });
    let at = order.iter().position(|name| *name == "release address").unwrap();
    assert_eq!(order[at + 1..at + 5], ["take address back", "unseal", "unfreeze", "fence"]);
}

#[test]
fn events_out_of_order_change_nothing() {
    let mut update = Update::new(plan(2, Goal::Upgrade));
    let fresh = update.clone();
    let error = update.step(Duration::ZERO, Event::Done).unwrap_err();
    assert_eq!(error.to_string(), "event done in state not begun");
    assert_eq!(update, fresh);
    update.step(Duration::ZERO, Event::Begin).unwrap();
    let begun = update.clone();
    let error = update.step(Duration::ZERO, Event::Begin).unwrap_err();
    assert_eq!(error.to_string(), "event begin in state granted, take memory under way");
    assert_eq!(update, begun);
    assert_eq!(update.deadline(), plan(2, Goal::Upgrade).deadlines.granted);
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        30 => Just(Fate::Done),
        2 => Just(Fate::Failed),
        1 => Just(Fate::UnknownDone),
        1 => Just(Fate::UnknownNot),
        2 => Just(Fate::UnknownLater),
        1 => Just(Fate::Died),
        1 => Just(Fate::DiedAfter),
        1 => Just(Fate::CalledOff),
        1 => Just(Fate::DoneCalledOff),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6_000, ..ProptestConfig::default() })]

    /// The invariants are in `World`: two kernels never answer, no CPU or memory is in two hands or in none, what was
    /// done is undone or reported.
    #[test]
    fn any_history_ends_well(
        cpus in 2u32..7,
        canary in any::<bool>(),
        fates in proptest::collection::vec((fate(), 0u64..4000, any::<bool>()), 0..60),
    ) {
        let plan = plan(cpus, if canary { Goal::Canary } else { Goal::Upgrade });
        let (_, outcome, update) = run(&plan, |number, _, world| {
            let Some(&(fate, millis, catches_up)) = fates.get(number) else {
                return (Fate::Done, MOMENT);
            };
            if catches_up {
                world.catch_up();
            }
            (fate, Duration::from_millis(millis))
        });
        if fates.iter().all(|(fate, ..)| *fate == Fate::Done) && update.phase() != Phase::Cutover {
            let on_time = !matches!(outcome, Outcome::RolledBack { .. });
            prop_assert!(on_time || fates.iter().map(|(_, millis, _)| millis).sum::<u64>() > 5000);
        }
    }
}
