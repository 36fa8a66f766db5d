//! What watches over the machine: watchdogs, a crash kernel, security policy, and what forbids Baton to work at all.

use std::collections::BTreeMap;

use super::accept::Accept;
use super::item::{Item, counted, listed, size};
use crate::machine::processes::Process;
use crate::machine::world::World;

/// A watchdog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watchdog {
    /// `watchdog0`.
    pub name: String,
    /// What it calls itself.
    pub identity: String,
    /// Seconds until it resets the machine.
    pub timeout: Option<u64>,
    /// Who has it open, and pets it.
    pub pets: Vec<String>,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Watchdogs that run.
    pub armed: Vec<Watchdog>,
    /// A crash kernel is loaded.
    pub crash_loaded: bool,
    /// Bytes that are reserved for one.
    pub crash_size: u64,
    /// A kernel is loaded for `kexec -e`.
    pub kexec_loaded: bool,
    /// Loading kernels is forbidden.
    pub kexec_disabled: bool,
    /// This process lacks what it takes to change the kernel (CAP_SYS_BOOT).
    pub may_not_boot: bool,
    /// What of security policy is loaded.
    pub policy: Vec<String>,
}

const WATCHDOGS: &str = "/sys/class/watchdog";
const SECURITY: &str = "/sys/kernel/security";

/// Looks.
pub fn read(world: &dyn World, processes: &BTreeMap<u32, Process>) -> Seen {
    let armed = world.names(WATCHDOGS).into_iter().filter_map(|name| {
        let text = |file: &str| world.text(&format!("{WATCHDOGS}/{name}/{file}"));
        // /dev/watchdog is the first one's other name.
        let is_it =
            |open: &String| open.ends_with(&format!("/{name}")) || (open == "/dev/watchdog" && name == "watchdog0");
        (text("state")? == "active").then(|| Watchdog {
            identity: text("identity").unwrap_or_default(),
            timeout: text("timeout").and_then(|seconds| seconds.parse().ok()),
            pets: (processes.values())
                .filter(|process| process.watchdogs.iter().any(is_it))
                .map(|process| format!("{} ({})", process.name, process.pid))
                .collect(),
            name: name.clone(),
        })
    });
    let is_set = |path: &str| world.text(path).is_some_and(|text| text == "1");
    Seen {
        armed: armed.collect(),
        crash_loaded: is_set("/sys/kernel/kexec_crash_loaded"),
        crash_size: world.number("/sys/kernel/kexec_crash_size").unwrap_or(0),
        kexec_loaded: is_set("/sys/kernel/kexec_loaded"),
        kexec_disabled: is_set("/proc/sys/kernel/kexec_load_disabled"),
        may_not_boot: lacks_boot(&world.text("/proc/self/status").unwrap_or_default()),
        policy: policy(world, processes),
    }
}

/// Whether CAP_SYS_BOOT is missing among the effective capabilities; unknown is not missing.
fn lacks_boot(status: &str) -> bool {
    const CAP_SYS_BOOT: u32 = 22;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|bits| bits & 1 << CAP_SYS_BOOT == 0)
}

fn policy(world: &dyn World, processes: &BTreeMap<u32, Process>) -> Vec<String> {
    let mut policy = Vec::new();
    let profiles = world.text(&format!("{SECURITY}/apparmor/profiles")).unwrap_or_default();
    let profiles = profiles.lines().filter(|line| line.ends_with("(enforce)")).count();
    if profiles > 0 {
        policy.push(format!("AppArmor: {} enforced", counted(profiles, "profile")));
    }
    if let Some(mode) = world.text("/sys/fs/selinux/enforce") {
        policy.push(format!("SELinux: {}", if mode == "1" { "enforcing" } else { "permissive" }));
    }
    if world.exists("/sys/fs/smackfs/load2") {
        policy.push("Smack".to_owned());
    }
    // The first one is the boot's own, made without any policy.
    if let Some(count) = world.number(&format!("{SECURITY}/ima/runtime_measurements_count")).filter(|count| *count > 1)
    {
        policy.push(format!("IMA: {}", counted(usize::try_from(count).unwrap_or(usize::MAX), "measurement")));
    }
    if processes.values().any(|process| process.name == "auditd") {
        policy.push("audit: auditd runs".to_owned());
    }
    if world.text("/sys/module/module/parameters/sig_enforce").is_some_and(|value| value == "Y") {
        policy.push("modules must be signed (module.sig_enforce)".to_owned());
    }
    policy
}

/// Judges.
pub fn judge(seen: &Seen) -> Vec<Item> {
    let mut items = permission(seen);
    items.extend([watchdog(seen), kdump(seen), security(seen)]);
    items
}

fn permission(seen: &Seen) -> Vec<Item> {
    const CHECK: &str = "permission";
    let mut items = Vec::new();
    if seen.kexec_disabled {
        items.push(Item::forbids(
            CHECK,
            "kernel.kexec_load_disabled = 1",
            "this machine must not load another kernel, and Baton keeps to that",
            "it stays so until a reboot: take it out of sysctl.d first",
        ));
    }
    if seen.may_not_boot {
        items.push(Item::forbids(
            CHECK,
            "batond has no CAP_SYS_BOOT",
            "it takes that to put another kernel in this one's place",
            "run batond as root, with CAP_SYS_BOOT in its unit's CapabilityBoundingSet",
        ));
    }
    if items.is_empty() {
        items.push(Item::fine(CHECK, "another kernel may be loaded"));
    }
    items
}

fn watchdog(seen: &Seen) -> Item {
    const CHECK: &str = "watchdog";
    if seen.armed.is_empty() {
        return Item::fine(CHECK, "none is armed");
    }
    let told: Vec<String> = (seen.armed.iter())
        .map(|dog| {
            let timeout = dog.timeout.map_or(String::new(), |seconds| format!(", {seconds} s"));
            let pets = if dog.pets.is_empty() {
                "nobody has it open".to_owned()
            } else {
                format!("petted by {}", listed(&dog.pets))
            };
            format!("{} ({}{timeout}), {pets}", dog.name, dog.identity)
        })
        .collect();
    Item::asks(
        CHECK,
        Accept::Watchdog,
        listed(&told),
        "nobody pets it in the successor, which does not even see it: it may reset the machine",
        "stop it (`wdctl`; systemd: RuntimeWatchdogSec=0)",
    )
}

fn kdump(seen: &Seen) -> Item {
    const CHECK: &str = "kdump";
    if seen.crash_loaded {
        return Item::asks(
            CHECK,
            Accept::Kdump,
            format!("a crash kernel is loaded in {}", size(seen.crash_size)),
            "a panic of this kernel during the update would start it, and reset the successor; afterwards the successor has none, and uses \
             its memory",
            "unload it (`kexec -p -u`, `kdump-config unload`)",
        );
    }
    if seen.kexec_loaded {
        return Item::asks(
            CHECK,
            Accept::Kdump,
            "a kernel is loaded for kexec -e",
            "it is forgotten with this kernel",
            "unload it (`kexec -u`)",
        );
    }
    if seen.crash_size > 0 {
        let found = format!("{} are reserved, and no crash kernel is loaded", size(seen.crash_size));
        return Item::comes_back(CHECK, found, "the successor uses that memory as its own");
    }
    Item::fine(CHECK, "no crash kernel")
}

fn security(seen: &Seen) -> Item {
    const CHECK: &str = "security";
    if seen.policy.is_empty() {
        return Item::fine(CHECK, "no policy is loaded");
    }
    Item::asks(
        CHECK,
        Accept::Security,
        listed(&seen.policy),
        "security policy does not cross: the successor starts without it, and runs open what this kernel confines",
        "",
    )
}

#[cfg(test)]
mod tests {
    use super::super::item::Weight;
    use super::*;
    use crate::machine::world::played::Played;

    fn of(world: &Played) -> Vec<Item> {
        judge(&read(world, &crate::machine::processes::all(world, &[])))
    }

    fn only(world: &Played) -> Item {
        let mut items: Vec<Item> = of(world).into_iter().filter(|item| item.weight != Weight::Fine).collect();
        assert_eq!(items.len(), 1, "{items:#?}");
        items.remove(0)
    }

    #[test]
    fn a_machine_of_the_lab_has_no_guards() {
        let world = Played::default()
            .file("/proc/self/status", "CapEff:\t000001ffffffffff\n")
            .file("/proc/sys/kernel/kexec_load_disabled", "0\n")
            .file("/sys/kernel/kexec_crash_loaded", "0\n")
            .file("/sys/kernel/kexec_crash_size", "0\n")
            .file("/sys/class/watchdog/watchdog0/state", "inactive\n")
            .file("/sys/kernel/security/ima/runtime_measurements_count", "1\n")
            .file("/sys/module/module/parameters/sig_enforce", "N\n");
        assert!(of(&world).iter().all(|item| item.weight == Weight::Fine));
    }

    #[test]
    fn an_armed_watchdog_is_named_with_whoever_pets_it() {
        let world = Played::default()
            .file("/sys/class/watchdog/watchdog0/state", "active\n")
            .file("/sys/class/watchdog/watchdog0/identity", "iTCO_wdt\n")
            .file("/sys/class/watchdog/watchdog0/timeout", "30\n");
        let item = only(&world);
        assert_eq!(item.weight, Weight::Asks(Accept::Watchdog));
        assert_eq!(item.found, "watchdog0 (iTCO_wdt, 30 s), nobody has it open");
        let world =
            world.file("/proc/1/stat", "1 (systemd) S 0 1 1 0 -1 4194560").linked("/proc/1/fd/7", "/dev/watchdog");
        assert_eq!(only(&world).found, "watchdog0 (iTCO_wdt, 30 s), petted by systemd (1)");
    }

    #[test]
    fn crash_kernels_and_policies_are_named() {
        let world = Played::default().file("/sys/kernel/kexec_crash_size", "268435456\n");
        assert_eq!(only(&world).weight, Weight::ComesBack);
        let item = only(&world.file("/sys/kernel/kexec_crash_loaded", "1\n"));
        assert_eq!(
            (item.found.as_str(), item.weight),
            ("a crash kernel is loaded in 256 MiB", Weight::Asks(Accept::Kdump))
        );
        let world = Played::default()
            .file(
                "/sys/kernel/security/apparmor/profiles",
                "lsb_release (enforce)\n/usr/sbin/ntpd (complain)\nman_filter (enforce)\n",
            )
            .file("/sys/fs/selinux/enforce", "0")
            .file("/sys/kernel/security/ima/runtime_measurements_count", "1234\n")
            .file("/sys/module/module/parameters/sig_enforce", "Y\n")
            .file("/proc/600/stat", "600 (auditd) S 1 600 600 0 -1 4194624");
        let item = only(&world);
        assert_eq!(item.weight, Weight::Asks(Accept::Security));
        assert_eq!(
            item.found,
            "AppArmor: 2 profiles enforced, SELinux: permissive, IMA: 1234 measurements, audit: auditd runs, modules must be signed \
             (module.sig_enforce)"
        );
    }

    #[test]
    fn who_must_not_change_the_kernel_does_not() {
        let world = Played::default()
            .file("/proc/sys/kernel/kexec_load_disabled", "1\n")
            .file("/proc/self/status", "Name:\tbatond\nCapEff:\t000001ffffbfffff\n");
        let forbids: Vec<String> =
            of(&world).into_iter().filter(|i| i.weight == Weight::Forbids).map(|i| i.found).collect();
        assert_eq!(forbids, ["kernel.kexec_load_disabled = 1", "batond has no CAP_SYS_BOOT"]);
        assert!(!lacks_boot("CapEff: rubbish") && !lacks_boot(""));
    }
}
