//! A placement as a whole: what lies where, and that nothing lies on anything else.

mod support;

use kexec_core::boot_params::{E820Kind, SETUP_INDIRECT};
use kexec_core::image::BzImage;
use kexec_core::layout::LowSlot;
use kexec_core::memory_map::division::Division;
use kexec_core::memory_map::{Range, RangeSet};
use kexec_core::placement::*;
use proptest::prelude::*;
use state_schemas::control_block::{self, words};
use state_schemas::platform::Platform;
use state_schemas::shared::SharedMemory;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn request<'a>(image: &'a BzImage<'a>, region: Range, initrd: &'a [u8]) -> PlacementRequest<'a> {
    PlacementRequest {
        image,
        initrd,
        cmdline: "quiet",
        region,
        low_slot: LowSlot::new(1).unwrap(),
        boot_cpu: 3,
        other_cpus: &[0, 1, 2],
        phantom: None,
        reserved_ram: RangeSet::new(),
        cap: None,
        identity: RangeSet::new(),
        gigabyte_pages: false,
        tsc_khz: 2_000_000,
        platform: Platform::default(),
        affinity: &[],
        kho: None,
    }
}

/// The bytes at a physical address, out of the segments; zero where none is.
fn peek(placement: &Placement<'_>, at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64)
        .map(|address| {
            let holder = placement.segments.iter().find(|s| s.range().contains(Range::new(address, address + 1)));
            holder.map_or(0, |s| s.bytes[(address - s.at) as usize])
        })
        .collect()
}

fn word(placement: &Placement<'_>, at: u64) -> u64 {
    u64::from_le_bytes(peek(placement, at, 8).try_into().unwrap())
}

/// Walks the identity map from the root that SIPI loads, through whatever pages it leads to.
fn maps(placement: &Placement<'_>, root: u64, address: u64) -> bool {
    let mut table = root;
    for shift in [39, 30, 21] {
        let entry = word(placement, table + ((address >> shift) & 511) * 8);
        if entry & 1 == 0 {
            return false;
        }
        let next = entry & 0x000f_ffff_ffff_f000;
        if entry & 0x80 != 0 {
            return next == address & !((1 << shift) - 1);
        }
        table = next;
    }
    false
}

#[test]
fn a_stock_kernel_is_placed() {
    for (_, path) in support::lab_kernels() {
        let file = std::fs::read(path).unwrap();
        let image = BzImage::parse(&file).unwrap();
        let initrd = vec![0x42; 5_000_001];
        for region in [Range::new(GIB, GIB + 512 * MIB), Range::new(9 * GIB, 9 * GIB + 512 * MIB)] {
            let placement = Placement::new(&request(&image, region, &initrd)).unwrap();
            let load = region.start() + 32 * MIB;
            assert_eq!(placement.kernel, Range::new(load, load + image.init_size()));
            assert_eq!(placement.entry(), load + 0x200);
            assert_eq!(placement.initrd.start() % 4096, 0);
            assert!(placement.initrd.end() <= region.end() && placement.initrd.end() + 4096 > region.end());
            assert_eq!(placement.boot.arg, region.start(), "rsi: the zero page");
            assert_eq!(placement.park.entry, region.start() + control_block::PARK_PAGE.offset);
            // What the CPU does first: the SIPI page, below 1 MiB, with this root, jumps to the entry.
            assert!(placement.boot.cr3 < 1 << 32);
            for address in [0x8000, 0xfee0_0000, placement.boot.entry, placement.boot.arg, placement.boot.stack - 8] {
                assert!(maps(&placement, placement.boot.cr3, address), "{address:#x}");
                assert!(maps(&placement, placement.root_4level, address), "{address:#x}");
            }
            assert_eq!(word(&placement, region.start() + words::MAGIC_AT), words::MAGIC);
            let rsdp = word(&placement, placement.boot.arg + 0x70);
            assert_eq!(peek(&placement, rsdp, 8), b"RSD PTR ");
            let line = peek(&placement, region.start() + 0x1000, placement.cmdline.len() + 1);
            assert_eq!(&line[..line.len() - 1], placement.cmdline.as_bytes());
            assert_eq!(line.last(), Some(&0));
            assert!(
                placement
                    .cmdline
                    .starts_with("quiet maxcpus=1 cpuhp.parallel=off pci=off tsc_early_khz=2000000 tsc=reliable")
            );
            assert_eq!(peek(&placement, load, 64), image.protected_mode()[..64]);
        }
    }
}

#[test]
fn the_kernel_sees_its_own_memory_and_nothing_else() {
    let file = support::synthetic_image();
    let image = BzImage::parse(&file).unwrap();
    let ram = RangeSet::from(vec![Range::new(0x1000, 0x9f000), Range::new(MIB, 2046 * MIB)]);
    let region = Range::new(1024 * MIB, 1152 * MIB);
    let arenas = RangeSet::from(Range::new(512 * MIB, 576 * MIB));
    let division = Division::new(&ram, region, &arenas, 128 * MIB).unwrap();
    let mut request = request(&image, region, &[]);
    request.reserved_ram = division.reserved_in_successor();
    let placement = Placement::new(&request).unwrap();
    let of = |kind| placement.e820.iter().filter(|e| e.kind == kind).map(|e| e.range).collect::<RangeSet>();
    assert_eq!(of(E820Kind::Reserved), RangeSet::from(Range::new(region.start(), region.start() + MIB)));
    let expected = division
        .reserved_in_successor()
        .union(&Range::new(region.start() + MIB, region.end()).into())
        .union(&Range::new(0x31000, 0x50000).into());
    assert_eq!(of(E820Kind::Ram), expected);
    assert!(!of(E820Kind::Ram).overlaps(Range::new(placement.boot.cr3, placement.boot.cr3 + 4096)), "the SIPI root");
    assert!(placement.initrd.is_empty());

    // Each reserved range has its node.
    let mut node = word(&placement, placement.boot.arg + 0x250);
    let mut reserved = RangeSet::new();
    while node != 0 {
        assert_eq!(word(&placement, node + 8) as u32, SETUP_INDIRECT);
        let (len, addr) = (word(&placement, node + 24), word(&placement, node + 32));
        reserved = reserved.union(&Range::new(addr, addr + len).into());
        node = word(&placement, node);
    }
    assert_eq!(reserved, division.reserved_in_successor());
}

#[test]
fn what_cannot_be_placed_is_refused_with_numbers() {
    let file = support::synthetic_image();
    let image = BzImage::parse(&file).unwrap();
    let region = Range::new(GIB, GIB + 128 * MIB);
    let refused = |request: &PlacementRequest<'_>| Placement::new(request).unwrap_err().to_string();

    let small = Range::new(GIB, GIB + 64 * MIB);
    assert_eq!(
        refused(&request(&image, small, &[])),
        "region of 0x4000000 bytes is too small: image (0x3000000 bytes at offset 0x2000000) and initrd (0x0 bytes) need 0x5000000"
    );
    let initrd = vec![0; 49 << 20];
    assert!(refused(&request(&image, region, &initrd)).contains("initrd (0x3100000 bytes)"));
    assert!(refused(&request(&image, Range::new(GIB + 4096, GIB + 128 * MIB), &[])).contains("2 MiB boundaries"));
    assert!(refused(&request(&image, Range::new(0, 128 * MIB), &[])).contains("above 1 MiB"));

    let mut high = file.clone();
    high[0x258..0x260].copy_from_slice(&(2 * GIB).to_le_bytes());
    let high = BzImage::parse(&high).unwrap();
    assert!(refused(&request(&high, region, &[])).contains("wants to run at 0x80000000"));

    let long = "x".repeat(2048);
    let mut bad = request(&image, region, &[]);
    bad.cmdline = &long;
    assert!(refused(&bad).contains("too long"));
    let mut bad = request(&image, region, &[]);
    bad.reserved_ram = Range::new(GIB + 127 * MIB, GIB + 129 * MIB).into();
    assert!(refused(&bad).contains("to be reserved"));
    let mut bad = request(&image, region, &[]);
    bad.other_cpus = &[3];
    assert_eq!(refused(&bad), "APIC id 0x3 is listed twice");
    let mut bad = request(&image, region, &[]);
    bad.identity = Range::new(4 * GIB, 100 * GIB).into();
    assert!(refused(&bad).contains("use 1 GiB pages"));
    bad.gigabyte_pages = true;
    assert!(Placement::new(&bad).is_ok());
}

#[test]
fn writing_fills_the_control_block_and_refuses_half_a_map() {
    use kexec_core::sys::{Access, Mapping};
    let file = support::synthetic_image();
    let image = BzImage::parse(&file).unwrap();
    let region = Range::new(GIB, GIB + 128 * MIB);
    let placement = Placement::new(&request(&image, region, b"initrd")).unwrap();
    let map = |len| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Mapping::new(&file, len, Access::ReadWrite).unwrap()
    };
    let (memory, low) = (map(region.len()), map(4096));
    memory.write(0, &vec![0xee; 2 * MIB as usize]);
    let region_part = Mapped { range: region, memory: &memory };

    let error = placement.write(&[region_part]).unwrap_err();
    assert_eq!(error.to_string(), "root for SIPI at 0x30000-0x30fff is not in any mapped range");
    assert_eq!(memory.load(control_block::WORDS.offset), 0xeeee_eeee_eeee_eeee, "nothing was written");

    let low_part = Mapped { range: Range::new(0x30000, 0x31000), memory: &low };
    placement.write(&[region_part, low_part]).unwrap();
    assert_eq!(memory.load(words::MAGIC_AT), words::MAGIC);
    assert_eq!(memory.load(control_block::MAILBOX.offset), 0);
    assert_eq!(memory.load(control_block::SIZE), 0xeeee_eeee_eeee_eeee, "RAM is left alone");
    for segment in &placement.segments {
        let mut bytes = vec![0; segment.bytes.len()];
        match segment.at {
            at if at < MIB => low.read(at - 0x30000, &mut bytes),
            at => memory.read(at - region.start(), &mut bytes),
        }
        assert_eq!(bytes, segment.bytes.as_ref(), "{}", segment.what);
    }
}

proptest! {
    #[test]
    fn segments_lie_in_their_places_and_never_on_each_other(
        start in 8u64..40_000,
        size in 40u64..200,
        initrd in 0usize..2_000_000,
        init_size in 0x2000u32..0x400_0000,
        alignment in 21u32..=24,
        slot in 0u8..4,
        cpus in 1u32..64,
    ) {
        let mut file = support::synthetic_image();
        file[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        file[0x230..0x234].copy_from_slice(&(1u32 << alignment).to_le_bytes());
        let image = BzImage::parse(&file).unwrap();
        let region = Range::new(start * 2 * MIB, (start + size) * 2 * MIB);
        let initrd = vec![1; initrd];
        let others: Vec<u32> = (4..4 + cpus).collect();
        let mut request = request(&image, region, &initrd);
        request.low_slot = LowSlot::new(slot).unwrap();
        request.other_cpus = &others;
        let needed = smallest_region(&image, initrd.len() as u64, 0, 2 * MIB);
        let placement = match Placement::new(&request) {
            Ok(placement) => placement,
            Err(error) => {
                // `smallest_region` counts with the region aligned as the image asks.
                prop_assert!(region.len() < needed + (1 << alignment), "{error}");
                return Ok(());
            }
        };
        let mut last = 0;
        for segment in &placement.segments {
            prop_assert!(segment.at >= last, "{} overlaps", segment.what);
            last = segment.range().end();
            let home = if segment.at < MIB { request.low_slot.range() } else { region };
            prop_assert!(home.contains(segment.range()), "{} at {}", segment.what, segment.range());
        }
        prop_assert!(placement.kernel.start().is_multiple_of(image.alignment()));
        prop_assert!(!placement.kernel.overlaps(placement.initrd) && region.contains(placement.kernel));
        prop_assert!(placement.control_block.end() <= placement.kernel.start());
    }
}

/// A machine of 2 TiB without a hole.
fn large(gib: u64) -> RangeSet {
    RangeSet::from(vec![Range::new(0x1000, 0x9f000), Range::new(MIB, gib * GIB)])
}

#[test]
fn whatever_placing_refuses_can_be_asked_before() {
    let file = support::synthetic_image();
    let image = BzImage::parse(&file).unwrap();
    // Only the length of the region counts.
    let region = Range::new(0, 512 * MIB);
    let good = PlacementRequest { identity: large(16), ..request(&image, region, &[]) };
    let line = can_place(&good).unwrap();
    assert!(line.starts_with("quiet maxcpus=1"), "{line}");

    let refused = |request: PlacementRequest<'_>| can_place(&request).unwrap_err().to_string();
    // Without pages of 1 GiB the identity map of a large machine does not fit.
    assert!(can_place(&PlacementRequest { identity: large(29), ..good.clone() }).is_ok());
    assert!(refused(PlacementRequest { identity: large(64), ..good.clone() }).contains("use 1 GiB pages"));
    assert!(can_place(&PlacementRequest { identity: large(2048), gigabyte_pages: true, ..good.clone() }).is_ok());
    // 97 arenas that do not touch.
    let pieces = |count| (0..count).map(|n| Range::new((16 + 2 * n) * MIB, (17 + 2 * n) * MIB)).collect::<RangeSet>();
    assert!(can_place(&PlacementRequest { reserved_ram: pieces(96), ..good.clone() }).is_ok());
    assert!(refused(PlacementRequest { reserved_ram: pieces(97), ..good.clone() }).contains("97 separate ranges"));
    // A line that the successor could not run with, or that does not fit.
    assert!(refused(PlacementRequest { cmdline: "\"maxcpus=4\"", ..good.clone() }).contains("`\"maxcpus=4\"`"));
    let long = "x".repeat(2040);
    assert!(refused(PlacementRequest { cmdline: &long, ..good.clone() }).contains("this kernel takes 2047"));
    // 4096 CPUs do, of which most have ids of x2APIC; as many with only such ids are too many for the tables.
    let many: Vec<u32> = (0..4096).filter(|&id| id != 3 && id != 0xff).collect();
    assert!(can_place(&PlacementRequest { other_cpus: &many, ..good.clone() }).is_ok());
    let holes: Vec<u32> = (0..4096).map(|n| 0x100 + 2 * n).collect();
    assert!(refused(PlacementRequest { other_cpus: &holes, ..good.clone() }).contains("4097 CPUs"));
    // No room.
    let crumbs: RangeSet = (1..40).map(|n| Range::new(n * GIB, n * GIB + 256 * MIB)).collect();
    assert!(refused(PlacementRequest { identity: crumbs, ..good.clone() }).contains("lie together"));
    assert!(refused(PlacementRequest { region: Range::new(0, 32 * MIB), ..good.clone() }).contains("too small"));
    assert!(refused(PlacementRequest { region: Range::new(0, 3 * MIB), ..good.clone() }).contains("with at least"));
}
