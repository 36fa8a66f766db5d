//! The update itself: [`Update::step`] takes what happened and says what to do next.
//!
//! One effect is under way at a time, and every effect is answered by one event. So the driver is four lines, and
//! everything that can happen at any moment happens *to an effect*: it was done, it failed, or nobody knows.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::blame::Blame;
use super::cpu::Cpu;
use super::effect::Effect;
use super::error::{Cause, Left, OutOfOrder, Outcome, Sort};
use super::phase::Phase;
use super::plan::{Goal, Plan};

/// Version of [`JournalLine`].
pub const JOURNAL_VERSION: u32 = 1;

/// What happened to the effect under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event", content = "cause")]
pub enum Event {
    /// The first event, once: go.
    Begin,
    /// It is so.
    Done,
    /// It is not so, and nothing of it is left behind.
    Failed(Cause),
    /// It may be so, or half so: time ran out, the successor died, or the operator called the update off meanwhile.
    Unknown(Cause),
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Event::Begin => "begin",
            Event::Done => "done",
            Event::Failed(_) => "failed",
            Event::Unknown(_) => "unknown",
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Next {
    /// Carry this out, and say what happened.
    Do(Effect),
    /// Nothing more. The update has ended.
    End(Outcome),
}

/// Who answers clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serves {
    /// The kernel that was there before.
    Incumbent,
    /// The blackout.
    Nobody,
    /// The new kernel.
    Successor,
}

/// One step of an update, as it is kept. The lines of an update can be [replayed](Update::replay).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalLine {
    /// [`JOURNAL_VERSION`].
    pub journal_version: u32,
    /// Which update.
    pub update: String,
    /// Number of the step, from 0.
    pub seq: u32,
    /// The driver's clock, in nanoseconds.
    pub at_ns: u64,
    /// The phase, after the step.
    pub phase: Phase,
    /// Who serves, after the step.
    pub serves: Serves,
    /// What happened.
    pub event: Event,
    /// What was to be done next.
    pub next: Next,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    New,
    /// The effect under way is the script's.
    Forward,
    /// It undoes something.
    Back {
        /// Nothing: the trial was all that was asked for.
        cause: Option<Cause>,
        /// Where the update turned.
        phase: Phase,
        undoing: Effect,
    },
    Ended,
}

/// An update under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    plan: Plan,
    script: Vec<(Phase, Effect)>,
    state: State,
    /// Steps of the script that are done.
    done: usize,
    phase: Phase,
    limit: Duration,
    deadline: Duration,
    /// What would undo all that has been done, the last first.
    undo: Vec<Effect>,
    left: Vec<Left>,
    serves: Serves,
    /// CPUs that the successor may be running on.
    with_successor: Vec<Cpu>,
    /// The successor may hold its epoch.
    told_to_answer: bool,
    /// No way back.
    committed: bool,
    steps: u32,
    journal: Vec<JournalLine>,
}

impl Update {
    /// An update that has not begun.
    pub fn new(plan: Plan) -> Update {
        Update {
            script: plan.script(),
            plan,
            state: State::New,
            done: 0,
            phase: Phase::Planned,
            limit: Duration::MAX,
            deadline: Duration::MAX,
            undo: Vec::new(),
            left: Vec::new(),
            serves: Serves::Incumbent,
            with_successor: Vec::new(),
            told_to_answer: false,
            committed: false,
            steps: 0,
            journal: Vec::new(),
        }
    }

    /// THE MAIN PATH. `now` is any clock that does not go backwards.
    ///
    /// # Errors
    /// An event that cannot be now; the update stays as it was.
    pub fn step(&mut self, now: Duration, event: Event) -> Result<Next, OutOfOrder> {
        let said = event.clone();
        let next = match (&self.state, event) {
            (State::New, Event::Begin) => self.forward(now),

            (State::Forward, Event::Done) => {
                self.is_done();
                self.forward(now)
            }
            (State::Forward, Event::Failed(cause)) => {
                self.never_happened();
                self.turn_back(now, cause, false)
            }
            (State::Forward, Event::Unknown(cause)) => self.turn_back(now, cause, true),

            (State::Back { undoing, .. }, Event::Done) => {
                self.is_undone(&undoing.clone());
                self.back(now)
            }
            (State::Back { undoing, .. }, Event::Failed(cause) | Event::Unknown(cause)) => {
                self.is_not_undone(undoing.clone(), cause);
                self.back(now)
            }

            (State::New, Event::Done | Event::Failed(_) | Event::Unknown(_))
            | (State::Forward | State::Back { .. }, Event::Begin)
            | (State::Ended, _) => {
                return Err(OutOfOrder { event: said.name(), state: self.describe() });
            }
        };
        self.write_line(now, said, &next);
        Ok(next)
    }

    /// The phase it is in, or turned back from.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Who answers clients now, as far as is known.
    pub fn serves(&self) -> Serves {
        self.serves
    }

    /// It is on its way back.
    pub fn is_rolling_back(&self) -> bool {
        matches!(self.state, State::Back { .. })
    }

    /// The operator may still call it off (by answering the effect under way with `Unknown`).
    pub fn can_be_called_off(&self) -> bool {
        matches!(self.state, State::Forward) && !self.committed
    }

    /// When the effect under way must be answered, on the driver's clock. What is not done by then is `Unknown`, with
    /// [`Update::deadline_cause`].
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The cause to give when the deadline has passed.
    pub fn deadline_cause(&self) -> Option<Cause> {
        let effect = self.under_way()?;
        Some(Cause::deadline(self.phase, effect, self.limit))
    }

    /// Epoch that the incumbent holds, or would go on with.
    pub fn incumbent_epoch(&self) -> u64 {
        if self.told_to_answer { self.plan.epochs().back } else { self.plan.epochs().before }
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What would be undone now, the first first.
    pub fn undo_list(&self) -> impl Iterator<Item = &Effect> {
        self.undo.iter().rev()
    }

    /// What could not be undone so far.
    pub fn left(&self) -> &[Left] {
        &self.left
    }

    /// The effect that the driver is carrying out.
    pub fn under_way(&self) -> Option<&Effect> {
        match &self.state {
            State::New | State::Ended => None,
            State::Forward => self.script.get(self.done).map(|(_, effect)| effect),
            State::Back { undoing, .. } => Some(undoing),
        }
    }

    /// Lines since the last call. In the blackout keep them in memory; they wait here.
    pub fn take_journal(&mut self) -> Vec<JournalLine> {
        std::mem::take(&mut self.journal)
    }

    /// Brings a new update to where the lines of an old one end: after a restart of the agent, which answers the
    /// effect under way with `Unknown`, and so goes back in order.
    ///
    /// # Errors
    /// If the lines are of another version or plan, or are not all there.
    pub fn replay(plan: Plan, lines: &[JournalLine]) -> Result<Update, ReplayError> {
        let mut update = Update::new(plan);
        for (index, line) in lines.iter().enumerate() {
            let seq = line.seq;
            if line.journal_version != JOURNAL_VERSION {
                let found = line.journal_version;
                return Err(ReplayError::Version { found, seq });
            }
            if seq as usize != index || line.update != update.plan.update.to_string() {
                return Err(ReplayError::Line { seq, index });
            }
            let next = update.step(Duration::from_nanos(line.at_ns), line.event.clone())?;
            if next != line.next {
                return Err(ReplayError::Diverged { seq });
            }
        }
        update.journal.clear();
        Ok(update)
    }

    /// The next step of the script, or the turn at its end.
    fn forward(&mut self, now: Duration) -> Next {
        let Some((phase, effect)) = self.script.get(self.done).cloned() else {
            return match self.plan.goal {
                Goal::Upgrade => self.end(),
                Goal::Canary => self.turn(now, None),
            };
        };
        if phase != self.phase {
            self.phase = phase;
            self.limit = self.plan.deadlines.of(phase, self.plan.cpus.others.len());
            self.deadline = now.saturating_add(self.limit);
        } else if now > self.deadline && !self.committed {
            let cause = Cause::deadline(phase, &effect, self.limit);
            return self.turn(now, Some(cause));
        }
        match &effect {
            Effect::Freeze => self.serves = Serves::Nobody,
            Effect::Activate { .. } => self.told_to_answer = true,
            Effect::StartCpu { cpu } | Effect::HandCpu { cpu } => self.with_successor.push(*cpu),
            _ => {}
        }
        // Before it is carried out: should its outcome never be known, its undo is on the list.
        self.undo.extend(effect.undo().into_iter().rev());
        self.state = State::Forward;
        Next::Do(effect)
    }

    /// The effect under way is done.
    fn is_done(&mut self) {
        match self.script.get(self.done) {
            Some((_, Effect::Activate { .. })) => self.serves = Serves::Successor,
            Some((_, Effect::Commit)) => {
                self.committed = true;
                self.undo.clear();
            }
            _ => {}
        }
        self.done += 1;
    }

    /// The effect under way left nothing behind.
    fn never_happened(&mut self) {
        let Some((_, effect)) = self.script.get(self.done) else {
            return;
        };
        match effect {
            Effect::Freeze => self.serves = Serves::Incumbent,
            Effect::Activate { .. } => self.told_to_answer = false,
            Effect::StartCpu { cpu } | Effect::HandCpu { cpu } => {
                self.with_successor.retain(|other| other != cpu);
            }
            _ => {}
        }
        self.undo.truncate(self.undo.len() - effect.undo().len().min(self.undo.len()));
    }

    /// Something went wrong on the way forward. After the commit: report what is left. Before: go back.
    fn turn_back(&mut self, now: Duration, cause: Cause, unknown: bool) -> Next {
        if self.committed {
            // A step that failed is not skipped: the last CPU must not leave devices behind that still write.
            for (_, effect) in &self.script[self.done..] {
                self.left.push(Left { effect: effect.clone(), cause: cause.clone() });
            }
            return self.end();
        }
        let asked_for_its_epoch = matches!(self.under_way(), Some(Effect::Activate { .. } | Effect::Commit));
        if cause.sort == Sort::SuccessorDied || (unknown && asked_for_its_epoch) {
            self.fence_first();
        }
        self.turn(now, Some(cause))
    }

    fn turn(&mut self, now: Duration, cause: Option<Cause>) -> Next {
        self.state = State::Back { cause, phase: self.phase, undoing: Effect::ReadLastWords };
        self.back(now)
    }

    /// The next undo, or the end.
    fn back(&mut self, now: Duration) -> Next {
        let Some(mut effect) = self.undo.pop() else {
            return self.end();
        };
        // What the table could not know.
        match &mut effect {
            Effect::Unseal { epoch } | Effect::Unfreeze { epoch } => {
                *epoch = self.incumbent_epoch();
            }
            Effect::Fence { cpus } => cpus.clone_from(&self.with_successor),
            _ => {}
        }
        let stops_successor = matches!(effect, Effect::StandDown { .. } | Effect::Fence { .. });
        if stops_successor && self.serves == Serves::Successor {
            self.serves = Serves::Nobody;
        }
        if let State::Back { undoing, .. } = &mut self.state {
            undoing.clone_from(&effect);
        }
        self.limit = self.plan.deadlines.of_undo(&effect);
        self.deadline = now.saturating_add(self.limit);
        Next::Do(effect)
    }

    fn is_undone(&mut self, effect: &Effect) {
        match effect {
            Effect::Unfreeze { .. } => self.serves = Serves::Incumbent,
            Effect::TakeCpuBack { cpu } => self.with_successor.retain(|other| other != cpu),
            Effect::Fence { .. } => self.with_successor.clear(),
            _ => {}
        }
    }

    fn is_not_undone(&mut self, effect: Effect, cause: Cause) {
        if effect.needs_successor() {
            // It does not help: so it is stopped, and its help is not asked for again.
            self.fence_first();
            return;
        }
        let unstoppable = matches!(effect, Effect::Fence { .. });
        let why = cause.what.clone();
        self.left.push(Left { effect, cause });
        if unstoppable {
            // It may still run: what remains on the list is what it may still be using.
            for effect in std::mem::take(&mut self.undo).into_iter().rev() {
                let cause = Cause::broken(
                    Blame::Hardware,
                    format!("not tried, because the successor could not be stopped: {why}"),
                );
                self.left.push(Left { effect, cause });
            }
        }
    }

    /// The successor may answer clients and cannot be asked to stop: before anything else it is made to.
    fn fence_first(&mut self) {
        if !self.told_to_answer {
            return; // it never had the address or the arenas: the services go on first, it is fenced in its turn
        }
        self.undo.retain(|effect| !effect.needs_successor());
        if let Some(at) = self.undo.iter().position(|e| matches!(e, Effect::Fence { .. })) {
            let fence = self.undo.remove(at);
            self.undo.push(fence);
        }
    }

    fn end(&mut self) -> Next {
        let left = std::mem::take(&mut self.left);
        let outcome = match std::mem::replace(&mut self.state, State::Ended) {
            State::Back { cause: Some(cause), phase, .. } => Outcome::RolledBack { cause, phase, left },
            State::Back { cause: None, .. } => Outcome::TrialPassed { left },
            State::New | State::Forward | State::Ended => Outcome::Committed { left },
        };
        self.deadline = Duration::MAX;
        Next::End(outcome)
    }

    fn describe(&self) -> String {
        match self.under_way() {
            None if self.state == State::New => "not begun".into(),
            None => "ended".into(),
            Some(effect) => format!("{}, {} under way", self.phase, effect.name()),
        }
    }

    fn write_line(&mut self, now: Duration, event: Event, next: &Next) {
        self.journal.push(JournalLine {
            journal_version: JOURNAL_VERSION,
            update: self.plan.update.to_string(),
            seq: self.steps,
            at_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            phase: self.phase,
            serves: self.serves,
            event,
            next: next.clone(),
        });
        self.steps += 1;
    }
}

/// Why an old update cannot be taken up again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// Written by another program.
    #[error("line {seq} has journal version {found}, this program reads {JOURNAL_VERSION}")]
    Version {
        /// Version in the line.
        found: u32,
        /// Which line.
        seq: u32,
    },
    /// A line is missing, or of another update.
    #[error("line {seq} stands at place {index}, or is of another update")]
    Line {
        /// Its number.
        seq: u32,
        /// Its place.
        index: usize,
    },
    /// The line's event does not fit.
    #[error("the lines contradict themselves")]
    OutOfOrder(#[from] OutOfOrder),
    /// This program would have done something else.
    #[error("after line {seq} this program would do something else")]
    Diverged {
        /// Which line.
        seq: u32,
    },
}
