//! A machine for tests: its module, its hardware and its network, with everything that was done to it in the order in which it was done.
//! Whatever the test wishes fails, and whatever would do harm on a real machine is written down as [`Machine::harm`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::mem::offset_of;
use std::net::Ipv4Addr;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result, bail};
use kexec_core::device::{Access, Mapping, Played};
use kexec_core::layout::SIPI_PAGE;
use kexec_core::memory_map::{Range, RangeSet};
use kexec_core::registry::State;
use kexec_core::sys;
use kexec_core::trampoline::{Mailbox, SipiArgs, SipiPage};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use state_schemas::control_block;
use state_schemas::shared::SharedMemory;
use zerocopy::FromBytes;

use crate::daemon::config::Cidr;
use crate::machine::clock::Moment;
use crate::machine::hardware::Hardware;
use crate::machine::net::{Announcer, ArpRules, HeldAddress, Link, Mac, Net};
use crate::machine::network::Network;
use crate::machine::sysfs::{Bdf, Function, Translated, Unbound};

/// The interface that stays, with the service address.
pub const STAYS: Mac = [2, 0, 0, 0, 0, 1];
/// The interface that is granted.
pub const GOES: Mac = [2, 0, 0, 0, 0, 2];
/// Its function.
pub const FUNCTION: Bdf = 0x18;
/// The grain of hot-add.
pub const BLOCK: u64 = 128 << 20;

/// Where a CPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// It runs this kernel.
    Online,
    /// This kernel has taken it offline, and finds it there.
    Offline,
    /// It runs an instance.
    Runs(u32),
    /// It waits at an instance's park page.
    Parked(u32),
}

/// One row of the module's.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its state.
    pub state: u32,
    image: String,
    /// Its memory.
    pub ranges: Vec<Range>,
    cpus: BTreeSet<u32>,
}

/// What changes.
#[derive(Debug, Default)]
pub struct Inside {
    /// Everything that was done.
    pub acts: Vec<String>,
    /// What would have done harm.
    pub harm: Vec<String>,
    /// What fails, and how often.
    pub fails: BTreeMap<String, u32>,
    /// CPUs: number and APIC id are the same.
    pub cpus: Vec<Option<At>>,
    /// Instances.
    pub rows: BTreeMap<u32, Row>,
    made: u32,
    memory: BTreeMap<u64, File>,
    /// The driver of [`FUNCTION`] has it.
    pub driver: bool,
    /// An instance's driver has it: it may write to that one's memory.
    pub dma: bool,
    /// This kernel's PCI bus does not show it.
    pub unseen: bool,
    /// Addresses by interface.
    pub addresses: BTreeSet<(Mac, Ipv4Addr)>,
    /// ARP rules by interface.
    pub rules: BTreeMap<Mac, (String, String)>,
    /// `arp_ignore` of the interface with the service address.
    hushed: Option<File>,
    /// Announcements of the service address.
    pub announced: Arc<Mutex<u32>>,
    /// [`sys::END_ALONE`] or [`sys::END_MACHINE`].
    pub end: u32,
    adopted: Vec<Range>,
}

/// The machine.
#[derive(Debug, Default)]
pub struct Machine(Mutex<Inside>);

impl Machine {
    /// With so many CPUs, all online, and both interfaces.
    pub fn with_cpus(count: usize) -> Arc<Machine> {
        let rules = ("0".to_owned(), "0".to_owned());
        let inside = Inside {
            cpus: vec![Some(At::Online); count],
            driver: true,
            rules: [(STAYS, rules.clone()), (GOES, rules)].into(),
            addresses: [(STAYS, SERVICE.address), (GOES, OWN.address)].into(),
            hushed: Some(memfd("arp_ignore", 1)),
            ..Inside::default()
        };
        inside.hushed.as_ref().unwrap().write_all_at(b"0", 0).unwrap();
        Arc::new(Machine(Mutex::new(inside)))
    }

    /// What changes.
    pub fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// From now on this fails so many times.
    pub fn fail(&self, act: &str, times: u32) {
        self.inside().fails.insert(act.to_owned(), times);
    }

    /// `arp_ignore` of the interface with the service address.
    pub fn arp_ignore(&self) -> String {
        let mut byte = [0];
        self.inside().hushed.as_ref().unwrap().read_exact_at(&mut byte, 0).unwrap();
        String::from_utf8_lossy(&byte).into_owned()
    }

    /// Memory that was mapped at this place.
    pub fn map(&self, start: u64, len: u64) -> Mapping {
        Mapping::new(self.inside().memory(start, len), len, Access::ReadWrite).unwrap()
    }

    /// A CPU waits at the park page of the control block at `base`, or does not any more.
    pub fn park(&self, base: u64, apic_id: u32, parked: bool) {
        let control = self.map(base, control_block::SIZE);
        let at = control_block::MAILBOX.offset + offset_of!(Mailbox, parked) as u64 + u64::from(apic_id / 64) * 8;
        let (word, bit) = (control.load(at), 1 << (apic_id % 64));
        control.store(at, if parked { word | bit } else { word & !bit });
    }

    /// What an update must bring back, as text.
    pub fn state(&self) -> String {
        let arp = self.arp_ignore();
        let inside = self.inside();
        format!(
            "cpus {:?}, instances {:?}, driver {}, dma {}, addresses {:?}, rules {:?}, arp_ignore {arp}, end {}",
            inside.cpus,
            inside.rows.keys(),
            inside.driver,
            inside.dma,
            inside.addresses,
            inside.rules,
            inside.end
        )
    }
}

/// The service address.
pub const SERVICE: Cidr = Cidr { address: Ipv4Addr::new(10, 77, 0, 10), prefix: 24 };
/// The granted interface's own.
pub const OWN: Cidr = Cidr { address: Ipv4Addr::new(10, 77, 1, 2), prefix: 24 };

fn memfd(name: &str, len: u64) -> File {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

impl Inside {
    /// Notes an act; it fails if the test wants that.
    fn act(&mut self, act: String) -> Result<(), Errno> {
        let left = self.fails.get_mut(&act).filter(|left| **left > 0);
        let failed = left.map(|left| *left -= 1).is_some();
        self.acts.push(if failed { format!("{act} FAILED") } else { act });
        if failed { Err(Errno::EIO) } else { Ok(()) }
    }

    fn set_rules(&mut self, mac: Mac, rules: &ArpRules) {
        self.rules.insert(mac, rules.texts());
        if mac == STAYS {
            self.hushed.as_ref().unwrap().write_all_at(&rules.texts().0.as_bytes()[..1], 0).unwrap();
        }
    }

    fn memory(&mut self, start: u64, len: u64) -> &File {
        let file = self.memory.entry(start).or_insert_with(|| memfd("memory", 0));
        if file.metadata().unwrap().len() < len {
            file.set_len(len).unwrap();
        }
        file
    }

    fn row(&mut self, id: u32) -> Result<&mut Row, Errno> {
        self.rows.get_mut(&id).ok_or(Errno::ENOENT)
    }

    fn destroy(&mut self, id: u32) -> Result<(), Errno> {
        self.act("destroy".to_owned())?;
        if self.dma {
            self.harm.push("memory is given back that a device may write".to_owned());
        }
        let of_it = |at: &Option<At>| matches!(at, Some(At::Runs(other) | At::Parked(other)) if *other == id);
        if self.cpus.iter().any(of_it) {
            self.harm.push("memory is given back that a CPU runs in, or waits in".to_owned());
        }
        self.rows.remove(&id).map(drop).ok_or(Errno::ENOENT)
    }

    fn give_cpu(&mut self, m: &sys::Cpu) -> Result<(), Errno> {
        if m.how == sys::CPU_RECORD {
            self.row(m.instance)?.cpus.insert(m.apic_id);
            return self.act(format!("record {}", m.apic_id));
        }
        self.act(format!("start {}", m.apic_id))?;
        if self.cpus[m.apic_id as usize] != Some(At::Offline) {
            self.harm.push(format!("CPU {} is started and is {:?}", m.apic_id, self.cpus[m.apic_id as usize]));
        }
        let mut args = [0; size_of::<SipiArgs>()];
        let page = Mapping::new(self.memory(SIPI_PAGE, 4096), 4096, Access::ReadOnly)?;
        page.read(offset_of!(SipiPage, args) as u64, &mut args);
        let entry = SipiArgs::read_from_bytes(&args).unwrap().entry;
        let row = self.row(m.instance)?;
        row.cpus.insert(m.apic_id);
        let base = row.ranges.iter().max_by_key(|range| range.len()).ok_or(Errno::EINVAL)?.start();
        let parks = entry == base + control_block::PARK_PAGE.offset;
        self.cpus[m.apic_id as usize] = Some(if parks { At::Parked(m.instance) } else { At::Runs(m.instance) });
        if parks {
            let control = Mapping::new(self.memory(base, control_block::SIZE), control_block::SIZE, Access::ReadWrite)?;
            let at = control_block::MAILBOX.offset + offset_of!(Mailbox, parked) as u64;
            control.store(at, control.load(at) | 1 << m.apic_id);
        } else {
            self.dma = !self.driver;
        }
        Ok(())
    }

    fn answer(&mut self, request: u32, bytes: &mut [u8]) -> Result<(), Errno> {
        fn of<M: sys::Message>(bytes: &mut [u8]) -> &mut M {
            M::mut_from_bytes(bytes).unwrap()
        }
        let is = |call: u32| request == call;
        if is(sys::INFO.request()) {
            let m: &mut sys::Info = of(bytes);
            (m.abi, m.tsc_khz, m.memory_block_size) = (sys::ABI_VERSION, 2_000_000, BLOCK);
            m.possible_cpus = self.cpus.len() as u32;
        } else if is(sys::CPU_INFO.request()) {
            let m: &mut sys::CpuInfo = of(bytes);
            let at = self.cpus.get(m.cpu as usize).copied().flatten().ok_or(Errno::ENOENT)?;
            m.apic_id = m.cpu;
            m.flags = sys::CPU_PRESENT | if at == At::Online { sys::CPU_ONLINE } else { 0 };
        } else if is(sys::INSTANCE_CREATE.request()) {
            self.act("create".to_owned())?;
            let m: &mut sys::Instance = of(bytes);
            self.made += 1;
            m.id = self.made;
            let image = String::from_utf8_lossy(&m.image).trim_end_matches('\0').to_owned();
            self.rows.insert(m.id, Row { state: m.state, image, ranges: Vec::new(), cpus: BTreeSet::new() });
        } else if is(sys::INSTANCE_UPDATE.request()) {
            let m: &mut sys::Instance = of(bytes);
            self.act(format!("state {}", m.state))?;
            self.row(m.id)?.state = m.state;
        } else if is(sys::INSTANCE_DESTROY.request()) {
            self.destroy(of::<sys::Instance>(bytes).id)?;
        } else if is(sys::MEM_TAKE.request()) {
            let m: &mut sys::Mem = of(bytes);
            self.act("take memory".to_owned())?;
            let range = Range::with_len(m.start, m.len).ok_or(Errno::EINVAL)?;
            if m.instance != sys::SELF {
                self.row(m.instance)?.ranges.push(range);
            }
        } else if is(sys::MEM_FD.request()) {
            let m: &mut sys::MemFd = of(bytes);
            let start = m.start;
            if m.flags & sys::FD_READONLY != 0 && m.len > control_block::SIZE {
                return Err(Errno::ENOMEM); // a successor's log is looked for in all of its memory, and a played kernel writes none
            }
            let owned = self
                .rows
                .values()
                .any(|row| row.ranges.iter().any(|range| range.contains(Range::new(start, start + 1))));
            if !owned && !self.memory.contains_key(&start) {
                return Err(Errno::ENOENT);
            }
            let file = self.memory(start, m.len).try_clone().map_err(|_| Errno::EMFILE)?;
            m.fd = file.into_raw_fd();
        } else if is(sys::MEM_ADOPT.request()) {
            let m: &mut sys::Adopt = of(bytes);
            self.act(format!("adopt {:#x}", m.start))?;
            self.adopted.push(Range::with_len(m.start, m.len).ok_or(Errno::EINVAL)?);
        } else if is(sys::CPU_GIVE.request()) {
            let m = *of::<sys::Cpu>(bytes);
            self.give_cpu(&m)?;
        } else if is(sys::CPU_TAKE.request()) {
            let m = *of::<sys::Cpu>(bytes);
            self.act(format!("{} {}", if m.how == sys::CPU_FENCE { "fence" } else { "unrecord" }, m.apic_id))?;
            self.row(m.instance)?.cpus.remove(&m.apic_id);
            if m.how == sys::CPU_FENCE {
                self.cpus[m.apic_id as usize] = Some(At::Offline);
            }
        } else if is(sys::DOORBELL_OPEN.request()) {
            let m: &mut sys::Doorbell = of(bytes);
            (m.apic_id, m.vector) = (0, 0xf0);
        } else if is(sys::YIELD.request()) {
            self.act("yield".to_owned())?;
            return Err(Errno::EAGAIN);
        } else if is(sys::PCI_ADD.request()) {
            self.act("add bus".to_owned())?;
        } else if is(sys::PCI_REMOVE.request()) {
            self.act("remove bus".to_owned())?;
        } else if is(sys::END.request()) {
            let m = *of::<sys::End>(bytes);
            self.act(format!("end {}", m.how))?;
            self.end = m.how;
        } else if is(sys::SLEEP_TYPE.request()) {
            return Err(Errno::EOPNOTSUPP);
        }
        // Bells, notices and I/O APICs have nothing to say.
        Ok(())
    }
}

impl Played for Machine {
    fn answer(&self, request: u32, message: &mut [u8]) -> Result<(), Errno> {
        self.inside().answer(request, message)
    }
}

impl Hardware for Machine {
    fn offline_cpu(&self, cpu: u32) -> Result<()> {
        let mut inside = self.inside();
        inside.act(format!("offline {cpu}"))?;
        inside.cpus[cpu as usize] = Some(At::Offline);
        Ok(())
    }

    fn online_cpu(&self, cpu: u32) -> Result<()> {
        let mut inside = self.inside();
        inside.act(format!("online {cpu}"))?;
        let at = inside.cpus[cpu as usize];
        if at != Some(At::Offline) {
            inside.harm.push(format!("CPU {cpu} is onlined, and is {at:?}"));
        }
        inside.cpus[cpu as usize] = Some(At::Online);
        Ok(())
    }

    fn function_of(&self, _: &str) -> Result<(Bdf, PathBuf)> {
        Ok((FUNCTION, PathBuf::from("/sys/devices/0000:00:03.0")))
    }

    fn unbind(&self, _: &Path) -> Result<Option<Unbound>> {
        let mut inside = self.inside();
        inside.act("unbind".to_owned())?;
        inside.driver = false;
        inside.addresses.retain(|(mac, _)| *mac != GOES);
        Ok(Some(serde_json::from_str(r#"{"device":"0000:00:03.0","driver":"/sys/bus/pci/drivers/virtio"}"#)?))
    }

    fn bind(&self, _: &Unbound) -> Result<()> {
        let mut inside = self.inside();
        inside.act("bind".to_owned())?;
        if inside.driver {
            bail!("it has a driver already");
        }
        (inside.driver, inside.dma) = (true, false);
        Ok(())
    }

    /// No IOMMU is played.
    fn translated(&self, _: &Path) -> Result<Option<Translated>> {
        Ok(None)
    }

    fn pass_through(&self, _: &Translated) -> Result<()> {
        Ok(())
    }

    fn translate_again(&self, _: &Translated) -> Result<()> {
        Ok(())
    }

    fn probe_drivers(&self) -> Result<()> {
        let mut inside = self.inside();
        inside.act("probe".to_owned())?;
        if !inside.unseen {
            (inside.driver, inside.dma) = (true, false);
        }
        Ok(())
    }

    fn function(&self, _: Bdf) -> Result<Option<Function>> {
        let inside = self.inside();
        let folder = PathBuf::from("/sys/devices/0000:00:03.0");
        Ok((!inside.unseen).then(|| Function { folder, has_driver: inside.driver }))
    }

    fn stop_function(&self, _: &Path) -> Result<()> {
        let mut inside = self.inside();
        inside.act("stop function".to_owned())?;
        inside.dma = false;
        Ok(())
    }

    fn managed_memory(&self) -> Result<RangeSet> {
        Ok(ram())
    }

    fn movable_memory(&self, _: &RangeSet) -> Result<RangeSet> {
        Ok(Range::new(1 << 30, 3 << 29).into())
    }

    fn memory_set_aside(&self, _: &RangeSet) -> Result<RangeSet> {
        Ok(RangeSet::new())
    }

    fn set_auto_online(&self, policy: &str) -> Result<()> {
        Ok(self.inside().act(format!("policy {policy}"))?)
    }

    fn instances(&self) -> Result<Option<String>> {
        let inside = self.inside();
        let mut text = "id name state cpus bytes ranges image\n0 self serving 0 0 - played\n".to_owned();
        for (id, row) in &inside.rows {
            let list = |all: Vec<String>| if all.is_empty() { "-".to_owned() } else { all.join(",") };
            let cpus = list(row.cpus.iter().map(u32::to_string).collect());
            let ranges = row.ranges.iter().map(|range| format!("{:x}-{:x}", range.start(), range.end() - 1)).collect();
            let state = State::ALL.into_iter().find(|state| *state as u32 == row.state);
            let state = state.context("a state that is none")?.name();
            text += &format!("{id} successor {state} {cpus} 0 {} {}\n", list(ranges), row.image);
        }
        Ok(Some(text))
    }

    fn set_clock(&self, _: Moment, _: u64) -> Result<()> {
        Ok(self.inside().act("clock".to_owned())?)
    }

    fn hold_sessions(&self) -> Result<Option<File>> {
        Ok(None)
    }

    fn hold_kexec(&self) -> Result<()> {
        Ok(())
    }

    fn grant_panic_wish(&self) -> Result<()> {
        Ok(self.inside().act("panic wish".to_owned())?)
    }

    fn sync(&self) {}

    fn quiesce(&self, _: &[Bdf]) -> Result<Vec<String>> {
        self.inside().act("quiesce".to_owned())?;
        Ok(Vec::new())
    }

    fn io_apics(&self) -> Vec<u32> {
        Vec::new()
    }
}

/// All RAM of the machine.
pub fn ram() -> RangeSet {
    [Range::new(0x1000, 0x9_f000), Range::new(1 << 20, 2 << 30)].into_iter().collect()
}

fn link(mac: Mac) -> Link {
    Link { index: mac[5].into(), name: format!("eth{}", mac[5]), mac }
}

impl Net for Arc<Machine> {
    fn find(&self, mac: Mac) -> Result<Option<Link>> {
        Ok((mac == STAYS || self.inside().driver).then(|| link(mac)))
    }

    fn link_up(&self, link: &Link) -> Result<()> {
        Ok(self.inside().act(format!("up {}", link.name))?)
    }

    fn add(&self, link: &Link, cidr: Cidr) -> Result<()> {
        let mut inside = self.inside();
        inside.act(format!("add {}", cidr.address))?;
        inside.addresses.insert((link.mac, cidr.address));
        Ok(())
    }

    fn held(&self, cidr: Cidr) -> Result<HeldAddress> {
        let holds = self.inside().addresses.contains(&(STAYS, cidr.address));
        if !holds {
            bail!("no interface holds {}", cidr.address);
        }
        let announcer = self.announcer(&link(STAYS), cidr.address)?;
        let file = self.inside().hushed.as_ref().unwrap().try_clone()?;
        Ok(HeldAddress::played(link(STAYS), cidr, file, self.arp_ignore(), announcer))
    }

    fn drop_held(&self, held: &HeldAddress) -> Result<()> {
        let mut inside = self.inside();
        inside.act("drop address".to_owned())?;
        inside.addresses.remove(&(STAYS, SERVICE.address));
        Ok(inside.hushed.as_ref().unwrap().write_all_at(held.answered().as_bytes(), 0)?)
    }

    fn restore(&self, rules: Vec<(Mac, ArpRules)>) -> Result<()> {
        let mut inside = self.inside();
        inside.act("restore rules".to_owned())?;
        for (mac, rules) in rules {
            inside.set_rules(mac, &rules);
        }
        Ok(())
    }

    fn take_again(&self, held: &HeldAddress) -> Result<()> {
        let mut inside = self.inside();
        inside.act("take address".to_owned())?;
        inside.addresses.insert((STAYS, SERVICE.address));
        Ok(inside.hushed.as_ref().unwrap().write_all_at(held.answered().as_bytes(), 0)?)
    }

    fn reserve(&self, _: &Link, _: Ipv4Addr) -> Result<()> {
        Ok(self.inside().act("reserve".to_owned())?)
    }

    fn settle(&self, _: &Link, _: Cidr) -> Result<()> {
        Ok(self.inside().act("settle".to_owned())?)
    }

    fn holder(&self, _: Ipv4Addr) -> Result<Option<u32>> {
        Ok(Some(STAYS[5].into()))
    }

    fn look(&self) -> Result<Network> {
        Ok(Network::default())
    }

    fn rules(&self, links: &[&Link]) -> Result<Vec<(Mac, ArpRules)>> {
        let inside = self.inside();
        Ok(links.iter().map(|link| (link.mac, ArpRules::of_texts(&inside.rules[&link.mac]))).collect())
    }

    fn part(&self, held: &HeldAddress, going: &Link) -> Result<()> {
        let mut inside = self.inside();
        for link in [held.link(), going] {
            inside.set_rules(link.mac, &ArpRules::strict());
        }
        Ok(inside.act("part".to_owned())?)
    }

    fn announcer(&self, _: &Link, _: Ipv4Addr) -> Result<Announcer> {
        let announced = self.inside().announced.clone();
        Ok(Announcer::by(move || {
            *announced.lock().unwrap() += 1;
            Ok(())
        }))
    }
}
