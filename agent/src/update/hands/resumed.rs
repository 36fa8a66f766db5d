//! Hands that follow those of a batond that died in the middle of an update: what they hold is what the module, the ledger and the
//! network say that there is.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use kexec_core::device::Access;
use kexec_core::layout::{LowSlot, PAGE, SIPI_PAGE};
use kexec_core::memory_map::Range;
use kexec_core::trampoline::SipiArgs;
use state_schemas::control_block;
use state_schemas::latest::handover_record::UpdateId;

use super::memory::Site;
use super::{Hands, Placed};
use crate::daemon::kernel::Kernel;
use crate::daemon::successor_log;
use crate::recovery::ledger::{Crossing, Granted};
use crate::update::line::Line;
use crate::update::plan::Target;
use crate::userland::kernels::Instance;

/// What is left of an update whose batond has died.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The module's account of the successor; nothing when it has none.
    pub row: Option<Instance>,
    /// What was written down of it in the trial.
    pub crossing: Option<Crossing>,
    /// What was written down of its interface.
    pub granted: Option<Granted>,
    /// Numbers and APIC ids of the CPUs that the update moves.
    pub cpus: Vec<(u32, u32)>,
    /// By when the successor must have answered this batond, if it answers at all.
    pub until: Option<Instant>,
}

impl<'k> Hands<'k> {
    /// What a batond that comes after this one must know to go on from here.
    pub(super) fn crossing(&self) -> Result<Crossing> {
        let site = self.site()?;
        let placed = self.placed.as_ref().context("the successor is not placed yet")?;
        let SipiArgs { cr3, entry, arg, stack } = placed.park;
        let granted = self.target.nic.as_ref();
        Ok(Crossing {
            instance: site.instance,
            release: self.target.release.clone(),
            region: (site.region.start(), site.region.len()),
            low_slot: site.low_slot()?.range().start(),
            park: [cr3, entry, arg, stack],
            root: placed.root,
            firmware_bsp: self.firmware_bsp,
            granted: granted.map(|granted| Granted {
                mac: granted.mac,
                bdf: granted.bdf,
                unbound: self.unbound.clone(),
            }),
            answered: self.address.as_ref().map(|held| held.answered().to_owned()),
        })
    }

    /// Hands that hold what was found. A successor that does not answer is noticed when it is asked for something.
    ///
    /// # Errors
    /// The module does not say what there is, or the successor's memory cannot be had.
    pub fn following(kernel: &'k Kernel, target: &'k Target, id: UpdateId, found: &Found) -> Result<Hands<'k>> {
        let mut hands = Hands::empty(kernel, target, id)?;
        hands.follows = true;
        hands.firmware_bsp = match &found.crossing {
            Some(crossing) => crossing.firmware_bsp,
            None => kernel.birth.as_ref().and_then(|birth| birth.facts().bsp),
        };
        hands.unbound = found.granted.as_ref().and_then(|granted| granted.unbound.clone());
        hands.arp_rules = kernel.ledger.pages().arp_rules;
        if let Some(service) = kernel.config.network.service_address {
            // Not there any more: it was dropped already.
            hands.address = kernel.netlink.held(service).ok();
            // The batond before this one may have hushed it.
            if let Some(before) = found.crossing.as_ref().and_then(|crossing| crossing.answered.as_ref()) {
                hands.address = hands.address.map(|held| held.that_answered(before));
            }
        }
        if let Some(row) = &found.row {
            hands.given = row.cpus.iter().copied().collect();
            hands.take_up_site(row, found)?;
        }
        hands.stopped = hands.stopped_before(&found.cpus)?;
        Ok(hands)
    }

    /// The successor's memory, and the line to it, as far as they are there.
    fn take_up_site(&mut self, row: &Instance, found: &Found) -> Result<()> {
        let crossing = found.crossing.as_ref().filter(|crossing| crossing.instance == row.id);
        let region = match crossing {
            Some(crossing) => Range::with_len(crossing.region.0, crossing.region.1),
            None => row.region(),
        };
        let Some(region) = region else {
            // It was made, and nothing was taken for it yet.
            self.undestroyed = Some(row.id);
            return Ok(());
        };
        let sipi = Range::new(SIPI_PAGE, SIPI_PAGE + PAGE);
        // Without this page no CPU has been started either.
        let low = self.device.map(sipi, Access::ReadWrite).ok().map(|mapping| (sipi, mapping));
        let low_slot = crossing.and_then(|crossing| LowSlot::holding(crossing.low_slot));
        let low = low.into_iter().collect();
        self.site = Some(Site { instance: row.id, region, low_slot, division: None, low });
        let mark = self.mark();
        let release = self.target.release.clone();
        self.kernel.successor_log.open(successor_log::Instance { id: row.id, release, mark, region });
        let Some(crossing) = crossing else { return Ok(()) };
        let block = Range::with_len(region.start(), control_block::SIZE).context("its control block")?;
        let control = Arc::new(self.device.map(block, Access::ReadWrite).context("cannot map its control block")?);
        let [cr3, entry, arg, stack] = crossing.park;
        let park = SipiArgs { cr3, entry, arg, stack };
        let mut line = Line::take_up(self.device, control, region.start(), row.id)?;
        match line.greet(found.until.unwrap_or_else(Instant::now)) {
            Ok(()) => self.heard = true,
            // What is asked of it later has its own deadline, and then it is stopped.
            Err(error) => tracing::warn!("{error:#}"),
        }
        // Its boot CPU runs: nobody starts it again.
        self.placed = Some(Placed { boot: park, park, root: crossing.root, line });
        Ok(())
    }

    /// CPUs that the batond before this one had stopped, and that wait nowhere: not in this kernel, not at its mailbox, not with the
    /// successor.
    fn stopped_before(&self, cpus: &[(u32, u32)]) -> Result<std::collections::BTreeSet<u32>> {
        let Some(home) = self.home() else { return Ok(Default::default()) };
        let mut stopped = std::collections::BTreeSet::new();
        for &(number, apic_id) in cpus {
            let online = self.device.cpu_info(number)?.is_some_and(|info| info.online);
            if !online && !self.given.contains(&apic_id) && !home.mailbox().is_parked(apic_id) {
                stopped.insert(apic_id);
            }
        }
        Ok(stopped)
    }
}
