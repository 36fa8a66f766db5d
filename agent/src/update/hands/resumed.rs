//! Hands that take up what a batond before them has put in place: an update whose successor serves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
use crate::recovery::ledger::{Crossing, Granted};
use crate::update::line::Line;
use crate::update::plan::Plan;
use crate::userland::kernels;

/// How long a successor that serves may take to answer a new batond of the incumbent.
const PATIENCE: Duration = Duration::from_secs(30);

impl<'k> Hands<'k> {
    /// What a batond that comes after this one must know to go on from here.
    pub(super) fn crossing(&self) -> Result<Crossing> {
        let site = self.site()?;
        let placed = self.placed.as_ref().context("the successor is not placed yet")?;
        let SipiArgs { cr3, entry, arg, stack } = placed.park;
        let granted = self.plan.nic.as_ref();
        Ok(Crossing {
            instance: site.instance,
            release: self.plan.release.clone(),
            region: (site.region.start(), site.region.len()),
            low_slot: site.low_slot.range().start(),
            park: [cr3, entry, arg, stack],
            root: placed.root,
            firmware_bsp: self.firmware_bsp,
            granted: granted.map(|granted| Granted {
                mac: granted.mac,
                bdf: granted.bdf,
                unbound: self.unbound.clone(),
            }),
        })
    }

    /// Hands that hold what `crossing` says. Nothing of the plan but what the rest of the update needs is in `plan`.
    ///
    /// # Errors
    /// The successor does not answer, or its memory cannot be had.
    pub fn resumed(kernel: &'k Kernel, plan: &'k Plan, id: UpdateId, crossing: &Crossing) -> Result<Hands<'k>> {
        let mut hands = Hands::new(kernel, plan, id)?;
        let device = hands.device;
        let region =
            Range::with_len(crossing.region.0, crossing.region.1).context("its region passes the end of memory")?;
        let low_slot = LowSlot::holding(crossing.low_slot).context("it has no slot below 1 MiB")?;
        let block = Range::with_len(region.start(), control_block::SIZE).context("its control block")?;
        let control = Arc::new(device.map(block, Access::ReadWrite).context("cannot map its control block")?);
        let [cr3, entry, arg, stack] = crossing.park;
        let park = SipiArgs { cr3, entry, arg, stack };
        let sipi = Range::new(SIPI_PAGE, SIPI_PAGE + PAGE);
        let low = vec![(sipi, device.map(sipi, Access::ReadWrite).context("cannot map the page at which CPUs start")?)];
        let line = Line::take_up(device, control, region.start(), crossing.instance, Instant::now() + PATIENCE)?;
        hands.site = Some(Site { instance: crossing.instance, region, low_slot, division: None, low });
        // Its boot CPU runs: nobody starts it again.
        hands.placed = Some(Placed { boot: park, park, root: crossing.root, line });
        hands.heard = true;
        hands.firmware_bsp = crossing.firmware_bsp;
        hands.unbound = crossing.granted.as_ref().and_then(|granted| granted.unbound.clone());
        hands.arp_rules = kernel.ledger.pages().arp_rules;
        let rows = kernels::others(&*kernel.hardware)?;
        let row =
            rows.iter().find(|row| row.id == crossing.instance).context("the module does not know it any more")?;
        hands.given = row.cpus.iter().copied().collect::<BTreeSet<u32>>();
        if let Some(service) = kernel.config.network.service_address {
            // Not there any more: it was dropped already.
            hands.address = kernel.netlink.held(service).ok();
        }
        Ok(hands)
    }
}
