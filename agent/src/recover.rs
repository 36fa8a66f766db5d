//! After a batond that died in the middle of an update: the module still accounts for what it held, and the journal for
//! what it was doing. What has not passed the cutover is taken back, as an update that fails would; what serves is left
//! alone, because only its own agent may stop it.
//!
//! What is not taken back: the services' connections. They come by themselves ([`crate::service`]) for the arenas that they
//! have ([`crate::ledger`]).

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use handover::error::{Blame, Cause, Left, Outcome};
use handover::machine::{Event, JournalLine, Next};
use handover::phase::Phase;
use handover::undo::Effect;
use kexec_core::device::{Access, Device, TakeCpu};
use kexec_core::layout::{PAGE, SIPI_PAGE};
use kexec_core::memory_map::Range;

use crate::birth::Birth;
use crate::config::Config;
use crate::home::Home;
use crate::kernels::{self, Instance};
use crate::ledger::Ledger;
use crate::net::{Netlink, parse_mac};
use crate::pci;
use crate::report::{self, JOURNAL};
use crate::sysfs;

/// How long a CPU may take to its park page: it runs some dozen instructions.
const HOMECOMING: Duration = Duration::from_secs(5);

/// Takes back what an earlier batond left, and says in log and journal what it found.
pub fn recover(device: &Device, netlink: &Netlink, config: &Config, birth: Option<&Birth>, ledger: &Ledger) {
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
        serves: handover::machine::Serves::Incumbent,
        event: Event::Unknown(cause),
        next: Next::End(outcome),
        ..last.clone()
    };
    if let Err(error) = report::append(Path::new(JOURNAL), &line) {
        tracing::warn!("the journal ends here: {error:#}");
    }
}

/// The lines of the last update.
#[derive(Debug, Default)]
struct Journal {
    lines: Vec<JournalLine>,
}

impl Journal {
    fn read(path: &Path) -> Result<Journal> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Journal::default()),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        Journal::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    fn parse(text: &str) -> Result<Journal> {
        // The last line may have been under way: what it would have announced was not begun.
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let lines = lines.map(serde_json::from_str).collect::<Result<_, _>>();
        Ok(Journal { lines: lines.context("a line does not read")? })
    }

    /// The last line, if the update was under way. One that has passed the commit ends without a word: this kernel left.
    fn unfinished(&self) -> Option<&JournalLine> {
        let committed = |phase| matches!(phase, Phase::Commit | Phase::Drained);
        self.lines.last().filter(|line| matches!(line.next, Next::Do(_)) && !committed(line.phase))
    }

    /// CPUs that the update took offline, or was about to.
    fn cpus(&self) -> impl Iterator<Item = u32> + '_ {
        self.lines.iter().filter_map(|line| match &line.next {
            Next::Do(Effect::OfflineCpu { cpu }) => Some(cpu.number),
            _ => None,
        })
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
    let left: Vec<Instance> = kernels::list()?.instances.into_iter().filter(|instance| instance.id != 0).collect();
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

#[cfg(test)]
mod tests {
    use handover::machine::Serves;
    use handover::plan::Cpu;

    use super::*;

    fn line(seq: u32, next: Next) -> String {
        let line = JournalLine {
            journal_version: 1,
            update: "u".into(),
            seq,
            at_ns: 0,
            phase: Phase::Granted,
            serves: Serves::Incumbent,
            event: Event::Done,
            next,
        };
        serde_json::to_string(&line).unwrap() + "\n"
    }

    #[test]
    fn an_update_without_an_end_is_unfinished_and_names_its_cpus() {
        let offline = line(1, Next::Do(Effect::OfflineCpu { cpu: Cpu { number: 3, apic_id: 3 } }));
        let begun = line(0, Next::Do(Effect::TakeMemory)) + &offline;
        let found = Journal::parse(&begun).unwrap();
        assert_eq!(found.unfinished().map(|line| line.seq), Some(1));
        assert_eq!(found.cpus().collect::<Vec<_>>(), [3]);
        // A line that was cut off announced something that was never begun.
        assert_eq!(
            Journal::parse(&(begun.clone() + "{\"journal_ver")).unwrap().unfinished().map(|line| line.seq),
            Some(1)
        );
        let ended = begun.clone() + &line(2, Next::End(Outcome::Committed { left: Vec::new() }));
        assert!(Journal::parse(&ended).unwrap().unfinished().is_none());
        let left = begun.replace("\"granted\"", "\"commit\"");
        assert!(left != begun && Journal::parse(&left).unwrap().unfinished().is_none());
        assert!(Journal::parse("no journal\n").is_err());
        assert!(Journal::read(Path::new("/nonexistent")).unwrap().unfinished().is_none());
    }
}
