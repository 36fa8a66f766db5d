//! After a batond that died in the middle of an update: the module still accounts for what it held, and the journal for
//! what it was doing. What has not passed the cutover is taken back, as an update that fails would; what serves is left
//! alone, because only its own agent may stop it.
//!
//! What is not taken back: the services' connections. They come by themselves ([`baton_sdk`]) for the arenas that they
//! have ([`crate::recovery::ledger`]).

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::update::blame::Blame;
use handover::update::effect::Effect;
use handover::update::error::{Cause, Left, Outcome};
use handover::update::machine::{Event, JournalLine, Next};
use kexec_core::device::{Access, Device, TakeCpu};
use kexec_core::layout::{PAGE, SIPI_PAGE};
use kexec_core::memory_map::Range;

use crate::daemon::config::Config;
use crate::daemon::kernel::Ground;
use crate::machine::net::{Netlink, parse_mac};
use crate::machine::pci;
use crate::machine::sysfs;
use crate::recovery::journal::{self, JOURNAL, Journal};
use crate::takeover::birth::Birth;
use crate::takeover::home::Home;
use crate::userland::kernels::{self, Instance};

/// How long a CPU may take to its park page: it runs some dozen instructions.
const HOMECOMING: Duration = Duration::from_secs(5);

/// Takes back what an earlier batond left, and says in log and journal what it found. Before anything of the machine is looked
/// at: a CPU or an interface may be missing.
pub fn recover(ground: &Ground) {
    // Without the module nothing can be missing; a kernel that has not taken over yet has nothing to take back.
    let Some(device) = ground.device().filter(|_| ground.is_settled()) else { return };
    let Ground { netlink, config, ledger, .. } = ground;
    let birth = ground.birth.as_ref();
    let journal = Journal::read(Path::new(JOURNAL)).unwrap_or_else(|error| {
        tracing::warn!("the last update's journal cannot be read: {error:#}");
        Journal::default()
    });
    let Some(last) = journal.unfinished() else { return };
    let during = match &last.next {
        Next::Do(effect) => effect.name(),
        Next::End(_) => "its end",
    };
    tracing::warn!(update = last.update, phase = last.phase.name(), during, "an earlier batond died in an update");
    let taken_back = take_back(device, netlink, config, &journal, birth);
    let taken_back = taken_back.and_then(|()| {
        netlink.restore(ledger.pages().arp_rules)?;
        ledger.change(|pages| pages.arp_rules.clear())
    });
    let left = match taken_back {
        Ok(()) => Vec::new(),
        Err(error) => {
            tracing::error!("what an earlier batond left could not be taken back: {error:#}");
            let cause = Cause::broken(Blame::Incumbent, format!("{error:#}"));
            vec![Left { effect: Effect::DestroyInstance, cause }]
        }
    };
    let cause =
        Cause::broken(Blame::Incumbent, format!("batond died during `{during}`; its successor took everything back"));
    let outcome = Outcome::RolledBack { cause: cause.clone(), phase: last.phase, left };
    let line = JournalLine {
        seq: last.seq + 1,
        serves: handover::update::machine::Serves::Incumbent,
        event: Event::Unknown(cause),
        next: Next::End(outcome),
        plan: None,
        ..last.clone()
    };
    if let Err(error) = journal::append(Path::new(JOURNAL), &line) {
        tracing::warn!("the journal ends here: {error:#}");
    }
}

fn take_back(
    device: &Device,
    netlink: &Netlink,
    config: &Config,
    journal: &Journal,
    birth: Option<&Birth>,
) -> Result<()> {
    let home = birth.map(Home::of);
    let left = kernels::others()?;
    if let Some(serving) = left.iter().find(|instance| instance.state == "serving") {
        bail!("instance {} ({}) serves: its own agent has to finish the update", serving.id, serving.image);
    }
    let bsp = birth.and_then(|birth| birth.facts().bsp);
    if let Some(apic_id) = left.iter().flat_map(|instance| &instance.cpus).find(|apic_id| bsp == Some(**apic_id)) {
        bail!("the CPU with APIC id {apic_id:#x} booted the machine: it cannot be stopped, and is with the successor");
    }
    for instance in &left {
        for apic_id in &instance.cpus {
            device.take_cpu(instance.id, *apic_id, TakeCpu::Fence)?;
        }
        if let Some(home) = home {
            bring_home(device, home, instance)?;
        }
    }
    // Before its memory is anybody's: a device that it had may still write there.
    take_devices_back(device, netlink, config, birth)?;
    for instance in &left {
        device.destroy_instance(instance.id)?;
    }
    let theirs = |apic_id| left.iter().any(|instance| instance.cpus.contains(&apic_id));
    for cpu in device.cpus()?.iter().filter(|cpu| !cpu.online) {
        if theirs(cpu.apic_id) || journal.cpus().any(|number| number == cpu.cpu) {
            if home.is_some_and(|home| !home.mailbox().is_parked(cpu.apic_id)) {
                bail!("CPU {} does not wait at this kernel's mailbox: onlining it would never end", cpu.cpu);
            }
            sysfs::online_cpu(cpu.cpu)?;
        }
    }
    Ok(())
}

/// An interface that is not here was granted. Its driver gets it back; one that this kernel never saw is only stopped.
fn take_devices_back(device: &Device, netlink: &Netlink, config: &Config, birth: Option<&Birth>) -> Result<()> {
    for nic in &config.network.nic {
        let mac = parse_mac(&nic.mac)?;
        if netlink.find(mac)?.is_some() {
            continue;
        }
        probe_drivers()?;
        if let Some(link) = netlink.find(mac)? {
            netlink.link_up(&link)?;
            netlink.add(&link, nic.address)?;
        } else if let Some(facts) = birth.map(Birth::facts)
            && let Some(bdf) = facts.nics.get(&mac)
        {
            pci::stop_unseen(device, facts.ecam, *bdf)?;
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

/// Lets the kernel look for drivers of PCI functions that have none: an interface that was to be granted.
fn probe_drivers() -> Result<()> {
    let root = Path::new("/sys/bus/pci");
    for entry in fs::read_dir(root.join("devices")).context("cannot list PCI functions")? {
        let entry = entry?;
        if !entry.path().join("driver").exists() {
            // A function that no driver wants answers with an error, which is no news.
            let _ = fs::write(root.join("drivers_probe"), entry.file_name().to_string_lossy().as_bytes());
        }
    }
    Ok(())
}
