//! The story of kexec handover: a machine with a stock kernel changes to one with KHO, to it again, to a stock one, and back. After each
//! update the new kernel is asked itself: what it found, what it was given under which name, whether preserved pages still hold what
//! they must when all other memory has been written, and what it can allocate.
//!
//! ```text
//! 6.12 ─► KHO ─► KHO ─► 7.x ─► KHO ─► KHO ...
//!   │  └ in the trial: what batond handed over, from the incumbent
//!   └ before each update: the first stage of the kernel's own selftests for LUO; their second stage judges it afterwards
//!            └ afterwards: the kernel's log, /sys/kernel/debug/kho/in, /dev/liveupdate, the keeper's pages, MemTotal
//! ```

use std::collections::BTreeMap;
use std::fs;

use agent::daemon::config::Service;
use agent::update::kho;
use anyhow::{Context, Result, bail};
use handover::luo;
use serde::Serialize;

use super::stage::{Shape, Stage, Upgraded};
use crate::keeper::{self, Found, Retrieved};
use crate::lab::kho_kernel::{SELFTESTS, selftest};
use crate::lab::progress::Task;
use crate::lab::{Guest, Kernel, Lab, incumbent};

/// Version of [`Report`].
pub const SCHEMA_VERSION: u32 = 1;
/// What the keeper keeps.
const KEPT_MIB: u64 = 96;
/// What a kernel says when it was given something (`kho_populate`).
const FOUND: &str = "KHO: found kexec handover data";
/// What it shows of it.
const SHOWN: &str = "/sys/kernel/debug/kho/in";
/// How much `MemTotal` of one kernel may differ between two hops: per-CPU areas and hash tables are sized by what was there at boot.
const SAME_KIB: u64 = 8 << 10;
/// What a kernel with KHO may keep for itself of the machine's memory, in percent: struct pages are 1.6 of them.
const OWN_PERCENT: u64 = 8;
/// Memory left alone when all other is written.
const LEFT_MIB: u64 = 160;

/// The story as data.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Updates, in order.
    pub hops: Vec<Hop>,
    /// What is not as it must be.
    #[serde(skip)]
    pub objections: Vec<String>,
}

/// One update.
#[derive(Debug, Serialize)]
pub struct Hop {
    /// The kernel that left.
    pub incumbent_release: String,
    /// The kernel that came.
    pub successor_release: String,
    /// In which version it was told of its memory; nothing for a kernel without KHO.
    pub kho_abi: Option<String>,
    /// Its log says that it found handover data.
    pub found_by_kernel: bool,
    /// Each blob that it shows is what the incumbent handed over, byte for byte; nothing for a kernel without KHO.
    pub blobs_identical: Option<bool>,
    /// Preserved pages that were looked at.
    pub pages_checked: u64,
    /// Those that did not hold what they must, before or after all other memory was written.
    pub pages_bad: u64,
    /// Sessions that `/dev/liveupdate` gave back.
    pub luo_sessions_retrieved: u64,
    /// The memfd in them has the content that was handed over, on the same physical pages; nothing for a kernel without KHO.
    pub memfd_same_pages: Option<bool>,
    /// The kernel's own selftests for LUO that passed, first stage in the kernel that left and second in the one that came. A kernel with KHO
    /// gives them their sessions by itself, for another one batond does.
    pub luo_selftests_passed: usize,
    /// The kernel's `MemTotal`.
    #[serde(skip)]
    pub mem_total_kib: u64,
    /// What a program could write at once.
    #[serde(skip)]
    pub written_mib: u64,
}

/// Tells it.
pub fn run(lab: &mut Lab, hops: usize) -> Result<Report> {
    let with_kho = lab.kernel_with_kho()?;
    let (first, stock) = (lab.tree().kernel("6.12")?.clone(), lab.tree().kernel("7.")?.clone());
    let route = [&with_kho, &with_kho, &stock, &with_kho];
    let keep = Service {
        name: keeper::NAME.into(),
        exec: ["/usr/sbin/labd", "keep", &KEPT_MIB.to_string()].map(str::to_owned).to_vec(),
        ..Service::default()
    };
    // A kernel without an orchestrator gets the sessions only where somebody of their name waits for them.
    let heir = |name: &str| Service {
        name: name.to_owned(),
        exec: ["/bin/sleep", "1000000"].map(str::to_owned).to_vec(),
        fd_store: true,
        ..Service::default()
    };
    let mut shape = Shape { services: vec![incumbent::demo_service(), keep], ..Shape::default() };
    shape.services.extend(SELFTESTS.map(heir));
    let task = lab.progress().task("machine");
    task.step(&format!("booting {}", first.release));
    let mut stage = Stage::open(lab, &first, &shape)?;
    task.done(&format!("{} serves; logs: {}", first.release, stage.machine.folder().display()));
    let mut report = Report { schema_version: SCHEMA_VERSION, hops: Vec::new(), objections: Vec::new() };
    let judges = SELFTESTS.map(|name| (name, selftest(lab.tree(), &with_kho, name)));
    let judges: Vec<Judge> = judges
        .into_iter()
        .map(|(name, path)| Ok(Judge { name, program: fs::read(&path).with_context(|| path.display().to_string())? }))
        .collect::<Result<_>>()?;
    for n in 0..hops {
        let to = route[n % route.len()];
        let task = lab.progress().task(&format!("update {} of {hops}", n + 1));
        let hop = hop(&mut stage, to, *to == with_kho, &judges, &task)?;
        task.done(&format!("{}, {} of {} pages bad", hop.successor_release, hop.pages_bad, hop.pages_checked));
        report.hops.push(hop);
    }
    report.objections = objections(&report.hops, u64::from(shape.memory_mib) << 10, &with_kho.release);
    Ok(report)
}

/// A program of the kernel's that judges LUO: one stage before an update, and one after it.
struct Judge {
    name: &'static str,
    program: Vec<u8>,
}

impl Judge {
    /// Lets the program make its sessions. They cross because batond answers for `/dev/liveupdate`, which this kernel may have or not.
    fn first_stage(&self, guest: &Guest) -> Result<()> {
        let path = self.put(guest)?;
        guest.check(&[&self.by_batond()[..], &[&path, "-s", "1"]].concat())?;
        Ok(())
    }

    /// What it finds in the sessions that this kernel gives back, without any help of ours if it can.
    fn second_stage(&self, guest: &Guest, has_kho: bool) -> Result<bool> {
        let path = self.put(guest)?;
        let itself = [path.as_str(), "-s", "2"];
        let ran = if has_kho { guest.run(&itself)? } else { guest.run(&[&self.by_batond()[..], &itself].concat())? };
        if !ran.success() {
            eprintln!("{}: {}{}", self.name, ran.text(), String::from_utf8_lossy(&ran.stderr));
        }
        Ok(ran.success())
    }

    fn by_batond(&self) -> [&str; 5] {
        ["baton", "run", "--liveupdate", self.name, "--"]
    }

    fn put(&self, guest: &Guest) -> Result<String> {
        let path = format!("/run/{}", self.name);
        guest.put(&path, 0o755, &self.program)?;
        Ok(path)
    }
}

fn hop(stage: &mut Stage, to: &Kernel, has_kho: bool, judges: &[Judge], task: &Task) -> Result<Hop> {
    let incumbent = stage.guest();
    let incumbent_release = stage.status()?.kernel_release;
    judges.iter().try_for_each(|judge| judge.first_stage(&incumbent))?;
    let mut handed = None;
    let image = format!("/boot/vmlinuz-{}", to.release);
    let upgraded = stage.upgrade_telling(&["--kernel", &image], &[], &mut |line| {
        task.detail(line);
        // Everything is in place, and the incumbent still here.
        if has_kho && handed.is_none() && line.starts_with("trial") {
            handed = Some(handed_over(&incumbent));
        }
    })?;
    if let Upgraded::Refused(ran) = upgraded {
        bail!("{}\n{}", ran.text(), String::from_utf8_lossy(&ran.stderr));
    }
    task.step("looking at the new kernel");
    let guest = stage.guest();
    let mut hop = Hop {
        incumbent_release,
        successor_release: to.release.clone(),
        kho_abi: None,
        found_by_kernel: guest.check(&["dmesg"])?.contains(FOUND),
        blobs_identical: None,
        pages_checked: 0,
        pages_bad: 0,
        luo_sessions_retrieved: 0,
        memfd_same_pages: None,
        luo_selftests_passed: 0,
        mem_total_kib: meminfo(&guest, "MemTotal")?,
        written_mib: 0,
    };
    if has_kho {
        let handed = handed.context("the update had no trial in which to look at what was handed over")??;
        hop.kho_abi = Some(abi(&guest)?);
        hop.blobs_identical = Some(are_shown(&guest, &handed)?);
        let (sessions, same) = retrieve(&guest, &handed)?;
        hop.luo_sessions_retrieved = sessions;
        hop.memfd_same_pages = Some(same);
    }
    for judge in judges {
        hop.luo_selftests_passed += usize::from(judge.second_stage(&guest, has_kho)?);
    }
    let before = kept(&guest)?;
    task.step("writing all other memory");
    hop.written_mib = write_all_other_memory(&guest)?;
    let after = kept(&guest)?;
    hop.pages_checked = after.pages;
    hop.pages_bad = before.bad.max(after.bad);
    Ok(hop)
}

/// The copies that batond leaves of what it hands over, by name.
fn handed_over(incumbent: &Guest) -> Result<BTreeMap<String, Vec<u8>>> {
    let names = incumbent.check(&["ls", kho::COPIES])?;
    let get = |name: &str| Ok((name.to_owned(), incumbent.get(&format!("{}/{name}", kho::COPIES))?));
    names.split_whitespace().map(get).collect()
}

/// The version, out of the tree that the kernel shows.
fn abi(guest: &Guest) -> Result<String> {
    let tree = guest.get(&format!("{SHOWN}/fdt"))?;
    let at = tree.windows(5).position(|window| window == b"kho-v").context("the kernel's FDT names no version")?;
    Ok(tree[at..].iter().take_while(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect())
}

/// Whether each blob that was handed over is what the kernel shows, and there are some. Not that of the Live Update Orchestrator: it reads
/// its blob early in the boot and frees it (`luo_early_startup`), so that debugfs shows a page that is somebody else's by now. What it made
/// of it is asked by [`retrieve`].
fn are_shown(guest: &Guest, handed: &BTreeMap<String, Vec<u8>>) -> Result<bool> {
    let shown = |name: &&String| ![kho::MEMFD_PAGES, luo::v5::BLOB].contains(&name.as_str());
    let names: Vec<_> = handed.keys().filter(shown).collect();
    for name in &names {
        if guest.get(&format!("{SHOWN}/sub_fdts/{name}"))? != handed[*name] {
            return Ok(false);
        }
    }
    Ok(names.len() >= 2)
}

/// How many sessions the kernel gives back, and whether the memfd in it is the one that was handed over.
fn retrieve(guest: &Guest, handed: &BTreeMap<String, Vec<u8>>) -> Result<(u64, bool)> {
    let answer = guest.check(&["labd", "luo", kho::NAME, &kho::RECORD_TOKEN.to_string()])?;
    let found: Retrieved = serde_json::from_str(&answer).with_context(|| format!("labd answered {answer:?}"))?;
    let pages: Vec<u64> =
        serde_json::from_slice(handed.get(kho::MEMFD_PAGES).context("batond left no addresses of the memfd")?)?;
    let record = handed.get(kho::NAME).context("batond handed over no record")?;
    Ok((1, found.bytes == *record && found.pages == pages && !pages.is_empty()))
}

fn kept(guest: &Guest) -> Result<Found> {
    let answer = guest.check(&["labd", "kept"])?;
    serde_json::from_str(&answer).with_context(|| format!("labd answered {answer:?}"))
}

fn meminfo(guest: &Guest, field: &str) -> Result<u64> {
    let text = guest.check(&["cat", "/proc/meminfo"])?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let value = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    value.with_context(|| format!("/proc/meminfo has no {field}"))
}

/// Fills a tmpfs with zeros (no page of the keeper's is zero) in all memory that is free, but for [`LEFT_MIB`], and gives it back; how much that
/// was, in MiB.
fn write_all_other_memory(guest: &Guest) -> Result<u64> {
    let mib = (meminfo(guest, "MemAvailable")? >> 10).saturating_sub(LEFT_MIB);
    let fill = format!(
        "mkdir -p /run/fill && mount -t tmpfs -o size=100% fill /run/fill && \
         dd if=/dev/zero of=/run/fill/all bs=1M count={mib}; r=$?; umount /run/fill; exit $r"
    );
    guest.command(&["sh", "-c", &fill]).timeout(std::time::Duration::from_secs(180)).check()?;
    Ok(mib)
}

/// What is not as it must be.
fn objections(hops: &[Hop], ram_kib: u64, with_kho: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut totals = BTreeMap::new();
    for (n, hop) in (1..).zip(hops) {
        let mut object = |what: String| found.push(format!("update {n}, to {}: {what}", hop.successor_release));
        let has_kho = hop.successor_release == with_kho;
        if has_kho != hop.found_by_kernel {
            object(format!("its log says that it found handover data: {}", hop.found_by_kernel));
        }
        if has_kho && hop.blobs_identical != Some(true) {
            object("it shows other blobs than it was given".into());
        }
        if has_kho && (hop.luo_sessions_retrieved == 0 || hop.memfd_same_pages != Some(true)) {
            object("/dev/liveupdate does not give the memfd back on its pages".into());
        }
        let (passed, all) = (hop.luo_selftests_passed, SELFTESTS.len());
        if passed != all {
            object(format!("of the kernel's {all} selftests for LUO {passed} pass"));
        }
        if hop.pages_bad > 0 || hop.pages_checked < KEPT_MIB << 8 {
            object(format!("{} of {} preserved pages are bad", hop.pages_bad, hop.pages_checked));
        }
        let own = ram_kib.saturating_sub(hop.mem_total_kib);
        if has_kho && own * 100 > ram_kib * OWN_PERCENT {
            object(format!("{own} of {ram_kib} KiB of memory are not for its use"));
        }
        let before = *totals.entry(&hop.successor_release).or_insert(hop.mem_total_kib);
        if before.abs_diff(hop.mem_total_kib) > SAME_KIB {
            object(format!("MemTotal is {} KiB, it was {before} when this kernel first came", hop.mem_total_kib));
        }
    }
    found
}

/// For people: a paragraph an update.
#[must_use]
pub fn for_people(report: &Report) -> String {
    let mut text = String::new();
    for hop in &report.hops {
        let kho = hop.kho_abi.as_deref().unwrap_or("no KHO: memory kept by setup_data");
        text += &format!("{} -> {}: {kho}\n", hop.incumbent_release, hop.successor_release);
        let yes = |answer: Option<bool>| answer.map_or("-", |yes| if yes { "yes" } else { "NO" });
        text += &format!(
            "  found by the kernel: {}; blobs identical: {}; sessions retrieved: {}; memfd on the same pages: {}\n",
            yes((hop.kho_abi.is_some() || hop.found_by_kernel).then_some(hop.found_by_kernel)),
            yes(hop.blobs_identical),
            hop.luo_sessions_retrieved,
            yes(hop.memfd_same_pages)
        );
        let (passed, all) = (hop.luo_selftests_passed, SELFTESTS.len());
        let by = if hop.kho_abi.is_some() { "the kernel" } else { "batond" };
        text += &format!(
            "  the kernel's own selftests for LUO, with sessions given back by {by}: {passed} of {all} passed\n"
        );
        text += &format!(
            "  preserved pages: {} checked, {} bad, after {} MiB of other memory were written; MemTotal {} MiB\n",
            hop.pages_checked,
            hop.pages_bad,
            hop.written_mib,
            hop.mem_total_kib >> 10
        );
    }
    for objection in &report.objections {
        text += &format!("NOT AS IT MUST BE: {objection}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(release: &str, has_kho: bool) -> Hop {
        Hop {
            incumbent_release: "6.12".into(),
            successor_release: release.into(),
            kho_abi: has_kho.then(|| "kho-v4".into()),
            found_by_kernel: has_kho,
            blobs_identical: has_kho.then_some(true),
            pages_checked: KEPT_MIB << 8,
            pages_bad: 0,
            luo_sessions_retrieved: u64::from(has_kho),
            memfd_same_pages: has_kho.then_some(true),
            luo_selftests_passed: SELFTESTS.len(),
            mem_total_kib: 3 << 20,
            written_mib: 2000,
        }
    }

    #[test]
    fn each_thing_that_is_not_as_it_must_be_is_named() {
        let good = || vec![hop("kho", true), hop("stock", false), hop("kho", true)];
        let found = |change: &dyn Fn(&mut Hop)| {
            let mut hops = good();
            change(&mut hops[2]);
            objections(&hops, 3 << 20, "kho").join("\n")
        };
        assert_eq!(found(&|_| {}), "");
        type Change = fn(&mut Hop);
        let changes: [(Change, &str); 7] = [
            (|hop| hop.found_by_kernel = false, "its log"),
            (|hop| hop.blobs_identical = None, "other blobs"),
            (|hop| hop.memfd_same_pages = Some(false), "memfd"),
            (|hop| hop.luo_selftests_passed = 1, "selftests"),
            (|hop| hop.pages_bad = 1, "1 of"),
            (|hop| hop.pages_checked = 0, "0 of 0"),
            (|hop| hop.mem_total_kib -= 1 << 20, "not for its use"),
        ];
        for (change, words) in changes {
            assert!(found(&change).contains(words), "{words}: {}", found(&change));
        }
        assert!(found(&|hop| hop.mem_total_kib -= 16 << 10).contains("when this kernel first came"));
    }

    #[test]
    fn the_report_has_the_promised_fields() {
        let report = Report { schema_version: SCHEMA_VERSION, hops: vec![hop("kho", true)], objections: Vec::new() };
        let json = serde_json::to_value(&report).unwrap();
        let mut names: Vec<_> = json["hops"][0].as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        let promised = [
            "blobs_identical",
            "found_by_kernel",
            "incumbent_release",
            "kho_abi",
            "luo_selftests_passed",
            "luo_sessions_retrieved",
            "memfd_same_pages",
            "pages_bad",
            "pages_checked",
            "successor_release",
        ];
        assert_eq!(names, promised);
        assert_eq!(json["schema_version"], 1);
    }
}
