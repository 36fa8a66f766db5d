//! THE MAIN PATH: one update, from the incumbent's side.
//!
//! ```text
//!            planned ─► granted ─► booting ─► trial ─► CUTOVER ─► probation ─► COMMIT ┄► drained
//! effects               take mem.  place      stand by  freeze     drop addr.  commit
//!                       grant dev. start CPU  health    seal       each CPU:   quiesce
//!                       offline    hello                release    offline     yield ┄► the successor's alone
//!                                                       activate   park, hand
//! serves     incumbent ──────────────────────────────┤ nobody ├─ successor ─────────────────────►
//! way back      ◄────────── give everything back ──────────┤◄─ reverse cutover ─┤     none
//! ```
//! What comes next, and what undoes what, is `handover`'s to say ([`Update`]); [`Hands`] do it; [`Report`] tells of it.

use std::sync::atomic::Ordering;
use std::sync::{PoisonError, TryLockError};
use std::time::Duration;

use anyhow::{Context, Result};
use handover::update::blame::Blame;
use handover::update::cpu::{Cpu, Cpus, Moving};
use handover::update::deadline::Deadlines;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Left, Outcome, Sort};
use handover::update::machine::{Event, Next, Update};
use handover::update::phase::Phase;
use handover::update::plan::Goal;
use handover::update::probation::ProbationPolicy;
use handover::update::recover::Resumed;
use kexec_core::cpus::{CpuFacts, Move};
use state_schemas::latest::handover_record::UpdateId;
use tokio::sync::mpsc::UnboundedSender;

use crate::daemon::control::{Reply, Upgrade};
use crate::daemon::kernel::Kernel;
use crate::daemon::outcome::{Class, Failure};
use crate::machine::facts::Facts;
use crate::recovery::journal::boot_id;
use crate::update::hands::trial::{is_candidates_fault, time_for};
use crate::update::hands::{self, Found, Hands};
use crate::update::plan::{self, Plan, Target};
use crate::update::report::Report;
use crate::update::trial::report::{Candidate, Report as Tried, Returned, Verdict};
use crate::update::trial::{Trial, judge};
use crate::userland::kernels;

/// Each effect is carried out, and its outcome decides on the next, until there is none.
pub(super) fn drive(update: &mut Update, first: Next, hands: &mut Hands<'_>, report: &mut Report<'_>) -> Outcome {
    let mut next = first;
    loop {
        let event;
        if hands.is_called_off() {
            // Where this is refused (too late, or on its way back already), nothing changes.
            let _ = update.call_off(hands::CALLED_OFF_BY);
        }
        match next {
            Next::Do(effect) => {
                event = match report.begins(update, &effect, &mut hands.timeline) {
                    // Nobody could clean up after what is not in the journal. On the way back it is done all the same.
                    Err(error) if !update.is_rolling_back() && !update.is_committed() => {
                        Event::Failed(Cause::broken(Blame::Incumbent, format!("{error:#}")))
                    }
                    begun => {
                        if let Err(error) = begun {
                            tracing::warn!("{error:#}");
                        }
                        hands.carry_out(&effect, report.at(update.deadline()))
                    }
                };
                report.ends(&effect, &event, &mut hands.timeline);
            }
            Next::End(outcome) => return outcome,
        }
        next = update.step(report.now(), event).expect("each effect is answered once");
    }
}

/// Makes an update, or only a `trial`, telling `replies` how it goes; gives the last word.
pub fn run(kernel: &Kernel, wish: &Upgrade, trial: Option<&Trial>, replies: &UnboundedSender<Reply>) -> Reply {
    let _held = match kernel.updating.try_lock() {
        Ok(held) => held,
        Err(TryLockError::Poisoned(held)) => held.into_inner(),
        Err(TryLockError::WouldBlock) => {
            return Reply::Failed(Failure::new(
                Class::Busy,
                "another update runs, or an arena is made longer",
                "wait for it; `baton status` shows how far it is",
            ));
        }
    };
    // The wish to call an earlier update off does not hold for this one.
    kernel.called_off.store(false, Ordering::SeqCst);
    let (findings, plan) = plan::make(kernel, wish, trial);
    let Some(plan) = plan else {
        return match findings.refuse() {
            true => Reply::Refused { findings: findings.into_list() },
            false => Reply::Failed(Failure::new(Class::Failed, "no plan could be made", "see batond's log")),
        };
    };
    make(kernel, &plan, replies).unwrap_or_else(|error| Reply::Failed(Failure::from_error(&error)))
}

/// The failure in which the update ended, or what the trial has shown. (An update that succeeds takes this kernel's last CPU with it.)
fn make(kernel: &Kernel, plan: &Plan, replies: &UnboundedSender<Reply>) -> Result<Reply> {
    let id = new_id()?;
    let mut update = Update::new(steps(id, plan, kernel)?);
    let mut report = Report::open(kernel, update.plan(), &plan.target.release, replies)?;
    let mut hands = Hands::new(kernel, plan, id)?;
    // A ledger that still tells of an earlier update would mislead a batond that recovers this one.
    kernel.ledger.change(|pages| (pages.crossing, pages.granted) = (None, None))?;
    let online = online(kernel)?;
    let first = update.step(report.now(), Event::Begin)?;
    let outcome = drive(&mut update, first, &mut hands, &mut report);
    let failure = ended(kernel, &mut update, outcome.clone(), &hands, &mut report);
    let Some(trial) = &plan.trial else { return Ok(Reply::Failed(failure)) };
    let still_there = kernels::others(&*kernel.hardware)?.iter().any(|instance| instance.id == hands.seen.instance);
    let returned =
        Returned { cpus: self::online(kernel)? == online, memory: !still_there && keeps_no_memory(&outcome) };
    Ok(match tried(trial, &outcome, &hands, &plan.target.release, returned) {
        Some(report) => Reply::Tried(Box::new(report)),
        None => Reply::Failed(failure),
    })
}

/// APIC ids of the CPUs that are online.
fn online(kernel: &Kernel) -> Result<Vec<u32>> {
    Ok(kernel.device()?.cpus()?.into_iter().filter(|cpu| cpu.online).map(|cpu| cpu.apic_id).collect())
}

fn keeps_no_memory(outcome: &Outcome) -> bool {
    let (Outcome::TrialPassed { left } | Outcome::RolledBack { left, .. } | Outcome::Committed { left }) = outcome;
    !left.iter().any(|left| matches!(left.effect, Effect::GiveBackMemory | Effect::DestroyInstance))
}

/// What a trial has shown; nothing if it was broken off by the operator or failed for a reason of this kernel's own, which is told as
/// the failure that it is.
fn tried(trial: &Trial, outcome: &Outcome, hands: &Hands<'_>, release: &str, returned: Returned) -> Option<Tried> {
    let cause = match outcome {
        Outcome::TrialPassed { .. } => None,
        Outcome::RolledBack { cause, phase, .. } if is_candidates_fault(cause) => {
            Some(told(*phase, cause, hands.last_words.as_deref()))
        }
        Outcome::RolledBack { .. } | Outcome::Committed { .. } => return None,
    };
    let candidate = Candidate {
        id: hands.seen.instance,
        release: release.to_owned(),
        verdict: if cause.is_none() { Verdict::Pass } else { Verdict::Fail },
        cause,
        boot_ms: hands.seen.boot_ms,
        checks: judge::all(hands.seen.checks.clone(), &trial.checks),
        dmesg_tail: hands.log.lines.clone(),
    };
    Some(Tried::of(candidate, returned))
}

/// Says who may serve here, now that the update has ended, and what became of it.
pub(super) fn ended(
    kernel: &Kernel,
    update: &mut Update,
    outcome: Outcome,
    hands: &Hands<'_>,
    report: &mut Report<'_>,
) -> Failure {
    match &outcome {
        Outcome::Committed { .. } => kernel.services.elsewhere("the successor serves: nobody serves here".to_owned()),
        Outcome::RolledBack { left, .. } if must_stay_silent(left) => {
            let why = "the successor may still serve: it could not be stopped, so nobody serves here";
            kernel.services.elsewhere(why.to_owned());
        }
        // Also where nobody had been stopped yet: who came meanwhile waits.
        Outcome::RolledBack { .. } | Outcome::TrialPassed { .. } => kernel.services.open(kernel.facts().epoch),
    }
    report.close(update, &outcome);
    if !hands.log.lines.is_empty() {
        kernel.note(|update| update.last_words = Some(hands.log.clone()));
    }
    Failure { log: hands.log.lines.clone(), ..failure(outcome, hands) }
}

/// Whether the services were frozen and must not go on: it was not tried, because of what had failed.
fn must_stay_silent(left: &[Left]) -> bool {
    left.iter().any(|left| matches!(left.effect, Effect::Unfreeze { .. }) && left.cause.sort == Sort::Kept)
}

/// Drives an update on that a batond began which has died, from what was found of it: to its end, or back.
///
/// Gives what it ended with. (One that succeeds takes this kernel's last CPU with it.)
///
/// # Errors
/// Nothing was done: the journal cannot be opened, or the module does not say what is there.
pub fn go_on(kernel: &Kernel, resumed: Resumed, found: &Found) -> Result<Failure> {
    let _held = kernel.updating.lock().unwrap_or_else(PoisonError::into_inner);
    let Resumed { mut update, next } = resumed;
    let release = found.row.as_ref().map_or_else(|| "the successor".to_owned(), |row| row.image.clone());
    let facts = Facts { epoch: update.plan().epoch, ..kernel.facts() };
    let target = Target::found(release, found.granted.as_ref(), &kernel.config, facts);
    let (replies, _) = tokio::sync::mpsc::unbounded_channel();
    let mut report = Report::go_on(kernel, &update, &target.release, &replies)?;
    let mut hands = Hands::following(kernel, &target, update.plan().update, found)?;
    let outcome = drive(&mut update, next, &mut hands, &mut report);
    let goes_well = matches!(&outcome, Outcome::RolledBack { left, .. } if left.is_empty());
    let failure = ended(kernel, &mut update, outcome, &hands, &mut report);
    if goes_well {
        kernel.ledger.change(|pages| (pages.crossing, pages.granted) = (None, None))?;
    }
    Ok(failure)
}

/// The plan as the state machine wants it. The configuration's time-outs are its deadlines, and there are no others.
fn steps(id: UpdateId, plan: &Plan, kernel: &Kernel) -> Result<handover::update::plan::Plan> {
    let config = &kernel.config.update;
    let cpu = |cpu: &CpuFacts| Cpu { number: cpu.cpu, apic_id: cpu.apic_id };
    let moving = |facts: &CpuFacts| Moving { cpu: cpu(facts), online: facts.online };
    let step = Duration::from_secs(config.step_timeout_s);
    let boot = Duration::from_secs(config.boot_timeout_s);
    let (last, _) = plan.moves.iter().find(|(_, how)| *how == Move::Yield).context("there is no last CPU")?;
    let plan = handover::update::plan::Plan {
        update: id,
        boot: boot_id()?,
        services: kernel.services.crossings().into_iter().map(|crossing| crossing.name).collect(),
        goal: if plan.trial.is_some() { Goal::Canary } else { Goal::Upgrade },
        epoch: plan.target.facts.epoch,
        cpus: Cpus {
            spare: moving(&plan.spare),
            others: match &plan.trial {
                None => plan.moves.iter().filter(|(_, how)| *how != Move::Yield).map(|(cpu, _)| moving(cpu)).collect(),
                Some(_) => plan.lent.iter().map(moving).collect(),
            },
            last: cpu(last),
        },
        devices: plan.target.nic.is_some(),
        probation: plan.probation,
        deadlines: Deadlines {
            granted: step,
            booting: boot,
            trial: step,
            checks: plan.trial.as_ref().map_or(Duration::ZERO, |trial| time_for(trial, step)),
            cutover: Duration::from_millis(config.cutover_timeout_ms),
            per_cpu: step,
            watch: match plan.probation {
                ProbationPolicy::Watch { period, .. } => period + step,
                ProbationPolicy::CommitAtOnce => Duration::ZERO,
            },
            commit: step,
            undo: step,
        },
    };
    Ok(plan.check()?)
}

/// What the person who asked is told, and the exit code.
fn failure(outcome: Outcome, hands: &Hands<'_>) -> Failure {
    match outcome {
        Outcome::RolledBack { cause, phase, left } if left.is_empty() => match &hands.refusal {
            Some(refusal) => refusal.clone(),
            None => {
                Failure::new(Class::RolledBack, told(phase, &cause, hands.last_words.as_deref()), advice(cause.blame))
            }
        },
        Outcome::RolledBack { cause, phase, left } => Failure::new(
            Class::Failed,
            told(phase, &cause, hands.last_words.as_deref()),
            format!("the incumbent goes on, but this could not be undone: {}", list(&left)),
        ),
        Outcome::Committed { left } => Failure::new(
            Class::Failed,
            format!("the successor serves and stays, but this kernel could not leave: {}", list(&left)),
            "what this kernel still has is lost to the successor until the machine is restarted",
        ),
        // Only a trial was asked for, and this is no failure of it: see `tried`.
        Outcome::TrialPassed { left } => {
            Failure::new(Class::Failed, "the trial has passed, and was taken back", list(&left))
        }
    }
}

fn told(phase: Phase, cause: &Cause, last_words: Option<&str>) -> String {
    if cause.sort == Sort::CalledOff {
        // It did not fail, and nobody asks what the successor died of.
        return format!("{} in the phase {phase}", cause.what);
    }
    let who = match cause.blame {
        Blame::Operator => "the operator",
        Blame::Incumbent => "the incumbent",
        Blame::Successor => "the successor",
        Blame::Hardware => "the machine",
    };
    let last_words = last_words.map(|words| format!("; {words}")).unwrap_or_default();
    format!("{phase} failed, because of {who}: {}{last_words}", cause.what)
}

fn advice(blame: Blame) -> &'static str {
    match blame {
        Blame::Operator => "everything was undone",
        Blame::Incumbent => "everything was undone; batond's log says more",
        Blame::Successor => {
            "everything was undone; `baton dmesg` shows what the successor's kernel said, from its first message on"
        }
        Blame::Hardware => "everything was undone; a CPU did not do as it was told, see the kernel's log",
    }
}

/// What is left, for people.
pub fn list(left: &[Left]) -> String {
    left.iter().map(|left| format!("{}: {}", left.effect.name(), left.cause)).collect::<Vec<_>>().join("; ")
}

fn new_id() -> Result<UpdateId> {
    let mut bytes = [0; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(UpdateId(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_phase_and_culprit_and_how_far_it_came() {
        let cause = Cause::broken(Blame::Successor, "the successor was silent for 40.0 s");
        assert_eq!(
            told(Phase::Booting, &cause, Some("its CPU entered the kernel, and its agent never came up")),
            "booting failed, because of the successor: the successor was silent for 40.0 s; its CPU entered the kernel, \
             and its agent never came up"
        );
        let called_off = Cause::called_off(hands::CALLED_OFF_BY);
        let told = told(Phase::Trial, &called_off, Some("its agent answered"));
        assert_eq!(told, "called off by the operator in the phase trial");
    }
}
