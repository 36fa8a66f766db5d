//! From what is asked and what there is, to what will be done: every check that can be made without touching anything.
//!
//! `baton check` prints the findings; an upgrade starts only when none of them refuses, and then has no choice left to make.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use kexec_core::cpus::{CpuFacts, Move, choose_spare, order_of_moves, parse_cpu_list};
use kexec_core::device::{Device, DeviceError, InfoFlags};
use kexec_core::image::{BzImage, KernelFacts, SignaturePolicy};
use kexec_core::layout::LOW_MEMORY_END;
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates, struct_page_bytes};
use kexec_core::placement::smallest_region;

use crate::daemon::config::{Cidr, Nic};
use crate::daemon::control::{Finding, ServiceState, Upgrade};
use crate::daemon::kernel::{Kernel, no_place, unusable};
use crate::daemon::outcome::{Class, Failure};
use crate::machine::facts::{Facts, available_memory, managed_memory};
use crate::machine::net::{Mac, mac_name, parse_mac};
use crate::machine::sysfs::Bdf;
use crate::machine::world::Live;
use crate::recovery::journal::{self, JOURNAL};
use crate::recovery::ledger::Crossing;
use crate::services::Admission;
use crate::update::findings::Findings;
use crate::update::kho::{self, Spoken};
use crate::update::stock::{self, asked::Asked};
use crate::update::versions;
use crate::userland::kernels;
use crate::userland::known_images;
use crate::userland::mkinitrd;

/// What a successor must have left to run in, beside image and initrd (which the kernel unpacks into RAM once more).
const RUNNING_ROOM: u64 = 128 << 20;
/// No initrd is larger.
const MAX_INITRD: u64 = 2 << 30;

/// What will be done. Holds no resource yet.
pub struct Plan {
    /// The kernel image's bytes.
    pub image: Vec<u8>,
    /// Its release.
    pub release: String,
    /// The initrd's bytes: the operator's, if any, and ours behind it.
    pub initrd: Vec<u8>,
    /// The operator's command line.
    pub cmdline: String,
    /// The version of KHO that the image expects, if it was built with it.
    pub kho: Option<Spoken>,
    /// The CPU on which the successor boots.
    pub spare: CpuFacts,
    /// The others, in the order in which they follow.
    pub moves: Vec<(CpuFacts, Move)>,
    /// Bytes to take for the region, a multiple of the memory block size.
    pub region_len: u64,
    /// The grain of hot-add.
    pub block_size: u64,
    /// The interface that the successor gets.
    pub nic: Option<GrantedNic>,
    /// In which version the handover record is written: the newest that the successor's agent reads.
    pub record_version: u32,
    /// The machine.
    pub facts: Facts,
}

impl Plan {
    /// What is left of a plan whose successor serves: what was to be placed is in its place, and which CPUs follow is in the journal.
    pub fn of_crossing(crossing: &Crossing, facts: Facts, epoch: u64) -> Plan {
        let nic = crossing.granted.as_ref().map(|granted| GrantedNic {
            nic: Nic { mac: mac_name(granted.mac), address: Cidr { address: Ipv4Addr::UNSPECIFIED, prefix: 0 } },
            mac: granted.mac,
            bdf: granted.bdf,
        });
        Plan {
            image: Vec::new(),
            release: crossing.release.clone(),
            initrd: Vec::new(),
            cmdline: String::new(),
            kho: None,
            spare: CpuFacts::default(),
            moves: Vec::new(),
            region_len: crossing.region.1,
            block_size: 0,
            nic,
            record_version: 0,
            facts: Facts { epoch, ..facts },
        }
    }
}

/// An interface for the successor.
#[derive(Debug, Clone)]
pub struct GrantedNic {
    /// From the configuration.
    pub nic: Nic,
    /// Its hardware address.
    pub mac: Mac,
    /// Its PCI function.
    pub bdf: Bdf,
}

/// Makes every check, in an order in which the first refusal is the most telling one.
pub fn make(kernel: &Kernel, wish: &Upgrade) -> (Findings, Option<Plan>) {
    let mut findings = Findings::default();
    let plan = (|| {
        let device = findings.check("module", module(kernel))?;
        findings.check("update", no_update_unfinished(kernel))?;
        let image = findings.check("image", read_image(kernel, &wish.kernel))?;
        let parsed = BzImage::parse(&image).ok()?;
        let release = parsed.release().to_owned();
        let looked = findings.check("wakeup", wakeup(&parsed))?;
        let kho = findings.check("kexec handover", kho::spoken(&looked, &release))?;
        let initrd = findings.check("initrd", make_initrd(kernel, wish, &release));
        let cpus = findings.check("cpus", cpus(kernel, device))?;
        findings.check("journal", journal(cpus.len()));
        let spare = findings.check("spare cpu", spare(&cpus, wish.cpu));
        let nic = findings.check("network", network(kernel));
        findings.check("services", services(kernel));
        let arenas = kernel.services.ranges().union(&kernel.files.ranges());
        findings.check("arenas", reservations(&arenas));
        let record_version = findings.check("agent", agent(kernel, kho));
        let initrd = initrd?;
        let block_size = device.info().ok()?.memory_block_size;
        let asked = kernel.config.update.region_mib << 20;
        let region_len = findings.check(
            "memory",
            memory(&parsed, initrd.len() as u64, &arenas, asked, block_size, kho, &kernel.facts().ram),
        )?;
        let spare = spare?;
        let cmdline = cmdline(kernel, wish, kho);
        Some(Plan {
            kho: kho.map(|spoken| kho::as_told(spoken, &cmdline)),
            cmdline,
            moves: order_of_moves(&cpus, spare.cpu),
            facts: Facts { apic_ids: cpus.iter().map(|cpu| cpu.apic_id).collect(), ..kernel.facts() },
            nic: nic?,
            record_version: record_version?,
            image,
            release,
            initrd,
            spare,
            region_len,
            block_size,
        })
    })();
    findings.extend(stock(kernel, wish));
    let plan = plan.filter(|_| !findings.refuse());
    (findings, plan)
}

/// What the machine would lose.
fn stock(kernel: &Kernel, wish: &Upgrade) -> Vec<Finding> {
    let facts = kernel.facts();
    let asked = Asked { config: &kernel.config, facts: &facts, own: std::process::id(), asker: wish.asker };
    let accepted = [kernel.config.update.accept.as_slice(), &wish.accept].concat();
    stock::take(&Live(&kernel.netlink), &asked, &accepted)
}

fn module(kernel: &Kernel) -> Result<(&Device, String)> {
    let device = kernel.device()?;
    let info = device.info()?;
    // Asked again: a running kernel can be locked down, but not released, and the device may be open for long.
    if info.flags.contains(InfoFlags::LOCKDOWN) {
        return Err(unusable(&DeviceError::Lockdown).into());
    }
    Ok((device, format!("baton.ko, TSC {} kHz, memory blocks of {} MiB", info.tsc_khz, info.memory_block_size >> 20)))
}

fn no_update_unfinished(kernel: &Kernel) -> Result<((), String)> {
    if kernel.is_successor() {
        return Err(Failure::new(
            Class::Busy,
            "the update that brought this kernel here is not finished",
            "wait until `baton status` says incumbent",
        )
        .into());
    }
    if let Some(other) = kernels::others()?.first() {
        return Err(Failure::new(
            Class::Busy,
            format!(
                "instance {} ({}) of an earlier update is {} and was neither finished nor undone",
                other.id, other.image, other.state
            ),
            "see batond's log for what keeps it from going on",
        )
        .into());
    }
    Ok(((), "none runs".to_owned()))
}

fn journal(cpus: usize) -> Result<((), String)> {
    let found = journal::could_begin(Path::new(JOURNAL), journal::room(cpus)).map_err(|error| {
        Failure::precondition(
            format!("the update's journal could not be written: {error:#}"),
            "make room there; without a journal nobody could clean up after a batond that dies",
        )
    })?;
    Ok(((), found))
}

fn read_image(kernel: &Kernel, path: &Path) -> Result<(Vec<u8>, String)> {
    let bytes = kernels::read_image(path)?;
    let image = BzImage::parse(&bytes).map_err(|error| kernels::not_an_image(path, &error))?;
    let policy =
        if kernel.config.update.require_signature { SignaturePolicy::Required } else { SignaturePolicy::Optional };
    image.check_signature(policy).map_err(|e| {
        Failure::precondition(
            format!("{}: {e}", path.display()),
            "install a signed image, or set update.require_signature = false",
        )
    })?;
    let signed = if image.is_signed() { "signed" } else { "not signed" };
    let found = format!("{}, {} MiB to run, {signed}", image.release(), image.init_size() >> 20);
    Ok((bytes, found))
}

fn wakeup(image: &BzImage<'_>) -> Result<(KernelFacts, String)> {
    let facts = known_images::facts(image)
        .map_err(|e| Failure::precondition(format!("cannot look into the image: {e}"), "name an intact image"))?;
    if !facts.mailbox_reset_vector {
        return Err(Failure::precondition(
            format!(
                "kernel {} cannot take CPUs over and give them back: it is older than 6.10, or lacks CONFIG_ACPI_MADT_WAKEUP",
                image.release()
            ),
            "choose a kernel of 6.10 or newer built with CONFIG_ACPI_MADT_WAKEUP=y (Debian's are)",
        )
        .into());
    }
    Ok((facts, "ACPI mailbox with reset vector".to_owned()))
}

fn make_initrd(kernel: &Kernel, wish: &Upgrade, release: &str) -> Result<(Vec<u8>, String)> {
    let mut initrd = match &wish.initrd {
        None => Vec::new(),
        Some(path) => read_initrd(path)?,
    };
    let given = initrd.len();
    // Archives follow each other on multiples of four (early-userspace/buffer-format.rst).
    initrd.resize(given.next_multiple_of(4), 0);
    initrd.extend(
        mkinitrd::build(&kernel.config, &kernel.config_path, release)
            .map_err(|e| Failure::precondition(format!("{e:#}"), "see initrd.* and service.* in the configuration"))?,
    );
    let found = format!("{} KiB given, {} KiB with ours", given >> 10, initrd.len() >> 10);
    Ok((initrd, found))
}

fn read_initrd(path: &Path) -> Result<Vec<u8>> {
    let refuse = |cause: String| {
        Failure::precondition(format!("{}: {cause}", path.display()), "name an initrd that exists, or none")
    };
    let size = fs::metadata(path).map_err(|e| refuse(e.to_string()))?.len();
    if size > MAX_INITRD {
        return Err(
            refuse(format!("{} MiB is too large for an initrd, at most {} MiB", size >> 20, MAX_INITRD >> 20)).into()
        );
    }
    Ok(fs::read(path).map_err(|e| refuse(e.to_string()))?)
}

/// All CPUs with what speaks against giving them away.
fn cpus(kernel: &Kernel, device: &Device) -> Result<(Vec<CpuFacts>, String)> {
    let facts = kernel.facts();
    let listed = |file: &str| -> BTreeSet<u32> {
        fs::read_to_string(file)
            .ok()
            .and_then(|text| parse_cpu_list(&text).ok())
            .unwrap_or_default()
            .into_iter()
            .collect()
    };
    let mut isolated = listed("/sys/devices/system/cpu/isolated");
    isolated.extend(listed("/sys/devices/system/cpu/nohz_full"));
    let pinned = pinned_cpus()?;
    let instances = kernels::instances()?;
    let owner = |apic_id| instances.iter().find(|i| i.id != 0 && i.cpus.contains(&apic_id)).map(|i| i.id);
    let present: Vec<_> = device.cpus()?.into_iter().filter(|cpu| cpu.present).collect();
    // Linux numbers the CPU that it was booted on 0; on a kernel that the firmware booted, that is the firmware's.
    let bsp = facts.bsp.or_else(|| present.iter().find(|cpu| cpu.cpu == 0).map(|cpu| cpu.apic_id));
    let cpus: Vec<_> = present
        .into_iter()
        .map(|cpu| CpuFacts {
            cpu: cpu.cpu,
            apic_id: cpu.apic_id,
            online: cpu.online,
            firmware_bsp: Some(cpu.apic_id) == bsp,
            isolated: isolated.contains(&cpu.cpu),
            pinned: pinned.contains(&cpu.cpu),
            instance: owner(cpu.apic_id),
        })
        .collect();
    let found = format!("{} of {} online", cpus.iter().filter(|cpu| cpu.online).count(), cpus.len());
    Ok((cpus, found))
}

/// CPUs to which a task of user space is bound alone: offlining one would break what its owner asked for.
fn pinned_cpus() -> Result<BTreeSet<u32>> {
    /// kthreadd(2): the parent of all kernel threads, which the kernel moves itself.
    const KTHREADD: &str = "2";
    let mut pinned = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        // Processes come and go while they are looked at.
        let Ok(entry) = entry else { continue };
        if !entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(tasks) = fs::read_dir(entry.path().join("task")) else { continue };
        for task in tasks.flatten() {
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            if field("PPid:") == Some(KTHREADD) || field("Pid:") == Some(KTHREADD) {
                continue;
            }
            if let Some(Ok([alone])) =
                field("Cpus_allowed_list:").map(parse_cpu_list).as_ref().map(|r| r.as_ref().map(Vec::as_slice))
            {
                pinned.insert(*alone);
            }
        }
    }
    Ok(pinned)
}

fn spare(cpus: &[CpuFacts], wish: Option<u32>) -> Result<(CpuFacts, String)> {
    let spare = choose_spare(cpus, wish).map_err(|e| {
        Failure::precondition(e.to_string(), "name another CPU with --cpu, or leave the choice to baton")
    })?;
    Ok((spare, format!("{spare}")))
}

/// The interface that the successor gets: a configured one that does not hold the service address.
fn network(kernel: &Kernel) -> Result<(Option<GrantedNic>, String)> {
    let network = &kernel.config.network;
    let Some(service) = network.service_address else {
        return Ok((None, "no service address is configured: none is moved".to_owned()));
    };
    let facts = kernel.facts();
    if facts.ecam.is_none() {
        return Err(Failure::precondition(
            "this machine has no memory-mapped PCI configuration space (ACPI table MCFG)",
            "a machine with PCI Express is needed to give the successor an interface",
        )
        .into());
    }
    let holder = kernel.netlink.holder(service.address)?.ok_or_else(|| {
        Failure::precondition(
            format!("no interface holds the service address {}", service.address),
            "give it to one of the configured interfaces first",
        )
    })?;
    for nic in &network.nic {
        let mac = parse_mac(&nic.mac)?;
        let in_use = kernel.netlink.find(mac)?.is_some_and(|link| link.index == holder);
        if let (false, Some(bdf)) = (in_use, facts.nics.get(&mac)) {
            let granted = GrantedNic { nic: nic.clone(), mac, bdf: *bdf };
            let found = format!("{} ({}) for the successor", nic.mac, crate::machine::sysfs::bdf_name(*bdf));
            return Ok((Some(granted), found));
        }
    }
    Err(anyhow!(Failure::precondition(
        format!("none of {} configured interfaces is free for the successor", network.nic.len()),
        "configure a second network.nic that exists and does not hold the service address",
    )))
}

fn services(kernel: &Kernel) -> Result<((), String)> {
    if let Admission::Elsewhere { why } = kernel.services.admission() {
        return Err(Failure::precondition(why, "finish or undo the update that is under way (batond's log)").into());
    }
    let services = kernel.who_serves();
    let absent: Vec<_> = services.iter().filter(|s| s.state != ServiceState::Serving).collect();
    if let Some(service) = absent.first() {
        return Err(Failure::precondition(
            format!("service {} is {}, not serving", service.name, service.state),
            "start it, or give up what it keeps (`baton release NAME`)",
        )
        .into());
    }
    for wanted in &kernel.config.service {
        if !services.iter().any(|service| service.name == wanted.name) {
            return Err(Failure::precondition(
                format!("service {} is configured and not connected", wanted.name),
                "start it, or take it out of the configuration",
            )
            .into());
        }
    }
    Ok(((), format!("{} serving", services.len())))
}

/// The agent that will run on the successor, and whether it can be told all that there is to tell.
fn agent(kernel: &Kernel, kho: Option<Spoken>) -> Result<(u32, String)> {
    let (version, found) = versions::agent()?;
    let carried = kernel.birth.as_ref().map_or(0, |birth| birth.record.carried.len());
    // What version 1 has no words for: `state_schemas::convert` would refuse it, when the successor has its memory already.
    let unsayable = [
        (kho.is_some(), "where a kernel with KHO finds its memory"),
        (!kernel.files.ranges().is_empty(), "which memory files cross"),
        (carried > 0, "what a newer Baton left to be carried on"),
    ];
    match unsayable.iter().find(|(there, _)| *there && version < 2) {
        None => Ok((version, found)),
        Some((_, what)) => Err(Failure::precondition(
            format!("the successor's agent reads handover record version {version}, which cannot say {what}"),
            "install baton, batond and baton-init of this batond's release, or a newer one",
        )
        .into()),
    }
}

fn reservations(arenas: &RangeSet) -> Result<((), String)> {
    crate::services::arenas::reservations(arenas.count())?;
    Ok(((), format!("{} MiB in {} pieces", arenas.total() >> 20, arenas.count())))
}

/// How large the region will be: as asked, or larger where the arenas are so large that the successor's own record of their
/// pages needs it.
fn memory(
    image: &BzImage<'_>,
    initrd: u64,
    arenas: &RangeSet,
    asked: u64,
    block_size: u64,
    kho: Option<Spoken>,
    ram: &RangeSet,
) -> Result<(u64, String)> {
    let region = asked.next_multiple_of(block_size);
    // The initrd is unpacked into RAM while it is still there.
    let mut room = RUNNING_ROOM + initrd;
    if kho.is_some() {
        // Its arenas, and around each of them and at each end of memory at most a block that is not whole.
        let around = (2 * arenas.count() as u64 + 4) * block_size;
        room = room.max(kho::room_to_run(image, region + arenas.total() + around));
    }
    let needed = smallest_region(image, initrd, room, block_size);
    if region < needed {
        return Err(Failure::precondition(
            format!(
                "a region of {} MiB is too small: image and initrd ({} MiB) need {} MiB",
                region >> 20,
                initrd >> 20,
                needed >> 20
            ),
            format!("set update.region_mib to {} or more, or make the initrd smaller", needed >> 20),
        )
        .into());
    }
    let described = struct_page_bytes(arenas.total());
    let region = region.max(smallest_region(image, initrd, RUNNING_ROOM + initrd + described, block_size));
    let managed = managed_memory()?.total();
    let available = available_memory()?;
    if available < region {
        return Err(Failure::precondition(
            format!(
                "{} MiB are needed for the successor, but only {} of {} MiB are available",
                region >> 20,
                available >> 20,
                managed >> 20
            ),
            "stop a program, or ask for a smaller update.region_mib",
        )
        .into());
    }
    // Whether one of them can be had, the update finds out: that takes moving pages out of the way.
    let avoid = arenas.union(&RangeSet::from(Range::new(0, LOW_MEMORY_END)));
    let wish = Wish { size: region, grain: block_size, below: None };
    let places = candidates(ram, &avoid, &wish).map_err(|error| Failure::precondition(error.to_string(), ""))?.count();
    if places == 0 {
        return Err(no_place(region, places).into());
    }
    let found = format!("{} MiB region of {} MiB available, {places} places", region >> 20, available >> 20);
    Ok((region, found))
}

fn cmdline(kernel: &Kernel, wish: &Upgrade, kho: Option<Spoken>) -> String {
    let asked = wish.cmdline.as_deref().unwrap_or_default();
    let given = format!("{} {asked}", kernel.config.update.cmdline).trim().to_owned();
    if kho.is_some() { kho::cmdline(given) } else { given }
}
