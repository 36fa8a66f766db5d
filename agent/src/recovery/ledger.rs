//! What a batond that is started after this one has died must know: whose arenas there are, where they lie, in which epoch
//! they are written; and who kept files, which died with it. The module keeps the memory of a batond that dies, and knows no
//! names.
//!
//! It is a file in memory (`/run`), which lives as long as this kernel does; what another kernel has left there counts for
//! nothing. It is written before a service gets its arena, never while nobody serves, and whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::machine::net::{ArpRules, Mac};
use crate::machine::rewrite::rewrite;
use crate::machine::sysfs::{Bdf, Translated, Unbound};
use crate::recovery::journal::boot_id;

/// Where it is.
pub const PATH: &str = "/run/baton/arenas.json";
/// Grows with every change that an older reader would misread.
const VERSION: u32 = 1;

/// A process, and no other that gets its number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it was started, in ticks since the boot.
    started: u64,
}

impl Process {
    /// The process of this number; none if there is none any more (or one that has ended and is not collected).
    pub fn find(pid: i32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Process { pid, started: started(&stat)? })
    }

    /// It has not ended.
    pub fn lives(&self) -> bool {
        Process::find(self.pid) == Some(*self)
    }
}

/// When a process that has not ended was started: field 22 of its `stat` (proc_pid_stat(5)). The second field, a name in
/// parentheses, may hold blanks and parentheses itself.
fn started(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let ended = matches!(state, "Z" | "X");
    fields.nth(18)?.parse().ok().filter(|_| !ended)
}

/// A service and its arena.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Kind of its state; 0 while it has not said.
    pub schema_kind: u32,
    /// And that kind's version.
    pub schema_version: u32,
    /// Start and length of each of the module's memory objects, in the arena's order.
    pub pieces: Vec<(u64, u64)>,
    /// Nothing was ever written to it.
    pub fresh: bool,
    /// Who connected for it last, if that is known.
    pub process: Option<Process>,
    /// The user who had it; nothing where a batond wrote this that did not look at users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<u32>,
}

/// What is written down.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    version: u32,
    /// Which kernel this is, and which time it runs (`/proc/sys/kernel/random/boot_id`).
    boot: String,
    /// A predecessor has handed over to this kernel, and has gone.
    pub drained: bool,
    /// In which epoch this kernel's services answer; 0 as long as only the first was.
    pub epoch: u64,
    /// Services by name.
    pub services: BTreeMap<String, Entry>,
    /// Whose files are kept.
    pub keepers: BTreeSet<String>,
    /// Start and length of what the module holds for them: their pages.
    #[serde(default)]
    pub files: Vec<(u64, u64)>,
    /// Interfaces whose rules an update under way has changed, with the rules as they were.
    #[serde(default)]
    pub arp_rules: Vec<(Mac, ArpRules)>,
    /// The interface that an update under way takes from its driver: written before it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granted: Option<Granted>,
    /// The interface's IOMMU group, which passes its DMA through for the successor's sake, and how it was before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub translated: Option<Translated>,
    /// What it takes to go on with an update whose successor serves. Written in its trial, before nobody serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crossing: Option<Crossing>,
}

/// A successor in its place: all that a batond must know of it that has not put it there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crossing {
    /// The module's number of it.
    pub instance: u32,
    /// Its kernel.
    pub release: String,
    /// Start and length of its region, which begins with the control block.
    pub region: (u64, u64),
    /// Where its slot below 1 MiB begins.
    pub low_slot: u64,
    /// How a CPU gets to its park page: page table, entry, argument and stack of the SIPI page.
    pub park: [u64; 4],
    /// The identity map in which this kernel leaves its last CPU.
    pub root: u64,
    /// APIC id of the CPU that the firmware booted, which must not get INIT.
    pub firmware_bsp: Option<u32>,
    /// The interface that was granted.
    pub granted: Option<Granted>,
    /// How the interface with the service address answered ARP requests before the cutover hushed it (`arp_ignore`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered: Option<String>,
}

/// An interface that was granted, and how its driver gets it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// Its hardware address.
    pub mac: Mac,
    /// Its PCI function.
    pub bdf: Bdf,
    /// The driver that was taken off it; nothing when this kernel never saw it.
    pub unbound: Option<Unbound>,
}

/// The file. One without a path, as a test has it, is not written.
#[derive(Debug, Default)]
pub struct Ledger {
    path: Option<PathBuf>,
    pages: Mutex<Pages>,
}

impl Ledger {
    /// Begins with what an earlier batond of this kernel wrote, if there was one.
    pub fn open(path: &Path) -> Result<Ledger> {
        let boot = boot_id()?;
        let pages = read(path, &boot)?.unwrap_or(Pages { version: VERSION, boot, ..Pages::default() });
        Ok(Ledger { path: Some(path.to_owned()), pages: Mutex::new(pages) })
    }

    /// What stands there.
    pub fn pages(&self) -> Pages {
        self.pages.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Writes something else there.
    pub fn change(&self, change: impl FnOnce(&mut Pages)) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut pages = self.pages.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut changed = pages.clone();
        change(&mut changed);
        if changed == *pages {
            return Ok(());
        }
        rewrite(path, &changed).with_context(|| format!("cannot write {}", path.display()))?;
        *pages = changed;
        Ok(())
    }
}

fn read(path: &Path, boot: &str) -> Result<Option<Pages>> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let pages: Pages = serde_json::from_slice(&text).with_context(|| format!("{} is no ledger", path.display()))?;
    if pages.version != VERSION {
        bail!("{} has version {}, this batond knows {VERSION}", path.display(), pages.version);
    }
    Ok((pages.boot == boot).then_some(pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            schema_kind: 7,
            schema_version: 2,
            pieces: vec![(1 << 30, 4096), (1 << 31, 8192)],
            fresh: false,
            process: Some(Process { pid: 4, started: 99 }),
            owner: None,
        }
    }

    #[test]
    fn what_was_written_is_found_again_by_the_same_boot_only() {
        let folder = std::env::temp_dir().join(format!("baton-ledger-{}", std::process::id()));
        let path = folder.join("arenas.json");
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.pages().services.len(), 0);
        let entry = Entry { owner: Some(107), ..entry() };
        ledger.change(|pages| (pages.epoch, _) = (3, pages.services.insert("kv".into(), entry.clone()))).unwrap();
        let again = Ledger::open(&path).unwrap().pages();
        assert_eq!((again.epoch, again.services.get("kv")), (3, Some(&entry)));
        assert_eq!(read(&path, "another boot").unwrap(), None);
        fs::write(&path, r#"{"version":9,"boot":"","drained":false,"epoch":0,"services":{},"keepers":[]}"#).unwrap();
        assert!(Ledger::open(&path).unwrap_err().to_string().contains("has version 9"));
        fs::write(&path, "{").unwrap();
        assert!(Ledger::open(&path).unwrap_err().to_string().contains("is no ledger"));
        fs::remove_dir_all(folder).unwrap();
    }

    /// Another release must read what this one writes.
    #[test]
    fn it_is_written_as_ever() {
        let services = BTreeMap::from([("kv".to_owned(), entry())]);
        let pages = Pages {
            version: VERSION,
            boot: "b".into(),
            drained: false,
            epoch: 1,
            services,
            keepers: ["memo".to_owned()].into(),
            files: vec![(1 << 21, 4096)],
            arp_rules: vec![([2, 0, 0, 0, 0, 9], ArpRules::strict())],
            granted: None,
            translated: None,
            crossing: None,
        };
        let first =
            r#"{"version":1,"boot":"b","drained":false,"epoch":1,"services":{"kv":{"schema_kind":7,"schema_version":2,"#
                .to_owned()
                + r#""pieces":[[1073741824,4096],[2147483648,8192]],"fresh":false,"process":{"pid":4,"started":99}}},"keepers":["memo"]"#;
        assert_eq!(
            serde_json::to_string(&pages).unwrap(),
            format!(
                r#"{first},"files":[[2097152,4096]],"arp_rules":[[[2,0,0,0,0,9],{{"ignore":"1","announce":"2"}}]]}}"#
            )
        );
        let before: Pages = serde_json::from_str(&format!("{first}}}")).unwrap();
        assert_eq!(
            before,
            Pages { files: Vec::new(), arp_rules: Vec::new(), ..pages },
            "as it was before these were written down"
        );
    }

    #[test]
    fn a_process_is_its_number_and_its_start() {
        let own = Process::find(std::process::id().cast_signed()).unwrap();
        assert!(own.lives() && !Process { started: own.started + 1, ..own }.lives());
        let stat = |state| format!("7 (a ) b) {state} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20");
        assert_eq!(started(&stat("S")), Some(4711));
        assert_eq!(started(&stat("Z")), None, "it has ended");
        assert_eq!(started("7 (short) S 1"), None);
        assert_eq!(Process::find(-1), None);
    }
}
