//! What of the incumbent's protection its successor would lack, as far as their command lines say.

use super::words::Line;

/// How much a word protects, compared with a line that does not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Strength {
    Less,
    AsBuilt,
    More,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weaker {
    /// What the incumbent was booted with; nothing where it is the successor's word that weakens.
    pub incumbent: Option<String>,
    /// What the successor would be booted with; nothing where the word is missing.
    pub successor: Option<String>,
}

impl std::fmt::Display for Weaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.incumbent, &self.successor) {
            (Some(had), Some(gets)) => write!(f, "`{gets}` instead of `{had}`"),
            (Some(had), None) => write!(f, "without `{had}`"),
            (None, Some(gets)) => write!(f, "`{gets}`"),
            (None, None) => write!(f, "nothing"),
        }
    }
}

/// Mitigations of the CPU's faults: each takes `off`, and a word alone or another value asks for it.
const MITIGATIONS: &[&str] = &[
    "mitigations",
    "spectre_v2",
    "spectre_v2_user",
    "spectre_bhi",
    "spec_store_bypass_disable",
    "spec_rstack_overflow",
    "l1tf",
    "l1d_flush",
    "mds",
    "tsx_async_abort",
    "mmio_stale_data",
    "retbleed",
    "srbds",
    "gather_data_sampling",
    "reg_file_data_sampling",
    "indirect_target_selection",
    "tsa",
    "vmscape",
    "pti",
    "kvm.nx_huge_pages",
    "kvm_intel.vmentry_l1d_flush",
];

/// Words that ask for more where they say yes, for less where they say no. (An IOMMU's are not among them: whether the machine has one in use, and
/// loses it, is looked at in the machine itself.)
const SWITCHES: &[&str] = &[
    "apparmor",
    "selinux",
    "enforcing",
    "audit",
    "ima_appraise",
    "ima_policy",
    "ima_tcb",
    "ima_appraise_tcb",
    "evm",
    "module.sig_enforce",
    "slab_nomerge",
    "slub_nomerge",
    "init_on_alloc",
    "init_on_free",
    "page_alloc.shuffle",
    "page_poison",
    "randomize_kstack_offset",
    "hardened_usercopy",
    "rodata",
    "cfi",
    "slab_debug",
    "slub_debug",
    "hash_pointers",
    "loadpin.enforce",
    "nosmt",
];

/// Words that ask for less, whatever their value.
const WEAKENING: &[&str] = &[
    "nokaslr",
    "nopti",
    "nospectre_v1",
    "nospectre_v2",
    "nospec_store_bypass_disable",
    "nosmep",
    "nosmap",
    "noexec",
    "no_hash_pointers",
    "slab_merge",
    "slub_merge",
    "clearcpuid",
];

/// Words of which a text decides (which modules, which lockdown): another one, or none, is not the same.
const TEXTS: &[&str] = &["lsm", "security", "lockdown", "debugfs", "vsyscall", "proc_mem.force_override", "tsx", "smt"];

pub(super) fn is_mitigation(key: &str) -> bool {
    MITIGATIONS.contains(&key)
}

fn strength(key: &str, value: Option<&str>) -> Strength {
    let off = matches!(value, Some("off" | "0" | "n" | "N" | "no" | "none" | "never"));
    match key {
        _ if WEAKENING.contains(&key) => Strength::Less,
        "lockdown" | "vsyscall" | "debugfs" => match value {
            Some("integrity" | "confidentiality") => Strength::More,
            Some("none" | "off" | "xonly") if key != "lockdown" => Strength::More,
            Some("emulate" | "on" | "none") => Strength::Less,
            _ => Strength::AsBuilt,
        },
        _ if off => Strength::Less,
        "mitigations" | "spectre_v2" | "spectre_v2_user" if value == Some("auto") => Strength::AsBuilt,
        _ => Strength::More,
    }
}

fn matters(key: &str) -> bool {
    [MITIGATIONS, SWITCHES, WEAKENING, TEXTS].iter().any(|names| names.contains(&key))
}

/// Where a kernel booted with the line `successor` protects less than one booted with `incumbent`, or differently: what is
/// as strong by another text (`lsm=`) is said too, because only the operator can judge it.
pub fn weaker(incumbent: &str, successor: &str) -> Vec<Weaker> {
    let (old, new) = (Line::parse(incumbent), Line::parse(successor));
    let mut keys: Vec<String> =
        old.words.iter().chain(&new.words).map(|word| word.key()).filter(|key| matters(key)).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.iter()
        .filter_map(|key| {
            let [had, gets] = [&old, &new].map(|line| line.last(key));
            let of = |word: Option<&super::words::Word<'_>>| {
                word.map_or(Strength::AsBuilt, |word| strength(key, word.value))
            };
            let same = had.map(|word| word.value) == gets.map(|word| word.value);
            let other_text = of(had) == Strength::More && of(gets) == Strength::More && !same;
            (of(gets) < of(had) || other_text).then(|| Weaker {
                incumbent: had.map(|word| word.raw.to_owned()),
                successor: gets.map(|word| word.raw.to_owned()),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_missing_or_weaker_is_said() {
        let said = |old: &str, new: &str| weaker(old, new).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(said("quiet mitigations=auto,nosmt", "quiet"), ["without `mitigations=auto,nosmt`"]);
        assert_eq!(
            said("mitigations=auto,nosmt", "mitigations=off"),
            ["`mitigations=off` instead of `mitigations=auto,nosmt`"]
        );
        assert_eq!(said("", "mitigations=off nokaslr"), ["`mitigations=off`", "`nokaslr`"]);
        assert_eq!(said("", "apparmor=0"), ["`apparmor=0`"]);
        assert_eq!(
            said("lsm=landlock,apparmor", "lsm=landlock"),
            ["`lsm=landlock` instead of `lsm=landlock,apparmor`"]
        );
        assert_eq!(
            said("lockdown=integrity module.sig-enforce", "quiet"),
            ["without `lockdown=integrity`", "without `module.sig-enforce`"]
        );
        assert_eq!(said("spectre-v2=on", "spectre_v2=on"), [""; 0], "- and _ are the same");
        assert_eq!(said("\"mitigations=auto,nosmt\"", "mitigations=auto,nosmt"), [""; 0]);
        assert_eq!(
            said("vsyscall=none debugfs=off", "vsyscall=emulate"),
            ["without `debugfs=off`", "`vsyscall=emulate` instead of `vsyscall=none`"]
        );
    }

    #[test]
    fn what_is_as_strong_or_stronger_is_not() {
        for (old, new) in [
            ("", ""),
            ("quiet", "loglevel=3"),
            ("mitigations=off", ""),
            ("mitigations=off", "mitigations=auto,nosmt"),
            ("nokaslr", "nokaslr"),
            ("", "init_on_free=1 lockdown=integrity vsyscall=none"),
            ("mitigations=auto", ""),
            ("apparmor=1 -- mitigations=auto,nosmt", "apparmor=1"),
            ("apparmor=0 apparmor=1", "apparmor=1"),
        ] {
            assert_eq!(weaker(old, new), [], "{old:?} {new:?}");
        }
    }
}
