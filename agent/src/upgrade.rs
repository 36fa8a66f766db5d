//! THE MAIN PATH: one update, from the incumbent's side.
//!
//! ```text
//! granted   take memory, release the interface, offline the spare CPU
//! booting   place, start, await hello
//! trial     stand by, check health
//! cutover   freeze, release the address, activate          ── nobody serves: the blackout ──
//! probation the other CPUs follow one by one               the successor serves
//! commit    no way back
//! drained   quiesce, leave: the last CPU goes over, and with it the machine
//! ```

use std::sync::TryLockError;
use std::time::Duration;

use anyhow::Result;
use kexec_core::cpus::Move;
use state_schemas::latest::handover_record::UpdateId;
use tokio::sync::mpsc::UnboundedSender;

use crate::control::{Reply, UpdateStatus, Upgrade};
use crate::hands::Hands;
use crate::kernel::Kernel;
use crate::outcome::{Class, Failure};
use crate::plan::{self, Plan};
use crate::timeline::tsc;

/// How long this kernel's network stays up after its last word, so that whoever waits for the word hears it. The service
/// does not wait: it is with the successor already.
const FAREWELL: Duration = Duration::from_millis(200);

/// Makes an update, telling `replies` how it goes; gives the last word.
pub fn run(kernel: &Kernel, wish: &Upgrade, replies: &UnboundedSender<Reply>) -> Reply {
    let _held = match kernel.updating.try_lock() {
        Ok(held) => held,
        Err(TryLockError::Poisoned(held)) => held.into_inner(),
        Err(TryLockError::WouldBlock) => {
            return Reply::Failed(Failure::new(
                Class::Busy,
                "another update runs",
                "wait for it; `baton status` shows how far it is",
            ));
        }
    };
    let (findings, plan) = plan::make(kernel, wish);
    let Some(plan) = plan else {
        let unknown = || Failure::new(Class::Failed, "no plan could be made", "see batond's log");
        return Reply::Failed(findings.refusal().unwrap_or_else(unknown));
    };
    match carry_out(kernel, &plan, replies) {
        Ok(()) => unreachable!("an update that succeeds takes this kernel's last CPU with it"),
        Err(failure) => Reply::Failed(failure),
    }
}

fn carry_out(kernel: &Kernel, plan: &Plan, replies: &UnboundedSender<Reply>) -> Result<(), Failure> {
    let id = new_id().map_err(|e| Failure::from_error(&e))?;
    let mut hands = Hands::new(kernel, plan, id).map_err(|e| Failure::from_error(&e))?;
    kernel.state().update = Some(UpdateStatus {
        id: id.to_string(),
        phase: "planned".to_owned(),
        incumbent_release: kernel.release().to_owned(),
        successor_release: plan.release.clone(),
        cpus_total: u32::try_from(plan.moves.len() + 1).unwrap_or(u32::MAX),
        cpus_moved: 0,
        left_undone: Vec::new(),
        timeline: Vec::new(),
    });
    let result = Update { kernel, plan, hands: &mut hands, replies }.run();
    match result {
        Ok(()) => Ok(()),
        Err((phase, error)) => Err(failed(kernel, &mut hands, phase, &error)),
    }
}

struct Update<'a, 'k> {
    kernel: &'a Kernel,
    plan: &'a Plan,
    hands: &'a mut Hands<'k>,
    replies: &'a UnboundedSender<Reply>,
}

type Step<'k> = fn(&mut Hands<'k>) -> Result<()>;

impl<'k> Update<'_, 'k> {
    fn run(&mut self) -> Result<(), (&'static str, anyhow::Error)> {
        self.phase(
            "granted",
            &[
                ("take memory", Hands::take_memory),
                ("release interface", Hands::release_nic),
                ("offline spare cpu", Hands::offline_spare),
            ],
        )?;
        self.phase(
            "booting",
            &[("place", Hands::place), ("start", Hands::start), ("await hello", Hands::await_hello)],
        )?;
        self.phase("trial", &[("stand by", Hands::stand_by), ("check health", Hands::check_health)])?;
        self.phase(
            "cutover",
            &[("freeze", Hands::freeze), ("release address", Hands::release_address), ("activate", Hands::activate)],
        )?;
        self.move_cpus().map_err(|error| ("probation", error))?;
        self.phase("commit", &[("commit", Hands::commit)])?;
        self.tell_committed();
        std::thread::sleep(FAREWELL);
        self.phase("drained", &[("quiesce", Hands::quiesce), ("leave", Hands::leave)])
    }

    fn phase(&mut self, phase: &'static str, steps: &[(&str, Step<'k>)]) -> Result<(), (&'static str, anyhow::Error)> {
        self.kernel.set_phase(phase);
        let started = tsc();
        for (name, step) in steps {
            let text = (*name).to_owned();
            tracing::info!(phase, step = text, "update");
            let _ = self.replies.send(Reply::Progress { phase: phase.to_owned(), text });
            let begun = tsc();
            let result = step(self.hands);
            self.hands.timeline.add(name, begun, tsc());
            result.map_err(|error| (phase, error))?;
        }
        self.hands.timeline.add(phase, started, tsc());
        Ok(())
    }

    fn move_cpus(&mut self) -> Result<()> {
        self.kernel.set_phase("probation");
        let started = tsc();
        for (cpu, how) in self.plan.moves.iter().filter(|(_, how)| *how != Move::Yield) {
            let begun = tsc();
            let result = self.hands.move_cpu(*cpu, *how);
            self.hands.timeline.add(&format!("move cpu {}", cpu.cpu), begun, tsc());
            result?;
            self.kernel.note(|update| update.cpus_moved += 1);
        }
        self.hands.timeline.add("probation", started, tsc());
        Ok(())
    }

    fn tell_committed(&self) {
        let khz = self.kernel.device().and_then(|device| Ok(device.info()?.tsc_khz)).unwrap_or(1);
        let timeline = self.hands.timeline.spans(khz.into());
        let release = self.plan.release.clone();
        let _ = self.replies.send(Reply::Committed { release, timeline });
    }
}

/// Undoes everything, in the reverse order, and says how that went.
fn failed(kernel: &Kernel, hands: &mut Hands<'_>, phase: &'static str, error: &anyhow::Error) -> Failure {
    tracing::warn!(phase, "the update failed, undoing it: {error:#}");
    let undos: [(&str, Step<'_>); 7] = [
        ("fence", Hands::fence),
        ("take the address back", Hands::take_address_back),
        ("unfreeze", Hands::unfreeze),
        ("give memory back", Hands::give_back_memory),
        ("online the spare cpu", Hands::online_spare),
        ("take the interface back", Hands::take_nic_back),
        ("end", |_| Ok(())),
    ];
    let mut left = Vec::new();
    for (name, undo) in undos {
        if let Err(error) = undo(hands) {
            tracing::error!(undo = name, "{error:#}");
            left.push(format!("{name}: {error:#}"));
        }
    }
    kernel.set_phase("rolled back");
    kernel.note(|update| update.left_undone.clone_from(&left));
    let mut failure = Failure::from_error(error);
    failure.cause = format!("{phase}: {}", failure.cause);
    if failure.class == Class::Failed {
        failure.class = Class::RolledBack;
    }
    if !left.is_empty() {
        failure.class = Class::Failed;
        failure.advice = format!("could not be undone: {}", left.join("; "));
    }
    failure
}

fn new_id() -> Result<UpdateId> {
    let mut bytes = [0; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(UpdateId(bytes))
}
