//! The update itself: [`Update::step`] takes what happened and says what to do next.
//!
//! One effect is under way at a time, and every effect is answered by one event. So the driver is four lines, and
//! everything that can happen at any moment happens *to an effect*: it was done, it failed, or nobody knows.
//!
//! The way back has three rules beside the list of undos:
//!
//! 1. Clients wait for the shortest time: while nobody serves, what lets the incumbent serve again comes first.
//! 2. An undo that fails is reported, and the others are done all the same.
//! 3. Only what would do harm after that failure is not tried ([`Effect::forbids`]): memory that a device or a CPU may still
//!    write is not given back. It is reported as kept.
//!
//! A trial that is taken back ([`Goal::Canary`]) needs no help for that: the candidate is fenced first, whatever the trial has shown.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::cpu::Cpu;
use super::deadline::Share;
use super::effect::Effect;
use super::error::{Cause, Left, OutOfOrder, Outcome, Sort};
use super::phase::Phase;
use super::plan::{Goal, Plan};

/// Version of [`JournalLine`]. Version 1 had no plan, so that its lines could be shown, but not be
/// [recovered](super::recover::recover) from.
pub const JOURNAL_VERSION: u32 = 2;

/// What happened to the effect under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event", content = "cause")]
pub enum Event {
    /// The first event, once: go.
    Begin,
    /// It is so.
    Done,
    /// It is so, but the update turns back: it took longer than it may, or its driver died. [`Update::step`] makes this of a `Done` that
    /// comes after the deadline.
    Late(Cause),
    /// It is so, and meanwhile the operator has called the update off. [`Update::step`] makes this of a `Done` that comes after
    /// [`Update::call_off`].
    CalledOff(Cause),
    /// It is not so, and nothing of it is left behind.
    Failed(Cause),
    /// It may be so, or half so: time ran out, the successor died, or the driver broke off a wait because the operator has
    /// called the update off ([`Cause::called_off`]).
    Unknown(Cause),
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Event::Begin => "begin",
            Event::Done => "done",
            Event::Late(_) => "late",
            Event::CalledOff(_) => "called off",
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

/// What became of the wish to call an update off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOff {
    /// The update turns back as soon as the effect under way is over.
    Accepted,
    /// It is on its way back already.
    GoingBack,
    /// The commit is under way or over: there is no way back.
    TooLate,
    /// It has not begun, or has ended.
    NotUnderWay,
}

/// One step of an update, as it is kept. From the lines of an update that was cut off, [`super::recover::recover`] says what is to
/// be done.
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
    /// The plan; in the first line only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    New,
    /// The effect under way is the script's.
    Forward,
    /// It undoes something.
    Back {
        /// Why; nothing when only a trial was asked for, and it has passed.
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
    /// With which other steps the effect under way shares its deadline.
    share: Option<Share>,
    limit: Duration,
    deadline: Duration,
    /// By when the incumbent shall serve again: set when the way back enters the blackout.
    serve_again_by: Option<Duration>,
    /// What would undo all that has been done; the last of the list is the next to be carried out.
    undo: Vec<Effect>,
    left: Vec<Left>,
    serves: Serves,
    /// Nobody has served since before the effect under way: the journal has to wait.
    silent: bool,
    /// The services have been told to fall silent, and not yet to go on.
    frozen: bool,
    called_off: Option<Cause>,
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
            share: None,
            limit: Duration::MAX,
            deadline: Duration::MAX,
            serve_again_by: None,
            undo: Vec::new(),
            left: Vec::new(),
            serves: Serves::Incumbent,
            silent: false,
            frozen: false,
            called_off: None,
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
        let silent = self.is_blackout();
        let event = self.in_time(now, event);
        let said = event.clone();
        let next = match (&self.state, event) {
            (State::New, Event::Begin) => self.forward(now),

            (State::Forward, Event::Done) => {
                self.is_done();
                self.forward(now)
            }
            (State::Forward, Event::Late(cause) | Event::CalledOff(cause)) => {
                self.is_done();
                if self.committed { self.forward(now) } else { self.turn_back(now, cause, false) }
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

            (State::New, Event::Done | Event::Late(_) | Event::CalledOff(_) | Event::Failed(_) | Event::Unknown(_))
            | (State::Forward, Event::Begin)
            | (State::Back { .. }, Event::Begin | Event::Late(_) | Event::CalledOff(_))
            | (State::Ended, _) => {
                return Err(OutOfOrder { event: said.name(), state: self.describe() });
            }
        };
        self.silent = silent && self.is_blackout();
        self.write_line(now, said, &next);
        Ok(next)
    }

    /// What `Done` means if it comes too late, or after the operator has called the update off. After the commit neither
    /// changes anything.
    fn in_time(&self, now: Duration, event: Event) -> Event {
        if event != Event::Done || self.state != State::Forward || self.committed {
            return event;
        }
        let (Some((phase, effect)), next) = (self.script.get(self.done), self.script.get(self.done + 1)) else {
            return event;
        };
        if *effect == Effect::Commit {
            return event; // done: this was the point of no return
        }
        if let Some(cause) = &self.called_off {
            return Event::CalledOff(cause.clone());
        }
        // Only where the next step shares this deadline: one with its own has its full time, however late it begins.
        match next {
            Some((next_phase, next))
                if now > self.deadline && Share::of(*next_phase, next) == Share::of(*phase, effect) =>
            {
                Event::Late(Cause::deadline(*phase, effect, self.limit))
            }
            _ => event,
        }
    }

    /// The operator wants the machine back as it was. The update turns back when the effect under way has been answered; a
    /// driver that waits for something may also break the wait off and answer `Unknown` with the same cause.
    pub fn call_off(&mut self, by: &str) -> CallOff {
        match self.state {
            State::New | State::Ended => CallOff::NotUnderWay,
            State::Back { .. } => CallOff::GoingBack,
            State::Forward if self.committed || self.under_way() == Some(&Effect::Commit) => CallOff::TooLate,
            State::Forward => {
                self.called_off.get_or_insert_with(|| Cause::called_off(by));
                CallOff::Accepted
            }
        }
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

    /// When the effect under way must be answered, on the driver's clock. What is not done by then is `Unknown`; an undo that
    /// needs no waiting is carried out all the same.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The journal may be written now. Not so in a blackout; but the line that announces its first effect (the freeze, the order to stand
    /// down, the fence of a successor that died) is written before that is carried out: a [recovery](super::recover::recover) needs it.
    pub fn may_write_journal(&self) -> bool {
        !self.silent
    }

    /// The successor has agreed that it stays.
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// Epoch that the incumbent holds, or would go on with.
    pub fn incumbent_epoch(&self) -> u64 {
        if self.told_to_answer { self.plan.epochs().back } else { self.plan.epochs().before }
    }

    /// How many CPUs have been handed over to the successor one by one, and are there.
    pub fn cpus_handed(&self) -> u32 {
        let handed = self.script[..self.done].iter().filter(|(_, effect)| match effect {
            Effect::HandCpu { cpu } => self.with_successor.contains(cpu),
            _ => false,
        });
        u32::try_from(handed.count()).unwrap_or(u32::MAX)
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

    /// Brings a new update to where the lines of an old one end. The effect under way may have been carried out, or not, or in
    /// part. No time has passed, whatever the lines say: who is late or not was decided when they were written.
    ///
    /// # Errors
    /// If the lines are of another version, are not all there, or this program would have done something else.
    pub fn replay(lines: &[JournalLine]) -> Result<Update, ReplayError> {
        let Some(first) = lines.first() else { return Err(ReplayError::NoPlan) };
        if first.journal_version != JOURNAL_VERSION {
            return Err(ReplayError::Version { found: first.journal_version, seq: first.seq });
        }
        let mut update = Update::new(first.plan.clone().ok_or(ReplayError::NoPlan)?);
        for (index, line) in lines.iter().enumerate() {
            let seq = line.seq;
            if line.journal_version != JOURNAL_VERSION {
                return Err(ReplayError::Version { found: line.journal_version, seq });
            }
            if seq as usize != index || line.update != update.plan.update.to_string() {
                return Err(ReplayError::Line { seq, index });
            }
            let next = update.step(Duration::ZERO, line.event.clone())?;
            if next != line.next {
                return Err(ReplayError::Diverged { seq });
            }
        }
        update.journal.clear();
        Ok(update)
    }

    /// The effect under way once more, by a driver whose clock begins anew: after a [replay](Update::replay).
    pub(super) fn again(&mut self, now: Duration) -> Option<Next> {
        let effect = self.under_way()?.clone();
        self.serve_again_by = None;
        match self.state {
            State::Back { .. } => self.give_time_to_undo(now, &effect),
            _ => self.deadline = now.saturating_add(self.limit),
        }
        Some(Next::Do(effect))
    }

    /// The next step of the script, or the turn at its end.
    fn forward(&mut self, now: Duration) -> Next {
        let Some((phase, effect)) = self.script.get(self.done).cloned() else {
            return match self.plan.goal {
                Goal::Upgrade => self.end(),
                Goal::Canary => self.turn(now, None),
            };
        };
        let share = Share::of(phase, &effect);
        if Some(share) != self.share {
            self.share = Some(share);
            self.limit = self.plan.deadlines.of(share);
            self.deadline = now.saturating_add(self.limit);
        }
        self.phase = phase;
        match &effect {
            Effect::Freeze => (self.serves, self.frozen) = (Serves::Nobody, true),
            Effect::Activate { .. } => self.told_to_answer = true,
            Effect::StartCpu { cpu } | Effect::HandCpu { cpu } => self.with_successor.push(*cpu),
            _ => {}
        }
        // Before it is carried out: should its outcome never be known, its undo is on the list.
        for undo in effect.undo().into_iter().rev() {
            self.list(undo);
        }
        self.state = State::Forward;
        Next::Do(effect)
    }

    /// Puts an undo on the list: it is the next to be carried out, but for the instance. That one goes, and the memory after it, when
    /// the devices have been taken back and every CPU is home.
    fn list(&mut self, undo: Effect) {
        let at = match undo {
            Effect::DestroyInstance => {
                self.undo.iter().position(|other| *other == Effect::GiveBackMemory).map(|at| at + 1)
            }
            _ => None,
        };
        self.undo.insert(at.unwrap_or(self.undo.len()), undo);
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
            Effect::Freeze => (self.serves, self.frozen) = (Serves::Incumbent, false),
            Effect::Activate { .. } => self.told_to_answer = false,
            Effect::StartCpu { cpu } | Effect::HandCpu { cpu } => {
                self.with_successor.retain(|other| other != cpu);
            }
            _ => {}
        }
        for undo in effect.undo() {
            if let Some(at) = self.undo.iter().rposition(|listed| *listed == undo) {
                self.undo.remove(at);
            }
        }
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
        if self.plan.goal == Goal::Canary {
            self.fence_candidate_first();
        }
        self.state = State::Back { cause, phase: self.phase, undoing: Effect::ReadLastWords };
        self.back(now)
    }

    /// The next undo, or the end.
    fn back(&mut self, now: Duration) -> Next {
        let Some(mut effect) = self.undo.pop() else {
            return self.end();
        };
        // Epochs and CPUs are not known when the undo is put on the list; they are filled in now.
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
        self.give_time_to_undo(now, &effect);
        Next::Do(effect)
    }

    /// The services are silent here, and do not answer in the successor.
    fn is_blackout(&self) -> bool {
        self.frozen && self.serves == Serves::Nobody
    }

    fn give_time_to_undo(&mut self, now: Duration, effect: &Effect) {
        let deadlines = &self.plan.deadlines;
        self.deadline = if self.is_blackout() {
            // One deadline for all that clients wait for.
            let all = *self.serve_again_by.get_or_insert(now.saturating_add(deadlines.cutover));
            all.max(now.saturating_add(deadlines.least_in_blackout()))
        } else {
            now.saturating_add(deadlines.of_undo(effect))
        };
        self.limit = self.deadline.saturating_sub(now);
    }

    fn is_undone(&mut self, effect: &Effect) {
        match effect {
            Effect::Unfreeze { .. } => (self.serves, self.frozen) = (Serves::Incumbent, false),
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
        let (kept, rest) = std::mem::take(&mut self.undo).into_iter().partition(|other| effect.forbids(other));
        self.undo = rest;
        // Without `Unfreeze` on the list the blackout does not end here, and its short deadline would only make undos fail.
        self.frozen &= self.undo.iter().any(|other| matches!(other, Effect::Unfreeze { .. }));
        let why = format!("{} failed: {}", effect.name(), cause.what);
        self.left.push(Left { effect, cause: cause.clone() });
        for effect in Vec::into_iter(kept).rev() {
            self.left.push(Left { effect, cause: Cause::kept(cause.blame, &why) });
        }
    }

    /// The successor may answer clients and cannot be asked to stop: it is made to, then the services go on, and whatever needs
    /// its help is not asked for.
    fn fence_first(&mut self) {
        if !self.told_to_answer {
            return; // it never had the address or the arenas: the services go on first, and it is fenced in its turn
        }
        let mut first = Vec::new();
        let mut rest = Vec::with_capacity(self.undo.len());
        let mut fence = None;
        for undo in std::mem::take(&mut self.undo) {
            match undo {
                Effect::Fence { .. } => fence = Some(undo),
                _ if undo.needs_successor() => {}
                _ if undo.is_in_blackout() => first.push(undo),
                _ => rest.push(undo),
            }
        }
        rest.extend(first.into_iter().chain(fence));
        self.undo = rest;
    }

    /// The candidate of a trial serves nobody, so nothing is asked of it: it is stopped, its last words are read, and then its CPUs are
    /// taken from where the fence has left them.
    fn fence_candidate_first(&mut self) {
        let (first, rest): (Vec<Effect>, Vec<Effect>) = std::mem::take(&mut self.undo)
            .into_iter()
            .filter(|undo| !undo.needs_successor())
            .partition(|undo| matches!(undo, Effect::Fence { .. } | Effect::ReadLastWords));
        self.undo = rest.into_iter().chain(first).collect();
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
            plan: (self.steps == 0).then(|| self.plan.clone()),
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
    /// The first line has no plan.
    #[error("the first line, which has the plan, is missing")]
    NoPlan,
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
