//! The driver dies: at every line of many histories, before and after the effect that the line announces. Whoever follows has only the
//! lines that were written, and the epoch word; it must bring everything into one kernel's hands.

use std::time::Duration;

use handover::update::blame::Blame;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Outcome};
use handover::update::machine::{Event, JOURNAL_VERSION, JournalLine, Next, ReplayError, Serves, Update};
use handover::update::plan::{Goal, Plan};
use handover::update::recover::{Evidence, Recovery, Resumed, parse, recover};
use proptest::prelude::*;

use crate::histories::facts;
use crate::plans::plan;
use crate::world::{At, Fate, Kernel, World};

/// A driver that writes its journal when it may, and what it has done.
struct Driver {
    world: World,
    update: Update,
    next: Next,
    written: Vec<JournalLine>,
    /// Lines that wait for the end of the blackout: they die with the driver.
    waiting: Vec<JournalLine>,
    /// The module's account: the successor serves.
    answered: bool,
}

/// What is known where the control block can be read and nobody has answered.
fn word(epoch_word: Option<u64>) -> Evidence {
    Evidence { answered: false, epoch_word }
}

impl Driver {
    fn begin(plan: &Plan) -> Driver {
        let mut update = Update::new(plan.clone());
        let next = update.step(Duration::ZERO, Event::Begin).unwrap();
        let mut driver = Driver {
            world: World::before(plan),
            update,
            next,
            written: Vec::new(),
            waiting: Vec::new(),
            answered: false,
        };
        driver.write();
        driver
    }

    fn write(&mut self) {
        self.waiting.extend(self.update.take_journal());
        if self.update.may_write_journal() {
            self.written.append(&mut self.waiting);
        }
    }

    /// Carries the next effect out; nothing when there is none.
    fn step(&mut self, fate: Fate) -> Option<()> {
        let Next::Do(effect) = self.next.clone() else { return None };
        let event = self.world.carry_out(&effect, fate);
        self.answered |= matches!((&effect, &event), (Effect::Activate { .. }, Event::Done));
        self.next = self.update.step(Duration::ZERO, event).unwrap();
        self.write();
        let both = self.world.incumbent_answers() && self.world.successor_answers();
        assert!(!both, "two kernels answer");
        Some(())
    }

    /// Dies here (after the effect under way was carried out, or before), and is followed by another one.
    fn dies(mut self, plan: &Plan, after_effect: bool) -> Successor {
        if let (Next::Do(effect), true) = (&self.next, after_effect) {
            self.world.carry_out(effect, Fate::Done);
        }
        let text: String = self.written.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect();
        // The last line that it wanted to write came half onto the disk.
        let lines = parse(&(text + "{\"journal_version\":2,\"upd")).unwrap();
        assert_eq!(lines, self.written);
        let evidence = Evidence { answered: self.answered, epoch_word: Some(self.world.epoch_word) };
        let recovery = recover(&lines, &plan.boot, evidence, Duration::ZERO).unwrap();
        Successor { world: self.world, recovery, written: self.written, answered: self.answered }
    }
}

/// The driver that follows.
struct Successor {
    world: World,
    recovery: Recovery,
    written: Vec<JournalLine>,
    answered: bool,
}

impl Successor {
    fn name(&self) -> &'static str {
        match self.recovery {
            Recovery::Nothing => "nothing",
            Recovery::TakeBack(_) => "take back",
            Recovery::GoOn(_) => "go on",
            Recovery::Leave(_) => "leave",
        }
    }

    fn drives(self) -> Option<Driver> {
        let (Recovery::TakeBack(resumed) | Recovery::GoOn(resumed) | Recovery::Leave(resumed)) = self.recovery else {
            return None;
        };
        let Resumed { update, next } = *resumed;
        let mut driver = Driver {
            world: self.world,
            update,
            next,
            written: self.written,
            waiting: Vec::new(),
            answered: self.answered,
        };
        driver.write();
        Some(driver)
    }
}

/// It has ended, and everything is in one kernel's hands.
fn one_owner(world: &World, outcome: &Outcome, plan: &Plan) {
    match outcome {
        Outcome::Committed { left } => {
            // Nobody can help one that dies after the commit.
            assert!(world.confirmed && (world.successor_answers() || world.successor == Kernel::Dead));
            assert!(!world.incumbent_answers());
            if left.is_empty() {
                // What was offline in the incumbent waits at the successor's park page, and stays offline.
                let waits =
                    |id: &u32| plan.cpus.others.iter().any(|moving| !moving.online && moving.cpu.apic_id == *id);
                let taken = |(id, at): (&u32, &At)| *at == if waits(id) { At::Parked } else { At::Successor };
                assert!(world.gone && world.cpus.iter().all(taken), "{:?}", world.cpus);
            }
        }
        Outcome::RolledBack { left, .. } | Outcome::TrialPassed { left } => {
            assert!(!world.gone);
            world.is_as_before(&World::before(plan), left);
            if left.is_empty() {
                assert!(world.incumbent_answers());
            }
        }
    }
}

/// One line at which the driver dies, in a history that goes well or turns back at some step: who follows finishes it.
#[test]
fn an_update_cut_at_any_line_is_brought_to_an_end() {
    let mut seen = std::collections::BTreeSet::new();
    for goal in [Goal::Upgrade, Goal::Canary] {
        let plan = plan(5, goal);
        let steps = plan.script().len();
        for turn in 0..=steps {
            for fate in [Fate::Failed, Fate::UnknownDone, Fate::UnknownNot, Fate::Died] {
                for cut in 0..3 * steps {
                    for after_effect in [false, true] {
                        let mut driver = Driver::begin(&plan);
                        let ends = (0..cut)
                            .any(|number| driver.step(if number == turn { fate } else { Fate::Done }).is_none());
                        if ends {
                            break;
                        }
                        let successor = driver.dies(&plan, after_effect);
                        seen.insert(successor.name());
                        let gone = successor.world.gone;
                        let Some(mut driver) = successor.drives() else { continue };
                        if gone {
                            continue; // it died with its kernel, which nobody follows
                        }
                        while driver.step(Fate::Done).is_some() {}
                        let Next::End(outcome) = &driver.next else { unreachable!() };
                        one_owner(&driver.world, outcome, &plan);
                        assert_eq!(facts(&Update::replay(&driver.written).unwrap()), facts(&driver.update));
                    }
                }
                if turn == steps {
                    break; // nothing fails: the fate does not matter
                }
            }
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["go on", "leave", "nothing", "take back"]);
}

/// What is said for each line of an update that goes well.
#[test]
fn each_last_line_has_its_recovery() {
    let plan = plan(3, Goal::Upgrade);
    let mut said = Vec::new();
    for cut in 0..=plan.script().len() {
        let mut driver = Driver::begin(&plan);
        for _ in 0..cut {
            driver.step(Fate::Done).unwrap();
        }
        let doing = driver.update.under_way().map_or("end", Effect::name);
        said.push((doing, driver.dies(&plan, false).name()));
    }
    let take_back =
        ["take memory", "grant devices", "offline cpu", "place image", "start cpu", "await hello", "stand by"]
            .into_iter()
            .chain(["check health", "freeze", "seal", "release address", "activate"])
            .map(|name| (name, "take back"));
    let go_on = ["drop address", "offline cpu", "park cpu", "hand cpu over", "commit"].map(|name| (name, "go on"));
    let leave = ["quiesce devices", "yield last cpu"].map(|name| (name, "leave"));
    let expected: Vec<_> = take_back.chain(go_on).chain(leave).chain([("end", "nothing")]).collect();
    assert_eq!(said, expected);
}

/// In the blackout the line says no more than that it began; the epoch word says whether the successor was told.
#[test]
fn the_epoch_word_decides_in_the_blackout() {
    let plan = plan(3, Goal::Upgrade);
    let mut driver = Driver::begin(&plan);
    while driver.update.under_way() != Some(&Effect::Activate { epoch: 8 }) {
        driver.step(Fate::Done).unwrap();
    }
    let lines = driver.written;
    assert_eq!(lines.last().unwrap().next, Next::Do(Effect::Freeze), "more was written than may be");
    let first = |epoch| match recover(&lines, "b", word(epoch), Duration::ZERO).unwrap() {
        Recovery::TakeBack(resumed) => (resumed.next, resumed.update.incumbent_epoch()),
        other => panic!("{other:?}"),
    };
    assert_eq!(first(Some(7)), (Next::Do(Effect::TakeAddressBack), 7));
    for told in [Some(8), Some(9), None] {
        assert_eq!(first(told), (Next::Do(Effect::StandDown { epoch: 8 }), 9));
    }
    // It has the deadlines of one that begins now.
    let Recovery::TakeBack(resumed) = recover(&lines, "b", word(Some(8)), Duration::from_secs(77)).unwrap() else {
        panic!()
    };
    assert_eq!(resumed.update.deadline(), Duration::from_secs(77) + plan.deadlines.cutover);
    // It answered, and the driver died before it could write that down in the journal.
    let answered = Evidence { answered: true, epoch_word: Some(8) };
    let Recovery::GoOn(resumed) = recover(&lines, "b", answered, Duration::ZERO).unwrap() else { panic!() };
    assert_eq!((resumed.next, resumed.update.serves()), (Next::Do(Effect::DropAddress), Serves::Successor));
}

#[test]
fn what_is_no_journal_of_this_boot_is_not_followed() {
    let plan = plan(3, Goal::Upgrade);
    let mut driver = Driver::begin(&plan);
    for _ in 0..4 {
        driver.step(Fate::Done).unwrap();
    }
    let lines = driver.written;
    let of = |lines: &[JournalLine]| recover(lines, "b", word(None), Duration::ZERO);
    assert_eq!(of(&[]), Ok(Recovery::Nothing));
    assert_eq!(recover(&lines, "another boot", word(None), Duration::ZERO), Ok(Recovery::Nothing));
    assert!(matches!(of(&lines), Ok(Recovery::TakeBack(_))));
    assert!(matches!(of(&lines[1..]), Err(ReplayError::NoPlan)));
    assert!(matches!(of(&[&lines[..2], &lines[3..]].concat()), Err(ReplayError::Line { seq: 3, index: 2 })));
    let mut changed = lines.clone();
    changed[0].journal_version = JOURNAL_VERSION + 1;
    assert!(matches!(of(&changed), Err(ReplayError::Version { seq: 0, .. })));
    let mut changed = lines.clone();
    changed[2].next = Next::Do(Effect::Freeze);
    assert!(matches!(of(&changed), Err(ReplayError::Diverged { seq: 2 })));
    assert!(parse("no journal\n").is_err());
    // A line of the first version, as it was written: it can be read and shown, and not be followed.
    let old = r#"{"journal_version":1,"update":"u","seq":0,"at_ns":0,"phase":"granted","serves":"incumbent","event":{"event":"begin"},"next":{"do":{"effect":"take_memory"}}}"#;
    let old = parse(&format!("{old}\n")).unwrap();
    assert_eq!(old[0].next, Next::Do(Effect::TakeMemory));
    assert!(matches!(of(&old), Err(ReplayError::Version { found: 1, seq: 0 })));
}

/// The lines of today, as they are on the disk: what is written tomorrow must still read them.
#[test]
fn golden_lines() {
    let plan = plan(2, Goal::Upgrade);
    let mut update = Update::new(plan);
    update.step(Duration::from_millis(3), Event::Begin).unwrap();
    let cause = Cause::broken(Blame::Incumbent, "no memory");
    update.step(Duration::from_millis(4), Event::Failed(cause)).unwrap();
    let text: Vec<String> = update.take_journal().iter().map(|line| serde_json::to_string(line).unwrap()).collect();
    let golden = include_str!("golden_journal.jsonl");
    assert_eq!(text.join("\n") + "\n", golden);
    assert_eq!(recover(&parse(golden).unwrap(), "b", word(None), Duration::ZERO), Ok(Recovery::Nothing));
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        20 => Just(Fate::Done),
        2 => Just(Fate::Failed),
        1 => Just(Fate::UnknownDone),
        1 => Just(Fate::UnknownNot),
        1 => Just(Fate::UnknownLater),
        1 => Just(Fate::Died),
        1 => Just(Fate::DiedAfter),
        1 => Just(Fate::DoneCalledOff),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Drivers die again and again, between failures of everything else.
    #[test]
    fn drivers_that_die_again_and_again_leave_one_owner(
        cpus in 2u32..7,
        canary in any::<bool>(),
        lives in proptest::collection::vec((proptest::collection::vec(fate(), 0..25), any::<bool>()), 0..4),
    ) {
        let plan = plan(cpus, if canary { Goal::Canary } else { Goal::Upgrade });
        let mut driver = Driver::begin(&plan);
        for (fates, after_effect) in lives {
            for fate in fates {
                if driver.step(fate).is_none() {
                    break;
                }
            }
            if driver.world.gone || matches!(driver.next, Next::End(_)) {
                break;
            }
            // What nobody knows of is not there: a death within the effect is one before or after it.
            let successor = driver.dies(&plan, after_effect);
            if successor.world.gone {
                return Ok(());
            }
            prop_assert_ne!(successor.name(), "nothing");
            driver = successor.drives().unwrap();
        }
        while driver.step(Fate::Done).is_some() {}
        let Next::End(outcome) = &driver.next else { unreachable!() };
        one_owner(&driver.world, outcome, &plan);
        if driver.world.successor == Kernel::Absent {
            prop_assert!(driver.update.serves() != Serves::Successor);
        }
    }
}
