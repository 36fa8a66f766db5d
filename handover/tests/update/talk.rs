//! Both machines and the channel between them: the incumbent's update on one side, the successor's role on the other, as the agents put
//! them together, with nothing simulated between the two but the work itself.

use std::time::Duration;

use handover::channel::{Channel, Side};
use handover::update::blame::Blame;
use handover::update::cpu::Cpu;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Outcome};
use handover::update::machine::{Event, Next, Update};
use handover::update::plan::{Goal, Plan};
use handover::update::sizes::{CPU_LIMIT, commit};
use handover::update::successor::{Answer, Stage, Successor};
use state_schemas::control_block::SIZE;
use state_schemas::handover_record::{self, PhaseMark};
use state_schemas::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::Local;

use crate::plans::plan;
use crate::roles::{good_answer, record};

/// The word by which the incumbent's agent has the successor carry this out.
fn word(effect: &Effect, marks: &[PhaseMark]) -> Option<ToSuccessor> {
    Some(match effect {
        Effect::StandBy => ToSuccessor::StandBy,
        Effect::CheckHealth => ToSuccessor::CheckHealth,
        Effect::RunChecks => ToSuccessor::Examine,
        Effect::Activate { epoch } => ToSuccessor::Activate { epoch: *epoch },
        Effect::HandCpu { cpu } => ToSuccessor::CpuParked { apic_id: cpu.apic_id },
        Effect::Commit => commit(marks),
        Effect::YieldLastCpu { cpu } => ToSuccessor::LastCpu { apic_id: cpu.apic_id },
        Effect::StandDown { epoch } => ToSuccessor::StandDown { epoch: *epoch },
        Effect::TakeCpuBack { cpu } => ToSuccessor::ReleaseCpu { apic_id: cpu.apic_id },
        _ => return None,
    })
}

struct Pair {
    update: Update,
    successor: Successor,
    memory: Local,
    marks: Vec<PhaseMark>,
}

impl Pair {
    fn new(plan: &Plan) -> Pair {
        let mut born_with = record();
        born_with.epoch = plan.epoch;
        born_with.grant.boot_cpu = plan.cpus.spare.cpu.apic_id;
        let others = plan.cpus.others.iter().map(|moving| moving.cpu);
        let cpu = |cpu: Cpu| handover_record::Cpu { apic_id: cpu.apic_id, firmware_boot: cpu.number == 0 };
        born_with.machine.cpus = others.chain([plan.cpus.spare.cpu, plan.cpus.last]).map(cpu).collect();
        let memory = Local::new(SIZE);
        Channel::reset(&&memory).unwrap();
        Pair { update: Update::new(plan.clone()), successor: Successor::new(&born_with), memory, marks: Vec::new() }
    }

    fn asks(&mut self, word: &ToSuccessor, fails: bool) -> Event {
        Channel::attach(&self.memory, Side::Incumbent).unwrap().send(word).unwrap();
        let mut theirs = Channel::attach(&self.memory, Side::Successor).unwrap();
        let heard: ToSuccessor = theirs.receive().unwrap().expect("it was sent");
        let reply = match self.successor.hear(&heard) {
            Ok(order) => {
                let answer = if fails { Answer::Failed("x".repeat(5000)) } else { good_answer(&order) };
                self.successor.answer(&order, answer).unwrap()
            }
            Err(unheard) => Some(unheard.reply(&heard)),
        };
        let Some(reply) = reply else { return Event::Done };
        theirs.send(&reply).unwrap();
        match Channel::attach(&self.memory, Side::Incumbent).unwrap().receive().unwrap() {
            Some(ToIncumbent::Failed { cause, .. }) => Event::Failed(Cause::broken(Blame::Successor, cause.as_str())),
            Some(_) => Event::Done,
            None => panic!("no answer to {word:?}"),
        }
    }

    fn run(mut self, mut fails: impl FnMut(&Effect) -> bool) -> (Outcome, Stage) {
        let mut next = self.update.step(Duration::ZERO, Event::Begin).unwrap();
        loop {
            let effect = match next {
                Next::Do(effect) => effect,
                Next::End(outcome) => return (outcome, self.successor.stage()),
            };
            let event = match word(&effect, &self.marks) {
                Some(word) => self.asks(&word, fails(&effect)),
                None => Event::Done,
            };
            let name = effect.cpu().map_or(effect.name().to_owned(), |cpu| format!("{} {}", effect.name(), cpu.number));
            let at = self.marks.len() as u64;
            self.marks.push(PhaseMark { phase: name, start_tsc: at, end_tsc: at + 1 });
            next = self.update.step(Duration::ZERO, event).unwrap();
            self.update.take_journal();
        }
    }
}

#[test]
fn an_upgrade_of_4096_cpus_commits() {
    let plan = plan(CPU_LIMIT as u32, Goal::Upgrade).check().unwrap();
    assert_eq!(Pair::new(&plan).run(|_| false), (Outcome::Committed { left: vec![] }, Stage::Alone));
}

#[test]
fn a_canary_passes_its_trial_and_never_serves() {
    for cpus in [2, 4, 8] {
        let (outcome, stage) = Pair::new(&plan(cpus, Goal::Canary)).run(|_| false);
        assert_eq!((outcome, stage), (Outcome::TrialPassed { left: vec![] }, Stage::Standing));
    }
}

#[test]
fn a_canary_that_fails_says_why() {
    for failing in [Effect::StandBy, Effect::CheckHealth, Effect::RunChecks] {
        let (outcome, _) = Pair::new(&plan(4, Goal::Canary)).run(|effect| *effect == failing);
        let Outcome::RolledBack { cause, left, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!((cause.blame, left), (Blame::Successor, vec![]));
        assert!(cause.what.ends_with('…'), "{cause}");
    }
}

/// The k-th of n CPUs does not come online there: the successor gives back those that did, and stands down.
#[test]
fn the_successor_gives_everything_back_after_k_of_n_cpus() {
    // Of the six others one is offline: it is parked, and not handed over.
    for failing in 0..5 {
        let mut handed = 0;
        let (outcome, stage) = Pair::new(&plan(8, Goal::Upgrade)).run(|effect| {
            handed += usize::from(matches!(effect, Effect::HandCpu { .. }));
            handed == failing + 1 && matches!(effect, Effect::HandCpu { .. })
        });
        assert!(matches!(outcome, Outcome::RolledBack { ref left, .. } if left.is_empty()), "{outcome:?}");
        assert_eq!(stage, Stage::Standing);
    }
}
