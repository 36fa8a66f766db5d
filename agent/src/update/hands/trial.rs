//! A trial that is taken back: the candidate is asked how it came up, has the operator's checks run, and is watched. What is seen is
//! kept here for the report; what it means is [`judge`]'s to say.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::update::blame::Blame;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Sort};
use handover::update::machine::Event;
use state_schemas::latest::message::{Ending, ToIncumbent, ToSuccessor};

use super::Hands;
use crate::machine::clock::Moment;
use crate::update::line::Unanswered;
use crate::update::timeline::tsc;
use crate::update::trial::report::Check;
use crate::update::trial::{Trial, judge};

/// How much later than the end of a check's time the candidate's agent may say how it ended.
const GRACE: Duration = Duration::from_secs(10);

/// What was seen of a candidate.
#[derive(Debug, Default)]
pub struct Seen {
    /// Its instance, once it has one.
    pub instance: u32,
    /// From the start of its CPU to the first word of its agent, in milliseconds.
    pub boot_ms: Option<f64>,
    /// In the order in which they were made.
    pub checks: Vec<Check>,
    started: Option<Instant>,
}

/// How long the checks of a trial may take in all; `step` is for a question and its answer.
pub fn time_for(trial: &Trial, step: Duration) -> Duration {
    let checks = u32::try_from(trial.checks.len()).unwrap_or(u32::MAX);
    let each = Duration::from_millis(trial.check_limit_ms) + GRACE;
    // The candidate is examined first, and must answer last.
    each.saturating_mul(checks).max(Duration::from_millis(trial.watch_ms)).saturating_add(2 * step)
}

impl Hands<'_> {
    /// It is a candidate that is taken back.
    pub(super) fn is_trial(&self) -> bool {
        self.plan.is_some_and(|plan| plan.trial.is_some())
    }

    /// Keeps what an effect showed of a candidate.
    pub(super) fn note_for_trial(&mut self, effect: &Effect, event: &Event, began: Instant) {
        if !self.is_trial() {
            return;
        }
        if let (Effect::StartCpu { .. }, Ok(site)) = (effect, self.site()) {
            (self.seen.instance, self.seen.started) = (site.instance, Some(began));
            return;
        }
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let (name, good) = match effect {
            Effect::AwaitHello => {
                let boot_ms = self.seen.started.map_or(ms, |started| started.elapsed().as_secs_f64() * 1e3);
                if *event == Event::Done {
                    self.seen.boot_ms = Some(boot_ms);
                }
                ("boots", format!("its agent answered {boot_ms:.0} ms after the start"))
            }
            Effect::StandBy => ("services", format!("{} told of, all stand by", self.listed.len())),
            Effect::CheckHealth => ("health", "its agent says that all is well".to_owned()),
            // That it came up, the candidate says itself; here only that it did not.
            Effect::HandCpu { .. } if *event != Event::Done => ("cpus", String::new()),
            _ => return,
        };
        let check = match event {
            Event::Failed(cause) | Event::Unknown(cause) if cause.sort == Sort::CalledOff => {
                return tracing::info!("{cause}");
            }
            Event::Failed(cause) | Event::Unknown(cause) => Check::fail(name, cause.what.clone(), ms),
            _ => Check::pass(name, good, ms),
        };
        self.seen.checks.push(check);
    }

    /// Makes all checks, and watches the candidate until its time is over. Fails with the first check that did.
    pub(super) fn run_checks(&mut self) -> Result<()> {
        let trial = self.plan.and_then(|plan| plan.trial.clone()).context("no trial was asked for")?;
        let until = Instant::now() + Duration::from_millis(trial.watch_ms);
        let made = self.make_checks(&trial, until);
        // Also where the candidate ended meanwhile: then its log is read once more when it is fenced.
        let began = Instant::now();
        let log = self.kernel.successor_log.read(self.device, None)?;
        let records = log.map(|log| log.records).unwrap_or_default();
        self.seen.checks.push(judge::log(&records, began.elapsed().as_secs_f64() * 1e3));
        made?;
        match self.seen.checks.iter().find(|check| !check.is_passed()) {
            Some(failed) => {
                Err(Unanswered::Refused { what: "pass its trial".into(), cause: failed.complaint() }.into())
            }
            None => Ok(()),
        }
    }

    fn make_checks(&mut self, trial: &Trial, until: Instant) -> Result<()> {
        self.examine()?;
        for command in &trial.checks {
            let check = self.run_check(command, Duration::from_millis(trial.check_limit_ms))?;
            self.seen.checks.push(check);
        }
        self.watch_candidate(until)?;
        self.answers()
    }

    fn examine(&mut self) -> Result<()> {
        let began = Instant::now();
        let given = self.given()?;
        let examined = self.ask_within(&ToSuccessor::Examine, self.step(), |answer| match answer {
            ToIncumbent::Examined { examination } => Some(examination),
            _ => None,
        })?;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        self.seen.checks.extend(judge::examined(&examined, &given, ms));
        Ok(())
    }

    fn given(&self) -> Result<judge::Given> {
        let info = self.device.info()?;
        let plan = self.plan.context("a trial has a plan")?;
        Ok(judge::Given {
            cpus: plan.lent.iter().chain([&plan.spare]).map(|cpu| cpu.apic_id).collect(),
            services: self.listed.clone(),
            functions: u32::from(plan.target.nic.is_some()),
            clock: Moment::now()?,
            tsc_khz: Moment::raw()?.khz_since(self.began, info.tsc_khz).into(),
            live_update: self.takes_sessions(),
        })
    }

    fn run_check(&mut self, command: &str, limit: Duration) -> Result<Check> {
        let began = Instant::now();
        let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let word = ToSuccessor::RunCheck { command: command.into(), limit_ms };
        let ended = self.ask_within(&word, limit + GRACE, |answer| match answer {
            ToIncumbent::CheckEnded { ending, output, took_ms } => Some((ending, output, took_ms)),
            _ => None,
        });
        match ended {
            Ok((ending, output, took_ms)) => Ok(judge::command(command, &ending, output.as_str(), took_ms)),
            Err(error) => {
                // The candidate ended, or its agent hangs, while this check ran: what it did is not known, and the trial is over.
                let took_ms = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
                let silent = matches!(error.downcast_ref(), Some(Unanswered::Silent { .. }));
                let ending = if silent { Ending::TimedOut } else { Ending::NotStarted { cause: String::new().into() } };
                let judged = judge::command(command, &ending, "", took_ms);
                let check = if silent { judged } else { Check::fail(&judged.name, "", judged.ms) };
                self.seen.checks.push(Check { detail: format!("{error:#}"), ..check });
                Err(error)
            }
        }
    }

    /// Lets time pass, unless the candidate panics or the operator calls the trial off.
    fn watch_candidate(&mut self, until: Instant) -> Result<()> {
        let kernel = self.kernel;
        let patience = until.saturating_duration_since(Instant::now());
        match self.placed()?.line.receive_unless(patience, &kernel.called_off) {
            Err(error) if matches!(error.downcast_ref(), Some(Unanswered::Silent { .. })) => Ok(()),
            Err(error) => Err(error),
            Ok(word) => bail!("the successor said {word:?}, and nobody had asked"),
        }
    }

    /// At the end it still answers.
    fn answers(&mut self) -> Result<()> {
        let (began, nonce) = (Instant::now(), tsc());
        let answered = self.ask_within(&ToSuccessor::Ping { nonce }, self.step(), |answer| match answer {
            ToIncumbent::Pong { nonce: heard } if heard == nonce => Some(()),
            _ => None,
        });
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let check = match &answered {
            Ok(()) => Check::pass("answers", format!("after {ms:.1} ms, at the end of its time"), ms),
            Err(error) => Check::fail("answers", format!("{error:#}"), ms),
        };
        self.seen.checks.push(check);
        answered
    }

    fn step(&self) -> Duration {
        Duration::from_secs(self.kernel.config.update.step_timeout_s)
    }

    fn ask_within<T>(
        &mut self,
        word: &ToSuccessor,
        patience: Duration,
        answer: impl Fn(ToIncumbent) -> Option<T>,
    ) -> Result<T> {
        let patience = patience.min(self.left());
        let kernel = self.kernel;
        let line = &mut self.placed()?.line;
        line.send(word)?;
        match line.receive_unless(patience, &kernel.called_off)? {
            ToIncumbent::Failed { what, cause } => {
                Err(Unanswered::Refused { what: what.into(), cause: cause.into() }.into())
            }
            other => {
                let shown = format!("{other:?}");
                answer(other).with_context(|| format!("the successor answered {word:?} with {shown}"))
            }
        }
    }
}

/// Whether a trial that ended so was failed by the candidate, rather than broken off by this kernel or the operator.
pub fn is_candidates_fault(cause: &Cause) -> bool {
    cause.blame == Blame::Successor
}
