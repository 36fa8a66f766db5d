//! One successor, placed: from a request to the bytes at each physical address. Pure: the caller writes them through the
//! device, and starts the boot CPU.
//!
//! ```text
//! image ──┐                        ┌─ segments: (physical address, bytes), disjoint, all in region or low slot
//! initrd ─┤   Placement::new       ├─ boot:  arguments of the SIPI page for the boot CPU   (→ kernel entry)
//! cmdline ┼───────────────────────►├─ park:  arguments of the SIPI page for every other   (→ park page)
//! region ─┤                        └─ the addresses that agent and module need later
//! CPUs ───┘
//! ```

use std::borrow::Cow;

use state_schemas::control_block::{self, Piece, words};
use state_schemas::platform::Platform;
use state_schemas::shared::SharedMemory;
use trampoline::{ParkArgs, SipiArgs, park_page, yield_page};
use zerocopy::IntoBytes;

use crate::acpi::{self, AcpiError, AcpiRequest, AcpiTables};
use crate::boot_params::{BootParams, BootParamsError, E820Entry, SETUP_KEXEC_KHO, SetupData};
use crate::cmdline::{self, Circumstances, CmdlineError};
use crate::image::BzImage;
use crate::layout::{ENTRY_OFFSET, KERNEL_OFFSET, LOW_MEMORY_END, LowSlot, PAGE, REGION_ALIGN, REGION_MIN};
use crate::memory_map::{Range, RangeSet, Wish, candidates};
use crate::page_tables::{PageTables, PageTablesError};

/// What shall be placed, and where.
#[derive(Debug, Clone)]
pub struct PlacementRequest<'a> {
    /// The kernel.
    pub image: &'a BzImage<'a>,
    /// Its initrd; empty for none.
    pub initrd: &'a [u8],
    /// The operator's command line; see [`crate::cmdline`] for what is added.
    pub cmdline: &'a str,
    /// Its region.
    pub region: Range,
    /// Its slot below 1 MiB.
    pub low_slot: LowSlot,
    /// APIC id of the CPU that boots it.
    pub boot_cpu: u32,
    /// APIC ids of all other CPUs that it may ever get.
    pub other_cpus: &'a [u32],
    /// An APIC id that no CPU of the machine has; `None`: chosen from the ids above. Give one when the machine has CPUs
    /// that this kernel will never get.
    pub phantom: Option<u32>,
    /// RAM outside of the region that it knows from the start and must not touch: fragments and arenas
    /// ([`crate::memory_map::division::Division::reserved_in_successor`]).
    pub reserved_ram: RangeSet,
    /// Its own RAM outside of the region: [`crate::memory_map::division::Division::cap`].
    pub cap: Option<Range>,
    /// RAM that the identity map covers beside the region's start: usually all that the machine has, so that CPUs parked
    /// here can one day be sent to the park page of the *next* successor, wherever that lies.
    pub identity: RangeSet,
    /// Use 1 GiB pages for it above 4 GiB (the CPU's flag `pdpe1gb`).
    pub gigabyte_pages: bool,
    /// TSC frequency; 0: leave it to the kernel.
    pub tsc_khz: u32,
    /// The machine's registers, for its ACPI tables.
    pub platform: Platform,
    /// Tables of the machine's NUMA nodes, for the successor's.
    pub affinity: &'a [Vec<u8>],
    /// For a kernel with KHO: the payload of its setup_data node. The kernel is then told by the handover what `reserved_ram`
    /// is, and by nothing else. A `SETUP_INDIRECT` node beside it would only cost one of
    /// [`MAX_RESERVATIONS`](crate::boot_params::MAX_RESERVATIONS): decompressor and early boot take memory from KHO's
    /// scratch alone until the preserved pages are reserved (`process_kho_entries`, `memblock_set_kho_scratch_only`), and
    /// who takes a page over there is decided by KHO's mark on it, not by `PageReserved`.
    pub kho: Option<Vec<u8>>,
}

/// Bytes for one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment<'a> {
    /// What it is, for logs.
    pub what: &'static str,
    /// Physical address.
    pub at: u64,
    /// The bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl Segment<'_> {
    /// Where it lies.
    pub fn range(&self) -> Range {
        Range::new(self.at, self.at + self.bytes.len() as u64)
    }
}

/// A successor, ready to be written.
#[derive(Debug, Clone)]
pub struct Placement<'a> {
    /// What to write where; ascending, disjoint. All other bytes of the control block are zero: see
    /// [`Placement::write`].
    pub segments: Vec<Segment<'a>>,
    /// The SIPI page's arguments for the boot CPU.
    pub boot: SipiArgs,
    /// The SIPI page's arguments for a CPU that is to wait in the park page.
    pub park: SipiArgs,
    /// The first MiB of the region.
    pub control_block: Range,
    /// What the kernel occupies before it knows its memory: from its load address, `init_size` long.
    pub kernel: Range,
    /// Where the initrd lies.
    pub initrd: Range,
    /// Root of the identity map, four levels.
    pub root_4level: u64,
    /// Root of the identity map, five levels: for a module whose kernel runs with LA57.
    pub root_5level: u64,
    /// The command line as it was completed.
    pub cmdline: String,
    /// The memory map that the kernel sees.
    pub e820: Vec<E820Entry>,
    /// The phantom APIC id.
    pub phantom: u32,
}

/// Why a successor cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The region is misplaced.
    #[error("region {region} must lie above 1 MiB, on 2 MiB boundaries, with at least {REGION_MIN:#x} bytes")]
    Region {
        /// Given.
        region: Range,
    },
    /// Image and initrd do not fit.
    #[error(
        "region of {size:#x} bytes is too small: image ({init_size:#x} bytes at offset {offset:#x}) and initrd ({initrd:#x} bytes) need {needed:#x}"
    )]
    RegionTooSmall {
        /// Given.
        size: u64,
        /// Needed.
        needed: u64,
        /// Where the image starts in it.
        offset: u64,
        /// What the image needs.
        init_size: u64,
        /// What the initrd needs, in whole pages.
        initrd: u64,
    },
    /// The kernel would move itself away.
    #[error(
        "the kernel wants to run at {pref_address:#x} or above, but would be loaded at {load:#x}: use a higher region"
    )]
    TooLow {
        /// Where it would be.
        load: u64,
        /// Its preferred address.
        pref_address: u64,
    },
    /// Reserved RAM in the region or below 1 MiB.
    #[error("memory {range} to be reserved is not page-aligned, or lies in the region {region} or below 1 MiB")]
    Reserved {
        /// Which.
        range: Range,
        /// Given.
        region: Range,
    },
    /// The machine's memory has no such hole.
    #[error(
        "no {size:#x} bytes of this machine's memory ({ram:#x} bytes) lie together beside what must stay where it is"
    )]
    NoPlace {
        /// Needed.
        size: u64,
        /// All that there is.
        ram: u64,
    },
    /// See there.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// See there.
    #[error(transparent)]
    BootParams(#[from] BootParamsError),
    /// See there.
    #[error(transparent)]
    PageTables(#[from] PageTablesError),
    /// See there.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
}

/// Part of physical memory, mapped.
#[derive(Clone, Copy)]
pub struct Mapped<'a> {
    /// Where it is; offset 0 of the memory is its start.
    pub range: Range,
    /// The mapping.
    pub memory: &'a dyn SharedMemory,
}

/// A segment has no mapping to be written to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at {range} is not in any mapped range")]
pub struct NotMapped {
    /// Which.
    pub what: &'static str,
    /// Where it belongs.
    pub range: Range,
}

/// The smallest region, a multiple of `grain`, that holds image and initrd and leaves `free` bytes to run in.
pub fn smallest_region(image: &BzImage<'_>, initrd_len: u64, free: u64, grain: u64) -> u64 {
    let kernel = KERNEL_OFFSET.next_multiple_of(image.alignment()) + image.init_size();
    (kernel + initrd_len.next_multiple_of(PAGE) + free).max(REGION_MIN).next_multiple_of(grain)
}

impl<'a> Placement<'a> {
    /// Places a successor.
    pub fn new(request: &PlacementRequest<'a>) -> Result<Placement<'a>, PlacementError> {
        let PlacementRequest { image, region, .. } = *request;
        if region != region.shrink_to(REGION_ALIGN) || region.len() < REGION_MIN || region.start() < LOW_MEMORY_END {
            return Err(PlacementError::Region { region });
        }
        let (kernel, initrd) = place_images(image, request.initrd.len() as u64, region)?;
        let at = |piece: Piece| Range::new(region.start() + piece.offset, region.start() + piece.end());
        let control_block = Range::new(region.start(), region.start() + control_block::SIZE);

        let cmdline = cmdline::complete(
            request.cmdline,
            &Circumstances {
                control_block,
                tsc_khz: request.tsc_khz,
                max: image.cmdline_size().min(control_block::CMDLINE.size - 1),
                highest_apic_id: request.other_cpus.iter().copied().fold(request.boot_cpu, u32::max),
                room: initrd.start() - kernel.end(),
            },
        )?;

        // Beside what is asked for: all that the boot protocol wants mapped, the image from load address to init_size.
        let mapped: Vec<Range> = request.identity.iter().chain([Range::new(region.start(), kernel.end())]).collect();
        let tables = PageTables::identity(at(control_block::PAGE_TABLES), &mapped, request.gigabyte_pages)?;

        let mut cpus = vec![request.boot_cpu];
        cpus.extend(request.other_cpus);
        let phantom = request.phantom.unwrap_or_else(|| acpi::choose_phantom(cpus.iter().copied()));
        let mailbox = at(control_block::MAILBOX).start();
        let park_at = at(control_block::PARK_PAGE).start();
        let acpi = AcpiTables::build(&AcpiRequest {
            room: at(control_block::ACPI),
            phantom,
            cpus: &cpus,
            mailbox,
            reset_vector: park_at,
            platform: request.platform,
            affinity: request.affinity,
        })?;

        let e820 = e820(request, control_block)?;
        let setup_data = match &request.kho {
            Some(bytes) => vec![SetupData::Raw { kind: SETUP_KEXEC_KHO, bytes: bytes.clone() }],
            None => request.reserved_ram.iter().map(SetupData::Reserve).collect(),
        };
        let boot_params = BootParams {
            header: image.header_for_boot(),
            cmdline: at(control_block::CMDLINE).start(),
            initrd,
            rsdp: acpi.rsdp,
            e820: e820.clone(),
            setup_data,
        }
        .build(at(control_block::SETUP_DATA))?;

        let park = park_page(&ParkArgs { cr3_4level: tables.root_4level, cr3_5level: tables.root_5level, mailbox });
        let sipi_root = request.low_slot.root_page().start();
        let stack = at(control_block::STACK).end();

        let owned = |what, at, bytes: Vec<u8>| Segment { what, at, bytes: Cow::Owned(bytes) };
        let mut line = cmdline.clone().into_bytes();
        line.push(0);
        let mut segments = vec![
            owned("root for SIPI", sipi_root, tables.root_copy(at(control_block::PAGE_TABLES).start())),
            owned("boot_params", at(control_block::BOOT_PARAMS).start(), boot_params.zero_page.as_bytes().to_vec()),
            owned("command line", at(control_block::CMDLINE).start(), line),
            owned("control words", at(control_block::WORDS).start(), control_words()),
            owned("park page", park_at, park.to_vec()),
            owned("yield page", at(control_block::YIELD_PAGE).start(), yield_page().to_vec()),
            owned("setup_data", at(control_block::SETUP_DATA).start(), boot_params.setup_data),
            owned("ACPI tables", acpi.rsdp, acpi.bytes),
            owned("page tables", at(control_block::PAGE_TABLES).start(), tables.bytes.clone()),
            Segment { what: "kernel", at: kernel.start(), bytes: Cow::Borrowed(image.protected_mode()) },
            Segment { what: "initrd", at: initrd.start(), bytes: Cow::Borrowed(request.initrd) },
        ];
        segments.retain(|segment| !segment.bytes.is_empty());
        debug_assert!(segments.windows(2).all(|pair| pair[0].range().end() <= pair[1].at));

        let entry = kernel.start() + ENTRY_OFFSET;
        Ok(Placement {
            segments,
            boot: SipiArgs { cr3: sipi_root, entry, arg: at(control_block::BOOT_PARAMS).start(), stack },
            park: SipiArgs { cr3: sipi_root, entry: park_at, arg: 0, stack },
            control_block,
            kernel,
            initrd,
            root_4level: tables.root_4level,
            root_5level: tables.root_5level,
            cmdline,
            e820,
            phantom,
        })
    }

    /// Writes everything: zeros into the whole control block, then the segments. The mappings must cover the region's
    /// segments and the low slot's first page; nothing is written unless they do.
    pub fn write(&self, mapped: &[Mapped<'_>]) -> Result<(), NotMapped> {
        let find = |what, range: Range| {
            let part = mapped.iter().find(|part| part.range.contains(range) && part.memory.size() >= part.range.len());
            part.ok_or(NotMapped { what, range }).map(|part| (part.memory, range.start() - part.range.start()))
        };
        let (block, block_at) = find("control block", self.control_block)?;
        let targets =
            self.segments.iter().map(|s| find(s.what, s.range()).map(|at| (s, at))).collect::<Result<Vec<_>, _>>()?;
        block.write(block_at, &vec![0; control_block::SIZE as usize]);
        for (segment, (memory, at)) in targets {
            memory.write(at, &segment.bytes);
        }
        Ok(())
    }

    /// The kernel's 64-bit entry.
    pub fn entry(&self) -> u64 {
        self.boot.entry
    }

    /// Where a piece of the control block is.
    pub fn piece(&self, piece: Piece) -> Range {
        Range::new(self.control_block.start() + piece.offset, self.control_block.start() + piece.end())
    }
}

/// Whether a successor could be placed, asked before any memory is taken: of `request.region` only the length counts, and a place is
/// supposed for it in `request.identity`. What is refused here would be refused by [`Placement::new`]; the command line as it will be is
/// returned, but for the address of the control block.
///
/// # Errors
/// Those of [`Placement::new`], and [`PlacementError::NoPlace`].
pub fn can_place(request: &PlacementRequest<'_>) -> Result<String, PlacementError> {
    let size = request.region.len();
    let avoid = request.reserved_ram.iter().chain(request.cap).collect();
    let no_place = || PlacementError::NoPlace { size, ram: request.identity.total() };
    let mut places = candidates(&request.identity, &avoid, &Wish { size, grain: REGION_ALIGN })
        .map_err(|_| PlacementError::Region { region: request.region })?;
    let region = places.next().ok_or_else(no_place)?;
    Ok(Placement::new(&PlacementRequest { region, ..request.clone() })?.cmdline)
}

/// Where image and initrd will lie: the image low in the region, the initrd at its end.
pub fn place_images(image: &BzImage<'_>, initrd_len: u64, region: Range) -> Result<(Range, Range), PlacementError> {
    let load = (region.start() + KERNEL_OFFSET).next_multiple_of(image.alignment());
    let offset = load - region.start();
    // Image files are bounded by MAX_IMAGE; an initrd is in our memory already. So these sums cannot wrap.
    let pages = initrd_len.next_multiple_of(PAGE);
    let needed = offset + image.init_size() + pages;
    if needed > region.len() {
        return Err(PlacementError::RegionTooSmall {
            size: region.len(),
            needed,
            offset,
            init_size: image.init_size(),
            initrd: pages,
        });
    }
    if load < image.pref_address() {
        return Err(PlacementError::TooLow { load, pref_address: image.pref_address() });
    }
    let initrd_at = region.end() - pages;
    Ok((Range::new(load, load + image.init_size()), Range::new(initrd_at, initrd_at + initrd_len)))
}

/// The successor's whole world.
fn e820(request: &PlacementRequest<'_>, control_block: Range) -> Result<Vec<E820Entry>, PlacementError> {
    let region = request.region;
    for range in request.reserved_ram.iter().chain(request.cap) {
        if range != range.shrink_to(PAGE) || range.overlaps(region) || range.start() < LOW_MEMORY_END {
            return Err(PlacementError::Reserved { range, region });
        }
    }
    let mut entries = vec![
        E820Entry::ram(request.low_slot.kernel_part()),
        E820Entry::reserved(control_block),
        E820Entry::ram(Range::new(control_block.end(), region.end())),
    ];
    entries.extend(request.reserved_ram.iter().chain(request.cap).map(E820Entry::ram));
    entries.sort_by_key(|entry| entry.range);
    Ok(entries)
}

/// Magic and version; everything else starts as zero, which means "nothing yet" in each of the words.
fn control_words() -> Vec<u8> {
    let mut bytes = vec![0; control_block::WORDS.size as usize];
    let mut put = |at: u64, value: &[u8]| {
        let at = (at - control_block::WORDS.offset) as usize;
        bytes[at..at + value.len()].copy_from_slice(value);
    };
    put(words::MAGIC_AT, &words::MAGIC.to_le_bytes());
    put(words::VERSION_AT, &words::VERSION.to_le_bytes());
    bytes
}
