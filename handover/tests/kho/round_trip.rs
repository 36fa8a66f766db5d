//! Anything that can be handed over comes out again: by the kernel's way of reading, and by ours.

use std::collections::BTreeSet;

use handover::kho::{Abi, Handed, Incoming, Limits, Machine, Metadata, Outgoing, OutgoingError, PAGE, Written};
use proptest::prelude::*;
use state_schemas::handover_record::PhysRange;
use zerocopy::IntoBytes;

use crate::kernel::Kernel;

pub const fn range(start: u64, len: u64) -> PhysRange {
    PhysRange { start, len }
}

pub const MIB: u64 = 1 << 20;
pub const POOL: PhysRange = range(0x4010_0000, 31 * MIB);
pub const SCRATCH: PhysRange = range(0x4200_0000, 64 * MIB);
/// Where the tests preserve things.
const FIRST: u64 = 0x1_0000_0000;

pub fn machine() -> Machine {
    Machine { ram: vec![range(0x10_0000, 0xbff0_0000), range(FIRST, 1 << 40)] }
}

pub fn read(written: &Written) -> Incoming {
    let received = Incoming::read(&written.segments, written.handed, &Limits::default()).unwrap();
    received.check(&machine()).unwrap()
}

/// What is kept: runs of pages, and of folios, in places that do not overlap.
fn kept() -> impl Strategy<Value = Vec<(u64, u64, Option<u32>)>> {
    // Slots of 64 MiB, so that nothing overlaps; page and order within.
    let one = (0u64..2000, 1u64..700, prop::option::of(0u32..=10));
    prop::collection::btree_map(0u64..1000, one, 0..30).prop_map(|slots| {
        let place = |(slot, (page, count, order)): (u64, (u64, u64, Option<u32>))| {
            let size = PAGE << order.unwrap_or(0);
            let start = (FIRST + slot * 64 * MIB + page * PAGE).next_multiple_of(size);
            (start, count.min((32 * MIB / size).max(1)), order)
        };
        slots.into_iter().map(place).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn both_readers_find_what_was_handed_over(
        kept in kept(),
        blobs in prop::collection::btree_map("[A-Za-z][A-Za-z0-9._-]{0,12}", prop::collection::vec(any::<u8>(), 1..20_000), 0..5),
        count in any::<u32>(),
    ) {
        let mut out = Outgoing::new(Abi::V4, POOL).unwrap();
        let mut expected = BTreeSet::new();
        for &(start, pages, order) in &kept {
            match order {
                Some(order) => out.preserve_folios(start, order, pages).unwrap(),
                None => out.preserve(range(start, pages * PAGE)).unwrap(),
            }
            expected.extend((0..pages * (PAGE << order.unwrap_or(0)) / PAGE).map(|page| start + page * PAGE));
        }
        for (name, blob) in &blobs {
            out.subtree(name, blob).unwrap();
        }
        out.metadata("6.12.95-amd64", count).unwrap();
        out.scratch(SCRATCH);
        let needed = out.space_needed();
        let written = out.write().unwrap();
        prop_assert_eq!(written.used.len, needed);

        let Handed { fdt, scratch } = Handed::from_setup_data(&written.setup_data()).unwrap();
        let kernel = Kernel(&written.segments);
        let found = kernel.preserved(fdt.start);
        for (phys, order) in &found {
            prop_assert_eq!(phys % (PAGE << order), 0);
        }
        let outside: BTreeSet<u64> = found
            .iter()
            .filter(|(phys, _)| *phys >= FIRST)
            .flat_map(|(phys, order)| (0..1 << order).map(move |page| phys + page * PAGE))
            .collect();
        prop_assert_eq!(&outside, &expected);
        for (start, _, order) in kept.iter().filter(|kept| kept.2.is_some()) {
            prop_assert!(found.contains(&(*start, order.unwrap())), "the folio at {:#x}", start);
        }
        for (name, blob) in &blobs {
            prop_assert_eq!(kernel.subtree(fdt.start, name), Some(blob.clone()));
        }
        prop_assert_eq!(kernel.scratch(scratch.start, scratch.len), vec![(SCRATCH.start, SCRATCH.len)]);
        prop_assert_eq!(scratch.start % PAGE, 0);

        let incoming = read(&written);
        let ours: BTreeSet<(u64, u32)> = incoming
            .preserved
            .iter()
            .flat_map(|run| (0..run.count).map(|i| (run.start + i * (PAGE << run.order), run.order)))
            .collect();
        prop_assert_eq!(&ours, &found.into_iter().collect());
        prop_assert_eq!(&incoming.scratch, &vec![SCRATCH]);
        for (name, blob) in &blobs {
            let found = incoming.blob(&written.segments, name, &Limits::default()).unwrap();
            prop_assert_eq!(found, Some(blob.clone()));
        }
        let metadata = incoming.metadata(&written.segments, &Limits::default()).unwrap();
        prop_assert_eq!(metadata, Some(Metadata { previous_release: "6.12.95-amd64".to_owned(), kexec_count: count }));
    }

    #[test]
    fn vmalloc_areas_come_out(bytes in prop::collection::vec(any::<u8>(), 1..40_000), pages in 1usize..1600) {
        let mut out = Outgoing::new(Abi::V4, POOL).unwrap();
        let area = out.vmalloc_copy(&bytes).unwrap();
        let places: Vec<u64> = (0..pages as u64).map(|page| FIRST + page * 2 * PAGE).collect();
        let wide = out.vmalloc(&places, 0).unwrap();
        let descriptor = out.subtree("area", area.as_bytes()).unwrap();
        out.scratch(SCRATCH);
        let written = out.write().unwrap();
        let mut taken = Vec::new();
        let mut content = Kernel(&written.segments).vmalloc(descriptor.start, &mut taken);
        content.truncate(bytes.len());
        prop_assert_eq!(&content, &bytes);
        let limits = Limits::default();
        prop_assert_eq!(area.bytes(&written.segments, bytes.len() as u64, &limits).unwrap(), bytes);
        prop_assert_eq!(wide.pages(&written.segments, &limits).unwrap(), places.clone());
        let incoming = read(&written);
        let kept = |phys: u64| incoming.preserved.iter().any(|run| run.order == 0 && run.range().contains(range(phys, PAGE)));
        prop_assert!(places.iter().chain(&taken).all(|page| kept(*page)));
    }
}

#[test]
fn what_cannot_be_handed_over_is_refused() {
    let new = || Outgoing::new(Abi::V4, POOL).unwrap();
    let mut out = new();
    out.preserve(range(FIRST, 8 * PAGE)).unwrap();
    for (bad, why) in [
        (range(FIRST + 7 * PAGE, PAGE), "a page twice"),
        (range(FIRST + 8 * PAGE, 0), "nothing"),
        (range(FIRST + 1, PAGE), "not a page"),
        (range(0, PAGE), "address 0"),
        (range(u64::MAX - PAGE + 1, PAGE), "the end of all addresses"),
        (range(1 << 52, PAGE), "beyond memory"),
        (range(POOL.start + POOL.len - PAGE, PAGE), "the pool"),
    ] {
        assert!(out.preserve(bad).is_err(), "{why}");
    }
    assert!(out.preserve_folios(FIRST + 16 * PAGE, 10, 1).is_err());
    assert!(out.preserve_folios(FIRST + 1024 * PAGE, 11, 1).is_err());
    assert!(out.preserve_folios(FIRST + 1024 * PAGE, 10, u64::MAX / 2).is_err());
    for name in ["", "a b", "x@1", "an-entirely-too-long-name-for-a-node"] {
        assert!(matches!(out.subtree(name, b"x"), Err(OutgoingError::Name { .. })), "{name}");
    }
    out.subtree("x", b"x").unwrap();
    assert!(matches!(out.subtree("x", b"x"), Err(OutgoingError::NameTaken { .. })));
    assert!(matches!(out.subtree("y", b""), Err(OutgoingError::BlobSize { .. })));
    assert!(matches!(out.subtree("y", &vec![0; 5 << 20]), Err(OutgoingError::BlobSize { .. })));
    assert!(out.subtree_in_place("z", range(FIRST + 7 * PAGE, PAGE + 1)).is_err());
    out.subtree_in_place("z", range(FIRST + 100, 3 * PAGE)).unwrap();
    assert_eq!(out.clone().write().unwrap_err(), OutgoingError::NoScratch);

    let scratch = |pieces: &[PhysRange]| {
        let mut out = out.clone();
        pieces.iter().for_each(|piece| out.scratch(*piece));
        out.write()
    };
    assert!(scratch(&[SCRATCH]).is_ok());
    assert!(matches!(scratch(&[range(0x4200_0000, MIB)]), Err(OutgoingError::ScratchAlign { .. })));
    assert!(matches!(scratch(&[range(0x4000_0000, 4 * MIB)]), Err(OutgoingError::Overlap { .. })));
    assert!(matches!(scratch(&[range(FIRST, 4 * MIB)]), Err(OutgoingError::Overlap { .. })));
    assert!(matches!(scratch(&[SCRATCH, SCRATCH]), Err(OutgoingError::Overlap { .. })));
    assert!(matches!(scratch(&vec![SCRATCH; 300]), Err(OutgoingError::ScratchFull { .. })));

    let mut small = Outgoing::new(Abi::V4, range(0x1000, 7 * PAGE)).unwrap();
    small.scratch(SCRATCH);
    small.preserve(range(FIRST, PAGE)).unwrap();
    assert!(matches!(small.write(), Err(OutgoingError::PoolFull { .. })));
    let mut full = new();
    for i in 0..100 {
        full.subtree(&format!("blob-{i}"), b"x").unwrap();
    }
    full.scratch(SCRATCH);
    assert!(matches!(full.write(), Err(OutgoingError::FdtFull { .. })));
}
