//! After a batond that died in the middle of an update: the module still accounts for what it held, the journal for what it was doing,
//! and the ledger for what of it has to be known. Which way it goes from there is decided in [`handover::update::recover`]; it is done by
//! hands that follow those of the dead one ([`crate::update::hands::Found`]), as every other step of an update.
//!
//! What is not taken back: the services' connections. They come by themselves ([`baton_sdk`]) for the arenas that they
//! have ([`crate::recovery::ledger`]).

use std::time::Instant;

use anyhow::{Context, Result};
use handover::update::blame::Blame;
use handover::update::cpu::Cpu;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Left, Outcome};
use handover::update::machine::{Event, JournalLine, Next, Serves};
use handover::update::recover::{Evidence, Recovery, Resumed};
use kexec_core::device::{Access, Device, End};
use kexec_core::memory_map::Range;
use kexec_core::registry::State;
use state_schemas::control_block::{self, words};
use state_schemas::latest::handover_record::UpdateId;
use state_schemas::shared::SharedMemory;

use crate::daemon::kernel::Kernel;
use crate::machine::net::parse_mac;
use crate::recovery::journal::{self, Journal};
use crate::recovery::ledger::{Crossing, Granted};
use crate::update::hands::{Found, Hands};
use crate::update::plan::Target;
use crate::update::upgrade;
use crate::userland::kernels::{self, Instance};

/// An update that an earlier batond began, and that this one goes on with: its successor serves.
pub struct GoingOn {
    /// The update, where the journal leaves it, and what comes next.
    pub resumed: Resumed,
    /// What there is of it.
    pub found: Found,
}

/// Finds out what an earlier batond was doing when it died. What no successor serves yet is taken back here, and log and journal say
/// so; an update whose successor serves is to be gone on with. Before anybody serves here: who does is decided by it.
pub fn recover(kernel: &Kernel) -> Option<GoingOn> {
    // Without the module nothing can be missing; a kernel that has not taken over yet has nothing to take back.
    let device = kernel.loaded_device().filter(|_| !kernel.is_successor())?;
    look(kernel, device).unwrap_or_else(|error| {
        tracing::error!("an update that an earlier batond began is neither finished nor undone: {error:#}");
        None
    })
}

fn look(kernel: &Kernel, device: &Device) -> Result<Option<GoingOn>> {
    let rows = kernels::others(&*kernel.hardware)?;
    let journal = Journal::of_this_boot(&kernel.journal).unwrap_or_else(|error| {
        tracing::warn!("the last update's journal cannot be read: {error:#}");
        Journal::default()
    });
    let serving = rows.iter().find(|row| row.state == State::Serving);
    let row = serving.or(rows.first()).cloned();
    let pages = kernel.ledger.pages();
    let crossing = pages.crossing.filter(|crossing| row.as_ref().is_some_and(|row| row.id == crossing.instance));
    let evidence = Evidence {
        answered: serving.is_some(),
        epoch_word: crossing.as_ref().and_then(|crossing| epoch_word(device, crossing)),
    };
    let who = |row: &Instance| {
        format!(
            "instance {} ({}) serves; stop it by restarting the machine, or leave both kernels as they are",
            row.id, row.image
        )
    };
    let decided = match journal.recover(evidence) {
        Ok(Recovery::Nothing) if rows.is_empty() => return Ok(None),
        // There is an instance, and nothing that leads to it.
        Ok(Recovery::Nothing) => None,
        Ok(decided) => Some(decided),
        Err(_) if rows.is_empty() && journal.unfinished().is_none() => return Ok(None),
        Err(error) => {
            tracing::warn!("the last update's journal does not lead to where it is: {error}");
            None
        }
    };
    if let Some(row) = serving {
        let known = decided.is_some() && crossing.is_some();
        known.then_some(()).context("what it takes to go on was not written down").with_context(|| who(row))?;
    }
    let Some(decided) = decided else {
        take_back_by_the_module(kernel, device, &journal, &rows);
        return Ok(None);
    };
    let found = |resumed: &Resumed| Found {
        granted: pages.granted.clone().or_else(|| crossing.as_ref().and_then(|crossing| crossing.granted.clone())),
        row: row.clone(),
        crossing: crossing.clone(),
        cpus: {
            let cpus = &resumed.update.plan().cpus;
            cpus.others.iter().chain([&cpus.spare]).map(|moving| (moving.cpu.number, moving.cpu.apic_id)).collect()
        },
        until: Some(Instant::now() + resumed.update.plan().deadlines.cutover),
    };
    let during = journal.unfinished().map_or("the update", |last| match &last.next {
        Next::Do(effect) => effect.name(),
        Next::End(_) => "the end of the update",
    });
    match decided {
        Recovery::Nothing => Ok(None),
        Recovery::GoOn(resumed) | Recovery::Leave(resumed) => {
            tracing::warn!(during, "an earlier batond died in an update whose successor serves: going on with it");
            Ok(Some(GoingOn { found: found(&resumed), resumed: *resumed }))
        }
        Recovery::TakeBack(resumed) => {
            tracing::warn!(during, "an earlier batond died in an update: taking it back");
            let (found, serves) = (found(&resumed), resumed.update.serves());
            match upgrade::go_on(kernel, *resumed, &found) {
                Ok(ended) => tracing::warn!("the update of an earlier batond has ended: {}", ended.cause),
                // Nothing was done, and who holds the arenas is not known.
                Err(error) if serves != Serves::Incumbent => {
                    kernel.services.elsewhere(format!("the successor may serve, and cannot be looked at: {error:#}"));
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
            Ok(None)
        }
    }
}

/// What the successor's control block says of who holds the epoch.
fn epoch_word(device: &Device, crossing: &Crossing) -> Option<u64> {
    let block = Range::with_len(crossing.region.0, control_block::SIZE)?;
    let control = device.map(block, Access::ReadOnly).ok()?;
    Some(control.load(words::EPOCH_AT))
}

/// Takes back what the module accounts for, where no journal leads to it, and says in log and journal what came of it.
fn take_back_by_the_module(kernel: &Kernel, device: &Device, journal: &Journal, rows: &[Instance]) {
    tracing::warn!(
        "an earlier batond died in an update, and no journal leads to it: everything that the module knows of is taken back"
    );
    let mut left = Vec::new();
    for row in rows {
        left.extend(take_back(kernel, device, journal, row).unwrap_or_else(|error| {
            let cause = Cause::broken(Blame::Incumbent, format!("{error:#}"));
            vec![Left { effect: Effect::DestroyInstance, cause }]
        }));
    }
    let ended = device.set_end(End::Machine).map_err(anyhow::Error::from);
    let noted = kernel.ledger.change(|pages| {
        if left.is_empty() {
            (pages.crossing, pages.granted) = (None, None);
        }
    });
    for error in [ended, noted].into_iter().filter_map(Result::err) {
        tracing::error!("{error:#}");
    }
    if !left.is_empty() {
        tracing::error!("what an earlier batond left could not all be taken back: {}", upgrade::list(&left));
    }
    let Some(last) = journal.unfinished() else { return };
    let what = if left.is_empty() { "took everything back" } else { "could not take everything back" };
    let cause = Cause::broken(Blame::Incumbent, format!("batond died in the update; the next one {what}"));
    let line = JournalLine {
        seq: last.seq + 1,
        serves: Serves::Incumbent,
        event: Event::Unknown(cause.clone()),
        next: Next::End(Outcome::RolledBack { cause, phase: last.phase, left }),
        plan: None,
        ..last.clone()
    };
    if let Err(error) = journal::append(&kernel.journal, &line) {
        tracing::warn!("the journal ends here: {error:#}");
    }
}

/// The undos of everything that an instance can hold, as an update would do them; says what is left.
fn take_back(kernel: &Kernel, device: &Device, journal: &Journal, row: &Instance) -> Result<Vec<Left>> {
    let cpus: Vec<Cpu> = device
        .cpus()?
        .into_iter()
        .filter(|cpu| !cpu.online)
        .filter(|cpu| row.cpus.contains(&cpu.apic_id) || journal.cpus().any(|number| number == cpu.cpu))
        .map(|cpu| Cpu { number: cpu.cpu, apic_id: cpu.apic_id })
        .collect();
    let found = Found {
        row: Some(row.clone()),
        granted: granted(kernel)?,
        cpus: cpus.iter().map(|cpu| (cpu.number, cpu.apic_id)).collect(),
        ..Found::default()
    };
    let target = Target::found(row.image.clone(), found.granted.as_ref(), &kernel.config, kernel.facts());
    let mut hands = Hands::following(kernel, &target, UpdateId([0; 16]), &found)?;
    let mut undo = vec![Effect::Fence { cpus: cpus.clone() }, Effect::TakeDevicesBack, Effect::DestroyInstance];
    undo.extend(cpus.iter().map(|cpu| Effect::OnlineCpu { cpu: *cpu }));
    undo.push(Effect::GiveBackMemory);
    let mut left: Vec<Left> = Vec::new();
    for effect in undo {
        if let Some(before) = left.iter().find(|left| left.effect.forbids(&effect)) {
            let cause = Cause::kept(before.cause.blame, &format!("{} failed", before.effect.name()));
            left.push(Left { effect, cause });
            continue;
        }
        let until = Instant::now() + kernel.config.update.step_timeout();
        if let Event::Failed(cause) | Event::Unknown(cause) = hands.carry_out(&effect, until) {
            left.push(Left { effect, cause });
        }
    }
    Ok(left)
}

/// The interface that was granted: as it was written down, or one that is configured and not here. Its driver may only need to be asked.
fn granted(kernel: &Kernel) -> Result<Option<Granted>> {
    let pages = kernel.ledger.pages();
    if let Some(granted) = pages.granted.or_else(|| pages.crossing?.granted) {
        return Ok(Some(granted));
    }
    for nic in &kernel.config.network.nic {
        let mac = parse_mac(&nic.mac)?;
        if kernel.netlink.find(mac)?.is_some() {
            continue;
        }
        kernel.hardware.probe_drivers()?;
        if let Some(link) = kernel.netlink.find(mac)? {
            kernel.netlink.link_up(&link)?;
            kernel.netlink.add(&link, nic.address)?;
            continue;
        }
        // The configuration may name an interface that this machine does not have: nothing is done about that.
        if let Some(bdf) = kernel.facts().nics.get(&mac) {
            return Ok(Some(Granted { mac, bdf: *bdf, unbound: None }));
        }
    }
    Ok(None)
}
