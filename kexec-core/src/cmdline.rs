//! The successor's command line: what the operator gave, and the words without which it cannot run beside another kernel.

use crate::memory_map::Range;

/// Why a command line is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// Too long.
    #[error("command line of {len} bytes is too long: this kernel takes {max}")]
    TooLong {
        /// With our words.
        len: u64,
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
    #[error("command line word `{given}` cannot be used in a successor: {reason}")]
    Conflict {
        /// The word.
        given: String,
        /// Why.
        reason: &'static str,
    },
}

/// Completes `given`. `max` is the longest command line without its NUL.
pub fn complete(given: &str, control_block: Range, tsc_khz: u32, max: u64) -> Result<String, CmdlineError> {
    if let Some(at) = given.bytes().position(|b| b.is_ascii_control() && b != b'\t') {
        return Err(CmdlineError::Control { byte: given.as_bytes()[at], at });
    }
    if !given.bytes().filter(|&b| b == b'"').count().is_multiple_of(2) {
        return Err(CmdlineError::Quotes);
    }
    // Words behind " -- " go to init and are none of ours.
    let (kernel, init) = split_init(given);
    let words = words(kernel);
    for word in &words {
        if let Some(reason) = conflict(word) {
            return Err(CmdlineError::Conflict { given: (*word).to_owned(), reason });
        }
    }
    let has = |key: &str| words.iter().any(|w| w.split('=').next() == Some(key));

    let mut line = kernel.trim_end().to_owned();
    let mut add = |word: String| {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&word);
    };
    // No CPU is parked yet when it boots, and the wakeup mailbox is waited for without limit.
    if !has("maxcpus") {
        add("maxcpus=1".into());
    }
    // Configuration space is the incumbent's; functions come through our own root bus.
    if !has("pci") {
        add("pci=off".into());
    }
    // No PIT, no HPET, no PM timer to calibrate against, and no clock to watch the TSC with.
    if !has("tsc_early_khz") && tsc_khz != 0 {
        add(format!("tsc_early_khz={tsc_khz}"));
    }
    if !has("tsc") {
        add("tsc=reliable".into());
    }
    // IPI shorthands ("all but self") reach the CPUs of the other kernel too.
    if !has("no_ipi_broadcast") {
        add("no_ipi_broadcast=1".into());
    }
    // A restart would take the incumbent with it. What was given counts once the machine is its own.
    add("panic=0".into());
    // How our own programs find the control block.
    add(format!("baton.control={:#x}", control_block.start()));
    if let Some(init) = init {
        add(format!("-- {init}"));
    }
    if line.len() as u64 > max {
        return Err(CmdlineError::TooLong { len: line.len() as u64, max });
    }
    Ok(line)
}

/// The address that [`complete`] passed on, out of `/proc/cmdline`.
pub fn control_block_of(cmdline: &str) -> Option<u64> {
    words(split_init(cmdline).0)
        .iter()
        .filter_map(|w| w.strip_prefix("baton.control=0x"))
        .find_map(|hex| u64::from_str_radix(hex, 16).ok())
}

/// What the operator of [`complete`]'s kernel wanted to happen at a panic (`panic=`), out of `/proc/cmdline`.
pub fn panic_wish(cmdline: &str) -> Option<i32> {
    let given = |word: &&str| word.strip_prefix("panic=").and_then(|seconds| seconds.parse().ok());
    // The last word is ours.
    let wishes: Vec<i32> = words(split_init(cmdline).0).iter().filter_map(given).collect();
    wishes.iter().rev().nth(1).copied()
}

fn conflict(word: &str) -> Option<&'static str> {
    let (key, value) = word.split_once('=').unwrap_or((word, ""));
    match (key, value) {
        ("maxcpus", "1") | ("pci", "off") => None,
        ("maxcpus", _) => Some("it must start with one CPU (maxcpus=1); it gets the others one by one"),
        ("pci", _) => Some("it must leave the incumbent's PCI bus alone (pci=off)"),
        ("nosmp", "") => Some("it could never take over the other CPUs"),
        ("acpi", "off" | "ht") => Some("its CPUs come to it through ACPI"),
        ("nolapic" | "disableapic", _) => Some("it needs its local APIC"),
        ("baton.control", _) => Some("this word is Baton's own"),
        _ => None,
    }
}

/// Splits like the kernel's `next_arg`: at blanks outside of double quotes.
fn words(line: &str) -> Vec<&str> {
    let mut quoted = false;
    line.split(move |c: char| {
        quoted ^= c == '"';
        !quoted && c.is_ascii_whitespace()
    })
    .filter(|w| !w.is_empty())
    .collect()
}

/// The kernel's part, and what follows the word `--`.
fn split_init(line: &str) -> (&str, Option<&str>) {
    for word in words(line) {
        if word == "--" {
            let at = word.as_ptr() as usize - line.as_ptr() as usize;
            return (&line[..at], Some(line[at + 2..].trim()));
        }
    }
    (line, None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTROL: Range = Range::new(0x5800_0000, 0x5810_0000);

    fn done(given: &str) -> String {
        complete(given, CONTROL, 2_400_000, 2047).unwrap()
    }

    #[test]
    fn adds_what_is_missing() {
        let ours = "maxcpus=1 pci=off tsc_early_khz=2400000 tsc=reliable no_ipi_broadcast=1 panic=0 \
                    baton.control=0x58000000";
        assert_eq!(done(""), ours);
        assert_eq!(done("quiet"), format!("quiet {ours}"));
        assert_eq!(
            done("tsc=nowatchdog pci=off maxcpus=1 tsc_early_khz=1"),
            "tsc=nowatchdog pci=off maxcpus=1 tsc_early_khz=1 no_ipi_broadcast=1 panic=0 \
             baton.control=0x58000000"
        );
        assert!(!complete("", CONTROL, 0, 2047).unwrap().contains("tsc_early_khz"));
    }

    #[test]
    fn a_panic_restarts_nothing_before_the_machine_is_its_own() {
        let line = done("panic=-1 quiet");
        assert!(line.ends_with(" panic=0 baton.control=0x58000000"), "{line}");
        assert_eq!(panic_wish(&line), Some(-1));
        assert_eq!(panic_wish(&done("quiet -- panic=3")), None);
    }

    #[test]
    fn keeps_words_of_init_behind_ours() {
        let line = done("quiet -- single maxcpus=4");
        assert!(line.ends_with("baton.control=0x58000000 -- single maxcpus=4"), "{line}");
        assert_eq!(control_block_of(&line), Some(CONTROL.start()));
        assert_eq!(control_block_of("quiet -- baton.control=0x1000"), None);
    }

    #[test]
    fn quotes_hide_blanks() {
        assert!(done("dyndbg=\"file a.c +p; pci=on\" quiet").contains(" pci=off"));
    }

    #[test]
    fn refuses_what_cannot_work() {
        let refused = |given| complete(given, CONTROL, 1, 2047).unwrap_err().to_string();
        assert!(refused("maxcpus=4").contains("`maxcpus=4`"));
        assert!(refused("pci=noacpi").contains("pci=off"));
        assert!(refused("acpi=off").contains("through ACPI"));
        assert!(refused("baton.control=0x0").contains("Baton's own"));
        assert_eq!(refused("a\nb"), "command line has the control character 0x0a at byte 1");
        assert_eq!(refused("a=\"b"), "command line has an odd number of double quotes");
        let long = "x".repeat(2040);
        assert!(refused(&long).contains("this kernel takes 2047"));
    }

    proptest! {
        #[test]
        fn every_word_is_there_once_and_the_given_ones_stay(given in "[a-z =.\"-]{0,80}") {
            if let Ok(line) = complete(&given, CONTROL, 1000, 2047) {
                prop_assert!(line.starts_with(split_init(&given).0.trim_end()));
                prop_assert_eq!(control_block_of(&line), Some(CONTROL.start()));
                for key in ["maxcpus", "pci", "tsc", "tsc_early_khz"] {
                    let times = words(split_init(&line).0).iter().filter(|w| w.split('=').next() == Some(key)).count();
                    let before = words(split_init(&given).0).iter().filter(|w| w.split('=').next() == Some(key)).count();
                    prop_assert_eq!(times, before.max(1), "{} in {}", key, line);
                }
            }
        }
    }
}
