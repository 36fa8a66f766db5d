//! The zero page against linux-loader's independent copy of the kernel's structs, and the setup_data list as the kernel
//! walks it.

mod support;

use std::mem::offset_of;

use kexec_core::boot_params::*;
use kexec_core::image::BzImage;
use kexec_core::image::bzimage::SetupHeader;
use kexec_core::memory_map::Range;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use proptest::prelude::*;
use zerocopy::IntoBytes;

const ROOM: Range = Range::new(0x5800_a000, 0x5801_0000);

macro_rules! same_offsets {
    ($ours:ty, $theirs:ty: $($field:ident),* $(,)?) => {
        $(assert_eq!(
            offset_of!($ours, $field), offset_of!($theirs, $field),
            "offset of {}", stringify!($field)
        );)*
    };
}

#[test]
fn structs_are_those_of_linux_loader() {
    assert_eq!(size_of::<RawBootParams>(), size_of::<boot_params>());
    assert_eq!(size_of::<SetupHeader>(), size_of::<setup_header>());
    assert_eq!(size_of::<RawE820Entry>(), size_of::<boot_e820_entry>());
    same_offsets!(RawBootParams, boot_params:
        acpi_rsdp_addr, ext_ramdisk_image, ext_ramdisk_size, ext_cmd_line_ptr, e820_entries, eddbuf_entries,
        edd_mbr_sig_buf_entries, kbd_status, secure_boot, sentinel, hdr, e820_table);
    same_offsets!(SetupHeader, setup_header:
        setup_sects, root_flags, syssize, ram_size, vid_mode, root_dev, boot_flag, jump, header, version,
        realmode_swtch, start_sys_seg, kernel_version, type_of_loader, loadflags, setup_move_size, code32_start,
        ramdisk_image, ramdisk_size, bootsect_kludge, heap_end_ptr, ext_loader_ver, ext_loader_type, cmd_line_ptr,
        initrd_addr_max, kernel_alignment, relocatable_kernel, min_alignment, xloadflags, cmdline_size,
        hardware_subarch, hardware_subarch_data, payload_offset, payload_length, setup_data, pref_address, init_size,
        handover_offset, kernel_info_offset);
    assert_eq!(offset_of!(RawE820Entry, size), offset_of!(boot_e820_entry, size));
    assert_eq!(offset_of!(RawE820Entry, kind), offset_of!(boot_e820_entry, r#type));
    assert_eq!(SETUP_E820_EXT, linux_loader::bootparam::SETUP_E820_EXT);
    assert_eq!(SETUP_KEXEC_KHO, linux_loader::bootparam::SETUP_KEXEC_KHO);
    assert_eq!(SETUP_INDIRECT, linux_loader::bootparam::SETUP_INDIRECT);
    assert_eq!(E820_MAX_ZEROPAGE, linux_loader::bootparam::E820_MAX_ENTRIES_ZEROPAGE);
}

fn params(e820: Vec<E820Entry>, setup_data: Vec<SetupData>) -> BootParams {
    let file = support::synthetic_image();
    BootParams {
        header: BzImage::parse(&file).unwrap().header_for_boot(),
        cmdline: 0x1_5800_1000,
        initrd: Range::new(0x1_7f00_0000, 0x1_7f12_3456),
        rsdp: 0x1_5801_0000,
        e820,
        setup_data,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Each node: type and content. As `early_reserve_memory` walks it.
fn walk(built: &BuiltBootParams) -> Vec<(u32, Vec<u8>)> {
    let mut nodes = Vec::new();
    let mut next = u64_at(built.zero_page.as_bytes(), 0x250);
    while next != 0 {
        let at = (next - ROOM.start()) as usize;
        let node = &built.setup_data[at..];
        let len = u32_at(node, 12) as usize;
        nodes.push((u32_at(node, 8), node[16..16 + len].to_vec()));
        assert!(u64_at(node, 0) == 0 || u64_at(node, 0) > next, "the list goes forward");
        next = u64_at(node, 0);
    }
    nodes
}

#[test]
fn the_page_says_what_it_was_told() {
    let ram = Range::new(0x5810_0000, 0x7800_0000);
    let built = params(vec![E820Entry::ram(ram)], vec![]).build(ROOM).unwrap();
    let page = built.zero_page.as_bytes();
    assert_eq!(u64_at(page, 0x070), 0x1_5801_0000, "acpi_rsdp_addr");
    assert_eq!((u32_at(page, 0x228), u32_at(page, 0x0c8)), (0x5800_1000, 1), "command line");
    assert_eq!((u32_at(page, 0x218), u32_at(page, 0x0c0)), (0x7f00_0000, 1), "initrd");
    assert_eq!((u32_at(page, 0x21c), u32_at(page, 0x0c4)), (0x12_3456, 0), "initrd size");
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    assert_eq!(page[0x1ef], 0, "sentinel");
    assert_eq!(page[0x1e8], 1, "e820_entries");
    assert_eq!((u64_at(page, 0x2d0), u64_at(page, 0x2d8), u32_at(page, 0x2e0)), (ram.start(), ram.len(), 1));
    assert_eq!(u64_at(page, 0x250), 0, "no setup_data");
    assert_eq!(&page[0x202..0x206], b"HdrS");
}

#[test]
fn a_reservation_is_what_kernel_and_decompressor_look_for() {
    let range = Range::new(0x1000_0000, 0x1400_0000);
    let kho = SetupData::Raw { kind: SETUP_KEXEC_KHO, bytes: vec![7; 32] };
    let built = params(vec![], vec![SetupData::Reserve(range), kho]).build(ROOM).unwrap();
    let nodes = walk(&built);
    assert_eq!(nodes.len(), 2);
    let (kind, data) = &nodes[0];
    assert_eq!(*kind, SETUP_INDIRECT);
    assert_ne!(u32_at(data, 0), SETUP_INDIRECT, "the inner type, else the node is skipped");
    assert_eq!((u64_at(data, 16), u64_at(data, 8)), (range.start(), range.len()));
    assert_eq!(nodes[1], (SETUP_KEXEC_KHO, vec![7; 32]));
}

#[test]
fn a_long_memory_map_overflows_into_setup_data() {
    let e820: Vec<_> = (0..200).map(|i| E820Entry::ram(Range::new(i << 24, (i << 24) + 4096))).collect();
    let built = params(e820, vec![]).build(ROOM).unwrap();
    assert_eq!(built.zero_page.e820_entries, 128);
    let nodes = walk(&built);
    assert_eq!((nodes[0].0, nodes[0].1.len()), (SETUP_E820_EXT, 72 * 20));
    assert_eq!(u64_at(&nodes[0].1, 0), 128 << 24);
}

#[test]
fn impossible_parameters_are_refused() {
    let error = |e820, nodes| params(e820, nodes).build(ROOM).unwrap_err().to_string();
    let twice = E820Entry::ram(Range::new(0x1000, 0x3000));
    assert_eq!(
        error(vec![twice, twice], vec![]),
        "memory map entries 0x1000-0x2fff and 0x1000-0x2fff overlap or are out of order"
    );
    let many = (0..97).map(|i| SetupData::Reserve(Range::new(i << 24, (i << 24) + 4096))).collect();
    assert!(error(vec![], many).starts_with("97 separate ranges to reserve"));
    let big = SetupData::Raw { kind: 9, bytes: vec![0; 0x6000] };
    assert_eq!(error(vec![], vec![big]), "setup_data needs 0x6010 bytes, but only 0x6000 are set aside for it");
    for kind in [SETUP_INDIRECT, SETUP_INDIRECT | 3, SETUP_E820_EXT] {
        assert!(error(vec![], vec![SetupData::Raw { kind, bytes: vec![] }]).contains("not allowed"));
    }
}

proptest! {
    #[test]
    fn every_node_is_found_in_order(sizes in prop::collection::vec(0usize..100, 0..20)) {
        let given: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(i, &size)| match i % 2 {
                0 => SetupData::Reserve(Range::new(4096 * size as u64, 4096 * (size as u64 + 1))),
                _ => SetupData::Raw { kind: 9, bytes: vec![i as u8; size] },
            })
            .collect();
        let built = params(vec![], given.clone()).build(ROOM).unwrap();
        let found = walk(&built);
        prop_assert_eq!(found.len(), given.len());
        for (found, given) in found.iter().zip(&given) {
            match given {
                SetupData::Reserve(range) => {
                    prop_assert_eq!(found.0, SETUP_INDIRECT);
                    prop_assert_eq!((u64_at(&found.1, 16), u64_at(&found.1, 8)), (range.start(), range.len()));
                }
                SetupData::Raw { kind, bytes } => prop_assert_eq!(found, &(*kind, bytes.clone())),
            }
        }
    }
}
