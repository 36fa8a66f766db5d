//! The successor's command line: what the incumbent was booted with, what the operator gave, and the words without which it cannot
//! run beside another kernel.
//!
//! - [`words`]: a line in words, split as Linux splits it.
//! - [`refused`]: the words with which a successor could not run, each with its reason.
//! - [`mod@inherit`]: which of the incumbent's words its successor gets, and which not, each with its reason.
//! - [`security`]: what a successor would protect less than the incumbent does.

pub mod inherit;
mod refused;
pub mod security;
pub mod words;

use crate::memory_map::Range;
use words::{Line, Word};

/// Why a command line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// Too long.
    #[error("command line of {len} bytes, {ours} of them Baton's own, is too long: this kernel takes {max}")]
    TooLong {
        /// With our words.
        len: u64,
        /// Of these, what we add.
        ours: u64,
        /// What image and control block allow.
        max: u64,
    },
    /// A byte that cannot be passed on.
    #[error("command line has the control character {byte:#04x} at byte {at}")]
    Control {
        /// The byte.
        byte: u8,
        /// Where.
        at: usize,
    },
    /// What we add would be swallowed by the open quotes.
    #[error("command line has an odd number of double quotes")]
    Quotes,
    /// The operator asks for what cannot work.
    #[error("command line word `{given}` cannot be used in a successor: {reason}; {advice}")]
    Conflict {
        /// The word.
        given: String,
        /// Why.
        reason: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// More memory is to be set aside than the successor has when it reads the line.
    #[error(
        "command line words {} set {} MiB aside, but a successor begins with {} MiB to run in: set them aside after the update \
         (for huge pages: sysctl vm.nr_hugepages), or make update.region_mib larger",
        .words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "), .needed >> 20, .room >> 20
    )]
    SetsAside {
        /// The words.
        words: Vec<String>,
        /// Bytes that they set aside.
        needed: u64,
        /// Bytes that there are.
        room: u64,
    },
}

/// What a command line is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Circumstances {
    /// Where the successor's control block will be.
    pub control_block: Range,
    /// TSC frequency; 0: leave it to the kernel.
    pub tsc_khz: u32,
    /// The longest command line without its NUL: what image and control block take. Linux's own limit on x86 is 2047
    /// (`COMMAND_LINE_SIZE`), and the image says it (`cmdline_size`).
    pub max: u64,
    /// The highest APIC id that it may ever get.
    pub highest_apic_id: u32,
    /// Bytes of its region that image and initrd leave.
    pub room: u64,
}

/// What a successor is told beside what was given; `true`: whatever was given.
fn ours(control_block: Range, tsc_khz: u32) -> Vec<(&'static str, String, bool)> {
    let mut words = vec![
        // No CPU is parked yet when it boots, and the wakeup mailbox is waited for without limit.
        ("maxcpus", "maxcpus=1".to_owned(), false),
        // A kernel that starts CPUs in parallel begins with the first threads of the cores, whatever `maxcpus` says, unless it runs on
        // one (`cpuhp_bringup_cpus_parallel()`, kernel/cpu.c, of 6.5 and later): on the second thread of a core it would wait at the
        // mailbox for ever. It starts none, so nothing is lost; kernels that do not know this word pass it over.
        ("cpuhp.parallel", "cpuhp.parallel=off".to_owned(), true),
        // Configuration space is the incumbent's; functions come through our own root bus.
        ("pci", "pci=off".to_owned(), false),
    ];
    // No PIT, no HPET, no PM timer to calibrate against, and no clock to watch the TSC with.
    if tsc_khz != 0 {
        words.push(("tsc_early_khz", format!("tsc_early_khz={tsc_khz}"), false));
    }
    words.push(("tsc", "tsc=reliable".to_owned(), false));
    // IPI shorthands ("all but self") reach the CPUs of the other kernel too.
    words.push(("no_ipi_broadcast", "no_ipi_broadcast=1".to_owned(), false));
    // A restart would take the incumbent with it. What was given counts once the machine is its own.
    words.push(("panic", "panic=0".to_owned(), true));
    // How our own programs find the control block.
    words.push(("baton.control", format!("baton.control={:#x}", control_block.start()), true));
    words
}

/// Completes `given`, or says why a successor could not run with it.
///
/// # Errors
/// What is wrong with it, the first of several.
pub fn complete(given: &str, circumstances: &Circumstances) -> Result<String, CmdlineError> {
    /// A no-break space in the kernel's character set, Latin-1: `isspace()` there, in the middle of a UTF-8 letter here.
    const NO_BREAK_SPACE: u8 = 0xa0;
    let control = |&byte: &u8| byte.is_ascii_control() && byte != b'\t' || byte == NO_BREAK_SPACE;
    if let Some(at) = given.bytes().position(|byte| control(&byte)) {
        return Err(CmdlineError::Control { byte: given.as_bytes()[at], at });
    }
    if !given.bytes().filter(|&b| b == b'"').count().is_multiple_of(2) {
        return Err(CmdlineError::Quotes);
    }
    // Words behind " -- " go to init and are none of ours.
    let parsed = Line::parse(given);
    for word in &parsed.words {
        if let Some((reason, advice)) = refused::why(word, circumstances.highest_apic_id) {
            return Err(CmdlineError::Conflict { given: word.raw.to_owned(), reason, advice });
        }
    }
    let (needed, words) = refused::sets_aside(&parsed);
    if needed > most_set_aside(circumstances.room) {
        let words = words.iter().map(|word| word.raw.to_owned()).collect();
        return Err(CmdlineError::SetsAside { words, needed, room: circumstances.room });
    }

    let mut line = parsed.kernel.trim_end().to_owned();
    for (name, word, always) in ours(circumstances.control_block, circumstances.tsc_khz) {
        if always || !parsed.has(name) {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(&word);
        }
    }
    if let Some(init) = parsed.init {
        line = format!("{line} -- {init}");
    }
    let (len, max) = (line.len() as u64, circumstances.max);
    if len > max {
        return Err(CmdlineError::TooLong { len, ours: len.saturating_sub(given.len() as u64), max });
    }
    Ok(line)
}

/// What may be set aside of the memory in which a successor begins: it has to come up in the rest.
fn most_set_aside(room: u64) -> u64 {
    room / 2
}

/// The address that [`complete`] passed on, out of `/proc/cmdline`.
pub fn control_block_of(cmdline: &str) -> Option<u64> {
    let line = Line::parse(cmdline);
    let mut given = line.words.iter().filter(|word| word.is("baton.control"));
    given.find_map(|word| u64::from_str_radix(word.value().strip_prefix("0x")?, 16).ok())
}

/// What the operator of [`complete`]'s kernel wanted to happen at a panic (`panic=`), out of `/proc/cmdline`.
pub fn panic_wish(cmdline: &str) -> Option<i32> {
    let line = Line::parse(cmdline);
    let given = |word: &Word<'_>| if word.is("panic") { word.value().parse().ok() } else { None };
    // The last word is ours.
    let wishes: Vec<i32> = line.words.iter().filter_map(given).collect();
    wishes.iter().rev().nth(1).copied()
}

/// The program that the kernel is told to run first (`rdinit=`), where that is not the `/init` that Baton packs. It has to be in the
/// operator's own initrd, and to start `/init` itself: whoever makes the initrd checks that it is there.
pub fn first_program(cmdline: &str) -> Option<String> {
    let line = Line::parse(cmdline);
    line.last("rdinit").map(|word| word.value().to_owned()).filter(|program| program != "/init")
}

/// The word that keeps the second threads of cores from coming online, if there is one that the incumbent was not booted with. With
/// it, a successor could not take those over that run in the incumbent: its move of CPUs would fail after the cutover.
pub fn without_second_threads(cmdline: &str, incumbent: &str) -> Option<String> {
    // Of some words it depends on the CPU; where the incumbent has the same one and second threads run, they will run there, too.
    let known = Line::parse(incumbent);
    let forbids = |word: &&Word<'_>| {
        word.is("nosmt")
            || word.is("l1tf") && word.value().starts_with("full")
            || word.value().split(',').any(|part| part == "nosmt") && security::is_mitigation(&word.key())
    };
    let line = Line::parse(cmdline);
    let mut new = line.words.iter().filter(|word| !known.words.iter().any(|old| old.raw == word.raw));
    new.find(forbids).map(|word| word.raw.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CIRCUMSTANCES: Circumstances = Circumstances {
        control_block: Range::new(0x5800_0000, 0x5810_0000),
        tsc_khz: 2_400_000,
        max: 2047,
        highest_apic_id: 3,
        room: 400 << 20,
    };

    fn done(given: &str) -> String {
        complete(given, &CIRCUMSTANCES).unwrap()
    }

    fn refused(given: &str) -> String {
        complete(given, &CIRCUMSTANCES).unwrap_err().to_string()
    }

    #[test]
    fn adds_what_is_missing() {
        let ours = "maxcpus=1 cpuhp.parallel=off pci=off tsc_early_khz=2400000 tsc=reliable no_ipi_broadcast=1 panic=0 \
                    baton.control=0x58000000";
        assert_eq!(done(""), ours);
        assert_eq!(done("quiet"), format!("quiet {ours}"));
        assert_eq!(
            done("tsc=nowatchdog pci=off maxcpus=1 tsc_early_khz=1"),
            "tsc=nowatchdog pci=off maxcpus=1 tsc_early_khz=1 cpuhp.parallel=off no_ipi_broadcast=1 panic=0 \
             baton.control=0x58000000"
        );
        assert!(!complete("", &Circumstances { tsc_khz: 0, ..CIRCUMSTANCES }).unwrap().contains("tsc_early_khz"));
    }

    #[test]
    fn a_panic_restarts_nothing_before_the_machine_is_its_own() {
        for given in ["panic=-1 quiet", "\"panic=-1\" quiet"] {
            let line = done(given);
            assert!(line.ends_with(" panic=0 baton.control=0x58000000"), "{line}");
            assert_eq!(panic_wish(&line), Some(-1));
        }
        assert_eq!(panic_wish(&done("quiet -- panic=3")), None);
    }

    #[test]
    fn keeps_words_of_init_behind_ours() {
        let line = done("quiet -- single maxcpus=4");
        assert!(line.ends_with("baton.control=0x58000000 -- single maxcpus=4"), "{line}");
        assert_eq!(control_block_of(&line), Some(CIRCUMSTANCES.control_block.start()));
        assert_eq!(control_block_of("quiet -- baton.control=0x1000"), None);
    }

    #[test]
    fn quotes_hide_blanks() {
        assert!(done("dyndbg=\"file a.c +p; pci=on\" quiet").contains(" pci=off"));
    }

    #[test]
    fn refuses_what_cannot_work_by_name() {
        for word in [
            "maxcpus=4",
            "\"maxcpus=4\"",
            "maxcpus=\"4\"",
            "nr_cpus=1",
            "nr-cpus=1",
            "possible_cpus=1",
            "nosmp",
            "mem=512M",
            "memmap=512M!1G",
            "acpi=off",
            "acpi=ht",
            "acpi=rsdt",
            "acpi_rsdp=0x1000",
            "pci=noacpi",
            "pci=",
            "pci",
            "nolapic",
            "disableapic",
            "noapic",
            "notsc",
            "tsc=unstable",
            "no_ipi_broadcast=0",
            "cpuhp.parallel=on",
            "noinitrd",
            "initrdmem=0x1000,1",
            "baton.control=0x0",
            "baton.other",
            "crashkernel=128M",
            "lockdown=integrity",
            "nomodule",
            "module_blacklist=x,baton",
            "sysctl.kernel.modules_disabled=1",
        ] {
            for line in [word.to_owned(), format!("quiet {word} x=y")] {
                let why = refused(&line);
                assert!(why.contains(&format!("`{word}`")) && why.contains("; "), "{why}");
            }
            assert!(complete(&format!("quiet -- {word}"), &CIRCUMSTANCES).is_ok(), "it is for init: {word}");
        }
        assert!(refused("pci=noacpi").contains("pci=off"));
        assert!(refused("acpi=off").contains("through ACPI"));
        assert!(refused("baton.control=0x0").contains("Baton's own"));
        assert_eq!(refused("a\nb"), "command line has the control character 0x0a at byte 1");
        assert_eq!(refused("a=à"), "command line has the control character 0xa0 at byte 3");
        assert_eq!(refused("a=\"b"), "command line has an odd number of double quotes");
        for fine in [
            "acpi=force",
            "tsc=nowatchdog",
            "mem=nopentium",
            "lockdown=none",
            "nox2apic",
            "panic=-1",
            "cpuhp.parallel=0",
            "module_blacklist=batonx",
            "a=ü",
        ] {
            done(fine);
        }
    }

    #[test]
    fn what_needs_x2apic_keeps_it() {
        for (highest, refused) in [(254, false), (255, true), (4096, true)] {
            let circumstances = Circumstances { highest_apic_id: highest, ..CIRCUMSTANCES };
            assert_eq!(complete("nox2apic", &circumstances).is_err(), refused, "{highest}");
        }
    }

    #[test]
    fn a_line_must_fit() {
        assert!(refused(&"x".repeat(2040)).contains("is too long: this kernel takes 2047"));
        let fits = 2047 - done("x").len() + 1;
        assert_eq!(done(&"x".repeat(fits)).len(), 2047);
        assert!(complete(&"x".repeat(fits + 1), &CIRCUMSTANCES).is_err());
    }

    #[test]
    fn memory_that_is_set_aside_must_be_there() {
        for line in [
            "hugepages=100000",
            "hugepagesz=1G hugepages=1",
            "default_hugepagesz=1G hugepages=1",
            "hugepages=0:60,1:60",
            "cma=1G",
            "log_buf_len=512M",
            "swiotlb=131072",
            "hugepages=999999999999999999999",
        ] {
            let why = refused(line);
            assert!(why.contains("set ") && why.contains("400 MiB to run in"), "{why}");
            assert!(why.contains(line.split(' ').next_back().unwrap()), "{why}");
        }
        for fine in ["hugepages=100", "hugepagesz=1G hugepages=0", "cma=64M@0", "log_buf_len=1M", "hugepages=x"] {
            done(fine);
        }
    }

    #[test]
    fn another_first_program_is_told() {
        assert_eq!(first_program("rdinit=/init quiet"), None);
        assert_eq!(first_program("rdinit=/init \"rdinit=/trap\""), Some("/trap".to_owned()));
    }

    #[test]
    fn words_that_keep_second_threads_offline() {
        for word in
            ["nosmt", "nosmt=force", "mitigations=auto,nosmt", "mds=full,nosmt", "l1tf=full", "l1tf=flush,nosmt"]
        {
            assert_eq!(without_second_threads(&format!("quiet {word}"), "quiet"), Some(word.to_owned()));
            assert_eq!(without_second_threads(&format!("quiet {word}"), word), None, "the incumbent has it");
        }
        assert_eq!(without_second_threads("mitigations=auto l1tf=flush x=nosmt -- nosmt", ""), None);
    }

    proptest! {
        #[test]
        fn every_word_is_there_once_and_the_given_ones_stay(given in "[a-z =.\"-]{0,80}") {
            if let Ok(line) = complete(&given, &CIRCUMSTANCES) {
                prop_assert!(line.starts_with(Line::parse(&given).kernel.trim_end()));
                prop_assert_eq!(control_block_of(&line), Some(CIRCUMSTANCES.control_block.start()));
                let count = |line: &str, key: &str| Line::parse(line).words.iter().filter(|word| word.is(key)).count();
                for key in ["maxcpus", "pci", "tsc", "tsc_early_khz"] {
                    prop_assert_eq!(count(&line, key), count(&given, key).max(1), "{} in {}", key, line);
                }
            }
        }
    }
}
