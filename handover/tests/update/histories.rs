//! Histories: one failure at each point, exhaustively; and thousands with many.

use std::time::Duration;

use handover::update::blame::Blame;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Outcome, Sort};
use handover::update::machine::{Event, JournalLine, Next, Serves, Update};
use handover::update::phase::Phase;
use handover::update::plan::{Goal, Plan};
use proptest::prelude::*;

use crate::plans::plan;
use crate::world::{At, Fate, Kernel, World};

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
    for event in [Event::Begin, Event::Done, Event::Failed(Cause::called_off())] {
        let before = update.clone();
        update.step(Duration::MAX, event).unwrap_err();
        assert_eq!(*update, before, "an event after the end changed something");
    }
    match outcome {
        Outcome::Committed { left } => {
            assert!(world.confirmed);
            if left.is_empty() {
                assert!(world.gone && world.cpus.values().all(|&at| at == At::Successor));
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
    assert_eq!(Update::replay(plan.clone(), &read).unwrap(), *update);
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
    let plan = plan(5, Goal::Upgrade);
    let script = plan.script();
    let commit = script.iter().position(|(_, effect)| *effect == Effect::Commit).unwrap();
    let fates = [
        Fate::Failed,
        Fate::UnknownDone,
        Fate::UnknownNot,
        Fate::UnknownLater,
        Fate::Died,
        Fate::DiedAfter,
        Fate::CalledOff,
    ];
    for (at, (in_phase, doing)) in script.iter().enumerate().take(commit + 1) {
        for fate in fates {
            if at == commit && matches!(fate, Fate::UnknownDone | Fate::DiedAfter) {
                continue; // told it that it stays, and then fenced it: looked at in the histories
            }
            let (_, outcome, _) = run(&plan, |number, effect, world| {
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
            assert_eq!(fate == Fate::CalledOff, cause.blame == Blame::Operator);
        }
    }
}

#[test]
fn a_late_phase_turns_back_and_names_its_limit() {
    let plan = plan(4, Goal::Upgrade);
    for (at, (phase, _)) in plan.script().into_iter().enumerate() {
        let limit = plan.deadlines.of(phase, plan.cpus.others.len());
        let same = |number: usize| plan.script().get(number).is_some_and(|(other, _)| *other == phase);
        let (_, outcome, _) =
            run(&plan, |number, _, _| (Fate::Done, if number == at { limit + MOMENT } else { Duration::ZERO }));
        // Done too late is too late, unless the phase ended with it: what comes next has time of its own.
        match outcome {
            Outcome::Committed { left } => {
                assert!(left.is_empty());
                assert!(!same(at + 1) || phase == Phase::Commit, "{phase} may take for ever at step {at}");
            }
            Outcome::RolledBack { cause, left, .. } => {
                assert!(left.is_empty() && same(at + 1));
                assert_eq!(cause.sort, Sort::Deadline);
                assert!(cause.what.contains(phase.name()), "{cause}");
            }
            other => panic!("{other:?}"),
        }
    }
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
    assert!(left[1].cause.what.contains("could not be stopped"), "{}", left[1].cause);
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
            "unpark cpu",
            "online cpu",
            "take address back",
            "unseal",
            "unfreeze",
            "read last words",
            "destroy instance",
            "online cpu",
            "take devices back",
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
    assert!(update.can_be_called_off());
    assert_eq!(update.deadline(), plan(2, Goal::Upgrade).deadlines.granted);
    assert_eq!(update.deadline_cause().unwrap().what, "granted took longer than 60.000 s, at take memory");
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
