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

/// What `baton.ko` calls the RAM that it hot-added.
const ADOPTED: &str = "System RAM (baton)";

/// The kernel's RAM: every `System RAM` resource, and those that drivers hot-added (`System RAM (name)`).
pub fn system_ram(resources: &[Resource]) -> RangeSet {
    resources.iter().filter(|r| r.name == "System RAM" || r.name.starts_with("System RAM (")).map(|r| r.range).collect()
}

/// What of that is the kernel's own for good. Not what drivers other than Baton's hot-added (`System RAM (virtio_mem)`, `(kmem)`):
/// they take it out again, and the next kernel has no such driver.
pub fn own_ram(resources: &[Resource]) -> RangeSet {
    resources.iter().filter(|r| r.name == "System RAM" || r.name == ADOPTED).map(|r| r.range).collect()
}

/// Where the kernel's own image lies (`Kernel code`, `Kernel rodata`, `Kernel data`, `Kernel bss`) and a crash kernel's
/// reservation: RAM that no allocator can move away.
pub fn kernel_image(resources: &[Resource]) -> RangeSet {
    resources.iter().filter(|r| r.name.starts_with("Kernel ") || r.name == "Crash kernel").map(|r| r.range).collect()
}

/// What can be tried to be taken out of this kernel's allocator, within `ram`, the RAM that the next kernel can have.
pub fn movable(resources: &[Resource], ram: &RangeSet) -> RangeSet {
    own_ram(resources).intersect(ram).subtract(&kernel_image(resources))
}

/// Of `named`, which somebody has set aside for Baton on the command line, what this kernel indeed keeps away from: it says
/// `Reserved`, and nothing else is there.
pub fn set_aside(resources: &[Resource], named: &RangeSet) -> RangeSet {
    let (reserved, others): (Vec<&Resource>, Vec<&Resource>) = resources.iter().partition(|r| r.name == "Reserved");
    let ranges = |resources: &[&Resource]| resources.iter().map(|r| r.range).collect::<RangeSet>();
    named.intersect(&ranges(&reserved)).subtract(&ranges(&others))
}

/// The RAM that may be divided between this kernel and the next one: what the firmware listed, and this kernel either uses as its
/// RAM or keeps away from for Baton. The rest is somebody else's, whatever the firmware says: persistent memory (`memmap=n!s`), a
/// reservation of another's (`memmap=n$s`), what `mem=` leaves out.
pub fn usable_ram(firmware: &RangeSet, resources: &[Resource], named: &RangeSet) -> RangeSet {
    own_ram(resources).union(&set_aside(resources, named)).intersect(firmware)
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

    /// What the firmware of a machine of 3 GiB lists.
    fn firmware() -> RangeSet {
        vec![Range::new(0, 0x9fc00), Range::new(1 << 20, 0xbffd_e000)].into()
    }

    fn usable(iomem: &str, named: &[(u64, u64)]) -> String {
        let named: RangeSet = named.iter().map(|(start, mib)| Range::new(*start, start + (mib << 20))).collect();
        usable_ram(&firmware(), &parse_iomem(iomem).unwrap(), &named).to_string()
    }

    /// `memmap=512M!1G`: a file system is mounted there.
    const PERSISTENT: &str = "\
00001000-0009fbff : System RAM
00100000-3fffffff : System RAM
40000000-5fffffff : Persistent Memory (legacy)
  40000000-5fffffff : namespace0.0
60000000-bffddfff : System RAM
bffde000-bfffffff : Reserved
";
    /// `memmap=512M$0x30000000`.
    const ASIDE: &str = "\
00001000-0009fbff : System RAM
00100000-2fffffff : System RAM
30000000-4fffffff : Reserved
50000000-bffddfff : System RAM
bffde000-bfffffff : Reserved
";
    /// `mem=2G`.
    const LESS: &str = "\
00001000-0009fbff : System RAM
00100000-7fffffff : System RAM
bffde000-bfffffff : Reserved
";
    /// The same page as a SIPI page, `memmap=4K$0x8000`; virtio-mem; a block that Baton hot-added.
    const OTHERS: &str = "\
00001000-00007fff : System RAM
00008000-00008fff : Reserved
00009000-0009fbff : System RAM
00100000-3fffffff : System RAM
  1b400000-1c3fffff : Kernel code
  20000000-27ffffff : Crash kernel
40000000-47ffffff : System RAM (virtio_mem)
48000000-4fffffff : System RAM (baton)
";

    #[test]
    fn what_is_somebody_elses_is_never_divided() {
        const LOW: &str = "0x1000-0x9fbff, ";
        let whole = format!("{LOW}0x100000-0xbffddfff");
        let without_aside = format!("{LOW}0x100000-0x2fffffff, 0x50000000-0xbffddfff");
        // Also when it is named by mistake.
        for named in [&[][..], &[(1 << 30, 512)][..]] {
            assert_eq!(usable(PERSISTENT, named), format!("{LOW}0x100000-0x3fffffff, 0x60000000-0xbffddfff"));
            assert_eq!(usable(LESS, named), format!("{LOW}0x100000-0x7fffffff"));
        }
        assert_eq!(usable(LESS, &[(0x8000_0000, 512)]), format!("{LOW}0x100000-0x7fffffff"));
        assert_eq!(usable(ASIDE, &[]), without_aside);
        assert_eq!(usable(ASIDE, &[(0x3000_0000, 512)]), whole);
        assert_eq!(usable(ASIDE, &[(0x3000_0000, 1024)]), whole);
        assert_eq!(usable(ASIDE, &[(0xbfe0_0000, 2)]), without_aside, "the firmware's own reservation is no RAM");
        assert_eq!(usable(OTHERS, &[]), "0x1000-0x7fff, 0x9000-0x9fbff, 0x100000-0x3fffffff, 0x48000000-0x4fffffff");
    }

    #[test]
    fn no_region_is_proposed_where_another_has_something() {
        use crate::memory_map::{Wish, candidates};
        let places = |iomem: &str| {
            let resources = parse_iomem(iomem).unwrap();
            let ram = movable(&resources, &usable_ram(&firmware(), &resources, &RangeSet::new()));
            let wish = Wish { size: 128 << 20, grain: 128 << 20 };
            candidates(&ram, &RangeSet::new(), &wish).unwrap().collect::<RangeSet>().to_string()
        };
        assert_eq!(places(PERSISTENT), "0x8000000-0x3fffffff, 0x60000000-0xb7ffffff");
        assert_eq!(places(LESS), "0x8000000-0x7fffffff");
        assert_eq!(places(ASIDE), "0x8000000-0x2fffffff, 0x50000000-0xb7ffffff");
        // Neither over the kernel's image and the crash kernel, nor into what virtio-mem brought.
        assert_eq!(places(OTHERS), "0x8000000-0x17ffffff, 0x28000000-0x3fffffff, 0x48000000-0x4fffffff");
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,200}") {
            let _ = parse_iomem(&text);
        }
    }
}
