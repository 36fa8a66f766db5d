//! After a batond that died in the middle of an update: the module still accounts for what it held, and the journal for
//! what it was doing. What has not passed the cutover is taken back, as an update that fails would; where the successor serves,
//! the update is gone on with ([`crate::update::upgrade::go_on`]).
//!
//! What is not taken back: the services' connections. They come by themselves ([`baton_sdk`]) for the arenas that they
//! have ([`crate::recovery::ledger`]).

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::update::blame::Blame;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Left, Outcome};
use handover::update::machine::{Event, JournalLine, Next, Serves};
use handover::update::recover::Resumed;
use kexec_core::device::{Access, Device, End, TakeCpu};
use kexec_core::layout::{PAGE, SIPI_PAGE};
use kexec_core::memory_map::Range;
use kexec_core::registry::State;

use crate::daemon::config::Config;
use crate::daemon::kernel::Ground;
use crate::machine::hardware::Hardware;
use crate::machine::net::{Net, parse_mac};
use crate::machine::pci;
use crate::recovery::journal::{self, JOURNAL, Journal};
use crate::recovery::ledger::Crossing;
use crate::takeover::birth::Birth;
use crate::takeover::home::Home;
use crate::userland::kernels::{self, Instance};

/// How long a CPU may take to its park page: it runs some dozen instructions.
const HOMECOMING: Duration = Duration::from_secs(5);

/// An update that an earlier batond began, and that this one goes on with: its successor serves.
pub struct GoingOn {
    /// The update, where the journal leaves it, and what comes next.
    pub resumed: Resumed,
    /// The successor in its place.
    pub crossing: Crossing,
}

/// Finds out what an earlier batond was doing when it died. What no successor serves yet is taken back here, and log and journal say
/// so; an update whose successor serves is to be gone on with. Before anything else of the machine is looked at: a CPU or an
/// interface may be missing.
pub fn recover(ground: &Ground) -> Option<GoingOn> {
    // Without the module nothing can be missing; a kernel that has not taken over yet has nothing to take back.
    let device = ground.device().filter(|_| ground.is_settled())?;
    let found = kernels::others(&*ground.hardware).and_then(|others| {
        let journal = Journal::of_this_boot(Path::new(JOURNAL)).unwrap_or_else(|error| {
            tracing::warn!("the last update's journal cannot be read: {error:#}");
            Journal::default()
        });
        match others.iter().find(|other| other.state == State::Serving) {
            Some(serving) => go_on(ground, serving, &journal).map(Some),
            None => {
                take_back_and_say(ground, device, &journal, &others);
                Ok(None)
            }
        }
    });
    found.unwrap_or_else(|error| {
        tracing::error!("an update that an earlier batond began is neither finished nor undone: {error:#}");
        None
    })
}

/// The successor serves, so the way on is the only one on which nobody notices anything.
fn go_on(ground: &Ground, serving: &Instance, journal: &Journal) -> Result<GoingOn> {
    let who = || {
        format!(
            "instance {} ({}) serves; stop it by restarting the machine, or leave both kernels as they are",
            serving.id, serving.image
        )
    };
    let crossing = ground.ledger.pages().crossing.filter(|crossing| crossing.instance == serving.id);
    let crossing = crossing.context("what it takes to go on was not written down").with_context(who)?;
    let resumed = journal.resume_serving().with_context(who)?;
    tracing::warn!(
        release = crossing.release,
        "an earlier batond died in an update whose successor serves: going on with it"
    );
    Ok(GoingOn { resumed, crossing })
}

/// Takes back what no successor serves with, and says in log and journal what came of it.
fn take_back_and_say(ground: &Ground, device: &Device, journal: &Journal, others: &[Instance]) {
    let last = journal.unfinished();
    if last.is_none() && others.is_empty() {
        return;
    }
    let during = match last.map(|last| &last.next) {
        Some(Next::Do(effect)) => effect.name(),
        _ => "an update without a journal",
    };
    tracing::warn!(during, "an earlier batond died in an update");
    let Ground { netlink, hardware, config, ledger, .. } = ground;
    let taken_back = take_back(device, &**hardware, &**netlink, config, journal, ground.birth.as_ref(), others);
    let taken_back = taken_back.and_then(|()| {
        netlink.restore(ledger.pages().arp_rules)?;
        ledger.change(|pages| {
            pages.arp_rules.clear();
            pages.crossing = None;
        })
    });
    let (what, left) = match taken_back {
        Ok(()) => (format!("batond died during `{during}`; the next one took everything back"), Vec::new()),
        Err(error) => {
            tracing::error!("what an earlier batond left could not be taken back: {error:#}");
            let cause = Cause::broken(Blame::Incumbent, format!("{error:#}"));
            let what = format!("batond died during `{during}`; the next one could not take everything back");
            (what, vec![Left { effect: Effect::DestroyInstance, cause }])
        }
    };
    let Some(last) = last else { return };
    let cause = Cause::broken(Blame::Incumbent, what);
    let line = JournalLine {
        seq: last.seq + 1,
        serves: Serves::Incumbent,
        event: Event::Unknown(cause.clone()),
        next: Next::End(Outcome::RolledBack { cause, phase: last.phase, left }),
        plan: None,
        ..last.clone()
    };
    if let Err(error) = journal::append(Path::new(JOURNAL), &line) {
        tracing::warn!("the journal ends here: {error:#}");
    }
}

fn take_back(
    device: &Device,
    hardware: &dyn Hardware,
    netlink: &dyn Net,
    config: &Config,
    journal: &Journal,
    birth: Option<&Birth>,
    left: &[Instance],
) -> Result<()> {
    let home = birth.map(Home::of);
    let bsp = birth.and_then(|birth| birth.facts().bsp);
    if let Some(apic_id) = left.iter().flat_map(|instance| &instance.cpus).find(|apic_id| bsp == Some(**apic_id)) {
        bail!("the CPU with APIC id {apic_id:#x} booted the machine: it cannot be stopped, and is with the successor");
    }
    for instance in left {
        for apic_id in &instance.cpus {
            device.take_cpu(instance.id, *apic_id, TakeCpu::Fence)?;
        }
        if let Some(home) = home {
            bring_home(device, home, instance)?;
        }
    }
    // Before its memory is anybody's: a device that it had may still write there.
    take_devices_back(device, hardware, netlink, config, birth)?;
    for instance in left {
        device.destroy_instance(instance.id)?;
    }
    device.set_end(End::Machine)?;
    let theirs = |apic_id| left.iter().any(|instance| instance.cpus.contains(&apic_id));
    for cpu in device.cpus()?.iter().filter(|cpu| !cpu.online) {
        if theirs(cpu.apic_id) || journal.cpus().any(|number| number == cpu.cpu) {
            if home.is_some_and(|home| !home.mailbox().is_parked(cpu.apic_id)) {
                bail!("CPU {} does not wait at this kernel's mailbox: onlining it would never end", cpu.cpu);
            }
            hardware.online_cpu(cpu.cpu)?;
        }
    }
    Ok(())
}

/// An interface that is not here was granted. Its driver gets it back; one that this kernel never saw is only stopped.
fn take_devices_back(
    device: &Device,
    hardware: &dyn Hardware,
    netlink: &dyn Net,
    config: &Config,
    birth: Option<&Birth>,
) -> Result<()> {
    for nic in &config.network.nic {
        let mac = parse_mac(&nic.mac)?;
        if netlink.find(mac)?.is_some() {
            continue;
        }
        hardware.probe_drivers()?;
        if let Some(link) = netlink.find(mac)? {
            netlink.link_up(&link)?;
            netlink.add(&link, nic.address)?;
        } else if let Some(facts) = birth.map(Birth::facts)
            && let Some(bdf) = facts.nics.get(&mac)
        {
            pci::stop_unseen(hardware, device, facts.ecam, *bdf)?;
        }
    }
    Ok(())
}

/// A former successor's CPUs that got INIT go to its own park page; as long as the instance has the page they start at.
fn bring_home(device: &Device, home: Home<'_>, instance: &Instance) -> Result<()> {
    if instance.cpus.is_empty() {
        return Ok(());
    }
    let sipi = device.map(Range::new(SIPI_PAGE, SIPI_PAGE + PAGE), Access::ReadWrite)?;
    for apic_id in &instance.cpus {
        // That it waited there may not have been struck out yet.
        home.mailbox().forget(*apic_id);
        home.bring(device, instance.id, &sipi, *apic_id, Instant::now() + HOMECOMING)?;
    }
    Ok(())
}
