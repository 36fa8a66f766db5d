//! The words with which a successor could not run beside another kernel, or could not take the machine over.

use super::words::{Line, Word, size};

/// The first APIC id that needs x2APIC.
const FIRST_X2APIC_ID: u32 = 0xff;

/// One parameter that cannot be used, or not with some values.
struct Rule {
    name: &'static str,
    /// Whether this value is refused. The number is the highest APIC id that the successor may get.
    refuses: fn(value: Option<&str>, highest_apic_id: u32) -> bool,
    reason: &'static str,
    advice: &'static str,
}

const ANY: fn(Option<&str>, u32) -> bool = |_, _| true;
const LEAVE_OUT: &str = "leave it out";
const CPUS: &str =
    "leave it out; take CPUs offline by hand (/sys/devices/system/cpu/cpuN/online): they stay offline in the successor";
const MEMORY: &str = "leave it out; Baton tells the successor which memory is its own";

/// The kernel's `kstrtobool()` says yes.
fn yes(value: Option<&str>) -> bool {
    value.is_none_or(|value| {
        matches!(value.as_bytes(), [b'y' | b'Y' | b't' | b'T' | b'1', ..] | [b'o' | b'O', b'n' | b'N', ..])
    })
}

const RULES: &[Rule] = &[
    Rule {
        name: "maxcpus",
        refuses: |value, _| value != Some("1"),
        reason: "it must start with one CPU (maxcpus=1); it gets the others one by one",
        advice: CPUS,
    },
    Rule { name: "nr_cpus", refuses: ANY, reason: "it could never take over the other CPUs", advice: CPUS },
    Rule { name: "possible_cpus", refuses: ANY, reason: "it could never take over the other CPUs", advice: CPUS },
    Rule { name: "nosmp", refuses: ANY, reason: "it could never take over the other CPUs", advice: CPUS },
    Rule { name: "disable_cpu_apicid", refuses: ANY, reason: "it could never take that CPU over", advice: CPUS },
    Rule {
        name: "cpuhp.parallel",
        refuses: |value, _| yes(value),
        reason: "started on the second thread of a core, it would wait for CPUs that are not there yet",
        advice: LEAVE_OUT,
    },
    Rule { name: "cpu0_hotplug", refuses: ANY, reason: "its first CPU is not to be taken offline", advice: LEAVE_OUT },
    Rule {
        name: "mem",
        refuses: |value, _| value != Some("nopentium"),
        reason: "its memory is what it was given, and it takes over all of the machine's later",
        advice: MEMORY,
    },
    Rule {
        name: "memmap",
        refuses: ANY,
        reason: "it would use memory that is the incumbent's, or miss some of its own",
        advice: MEMORY,
    },
    Rule { name: "efi_fake_mem", refuses: ANY, reason: "it has a memory map of its own", advice: MEMORY },
    Rule {
        name: "memtest",
        refuses: ANY,
        reason: "it would test its memory for longer than it has to come up",
        advice: LEAVE_OUT,
    },
    Rule { name: "initrdmem", refuses: ANY, reason: "its initrd is where Baton puts it", advice: "use --initrd" },
    Rule { name: "noinitrd", refuses: ANY, reason: "its agent is in its initrd", advice: LEAVE_OUT },
    Rule {
        name: "nox2apic",
        refuses: |_, highest| highest >= FIRST_X2APIC_ID,
        reason: "this machine has APIC ids of 255 or more, which only x2APIC can address",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "acpi",
        refuses: |value, _| matches!(value, Some("off" | "ht")),
        reason: "its CPUs come to it through ACPI",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "acpi",
        refuses: |value, _| value == Some("rsdt"),
        reason: "its tables are listed in an XSDT",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "acpi_rsdp",
        refuses: ANY,
        reason: "it would read the incumbent's tables instead of those that are made for it",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "pci",
        refuses: |value, _| value != Some("off"),
        reason: "it must leave the incumbent's PCI bus alone (pci=off)",
        advice: "leave it out; it gets its functions from Baton",
    },
    Rule { name: "nolapic", refuses: ANY, reason: "it needs its local APIC", advice: LEAVE_OUT },
    Rule { name: "disableapic", refuses: ANY, reason: "it needs its local APIC", advice: LEAVE_OUT },
    Rule {
        name: "noapic",
        refuses: ANY,
        reason: "it has no I/O APIC, and is not to set its interrupts up the old way",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "nolapic_timer",
        refuses: ANY,
        reason: "it has no other timer than the local APIC's",
        advice: LEAVE_OUT,
    },
    Rule { name: "notsc", refuses: ANY, reason: "it has no other clock than the TSC", advice: LEAVE_OUT },
    Rule {
        name: "tsc",
        refuses: |value, _| value == Some("unstable"),
        reason: "it has no other clock than the TSC",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "no_ipi_broadcast",
        refuses: |value, _| !yes(value),
        reason: "its broadcast interrupts would reach the incumbent's CPUs",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "crashkernel",
        refuses: ANY,
        reason: "a crash kernel's memory cannot be set aside in the part of the machine in which it begins",
        advice: "leave it out; until the next ordinary boot there is no kdump",
    },
    Rule { name: "nomodule", refuses: ANY, reason: "Baton's own module could not be loaded", advice: LEAVE_OUT },
    Rule {
        name: "module_blacklist",
        refuses: |value, _| value.unwrap_or_default().split(',').any(|name| name == "baton"),
        reason: "Baton's own module could not be loaded",
        advice: LEAVE_OUT,
    },
    Rule {
        name: "sysctl.kernel.modules_disabled",
        refuses: |value, _| value != Some("0"),
        reason: "Baton's own module could not be loaded",
        advice: "set it when the update is done",
    },
    Rule {
        name: "sysctl.kernel/modules_disabled",
        refuses: |value, _| value != Some("0"),
        reason: "Baton's own module could not be loaded",
        advice: "set it when the update is done",
    },
    Rule {
        name: "lockdown",
        refuses: |value, _| value != Some("none"),
        reason: "Baton's module does nothing in a kernel that is locked down, so the update could not be finished",
        advice: "lock it down when the update is done (/sys/kernel/security/lockdown)",
    },
];

/// Why this word cannot be used, and what to do; nothing for one that can.
pub(super) fn why(word: &Word<'_>, highest_apic_id: u32) -> Option<(&'static str, &'static str)> {
    // `baton.update=` names the update in front of what is given, and means nothing to a kernel.
    if word.param.starts_with("baton.") && !word.is("baton.update") {
        return Some(("this word is Baton's own", LEAVE_OUT));
    }
    let rule = RULES.iter().find(|rule| word.is(rule.name) && (rule.refuses)(word.value, highest_apic_id))?;
    Some((rule.reason, rule.advice))
}

/// Bytes that the line sets aside at boot, at least, and by which words.
pub(super) fn sets_aside<'a>(line: &Line<'a>) -> (u64, Vec<Word<'a>>) {
    /// Default size of huge pages, and size of a slot of the software I/O TLB.
    const HUGE: u64 = 2 << 20;
    const SLOT: u64 = 2 << 10;
    let mut total = 0u64;
    let mut words = Vec::new();
    let mut default = HUGE;
    let mut current = None;
    for word in &line.words {
        if word.is("default_hugepagesz") || word.is("hugepagesz") {
            current = size(word.value());
            if word.is("default_hugepagesz") {
                default = current.unwrap_or(HUGE);
            }
        }
        let bytes = match word {
            _ if word.is("hugepages") => count(word.value()).saturating_mul(current.unwrap_or(default)),
            _ if word.is("swiotlb") => count(word.value().split(',').next().unwrap_or_default()).saturating_mul(SLOT),
            _ if word.is("cma") => size(word.value().split('@').next().unwrap_or_default()).unwrap_or(0),
            _ if word.is("hugetlb_cma") => per_node(word.value(), |text| size(text).unwrap_or(0)),
            _ if word.is("log_buf_len") => size(word.value()).unwrap_or(0),
            _ => 0,
        };
        if bytes > 0 {
            total = total.saturating_add(bytes);
            words.push(*word);
        }
    }
    (total, words)
}

/// A number of huge pages: in all, or for each node (`0:512,1:512`).
fn count(text: &str) -> u64 {
    // What does not fit 64 bits is more than there is.
    per_node(text, |number| {
        let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        if digits { number.parse().unwrap_or(u64::MAX) } else { 0 }
    })
}

fn per_node(text: &str, one: impl Fn(&str) -> u64) -> u64 {
    text.split(',')
        .map(|part| one(part.split_once(':').map_or(part, |(_, number)| number)))
        .fold(0, u64::saturating_add)
}
