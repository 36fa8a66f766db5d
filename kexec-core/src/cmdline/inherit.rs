//! Which words of the incumbent's command line its successor gets.
//!
//! All of them, unless there is a reason against: the operator of a machine has tuned it by words that Baton need not know. The
//! reasons are in one table, and each word that is left out is told with its reason. What the operator gives for the update counts
//! before what the incumbent has.

use super::refused;
use super::words::{Line, Word};
use crate::cpus::{format_cpu_list, parse_cpu_list};
use crate::memory_map::Range;

/// What a line is inherited by.
pub struct Heir<'a> {
    /// The highest APIC id that the successor may get.
    pub highest_apic_id: u32,
    /// Bytes of the successor's region that image and initrd leave.
    pub room: u64,
    /// The number in the successor of a CPU that has this number here: kernels number the same CPUs differently.
    pub cpu_number: &'a dyn Fn(u32) -> Option<u32>,
}

/// A word that the successor does not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The word.
    pub word: String,
    /// Why.
    pub reason: String,
}

/// A line for the successor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inherited {
    /// The incumbent's words that are inherited, and behind them what was given.
    pub line: String,
    /// The incumbent's words that are not.
    pub left_out: Vec<LeftOut>,
}

/// What a word's name is compared with.
enum Name {
    Is(&'static str),
    Begins(&'static str),
}

/// Words that concern the incumbent and not the machine. (What [`refused`] has is left out as well.)
const NOT_INHERITED: &[(Name, &str)] = {
    use Name::{Begins, Is};
    const BY_BATON: &str = "Baton gives each successor its own";
    const BOOT_LOADER: &str = "it is the boot loader's";
    const HIBERNATION: &str = "there is nothing to resume from: the machine goes on";
    const FIRST: &str = "it names the first program of the incumbent; the successor starts the /init that Baton packs";
    const FIRMWARE: &str = "it names a device or a table of the firmware, which the successor does not see";
    const REMAPPING: &str = "the successor drives no IOMMU";
    &[
        (Begins("baton."), BY_BATON),
        (Is("maxcpus"), BY_BATON),
        (Is("cpuhp.parallel"), BY_BATON),
        (Is("pci"), "the successor must leave the PCI bus alone; it gets its functions from Baton"),
        (Is("tsc"), BY_BATON),
        (Is("tsc_early_khz"), BY_BATON),
        (Is("no_ipi_broadcast"), BY_BATON),
        (Is("kho"), BY_BATON),
        (Is("liveupdate"), BY_BATON),
        (Is("kho_scratch"), BY_BATON),
        (Is("BOOT_IMAGE"), BOOT_LOADER),
        (Is("initrd"), BOOT_LOADER),
        (Is("auto"), BOOT_LOADER),
        (Is("rdinit"), FIRST),
        (Is("init"), FIRST),
        (Is("resume"), HIBERNATION),
        (Is("resume_offset"), HIBERNATION),
        (Is("resumewait"), HIBERNATION),
        (Is("resumedelay"), HIBERNATION),
        (Is("hibernate"), HIBERNATION),
        (Is("clocksource"), "the successor has no other clock than the TSC"),
        (Is("hpet"), FIRMWARE),
        (Is("efi"), FIRMWARE),
        (Is("add_efi_memmap"), FIRMWARE),
        (Is("acpi_enforce_resources"), FIRMWARE),
        (Is("acpi_osi"), FIRMWARE),
        (Is("acpi_irq_nobalance"), FIRMWARE),
        (Is("earlyprintk"), FIRMWARE),
        (Is("earlycon"), FIRMWARE),
        (Is("pcie_aspm"), FIRMWARE),
        (Is("pcie_ports"), FIRMWARE),
        (Is("intel_iommu"), REMAPPING),
        (Is("amd_iommu"), REMAPPING),
        (Is("iommu"), REMAPPING),
        (Begins("iommu."), REMAPPING),
        (Is("intremap"), REMAPPING),
        (Is("numa"), "the successor sees one node"),
        (Is("numa_balancing"), "the successor sees one node"),
    ]
};

/// Words that list CPUs by number.
const CPU_LISTS: [&str; 4] = ["isolcpus", "nohz_full", "rcu_nocbs", "irqaffinity"];
/// Words of which several count, one beside the other: a given one does not replace the incumbent's.
const CUMULATIVE: [&str; 4] = ["dyndbg", "module_blacklist", "initcall_blacklist", "usbcore.quirks"];

/// The successor's line: the words of `incumbent` (`/proc/cmdline`) that concern the machine, and then `given`.
pub fn inherit(incumbent: &str, given: &str, heir: &Heir<'_>) -> Inherited {
    let (old, new) = (Line::parse(incumbent.trim()), Line::parse(given));
    let mut words: Vec<String> = Vec::new();
    let mut left_out = Vec::new();
    let mut out = |word: &Word<'_>, reason: String| left_out.push(LeftOut { word: word.raw.to_owned(), reason });
    // A successor's last `panic=` is what Baton added (`super::panic_wish`); only what was given before is the operator's.
    let by_baton = old.has("baton.control").then(|| old.words.iter().rposition(|word| word.is("panic"))).flatten();
    let ours = super::ours(Range::new(0, 0), 1)
        .into_iter()
        .map(|(name, ..)| name)
        .chain(["kho", "liveupdate", "baton.update"])
        .collect::<Vec<_>>();
    // Huge pages and the like go together: one word gives another its meaning.
    let (aside, asiders) = refused::sets_aside(&old);
    let too_large = aside > super::most_set_aside(heir.room);

    for (at, word) in old.words.iter().enumerate() {
        if Some(at) == by_baton {
            continue;
        }
        let known = NOT_INHERITED.iter().find(|(name, _)| match name {
            Name::Is(name) => word.is(name),
            Name::Begins(prefix) => word.param.starts_with(prefix),
        });
        if let Some((_, reason)) = known {
            // What Baton adds to every line is no news.
            let own = old.has("baton.control") && ours.iter().any(|name| word.is(name));
            if !own {
                out(word, (*reason).to_owned());
            }
        } else if let Some((reason, _)) = refused::why(word, heir.highest_apic_id) {
            out(word, reason.to_owned());
        } else if new.has(word.param) && !CUMULATIVE.iter().any(|name| word.is(name)) {
            // The same word given again is no change.
            if new.last(word.param).is_some_and(|given| given.value != word.value) {
                out(word, "it was given anew".to_owned());
            }
        } else if too_large && asiders.contains(word) {
            let reason = format!(
                "it sets memory aside at boot, {} MiB with its like, and the successor begins with {} MiB to run in; set it aside after the update (for huge pages: sysctl vm.nr_hugepages)",
                aside >> 20,
                heir.room >> 20
            );
            out(word, reason);
        } else if CPU_LISTS.iter().any(|name| word.is(name)) && word.value.is_some_and(|value| value != "all") {
            match renumbered(word, heir.cpu_number) {
                Ok(renumbered) => words.push(renumbered),
                Err(reason) => out(word, reason),
            }
        } else if word.raw.bytes().any(|byte| byte.is_ascii_control())
            || !word.raw.bytes().filter(|&b| b == b'"').count().is_multiple_of(2)
        {
            out(word, "it has a control character or an odd number of quotes".to_owned());
        } else {
            words.push(word.raw.to_owned());
        }
    }
    if let Some(init) = old.init.filter(|init| !init.is_empty()) {
        let reason = "what is behind the two dashes is for the incumbent's first program".to_owned();
        left_out.push(LeftOut { word: format!("-- {init}"), reason });
    }
    let given = given.trim();
    if !given.is_empty() {
        words.push(given.to_owned());
    }
    Inherited { line: words.join(" "), left_out }
}

/// The same CPUs by the successor's numbers.
fn renumbered(word: &Word<'_>, cpu_number: &dyn Fn(u32) -> Option<u32>) -> Result<String, String> {
    // isolcpus=[flag,...,]list: flags are words, the list is digits.
    let value = word.value();
    let list_at = value
        .find(|c: char| c.is_ascii_digit())
        .filter(|&at| value[..at].split(',').all(|flag| flag.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
    let (flags, list) = value.split_at(list_at.ok_or("its list of CPUs has a form that is not understood here")?);
    let cpus = parse_cpu_list(list).map_err(|error| error.to_string())?;
    let mut numbers = cpus
        .iter()
        .map(|&cpu| cpu_number(cpu).ok_or_else(|| format!("CPU {cpu} is none that the successor gets")))
        .collect::<Result<Vec<u32>, String>>()?;
    numbers.sort_unstable();
    Ok(format!("{}={flags}{}", word.param, format_cpu_list(&numbers)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cmdline::{Circumstances, complete};

    /// The successor's CPU 0 is this kernel's CPU 3.
    fn number(cpu: u32) -> Option<u32> {
        [1, 2, 3, 0].get(cpu as usize).copied()
    }

    fn heir() -> Heir<'static> {
        Heir { highest_apic_id: 3, room: 400 << 20, cpu_number: &number }
    }

    fn of(incumbent: &str, given: &str) -> (String, Vec<String>) {
        let Inherited { line, left_out } = inherit(incumbent, given, &heir());
        (line, left_out.into_iter().map(|LeftOut { word, reason }| format!("{word}: {reason}")).collect())
    }

    #[test]
    fn what_concerns_the_machine_is_inherited() {
        let debian = "BOOT_IMAGE=/boot/vmlinuz-6.12.117+deb13-amd64 root=UUID=51d1-aa ro quiet mitigations=auto,nosmt lockdown=none \
                      lsm=landlock,apparmor audit=1 net.ifnames=0 transparent_hugepage=never console=ttyS0,115200n8 systemd.show_status=0\n";
        let (line, out) = of(debian, "loglevel=7");
        assert_eq!(
            line,
            "root=UUID=51d1-aa ro quiet mitigations=auto,nosmt lockdown=none lsm=landlock,apparmor audit=1 net.ifnames=0 \
             transparent_hugepage=never console=ttyS0,115200n8 systemd.show_status=0 loglevel=7"
        );
        assert_eq!(out, ["BOOT_IMAGE=/boot/vmlinuz-6.12.117+deb13-amd64: it is the boot loader's"]);
    }

    #[test]
    fn each_word_left_out_has_its_reason() {
        let line = "mem=2G \"nr_cpus=4\" pci=noaer resume=/dev/vda2 hugepages=100000 crashkernel=256M iommu=pt init=/sbin/x a=1 -- single";
        let (line, out) = of(line, "a=2 -- other");
        assert_eq!(line, "a=2 -- other");
        let words: Vec<_> = out.iter().map(|line| line.split_once(": ").unwrap().0).collect();
        let all = [
            "mem=2G",
            "\"nr_cpus=4\"",
            "pci=noaer",
            "resume=/dev/vda2",
            "hugepages=100000",
            "crashkernel=256M",
            "iommu=pt",
            "init=/sbin/x",
            "a=1",
            "-- single",
        ];
        assert_eq!(words, all);
        assert!(out[4].contains("200000 MiB") && out[4].contains("400 MiB to run in"), "{}", out[4]);
        assert_eq!(
            of("hugepages=50 default_hugepagesz=2M hugepagesz=1G x", "").0,
            "hugepages=50 default_hugepagesz=2M hugepagesz=1G x"
        );
    }

    #[test]
    fn cpus_keep_their_place_and_get_new_numbers() {
        assert_eq!(
            of("isolcpus=managed_irq,domain,1-2 nohz_full=0,2 rcu_nocbs=all irqaffinity=3", "").0,
            "isolcpus=managed_irq,domain,2-3 nohz_full=1,3 rcu_nocbs=all irqaffinity=0"
        );
        let (line, out) = of("isolcpus=7 nohz_full=0-N", "");
        assert_eq!(line, "");
        assert_eq!(
            out,
            [
                "isolcpus=7: CPU 7 is none that the successor gets",
                "nohz_full=0-N: \"0-N\" is not a list of CPUs such as 0-3,5"
            ]
        );
    }

    #[test]
    fn a_given_word_replaces_the_incumbents() {
        assert_eq!(
            of("console=ttyS0 console=tty0 panic=-1", "console=ttyS1 panic=-1"),
            (
                "console=ttyS1 panic=-1".into(),
                vec!["console=ttyS0: it was given anew".into(), "console=tty0: it was given anew".into()]
            )
        );
        assert_eq!(of("module_blacklist=a", "module-blacklist=b").0, "module_blacklist=a module-blacklist=b");
    }

    /// Otherwise each update would make the line longer, until it does not fit.
    #[test]
    fn a_line_is_the_same_after_any_number_of_updates() {
        let circumstances = Circumstances {
            control_block: Range::new(0x5800_0000, 0x5810_0000),
            tsc_khz: 2_400_000,
            max: 2047,
            highest_apic_id: 3,
            room: 400 << 20,
        };
        let given = "console=ttyS1 kho=on liveupdate=on";
        let mut line = "quiet mitigations=auto panic=10 console=ttyS0 -- x".to_owned();
        let mut lines = Vec::new();
        for hop in 0..4 {
            let inherited = inherit(&line, given, &heir());
            assert_eq!(inherited.left_out.len(), if hop == 0 { 2 } else { 0 }, "{:?}", inherited.left_out);
            line = complete(&inherited.line, &circumstances).unwrap();
            assert_eq!(crate::cmdline::panic_wish(&line), Some(10));
            lines.push(line.clone());
        }
        lines.dedup();
        assert_eq!(lines.len(), 1, "{lines:#?}");
    }

    proptest! {
        #[test]
        fn what_is_inherited_can_be_booted(incumbent in "([a-z_]{1,6}|mem|acpi|pci|nohz_full|hugepages|\"|--|=|,| |[0-9]{1,3}|off|baton\\.control){0,20}") {
            let Inherited { line, left_out } = inherit(&incumbent, "", &heir());
            let circumstances = Circumstances { control_block: Range::new(0, 0x10_0000), tsc_khz: 1, max: 2047, highest_apic_id: 3, room: 400 << 20 };
            prop_assert!(complete(&line, &circumstances).is_ok(), "{line:?} of {incumbent:?}");
            for LeftOut { word, reason } in left_out {
                prop_assert!(incumbent.contains(word.trim_start_matches("-- ")) && !reason.is_empty());
            }
        }
    }
}
