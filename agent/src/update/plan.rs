//! From what is asked and what there is, to what will be done: every check that can be made without touching anything.
//!
//! `baton check` prints the findings; an upgrade starts only when none of them refuses, and then has no choice left to make.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use handover::update::probation::{ProbationPolicy, WATCH_LIMITS, WhenWatched};
use kexec_core::cmdline::inherit::{Heir, LeftOut, inherit};
use kexec_core::cmdline::words::Line;
use kexec_core::cmdline::{self, security};
use kexec_core::compression::Compression;
use kexec_core::cpus::{
    CpuFacts, Move, all_can_move, choose_spare, format_cpu_list, is_first_thread, number_in_successor, order_of_moves,
    parse_cpu_list,
};
use kexec_core::device::{Device, DeviceError, InfoFlags};
use kexec_core::image::signature::{self, SignatureError, Trusted};
use kexec_core::image::{BzImage, KernelFacts};
use kexec_core::initrd::{self, Initrd, Limits};
use kexec_core::layout::{LOW_MEMORY_END, LowSlot};
use kexec_core::memory_map::{Range, RangeSet, Wish, candidates, struct_page_bytes};
use kexec_core::placement::{PlacementError, PlacementRequest, can_place, smallest_region};
use state_schemas::platform::Platform;

use crate::daemon::config::{Cidr, Config, Nic};
use crate::daemon::control::{Finding, ServiceState, Upgrade};
use crate::daemon::kernel::{Kernel, no_place, unusable};
use crate::daemon::outcome::{Class, Failure};
use crate::machine::cpuid::{gigabyte_pages, thread_bits};
use crate::machine::facts::{Facts, affinity, available_memory, managed_memory};
use crate::machine::net::{Mac, mac_name, parse_mac};
use crate::machine::regular;
use crate::machine::sysfs::Bdf;
use crate::machine::world::Live;
use crate::recovery::journal::{self, JOURNAL};
use crate::recovery::ledger::Granted;
use crate::services::Admission;
use crate::update::findings::Findings;
use crate::update::kho::{self, Spoken};
use crate::update::stock::accept::Accept;
use crate::update::stock::item::Item;
use crate::update::stock::{self, asked::Asked};
use crate::update::trial::Trial;
use crate::update::versions;
use crate::userland::kernels;
use crate::userland::known_images;
use crate::userland::mkinitrd;

/// What a successor must have left to run in, beside image and initrd (which the kernel unpacks into RAM once more).
const RUNNING_ROOM: u64 = 128 << 20;
/// No certificate is larger.
const MAX_CERTIFICATE: u64 = 64 << 10;
/// No initrd is larger.
const MAX_INITRD: u64 = 2 << 30;
/// What an initrd may unpack to: memory is checked against what it does unpack to.
const INITRD_LIMITS: Limits = Limits { files: 1 << 20, unpacked: 16 << 30 };
/// No kernel's `.config` is larger.
const MAX_KERNEL_CONFIG: u64 = 4 << 20;

/// Whom an update hands over to, and with what: all that has to be known of it once it is in its place.
pub struct Target {
    /// The successor's release.
    pub release: String,
    /// The interface that it gets.
    pub nic: Option<GrantedNic>,
    /// The machine.
    pub facts: Facts,
}

impl Target {
    /// That of an update that an earlier batond began: what it granted is in the ledger, which interface that is in the configuration.
    pub fn found(release: String, granted: Option<&Granted>, config: &Config, facts: Facts) -> Target {
        let configured = |mac: Mac| config.network.nic.iter().find(|nic| parse_mac(&nic.mac).is_ok_and(|m| m == mac));
        let unknown = |mac| Nic { mac: mac_name(mac), address: Cidr { address: Ipv4Addr::UNSPECIFIED, prefix: 0 } };
        let nic = granted.map(|granted| GrantedNic {
            nic: configured(granted.mac).cloned().unwrap_or_else(|| unknown(granted.mac)),
            mac: granted.mac,
            bdf: granted.bdf,
        });
        Target { release, nic, facts }
    }
}

/// What will be done. Holds no resource yet.
pub struct Plan {
    /// For whom.
    pub target: Target,
    /// The kernel image's bytes.
    pub image: Vec<u8>,
    /// The initrd's bytes: the operator's, if any, with ours in it.
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
    /// Whether the successor is watched before it stays.
    pub probation: ProbationPolicy,
    /// In which version the handover record is written: the newest that the successor's agent reads.
    pub record_version: u32,
    /// It is a trial that is taken back.
    pub trial: Option<Trial>,
    /// CPUs beside the spare one that the candidate of a trial gets.
    pub lent: Vec<CpuFacts>,
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

/// Makes every check, in an order in which the first refusal is the most telling one. With a `trial`, of a candidate that is taken back:
/// what an update would lose is no matter then.
pub fn make(kernel: &Kernel, wish: &Upgrade, trial: Option<&Trial>) -> (Findings, Option<Plan>) {
    let mut findings = Findings::default();
    let mut granted = None;
    let plan = (|| {
        if let Some(trial) = trial {
            findings.check("trial", trial.check().map(|()| ((), told(trial))).map_err(Into::into))?;
        }
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
        let nic = findings.check("network", network(kernel, trial.is_some()));
        granted = nic.iter().flatten().map(|granted| granted.mac).next();
        findings.check("services", services(kernel));
        let arenas = kernel.services.ranges().union(&kernel.files.ranges());
        findings.check("arenas", reservations(&arenas));
        let record_version = findings.check("agent", agent(kernel, kho, trial.is_some()));
        let probation = findings.check("probation", probation(kernel, wish));
        let initrd = initrd?;
        let block_size = device.info().ok()?.memory_block_size;
        let asked = trial.and_then(|trial| trial.memory_mib).unwrap_or(kernel.config.update.region_mib) << 20;
        let region_len =
            findings.check("memory", memory(&parsed, &initrd, &arenas, asked, block_size, kho, &kernel.facts().ram))?;
        let spare = spare?;
        let moves = order_of_moves(&cpus, spare.cpu);
        let lent = match trial {
            Some(trial) => findings.check("lent cpus", lent(&moves, trial.cpus))?,
            None => Vec::new(),
        };
        let (cmdline, weaker) =
            findings.check("command line", cmdline(kernel, wish, &release, initrd.microcode, &spare, &moves, kho))?;
        if trial.is_none() {
            findings.extend(vec![protection(&weaker).finding(&accepted(kernel, wish))]);
        }
        let initrd = initrd.bytes;
        let ids: Vec<u32> = moves.iter().map(|(cpu, _)| cpu.apic_id).collect();
        let probation = held_back(probation?, &moves);
        let nodes = affinity();
        let placing = PlacementRequest {
            image: &parsed,
            initrd: &initrd,
            cmdline: &cmdline,
            region: Range::new(0, region_len),
            low_slot: LowSlot::new(0)?,
            boot_cpu: spare.apic_id,
            other_cpus: &ids,
            phantom: None,
            reserved_ram: arenas,
            cap: None,
            identity: kernel.facts().ram,
            gigabyte_pages: gigabyte_pages(),
            tsc_khz: device.info().ok()?.tsc_khz,
            platform: Platform::default(),
            affinity: &nodes,
            kho: None,
        };
        findings.check("placement", placeable(&placing))?;
        Some(Plan {
            kho: kho.map(|spoken| kho::as_told(spoken, &cmdline)),
            cmdline,
            moves,
            target: Target {
                release,
                nic: nic?,
                facts: Facts { apic_ids: cpus.iter().map(|cpu| cpu.apic_id).collect(), ..kernel.facts() },
            },
            probation,
            record_version: record_version?,
            image,
            initrd,
            spare,
            region_len,
            block_size,
            trial: trial.cloned(),
            lent,
        })
    })();
    findings.extend(match trial {
        None => stock(kernel, wish),
        Some(_) => stock_before_trial(kernel, wish, granted),
    });
    let plan = plan.filter(|_| !findings.refuse());
    (findings, plan)
}

/// What the machine would lose.
fn stock(kernel: &Kernel, wish: &Upgrade) -> Vec<Finding> {
    let facts = kernel.facts();
    let asked = Asked { config: &kernel.config, facts: &facts, own: std::process::id(), asker: wish.asker };
    stock::take(&Live(&*kernel.netlink), &asked, &accepted(kernel, wish))
}

/// What this machine would suffer from a candidate that is taken back.
fn stock_before_trial(kernel: &Kernel, wish: &Upgrade, granted: Option<Mac>) -> Vec<Finding> {
    let facts = kernel.facts();
    let asked = Asked { config: &kernel.config, facts: &facts, own: std::process::id(), asker: wish.asker };
    stock::before_trial(&Live(&*kernel.netlink), &asked, &accepted(kernel, wish), granted)
}

/// A trial, as the findings have it.
fn told(trial: &Trial) -> String {
    let checks = trial.checks.len();
    let watched = trial.watch_ms as f64 / 1e3;
    format!(
        "{} CPUs, {checks} checks of the operator's, watched for {watched} s; taken back whatever it shows",
        trial.cpus
    )
}

/// The CPUs that a candidate gets beside the one on which it boots. All of them can be taken back by force, which the one that the
/// firmware booted cannot: INIT would reset the machine.
fn lent(moves: &[(CpuFacts, Move)], cpus: u32) -> Result<(Vec<CpuFacts>, String)> {
    let can = moves.iter().filter(|(cpu, how)| *how == Move::Ordinary && cpu.online && !cpu.firmware_bsp);
    let can: Vec<CpuFacts> = can.map(|(cpu, _)| *cpu).collect();
    let wanted = cpus as usize - 1;
    if can.len() < wanted {
        return Err(Failure::precondition(
            format!("{cpus} CPUs are asked for, and {} can be given to a candidate and be taken back", 1 + can.len()),
            format!("ask for --cpus {} or less", 1 + can.len()),
        )
        .into());
    }
    let names: Vec<u32> = can[..wanted].iter().map(|cpu| cpu.cpu).collect();
    let found = if names.is_empty() { "none beside the spare one".to_owned() } else { format_cpu_list(&names) };
    Ok((can[..wanted].to_vec(), found))
}

/// What the operator accepted, for every update and for this one.
fn accepted(kernel: &Kernel, wish: &Upgrade) -> Vec<Accept> {
    [kernel.config.update.accept.as_slice(), &wish.accept].concat()
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
    if let Some(other) = kernels::others(&*kernel.hardware)?.first() {
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

/// The CPU that firmware booted, the last of those that follow, cannot be stopped under a successor that has died.
fn held_back(probation: ProbationPolicy, moves: &[(CpuFacts, Move)]) -> ProbationPolicy {
    match probation {
        ProbationPolicy::Watch { period, then, .. } => {
            let held_back = moves.iter().filter(|(_, how)| *how == Move::MailboxOnly).count();
            ProbationPolicy::Watch { period, then, held_back }
        }
        ProbationPolicy::CommitAtOnce => probation,
    }
}

/// What the operator wants of the time between the successor's first answer and the commit.
fn probation(kernel: &Kernel, wish: &Upgrade) -> Result<(ProbationPolicy, String)> {
    let update = &kernel.config.update;
    let period = wish.probation.unwrap_or(Duration::from_secs(update.probation_s));
    let required = wish.require_commit || (update.require_commit && wish.probation.is_none());
    let refuse = |cause: String, advice: &str| Err(Failure::precondition(cause, advice).into());
    if period.is_zero() {
        return match required {
            true => refuse(
                "a commit is required, and there is no time in which it could be said".into(),
                "give a time with --probation",
            ),
            false => {
                Ok((ProbationPolicy::CommitAtOnce, "none: the update commits as soon as the CPUs have moved".into()))
            }
        };
    }
    let (least, most) = WATCH_LIMITS;
    if period < least || period > most {
        return refuse(
            format!("a probation of {} s", period.as_secs_f64()),
            &format!("a time from {} s to {} s, or 0 for none", least.as_secs(), most.as_secs()),
        );
    }
    let programs = kernel.files.status();
    if let Some(program) = programs.first() {
        return refuse(
            format!(
                "a probation of {} s: program {} keeps files, and such programs go on only after the commit: it would be silent all the time",
                period.as_secs_f64(),
                program.name
            ),
            "make the update without a probation (--probation 0)",
        );
    }
    let (then, end) = match required {
        true => (WhenWatched::RollBack, "turns back unless `baton commit` is said"),
        false => (WhenWatched::Commit, "commits unless `baton rollback` is said"),
    };
    // Which CPUs are held back is seen when they are known.
    Ok((ProbationPolicy::Watch { period, then, held_back: 0 }, format!("{} s, then it {end}", period.as_secs_f64())))
}

fn read_image(kernel: &Kernel, path: &Path) -> Result<(Vec<u8>, String)> {
    let bytes = kernels::read_image(path)?;
    let image = BzImage::parse(&bytes).map_err(|error| kernels::not_an_image(path, &error))?;
    let signed = signature(kernel, path, &bytes)?;
    let found = format!("{}, {} MiB to run, {signed}", image.release(), image.init_size() >> 20);
    Ok((bytes, found))
}

/// Whether the image is what was signed, and by whom; a refusal where one is required.
fn signature(kernel: &Kernel, path: &Path, image: &[u8]) -> Result<String> {
    let update = &kernel.config.update;
    let mut trusted = Vec::new();
    for file in &update.signing_certificates {
        let bytes = regular::read(file, MAX_CERTIFICATE).map_err(|e| e.to_string());
        let certificate = bytes.and_then(|bytes| Trusted::parse(&bytes).map_err(|e| e.to_string()));
        trusted.push(certificate.map_err(|e| {
            Failure::precondition(
                format!("{}: {e}", file.display()),
                "name certificates (PEM or DER) in update.signing_certificates",
            )
        })?);
    }
    match signature::verify(image, &trusted) {
        Ok(verified) if verified.trusted => Ok(format!("signed by {}, who is trusted", verified.signer)),
        Ok(verified) => Ok(format!("intact since it was signed, by somebody who calls himself {}", verified.signer)),
        Err(why) if update.require_signature || !trusted.is_empty() => Err(Failure::precondition(
            format!("{}: {why}", path.display()),
            "install a signed image, or set update.require_signature = false and update.signing_certificates = []",
        )
        .into()),
        Err(SignatureError::None) => Ok("not signed".to_owned()),
        Err(why) => Ok(format!("NOT VALIDLY SIGNED: {why}")),
    }
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

/// The successor's initrd.
struct Made {
    bytes: Vec<u8>,
    /// Bytes of all files in it.
    unpacked: u64,
    /// The operator's part of it brings microcode.
    microcode: bool,
}

/// The operator's initrd, walked as the successor will walk it, and ours in it.
fn make_initrd(kernel: &Kernel, wish: &Upgrade, release: &str) -> Result<(Made, String)> {
    let given = wish.initrd.as_ref().map(|path| given_initrd(path, &wish.kernel, release)).transpose()?;
    let links = given.as_ref().map(|(_, walked)| walked.links.clone()).unwrap_or_default();
    let ours = mkinitrd::build(&kernel.config, &kernel.config_path, release, links)
        .map_err(|e| Failure::precondition(format!("{e:#}"), "see initrd.* and service.* in the configuration"))?;
    let own = initrd::walk(&ours, INITRD_LIMITS, |_| true).context("our own initrd cannot be walked")?;
    let mut first = first_program(&kernel.config.update.cmdline, wish.cmdline.as_deref());
    first.retain(|program| !own.has(program) && !given.as_ref().is_some_and(|(_, walked)| walked.has(program)));
    if let Some(program) = first.first() {
        return Err(Failure::precondition(
            format!("rdinit={program}: the successor's initrd has no such program"),
            "leave it out, or put the program into the initrd; it has to start /init itself",
        )
        .into());
    }
    let Some((bytes, walked)) = given else {
        let found = format!("{} KiB", ours.len() >> 10);
        return Ok((Made { unpacked: own.unpacked, bytes: ours, microcode: false }, found));
    };
    let mut found =
        format!("{} KiB given, {} files in {} parts", bytes.len() >> 10, walked.paths.len(), walked.parts.len());
    let replaced: Vec<_> =
        own.paths.iter().filter(|path| walked.paths.contains(*path)).map(|path| format!("/{path}")).collect();
    if !replaced.is_empty() {
        found.push_str(&format!("; ours replace {}", replaced.join(", ")));
    }
    if let Some(config) = &walked.boot_config {
        if config.has_kernel_words() {
            return Err(Failure::precondition(
                "the boot configuration of the initrd has words for the kernel's command line (kernel.*), which are not checked",
                "take them out of it (`bootconfig -d`), and give them by --cmdline",
            )
            .into());
        }
        found.push_str("; its boot configuration stays last");
    }
    let joined = initrd::join(&bytes, &walked, &ours);
    let microcode = walked.has_microcode();
    if microcode {
        found.push_str("; its microcode is not loaded: what this kernel has loaded stays");
    }
    Ok((Made { bytes: joined, unpacked: walked.unpacked + own.unpacked, microcode }, found))
}

/// What the command lines want to be run first, other than `/init`.
fn first_program(configured: &str, asked: Option<&str>) -> Vec<String> {
    cmdline::first_program(&format!("{configured} {}", asked.unwrap_or_default())).into_iter().collect()
}

fn given_initrd(path: &Path, kernel: &Path, release: &str) -> Result<(Vec<u8>, Initrd)> {
    let refuse =
        |cause: String| Failure::precondition(format!("{}: {cause}", path.display()), "name an intact initrd, or none");
    let bytes = regular::read(path, MAX_INITRD).map_err(|e| refuse(e.to_string()))?;
    let config = kernel_config(kernel, release);
    // Debian's kernels unpack all that Linux knows.
    let supported = |compression: Compression| {
        let option = format!("\nCONFIG_RD_{}=y\n", compression.name().to_uppercase());
        config.as_ref().is_none_or(|config| config.contains(&option))
    };
    let walked = initrd::walk(&bytes, INITRD_LIMITS, supported).map_err(|e| refuse(e.to_string()))?;
    Ok((bytes, walked))
}

/// What the kernel was built with, if that was installed with it.
fn kernel_config(kernel: &Path, release: &str) -> Option<String> {
    let beside = kernel.with_file_name(format!("config-{release}"));
    let places = [beside, format!("/boot/config-{release}").into(), format!("/lib/modules/{release}/config").into()];
    let bytes = places.iter().find_map(|place| regular::read(place, MAX_KERNEL_CONFIG).ok())?;
    Some(format!("\n{}", String::from_utf8_lossy(&bytes)))
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
    let instances = kernels::instances(&*kernel.hardware)?;
    let thread_bits = thread_bits();
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
            first_thread: is_first_thread(cpu.apic_id, thread_bits),
            isolated: isolated.contains(&cpu.cpu),
            pinned: pinned.contains(&cpu.cpu),
            instance: owner(cpu.apic_id),
        })
        .collect();
    all_can_move(&cpus).map_err(|e| Failure::precondition(e.to_string(), "this machine cannot be updated live"))?;
    let offline: Vec<u32> =
        cpus.iter().filter(|cpu| !cpu.online && cpu.instance.is_none()).map(|cpu| cpu.cpu).collect();
    let mut found = format!("{} of {} online", cpus.iter().filter(|cpu| cpu.online).count(), cpus.len());
    if !offline.is_empty() {
        found.push_str(&format!("; {} stay offline in the successor", format_cpu_list(&offline)));
    }
    Ok((cpus, found))
}

/// CPUs to which a task of user space is bound alone: offlining one moves it elsewhere.
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
    let bound = if spare.pinned { "; tasks are bound to it: the kernel moves them to others" } else { "" };
    let thread = if spare.first_thread { "" } else { "; the second thread of its core" };
    Ok((spare, format!("{spare}{thread}{bound}")))
}

/// The interface that the successor gets: a configured one that does not hold the service address.
///
/// A candidate that is taken back can do without.
fn network(kernel: &Kernel, trial: bool) -> Result<(Option<GrantedNic>, String)> {
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
    if trial {
        return Ok((None, "no configured interface is free: the candidate runs without one".to_owned()));
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
fn agent(kernel: &Kernel, kho: Option<Spoken>, trial: bool) -> Result<(u32, String)> {
    /// The messages in which a candidate can be asked how it is.
    const TRIAL_WORDS: u32 = 2;
    let ((version, words), found) = versions::agent()?;
    if trial && words < TRIAL_WORDS {
        return Err(Failure::precondition(
            format!(
                "the candidate's agent knows messages of version {words}, a trial needs those of version {TRIAL_WORDS}"
            ),
            "install baton, batond and baton-init of this batond's release, or a newer one",
        )
        .into());
    }
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
    initrd: &Made,
    arenas: &RangeSet,
    asked: u64,
    block_size: u64,
    kho: Option<Spoken>,
    ram: &RangeSet,
) -> Result<(u64, String)> {
    let region = asked.next_multiple_of(block_size);
    // The initrd is unpacked into RAM while it is still there.
    let Made { unpacked, .. } = *initrd;
    let initrd = initrd.bytes.len() as u64;
    let mut room = RUNNING_ROOM + unpacked;
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
    let region = region.max(smallest_region(image, initrd, RUNNING_ROOM + unpacked + described, block_size));
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
    let wish = Wish { size: region, grain: block_size };
    let places = candidates(ram, &avoid, &wish).map_err(|error| Failure::precondition(error.to_string(), ""))?.count();
    if places == 0 {
        return Err(no_place(region, places).into());
    }
    let found = format!("{} MiB region of {} MiB available, {places} places", region >> 20, available >> 20);
    Ok((region, found))
}

/// The successor's command line but for Baton's own words: the incumbent's words that concern the machine, and what was given.
fn cmdline(
    kernel: &Kernel,
    wish: &Upgrade,
    release: &str,
    microcode: bool,
    spare: &CpuFacts,
    moves: &[(CpuFacts, Move)],
    kho: Option<Spoken>,
) -> Result<((String, Vec<String>), String)> {
    let asked = wish.cmdline.as_deref().unwrap_or_default();
    // To load microcode is not safe while another thread of the core runs another kernel.
    let no_microcode = if microcode { "dis_ucode_ldr " } else { "" };
    let given = format!("{no_microcode}{} {asked}", kernel.config.update.cmdline).trim().to_owned();
    let incumbent = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    let mut found = Vec::new();
    let line = if wish.no_inherit {
        given
    } else {
        let highest_apic_id = moves.iter().map(|(cpu, _)| cpu.apic_id).fold(spare.apic_id, u32::max);
        let cpu_number = |cpu| number_in_successor(spare, moves, cpu);
        // What is set aside at boot must leave room to come up in: that is what a region has beside image and initrd, at least.
        let inherited =
            inherit(&incumbent, &given, &Heir { highest_apic_id, room: RUNNING_ROOM, cpu_number: &cpu_number });
        found.extend(
            inherited.left_out.iter().map(|LeftOut { word, reason }| format!("not inherited: `{word}` ({reason})")),
        );
        inherited.line
    };
    let second_threads = moves.iter().any(|(cpu, _)| cpu.online && !cpu.first_thread) || !spare.first_thread;
    if let (true, Some(word)) = (second_threads, cmdline::without_second_threads(&line, &incumbent)) {
        return Err(Failure::precondition(
            format!(
                "`{word}` would keep second threads of cores from coming online in the successor, and they run here"
            ),
            "leave it out, or take them offline first (echo off > /sys/devices/system/cpu/smt/control)",
        )
        .into());
    }
    let enforced =
        Line::parse(&line).last("module.sig_enforce").is_some_and(|word| !matches!(word.value, Some("0" | "n" | "N")));
    if enforced && mkinitrd::own_module_is_signed(release) == Some(false) {
        return Err(Failure::precondition(
            format!("`module.sig_enforce`: the successor would not load baton.ko for {release}, which is not signed"),
            "sign it with a key that this kernel trusts (DKMS does, /etc/dkms/framework.conf), or leave the word out by --no-inherit",
        )
        .into());
    }
    let weaker = security::weaker(&incumbent, &line).iter().map(ToString::to_string).collect();
    let line = if kho.is_some() { kho::cmdline(line) } else { line };
    found.insert(0, if line.is_empty() { "only Baton's own words".to_owned() } else { format!("`{line}`") });
    Ok(((line, weaker), found.join("; ")))
}

/// What this kernel's command line protects, and the successor's would not.
fn protection(weaker: &[String]) -> Item {
    match weaker {
        [] => Item::fine("protection", "the command line protects as much as this kernel's"),
        _ => Item::asks(
            "protection",
            Accept::Security,
            weaker.join(", "),
            "the successor would protect less than this kernel does",
            "give these words by --cmdline, or inherit them",
        ),
    }
}

/// All that could be refused when the successor is placed, asked before anything is touched.
fn placeable(request: &PlacementRequest<'_>) -> Result<((), String)> {
    let line = can_place(request).map_err(|error| {
        let advice = match &error {
            PlacementError::Cmdline(_) => {
                "change --cmdline or update.cmdline; --no-inherit leaves the incumbent's words out"
            }
            PlacementError::PageTables(_) => "a CPU with pages of 1 GiB (flag pdpe1gb) is needed for so much memory",
            PlacementError::BootParams(_) => "let services keep fewer, larger arenas and files",
            PlacementError::Acpi(_) => "this machine has more CPUs than Baton can describe",
            _ => "set update.region_mib to another size",
        };
        Failure::precondition(error.to_string(), advice)
    })?;
    Ok((
        (),
        format!(
            "image, initrd, tables for {} CPUs, {} bytes of command line",
            1 + request.other_cpus.len(),
            line.len()
        ),
    ))
}
