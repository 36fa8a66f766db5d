//! What is told of an update while it is made: progress for whoever asked, `baton status`, the timeline, the journal.
//!
//! While nobody serves, nothing is told: a line on a serial console takes longer than the cutover. What there is to tell
//! waits, and is told afterwards.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use handover::update::effect::Effect;
use handover::update::error::Outcome;
use handover::update::machine::{Event, JournalLine, Update};
use handover::update::phase::Phase;
use handover::update::plan::Plan as Steps;
use handover::update::probation::WhenWatched;
use tokio::sync::mpsc::UnboundedSender;

use crate::daemon::control::{Reply, Stage, UpdateStatus};
use crate::daemon::kernel::Kernel;
use crate::daemon::outcome::Failure;
use crate::recovery::journal;
use crate::update::timeline::{Timeline, tsc};

/// Tells of one update.
pub struct Report<'a> {
    kernel: &'a Kernel,
    release: &'a str,
    replies: &'a UnboundedSender<Reply>,
    began: Instant,
    phase: Phase,
    phase_began: u64,
    effect_began: u64,
    /// Told when somebody serves again.
    waiting: Vec<(Phase, String)>,
    journal: File,
    /// Lines that are not in the journal yet.
    unwritten: Vec<JournalLine>,
}

impl<'a> Report<'a> {
    /// Nothing has happened yet.
    ///
    /// # Errors
    /// The journal cannot be written: then no update begins, because a batond that dies in it could not be cleaned up after.
    pub fn open(
        kernel: &'a Kernel,
        steps: &Steps,
        release: &'a str,
        replies: &'a UnboundedSender<Reply>,
    ) -> Result<Report<'a>> {
        let journal =
            journal::create(&kernel.journal, journal::room(steps.cpus.others.len() + 2)).map_err(|error| {
                Failure::precondition(
                    format!("the update's journal cannot be begun: {error:#}"),
                    "make room on its disk; without a journal nobody could clean up after a batond that dies",
                )
            })?;
        Ok(Report::with_journal(journal, kernel, steps, release, replies))
    }

    /// Of an update that an earlier batond began. Its lines follow those that are there.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn go_on(
        kernel: &'a Kernel,
        update: &Update,
        release: &'a str,
        replies: &'a UnboundedSender<Reply>,
    ) -> Result<Report<'a>> {
        let path = &kernel.journal;
        let journal =
            File::options().append(true).open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let report = Report::with_journal(journal, kernel, update.plan(), release, replies);
        kernel.note(|status| status.cpus_moved = update.cpus_handed());
        Ok(report)
    }

    /// With a journal that is open already.
    pub(super) fn with_journal(
        journal: File,
        kernel: &'a Kernel,
        steps: &Steps,
        release: &'a str,
        replies: &'a UnboundedSender<Reply>,
    ) -> Report<'a> {
        kernel.state().update = Some(UpdateStatus {
            id: steps.update.to_string(),
            phase: Stage::In(Phase::Planned),
            incumbent_release: kernel.release().to_owned(),
            successor_release: release.to_owned(),
            cpus_total: u32::try_from(steps.cpus.others.len() + 2).unwrap_or(u32::MAX),
            cpus_moved: 0,
            left_undone: Vec::new(),
            timeline: Vec::new(),
            zero: None,
            last_words: None,
        });
        Report {
            kernel,
            release,
            replies,
            began: Instant::now(),
            phase: Phase::Planned,
            phase_began: tsc(),
            effect_began: tsc(),
            waiting: Vec::new(),
            journal,
            unwritten: Vec::new(),
        }
    }

    /// The clock of the state machine.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// When that clock shows `time`.
    pub fn at(&self, time: Duration) -> Instant {
        const FAR: Duration = Duration::from_secs(365 * 24 * 3600);
        self.began + time.min(FAR)
    }

    /// An effect is about to be carried out.
    ///
    /// # Errors
    /// The journal's line for it cannot be written. It is kept, and tried again with the next one.
    pub fn begins(&mut self, update: &mut Update, effect: &Effect, timeline: &mut Timeline) -> Result<()> {
        // This kernel's timeline goes over with the commit: what is measured after it would reach nobody.
        let leaves = matches!(effect, Effect::QuiesceDevices);
        if update.phase() != self.phase || leaves {
            self.phase_ends(timeline);
            self.phase = update.phase();
            self.kernel.set_phase(self.phase);
        }
        if leaves && !update.is_rolling_back() {
            self.tell_committed(timeline);
        }
        self.waiting.push((self.phase, told(effect)));
        self.effect_began = tsc();
        if update.may_write_journal() {
            self.tell(update)?;
            self.effect_began = tsc();
        }
        Ok(())
    }

    /// And was.
    pub fn ends(&mut self, effect: &Effect, event: &Event, timeline: &mut Timeline) {
        timeline.add(&named(effect), self.effect_began, tsc());
        if let Event::Failed(cause) | Event::Unknown(cause) = event {
            self.waiting.push((self.phase, format!("{} failed: {cause}", named(effect))));
        }
    }

    /// The update has ended, and this kernel is still there.
    pub fn close(&mut self, update: &mut Update, outcome: &Outcome) {
        if let Err(error) = self.tell(update) {
            tracing::error!("the end of this update is not in its journal: {error:#}");
        }
        let (stage, left) = match outcome {
            Outcome::Committed { left } => (Stage::Committed, left),
            Outcome::RolledBack { left, .. } => (Stage::RolledBack, left),
            Outcome::TrialPassed { left } => (Stage::TrialPassed, left),
        };
        self.kernel.set_stage(stage);
        self.kernel.note(|update| {
            update.left_undone = left.iter().map(|left| format!("{}: {}", left.effect.name(), left.cause)).collect();
            if stage != Stage::Committed {
                update.cpus_moved = 0;
            }
        });
    }

    fn phase_ends(&mut self, timeline: &mut Timeline) {
        let now = tsc();
        if self.phase != Phase::Planned {
            timeline.add(self.phase.name(), self.phase_began, now);
        }
        self.phase_began = now;
    }

    fn tell_committed(&self, timeline: &Timeline) {
        let khz = self.kernel.device().and_then(|device| Ok(device.info()?.tsc_khz)).unwrap_or(1);
        let timeline = timeline.spans(khz.into());
        let _ = self.replies.send(Reply::Committed { release: self.release.to_owned(), timeline });
    }

    fn tell(&mut self, update: &mut Update) -> Result<()> {
        for (phase, text) in self.waiting.drain(..) {
            tracing::info!(phase = phase.name(), step = text, "update");
            // The asker may have left.
            let _ = self.replies.send(Reply::Progress { phase: phase.to_string(), text });
        }
        self.unwritten.extend(update.take_journal());
        journal::write(&mut self.journal, &self.unwritten).context("the update's journal cannot be written")?;
        self.unwritten.clear();
        Ok(())
    }
}

/// An effect for whoever follows the update: by its name, or by what can be done about it.
fn told(effect: &Effect) -> String {
    let Effect::Watch { period, then } = effect else { return named(effect) };
    let end = match then {
        WhenWatched::Commit => "commits then; `baton commit` does so now, `baton rollback` takes everything back",
        WhenWatched::RollBack => {
            "turns back then, unless somebody says `baton commit`; `baton rollback` turns back now"
        }
    };
    format!("watch for {} s: the update {end}", period.as_secs_f64())
}

/// An effect's name with its CPU.
fn named(effect: &Effect) -> String {
    match effect.cpu() {
        Some(cpu) => format!("{} {}", effect.name(), cpu.number),
        None => effect.name().to_owned(),
    }
}
