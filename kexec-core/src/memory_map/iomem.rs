//! What the running kernel says about physical memory: `/proc/iomem` and `/sys/firmware/memmap`, from text to data.
//!
//! `/proc/iomem` is the present (hot-added memory included), `/sys/firmware/memmap` what the firmware said at boot. Both
//! show zeros to a process without `CAP_SYS_ADMIN`; that is told apart from a machine without memory.

use super::{Range, RangeSet};

/// One line of `/proc/iomem`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Where it is.
    pub range: Range,
    /// Nesting: 0 for a top-level resource.
    pub depth: usize,
    /// What the kernel calls it.
    pub name: String,
}

/// Why a memory description could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IomemError {
    /// Not the format that the kernel writes.
    #[error("line {line} of the memory map is not `start-end : name`: {text:?}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// Addresses are hidden from this process.
    #[error("all addresses are zero: the kernel hides them; run as root (CAP_SYS_ADMIN)")]
    Hidden,
    /// An entry of `/sys/firmware/memmap`.
    #[error("firmware memory map entry {entry}: start {start:?}, end {end:?} are not addresses")]
    Firmware {
        /// Its place in the list.
        entry: usize,
        /// The content of its file `start`.
        start: String,
        /// The content of its file `end`.
        end: String,
    },
}

/// Parses `/proc/iomem`.
pub fn parse_iomem(text: &str) -> Result<Vec<Resource>, IomemError> {
    let mut resources = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = || IomemError::Line { line: index + 1, text: line.to_owned() };
        let body = line.trim_start_matches(' ');
        let (span, name) = body.split_once(" : ").ok_or_else(bad)?;
        let (start, last) = span.split_once('-').ok_or_else(bad)?;
        resources.push(Resource {
            range: inclusive(start, last, 16).ok_or_else(bad)?,
            depth: (line.len() - body.len()) / 2,
            name: name.trim_end().to_owned(),
        });
    }
    let hidden = |r: &Resource| r.range == Range::new(0, 1);
    if !resources.is_empty() && resources.iter().all(hidden) {
        return Err(IomemError::Hidden);
    }
    Ok(resources)
}

/// The kernel's RAM: every `System RAM` resource, and those that drivers hot-added (`System RAM (name)`).
pub fn system_ram(resources: &[Resource]) -> RangeSet {
    resources.iter().filter(|r| r.name == "System RAM" || r.name.starts_with("System RAM (")).map(|r| r.range).collect()
}

/// Where the kernel's own image lies (`Kernel code`, `Kernel rodata`, `Kernel data`, `Kernel bss`) and a crash kernel's
/// reservation: RAM that no allocator can move away.
pub fn kernel_image(resources: &[Resource]) -> RangeSet {
    resources.iter().filter(|r| r.name.starts_with("Kernel ") || r.name == "Crash kernel").map(|r| r.range).collect()
}

/// One entry of `/sys/firmware/memmap`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareEntry {
    /// Where it is.
    pub range: Range,
    /// What the firmware calls it, as the kernel prints it.
    pub kind: String,
}

/// Parses the files `start`, `end` (last byte) and `type` of each `/sys/firmware/memmap/N`.
pub fn parse_firmware_memmap<'a>(
    entries: impl IntoIterator<Item = (&'a str, &'a str, &'a str)>,
) -> Result<Vec<FirmwareEntry>, IomemError> {
    let hex = |s: &'a str| s.trim().strip_prefix("0x");
    entries
        .into_iter()
        .enumerate()
        .map(|(entry, (start, end, kind))| {
            let range = hex(start).zip(hex(end)).and_then(|(s, e)| inclusive(s, e, 16));
            range.map(|range| FirmwareEntry { range, kind: kind.trim().to_owned() }).ok_or_else(|| {
                IomemError::Firmware { entry, start: start.trim().to_owned(), end: end.trim().to_owned() }
            })
        })
        .collect()
}

/// The RAM that the firmware reported.
pub fn firmware_ram(entries: &[FirmwareEntry]) -> RangeSet {
    entries.iter().filter(|e| e.kind == "System RAM").map(|e| e.range).collect()
}

/// Both files name the last byte. The very last byte of the address space would not fit a half-open range: no RAM
/// is there, so the range just ends one byte early.
fn inclusive(start: &str, last: &str, radix: u32) -> Option<Range> {
    let start = u64::from_str_radix(start, radix).ok()?;
    let last = u64::from_str_radix(last, radix).ok()?;
    if last < start {
        return None;
    }
    Range::checked(start, last.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A q35 machine of 2 GiB under Linux 6.12.
    const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
0009fc00-0009ffff : Reserved
000a0000-000bffff : PCI Bus 0000:00
000f0000-000fffff : Reserved
  000f0000-000fffff : System ROM
00100000-7ffddfff : System RAM
  1b400000-1c3fffff : Kernel code
  1c400000-1cbadfff : Kernel rodata
  1cc00000-1ceadfff : Kernel data
  1d3b2000-1d7fffff : Kernel bss
7ffde000-7fffffff : Reserved
fed00000-fed003ff : HPET 0
100000000-13fffffff : System RAM (baton)
fd00000000-ffffffffff : Reserved
";

    #[test]
    fn reads_a_machine() {
        let resources = parse_iomem(IOMEM).unwrap();
        assert_eq!(resources.len(), 15);
        assert_eq!(resources[5].depth, 1);
        let ram = system_ram(&resources);
        assert_eq!(ram.to_string(), "0x1000-0x9fbff, 0x100000-0x7ffddfff, 0x100000000-0x13fffffff");
        // code and rodata touch
        assert_eq!(kernel_image(&resources).count(), 3);
    }

    #[test]
    fn hidden_addresses_are_not_an_empty_machine() {
        let hidden = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n";
        assert_eq!(parse_iomem(hidden), Err(IomemError::Hidden));
        assert_eq!(parse_iomem(""), Ok(vec![]));
    }

    #[test]
    fn names_the_bad_line() {
        let error = parse_iomem("00000000-00000fff : Reserved\nnonsense\n").unwrap_err();
        assert_eq!(error.to_string(), "line 2 of the memory map is not `start-end : name`: \"nonsense\"");
        assert!(parse_iomem("2000-1000 : System RAM\n").is_err());
    }

    #[test]
    fn reads_firmware_entries() {
        let entries = [("0x0\n", "0x9fbff\n", "System RAM\n"), ("0x9fc00\n", "0x9ffff\n", "Reserved\n")];
        let map = parse_firmware_memmap(entries).unwrap();
        assert_eq!(firmware_ram(&map), RangeSet::from(Range::new(0, 0x9fc00)));
        assert!(parse_firmware_memmap([("0", "0x1", "x")]).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,200}") {
            let _ = parse_iomem(&text);
        }
    }
}
