//! Who runs the successor: CPUs are taken offline, started or parked over there, handed over one by one, and brought home
//! again where the update ends early.

use std::mem::offset_of;

use anyhow::{Context, Result, bail};
use handover::update::cpu::Cpu;
use kexec_core::cpus::ParkedCpus;
use kexec_core::device::{GiveCpu, Mapping, TakeCpu, Yield};
use kexec_core::klog::LogTail;
use kexec_core::layout::SIPI_PAGE;
use kexec_core::registry::State;
use kexec_core::trampoline::{Epitaph, SipiPage, YieldArgs, sipi_page, step, yield_command};
use state_schemas::control_block::words::BootMark;
use state_schemas::control_block::{self, Piece, words};
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::SharedMemory;
use zerocopy::IntoBytes;

use super::Hands;
use crate::machine::bounded::within;
use crate::takeover::home::{Home, await_parked, pause};

/// So many lines of its log are told with a failure.
const LAST_LINES: usize = 30;

impl<'k> Hands<'k> {
    /// The undo of [`Hands::offline_cpu`].
    pub(super) fn online_cpu(&mut self, cpu: Cpu) -> Result<()> {
        if self.device.cpu_info(cpu.number)?.is_some_and(|info| info.online) {
            return Ok(());
        }
        self.bring_home(cpu.apic_id)?;
        if self.home().is_some_and(|home| !home.mailbox().is_parked(cpu.apic_id)) {
            bail!("{} does not wait at this kernel's mailbox: onlining it would never end", name(cpu));
        }
        let hardware = self.kernel.hardware.clone();
        within(self.until, &format!("bring {} online", name(cpu)), move || hardware.online_cpu(cpu.number))
    }

    /// Takes a CPU offline. Its undo is [`Hands::online_cpu`].
    pub(super) fn offline_cpu(&self, cpu: Cpu) -> Result<()> {
        let hardware = self.kernel.hardware.clone();
        let offline = move || hardware.offline_cpu(cpu.number);
        within(self.until, &format!("take {} offline", name(cpu)), offline)
            .with_context(|| format!("{} cannot be taken offline", name(cpu)))
    }

    /// Where CPUs wait that this kernel takes offline; nothing in one that the firmware booted.
    pub(super) fn home(&self) -> Option<Home<'k>> {
        self.kernel.birth.as_ref().map(Home::of)
    }

    /// Back to this kernel's own park page, if it was stopped by INIT.
    pub(super) fn bring_home(&mut self, apic_id: u32) -> Result<()> {
        if self.stopped.contains(&apic_id) {
            if let (Some(home), Some(site)) = (self.home(), &self.site) {
                home.bring(self.device, site.instance, site.sipi()?, apic_id, self.until)?;
            }
            self.stopped.remove(&apic_id);
        }
        Ok(())
    }

    /// Starts a CPU in the successor's kernel.
    pub(super) fn start_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let boot = self.placed()?.boot;
        let site = self.site()?;
        let instance = site.instance;
        site.sipi()?.write(0, &sipi_page(&boot));
        self.device.give_cpu(instance, cpu.apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
        self.given.insert(cpu.apic_id);
        self.forget_parked(cpu.apic_id);
        self.device.update_instance(instance, State::Booting, None)?;
        Ok(())
    }

    /// The undo of [`Hands::start_cpu`], and of every CPU handed over since: nothing runs in the successor any more.
    pub(super) fn fence(&mut self, cpus: &[Cpu]) -> Result<()> {
        let Some(site) = &self.site else { return Ok(()) };
        if !self.heard {
            self.last_words = site.sipi().ok().map(how_far_without_agent);
        }
        let mut first_error = Ok(());
        // All of them, whatever one says, and nothing in between: what runs on may still answer clients.
        for cpu in cpus.iter().filter(|cpu| self.given.contains(&cpu.apic_id)) {
            let fenced = if self.is_firmware_bsp(cpu.apic_id) {
                Err(anyhow::anyhow!("{} booted the machine: INIT would reset everything", name(*cpu)))
            } else {
                self.device.take_cpu(site.instance, cpu.apic_id, TakeCpu::Fence).map_err(Into::into)
            };
            first_error = first_error.and(fenced.map(|()| {
                self.stopped.insert(cpu.apic_id);
            }));
        }
        self.given.retain(|apic_id| !self.stopped.contains(apic_id));
        first_error.context("cannot stop the successor")
    }

    fn is_firmware_bsp(&self, apic_id: u32) -> bool {
        self.firmware_bsp == Some(apic_id)
    }

    /// How far the successor came, and what its log says of its end. It is stopped, and still has its memory.
    pub(super) fn read_last_words(&mut self) -> Result<()> {
        let Some(placed) = &self.placed else { return Ok(()) };
        let how_far = match BootMark::of_word(placed.line.memory().load(words::BOOT_MARK_AT)) {
            _ if self.heard => None,
            Some(BootMark::None) => self.last_words.take(),
            Some(BootMark::Agent) => Some("its agent has read the handover record, and come no further".to_owned()),
            Some(BootMark::Network | BootMark::Standby) => Some("its agent was ready and did not say so".to_owned()),
            None => Some("what its agent wrote of itself is destroyed".to_owned()),
        };
        match self.kernel.successor_log.last_words(self.device, LAST_LINES) {
            Ok(tail) => self.log = tail,
            // The update is undone all the same.
            Err(error) => tracing::warn!("the successor's log cannot be read: {error:#}"),
        }
        self.last_words = how_it_ended(how_far, &self.log);
        Ok(())
    }

    /// A CPU that INIT took out of this kernel's own park page waits there no longer.
    fn forget_parked(&self, apic_id: u32) {
        if let Some(home) = self.home() {
            home.mailbox().forget(apic_id);
        }
    }

    /// Sends an offline CPU to the successor's park page: from our own park page if it waits there, else by SIPI.
    pub(super) fn park_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let park = self.placed()?.park;
        let site = self.site()?;
        match self.home().map(Home::mailbox) {
            Some(own) if own.is_parked(cpu.apic_id) => {
                if !self.given.contains(&cpu.apic_id) {
                    self.device.give_cpu(site.instance, cpu.apic_id, GiveCpu::Record)?;
                    self.given.insert(cpu.apic_id);
                }
                own.wake(cpu.apic_id, park.entry, || pause(self.until))?;
            }
            // A batond before this one has sent it there.
            _ if self.given.contains(&cpu.apic_id) => {}
            _ if self.is_firmware_bsp(cpu.apic_id) => {
                bail!("{} booted the machine and waits at no mailbox: it cannot be moved", name(cpu))
            }
            _ => {
                site.sipi()?.write(0, &sipi_page(&park));
                self.device.give_cpu(site.instance, cpu.apic_id, GiveCpu::Start { page: SIPI_PAGE })?;
                self.given.insert(cpu.apic_id);
            }
        }
        self.await_parked_there(cpu)
    }

    /// The undo of [`Hands::park_cpu`]: through the successor's mailbox to our own, else by INIT.
    pub(super) fn unpark_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let apic_id = cpu.apic_id;
        if !self.given.contains(&apic_id) {
            return self.bring_home(apic_id); // never left, or was fenced
        }
        let instance = self.site()?.instance;
        let until = self.until;
        let placed = self.placed.as_ref().context("the successor is not placed")?;
        let theirs = ParkedCpus::new(placed.line.memory(), control_block::MAILBOX.offset);
        match self.home() {
            Some(home) if home.mailbox().is_parked(apic_id) => {
                self.device.take_cpu(instance, apic_id, TakeCpu::Record)?;
            }
            Some(home) if theirs.is_parked(apic_id) => {
                theirs.wake(apic_id, home.entry(), || pause(until))?;
                await_parked(&home.mailbox(), apic_id, until)?;
                self.device.take_cpu(instance, apic_id, TakeCpu::Record)?;
            }
            _ if self.is_firmware_bsp(apic_id) => bail!("{} is at no mailbox", name(cpu)),
            _ => {
                self.device.take_cpu(instance, apic_id, TakeCpu::Fence)?;
                theirs.forget(apic_id);
                self.stopped.insert(apic_id);
            }
        }
        self.given.remove(&apic_id);
        self.bring_home(apic_id)
    }

    /// Tells the successor of a parked CPU, and waits until it is online there.
    pub(super) fn hand_cpu(&mut self, cpu: Cpu) -> Result<()> {
        let apic_id = cpu.apic_id;
        self.ask(&ToSuccessor::CpuParked { apic_id }, |answer| match answer {
            ToIncumbent::CpuOnline { apic_id: online, .. } if online == apic_id => Some(()),
            _ => None,
        })?;
        self.kernel.note(|update| update.cpus_moved += 1);
        Ok(())
    }

    /// The undo of [`Hands::hand_cpu`], with the successor's help: there, too, an offline CPU parks.
    pub(super) fn take_cpu_back(&mut self, cpu: Cpu) -> Result<()> {
        let apic_id = cpu.apic_id;
        self.ask(&ToSuccessor::ReleaseCpu { apic_id }, |answer| match answer {
            ToIncumbent::CpuReleased { apic_id: released } if released == apic_id => Some(()),
            _ => None,
        })?;
        self.await_parked_there(cpu)
    }

    fn await_parked_there(&self, cpu: Cpu) -> Result<()> {
        let placed = self.placed.as_ref().context("the successor is not placed")?;
        let theirs = ParkedCpus::new(placed.line.memory(), control_block::MAILBOX.offset);
        await_parked(&theirs, cpu.apic_id, self.until).context("at the successor's park page")
    }

    /// Hands over the last CPU, and with it the machine. Comes back only if it could not leave.
    pub(super) fn yield_last_cpu(&mut self, last: Cpu) -> Result<()> {
        let base = self.site()?.region.start();
        let at = |piece: Piece| base + piece.offset;
        let root = self.placed()?.root;
        let mut arguments = YieldArgs::new(at(control_block::PARK_PAGE));
        arguments.command = yield_command::PARK;
        let line = &mut self.placed()?.line;
        line.memory().write(control_block::YIELD_ARGS.offset, arguments.as_bytes());
        line.send(&ToSuccessor::LastCpu { apic_id: last.apic_id })?;
        self.device.yield_last_cpu(Yield {
            entry: at(control_block::YIELD_PAGE),
            arg: at(control_block::YIELD_ARGS),
            table: at(control_block::TRANSITION_TABLE),
            identity: root,
        })?;
        bail!("the last CPU came back")
    }
}

fn name(cpu: Cpu) -> String {
    format!("CPU {} (APIC id {:#x})", cpu.number, cpu.apic_id)
}

/// What is said of a successor's end: how far it came without its agent, and what its kernel says. Where its agent spoke, that
/// has told what was wrong, and the kernel is quoted only when it died.
fn how_it_ended(how_far: Option<String>, log: &LogTail) -> Option<String> {
    let Some(how_far) = how_far else {
        return log.cause.as_ref().filter(|cause| cause.kind.is_fatal()).map(ToString::to_string);
    };
    Some(if log.lines.is_empty() { how_far } else { format!("{how_far}; {log}") })
}

/// What the trampoline tells of a CPU that was started.
fn how_far_without_agent(sipi: &Mapping) -> String {
    let mut reached = [0; 4];
    sipi.read((offset_of!(SipiPage, epitaph) + offset_of!(Epitaph, step)) as u64, &mut reached);
    match reached {
        step::JUMP => "its CPU entered the kernel, and its agent never came up".to_owned(),
        [0, 0, 0, 0] => "its CPU never began to run".to_owned(),
        other => format!("its CPU came no further than `{}` on its way into the kernel", other.escape_ascii()),
    }
}

#[cfg(test)]
mod tests {
    use kexec_core::klog::{DeathCause, Kind};

    use super::*;

    #[test]
    fn a_kernel_is_quoted_where_its_agent_said_nothing_or_where_it_died() {
        let cause = |kind| DeathCause { kind, what: "what".to_owned(), place: None, after: None };
        let log = |kind: Option<Kind>| LogTail {
            cause: kind.map(cause),
            lines: vec!["[    0.000000] last".to_owned()],
            last: Some("last".to_owned()),
        };
        let silent = || Some("its agent never came up".to_owned());
        let ended = |how_far, log| how_it_ended(how_far, &log);
        assert_eq!(
            ended(silent(), log(Some(Kind::Panic))).unwrap(),
            "its agent never came up; its kernel panicked: what"
        );
        assert_eq!(ended(silent(), log(None)).unwrap(), "its agent never came up; its last message: last");
        assert_eq!(ended(silent(), LogTail::default()), silent());
        assert_eq!(ended(None, log(Some(Kind::Panic))).unwrap(), "its kernel panicked: what");
        assert_eq!(ended(None, log(Some(Kind::Error))), None);
        assert_eq!(ended(None, log(None)), None);
    }
}
