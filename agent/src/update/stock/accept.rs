//! The names by which an operator accepts that something ends, changes or is given up with this kernel.
//!
//! There is no name for everything: whoever accepts has read what is lost.

use std::fmt;

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that can be accepted (`--accept NAME,NAME`, or `update.accept` in the configuration).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Accept {
    /// File systems that do not cross, and what is in memory file systems.
    Mounts,
    /// Swap on disks and in compressed memory.
    Swap,
    /// Stacked block devices (LVM, md, loop …) that are active.
    Devices,
    /// Addresses, interfaces and their settings.
    Addresses,
    /// Routes other than those of the addresses themselves.
    Routes,
    /// Policy routing rules.
    Rules,
    /// Static neighbours (ARP, NDP).
    Neighbours,
    /// nftables and iptables: the successor is open where this kernel is closed.
    Ruleset,
    /// Name servers.
    Dns,
    /// Memory that the successor does not get, or gets in another state.
    Memory,
    /// Pools of huge pages.
    Hugepages,
    /// CPUs that are isolated.
    Isolation,
    /// NUMA nodes.
    Numa,
    /// Who keeps the clock.
    Clock,
    /// Translation of DMA and interrupts.
    Iommu,
    /// Armed watchdogs.
    Watchdog,
    /// A loaded crash kernel.
    Kdump,
    /// Security policy: LSMs, audit, integrity measurement.
    Security,
    /// Processes that end.
    Processes,
    /// Containers that end.
    Containers,
    /// People who are logged in.
    Logins,
    /// Virtual machines that end.
    Vms,
    /// Ports that nobody answers afterwards.
    Listeners,
    /// Kernel settings that no file holds.
    Sysctls,
}

impl Accept {
    /// All of them, in the order of the checks.
    pub fn all() -> &'static [Accept] {
        Accept::value_variants()
    }

    /// Its name.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// What it stands for, in one line.
    pub fn meaning(self) -> String {
        self.to_possible_value().and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default()
    }
}

impl fmt::Display for Accept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_whoever_writes_it_and_none_for_everything() {
        for accept in Accept::all() {
            let json = serde_json::to_value(accept).unwrap();
            assert_eq!(json.as_str(), Some(accept.name().as_str()), "serde and clap agree");
            assert!(!accept.meaning().is_empty());
        }
        let error = serde_json::from_str::<Accept>("\"all\"").unwrap_err().to_string();
        assert!(error.contains("mounts") && error.contains("sysctls"), "{error}");
        assert!(Accept::from_str("all", true).is_err());
    }

    #[test]
    fn the_documents_name_each() {
        let readme = include_str!("../../../README.md");
        for accept in Accept::all() {
            assert!(readme.contains(&format!("| `{accept}` |")), "agent/README.md has no row for {accept}");
        }
    }
}
