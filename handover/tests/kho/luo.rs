//! Sessions and memfds: as the kernel's code restores them (every page once, each a folio of its own), and as ours
//! reads them.

use std::collections::BTreeSet;

use handover::kho::{Abi, Incoming, Limits, Outgoing, PAGE, Segments, Written};
use handover::luo::memfd_v2::{DIRTY, SEALS, UPTODATE};
use handover::luo::{File, Flb, LuoError, Memfd, Orchestration, Piece, Session};
use proptest::prelude::*;

use crate::kernel::Kernel;
use crate::round_trip::{MIB, POOL, SCRATCH, range, read};

const CONTENT: u64 = 0x2_0000_0000;

pub fn write(memfds: &[Memfd], sessions: &[(String, Vec<u64>)], flbs: &[Flb]) -> (Written, Orchestration) {
    let mut out = Outgoing::new(Abi::V4, POOL).unwrap();
    let mut memfds = memfds.iter();
    let mut luo = Orchestration { update: 7, flbs: flbs.to_vec(), ..Orchestration::default() };
    for (name, tokens) in sessions {
        let mut files = Vec::new();
        for token in tokens {
            files.push(match memfds.next() {
                Some(memfd) => File::memfd(*token, memfd.write(&mut out).unwrap()),
                None => File { token: *token, compatible: "vfio-v1".to_owned(), data: *token ^ 0xffff },
            });
        }
        luo.sessions.push(Session { name: name.clone(), files });
    }
    luo.write(&mut out).unwrap();
    out.scratch(SCRATCH);
    (out.write().unwrap(), luo)
}

pub fn read_luo(segments: &Segments, incoming: &Incoming) -> Orchestration {
    let received = Orchestration::read(segments, incoming, &Limits::default()).unwrap().unwrap();
    received.check(incoming).unwrap()
}

/// Order, count, pages to leave out before it, whether its content counts.
type Wish = (u32, u64, u64, bool);

/// Memfds whose pages do not overlap: each has 64 MiB of memory for itself.
fn memfds() -> impl Strategy<Value = Vec<Memfd>> {
    let piece = (0u32..4, 1u64..40, 0u64..5, prop::bool::ANY);
    let one = (prop::collection::vec(piece, 0..4), 0..=SEALS, any::<u32>());
    prop::collection::vec(one, 0..5).prop_map(|all| {
        let memfd = |(slot, (pieces, seals, pos)): (usize, (Vec<Wish>, u32, u32))| {
            let (mut phys, mut index) = (CONTENT + slot as u64 * 64 * MIB, 0u64);
            let mut made: Vec<Piece> = Vec::new();
            for (order, count, skip, dirty) in pieces {
                let size = 1u64 << order;
                // Always a page apart, so that what is read has the same pieces.
                index = (index + skip + 1).next_multiple_of(size);
                phys = (phys + PAGE).next_multiple_of(size * PAGE);
                let flags = if dirty { DIRTY | UPTODATE } else { 0 };
                made.push(Piece { phys, order, count, index, flags });
                (phys, index) = (phys + count * size * PAGE, index + count * size);
            }
            let size = (index * PAGE).saturating_sub(100);
            Memfd { size, pos: pos.into(), seals, pieces: made }
        };
        all.into_iter().enumerate().map(memfd).collect()
    })
}

fn sessions() -> impl Strategy<Value = Vec<(String, Vec<u64>)>> {
    let tokens = prop::collection::btree_set(any::<u64>(), 0..150);
    prop::collection::btree_map("[ -~]{1,63}", tokens, 0..120)
        .prop_map(|all| all.into_iter().map(|(name, tokens)| (name, tokens.into_iter().collect())).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sessions_and_memfds_come_out(memfds in memfds(), sessions in sessions()) {
        let flbs = [Flb { name: "iommu-v1".to_owned(), data: 99, count: 2 }];
        let files: usize = sessions.iter().map(|session| session.1.len()).sum();
        let memfds = &memfds[..memfds.len().min(files)];
        let (written, luo) = write(memfds, &sessions, &flbs);
        let incoming = read(&written);
        prop_assert_eq!(&read_luo(&written.segments, &incoming), &luo);
        let data = luo.sessions.iter().flat_map(|session| &session.files).filter(|file| file.compatible == "memfd-v2");
        for (file, memfd) in data.zip(memfds) {
            let found = Memfd::read(&written.segments, &incoming, file.data, &Limits::default()).unwrap();
            prop_assert_eq!(&found.check(&()).unwrap(), memfd);
        }
        restore(&written, &sessions, memfds);
    }
}

/// What the kernel does: `luo_early_startup`, `luo_session_deserialize`, `luo_file_deserialize`, `memfd_luo_retrieve`.
/// Every page that it restores must be preserved in the order with which it counts on it, and restored once.
fn restore(written: &Written, sessions: &[(String, Vec<u64>)], memfds: &[Memfd]) {
    let kernel = Kernel(&written.segments);
    let fdt = written.handed.fdt.start;
    let mut preserved: BTreeSet<(u64, u32)> = kernel.preserved(fdt).into_iter().collect();
    let mut restore = |phys: u64, order: u32| assert!(preserved.remove(&(phys, order)), "{phys:#x} of order {order}");
    let found = kernel.fdt(fdt);
    let number = |name: &str| {
        let value = &found[&("LUO".to_owned(), name.to_owned())];
        value.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (ser, size) = (number("preserved-data"), number("blob-size"));
    assert_eq!(size, 32);
    assert_eq!(kernel.subtree(fdt, "LUO").unwrap()[..8], *b"luo-v5\0\0");
    assert_eq!(kernel.u64(ser + 8), 7);

    let mut names = Vec::new();
    let mut handed = memfds.iter();
    let blocks = blocks(&kernel, kernel.u64(ser + 16), 80);
    restore(ser, 0);
    blocks.pages.iter().for_each(|page| restore(*page, 0));
    for session in blocks.entries {
        let name = text(&kernel, session, 64);
        let files = self::blocks(&kernel, kernel.u64(session + 64), 64);
        assert_eq!(kernel.u64(session + 72), files.entries.len() as u64, "{name}");
        files.pages.iter().for_each(|page| restore(*page, 0));
        let mut tokens = Vec::new();
        for file in files.entries {
            tokens.push(kernel.u64(file + 56));
            let Some(expected) = handed.next() else { continue };
            assert_eq!(text(&kernel, file, 48), "memfd-v2");
            let memfd = kernel.u64(file + 48);
            let words: Vec<u64> = (0..4).map(|i| kernel.u64(memfd + 8 * i)).collect();
            assert_eq!(words[..3], [expected.pos, expected.size, u64::from(expected.seals)]);
            if words[3] > 0 {
                let mut taken = Vec::new();
                let folios = kernel.vmalloc(memfd + 32, &mut taken);
                taken.into_iter().for_each(|page| restore(page, 0));
                let folios = &folios[..words[3] as usize * 16];
                let mut all = expected.pieces.iter().flat_map(|piece| (0..piece.count).map(move |i| (piece, i)));
                for folio in folios.chunks(16) {
                    let word =
                        |at: usize| folio[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
                    let (piece, i) = all.next().unwrap();
                    let pfn = piece.phys / PAGE + (i << piece.order);
                    assert_eq!((word(0) & ((1 << 52) - 1), word(0) >> 52), (pfn, u64::from(piece.flags)));
                    assert_eq!(word(8), piece.index + (i << piece.order));
                    restore(pfn * PAGE, piece.order);
                }
                assert!(all.next().is_none());
            }
            restore(memfd, 0);
        }
        names.push((name, tokens));
    }
    assert_eq!(names, sessions);
    // What nobody restores: the FDT, and the page of FLBs, which the kernel never frees either.
    let flbs = kernel.u64(ser + 24);
    assert_eq!(preserved, BTreeSet::from([(fdt, 0), (flbs, 0)]));
}

struct Blocks {
    pages: Vec<u64>,
    entries: Vec<u64>,
}

/// `kho_block_set_restore` and `kho_block_set_it_read_entry`.
fn blocks(kernel: &Kernel, mut next: u64, size: u64) -> Blocks {
    let mut found = Blocks { pages: Vec::new(), entries: Vec::new() };
    while next != 0 {
        let count = kernel.u64(next + 8);
        assert!((1..=(4096 - 16) / size).contains(&count), "{count}");
        found.pages.push(next);
        found.entries.extend((0..count).map(|i| next + 16 + i * size));
        next = kernel.u64(next);
    }
    found
}

fn text(kernel: &Kernel, at: u64, len: u64) -> String {
    let bytes: Vec<u8> = (0..len / 8).flat_map(|i| kernel.u64(at + 8 * i).to_le_bytes()).collect();
    assert_eq!(*bytes.last().unwrap(), 0);
    String::from_utf8(bytes.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap()
}

#[test]
fn what_no_kernel_would_give_back_is_not_written() {
    let pages = range(CONTENT, 16 * PAGE);
    let good = Memfd::over(pages, 16 * PAGE - 1, 0);
    let write = |memfd: &Memfd| memfd.write(&mut Outgoing::new(Abi::V4, POOL).unwrap());
    write(&good).unwrap();
    write(&Memfd::over(pages, 0, SEALS)).unwrap();
    let with = |change: fn(&mut Memfd)| {
        let mut memfd = good.clone();
        change(&mut memfd);
        write(&memfd).unwrap_err()
    };
    assert!(matches!(with(|memfd| memfd.seals = 0x40), LuoError::Seals { .. }));
    assert!(matches!(with(|memfd| memfd.size = 1 << 63), LuoError::Size { .. }));
    assert!(matches!(with(|memfd| memfd.pos = u64::MAX), LuoError::Size { .. }));
    assert!(matches!(with(|memfd| memfd.size = i64::MAX as u64), LuoError::TooMany { .. }));
    assert!(matches!(with(|memfd| memfd.size = 15 * PAGE), LuoError::Index { .. }));
    assert!(matches!(with(|memfd| memfd.pieces[0].flags = 4), LuoError::Flags { .. }));
    assert!(matches!(with(|memfd| memfd.pieces[0].order = 40), LuoError::Index { .. }));
    assert!(matches!(with(|memfd| memfd.pieces[0].count = u64::MAX), LuoError::Index { .. }));
    assert!(matches!(with(|memfd| memfd.pieces[0].count = 0), LuoError::Index { .. }));
    assert!(matches!(with(|memfd| memfd.pieces[0].phys = 0), LuoError::Kho(_)));
    assert!(matches!(with(|memfd| memfd.pieces.push(memfd.pieces[0])), LuoError::Index { .. }));
    let twice = |memfd: &mut Memfd| {
        memfd.size *= 2;
        memfd.pieces.push(Piece { index: 16, ..memfd.pieces[0] });
    };
    assert!(matches!(with(twice), LuoError::PageTwice { .. }));

    let luo = |names: &[(&str, &[u64])]| {
        let session = |(name, tokens): &(&str, &[u64])| Session {
            name: (*name).to_owned(),
            files: tokens.iter().map(|token| File { token: *token, compatible: "x".to_owned(), data: 0 }).collect(),
        };
        let luo = Orchestration { sessions: names.iter().map(session).collect(), ..Orchestration::default() };
        luo.write(&mut Outgoing::new(Abi::V4, POOL).unwrap())
    };
    assert!(luo(&[("a", &[1, 2]), ("b", &[1])]).is_ok());
    assert!(matches!(luo(&[("a", &[]), ("a", &[])]), Err(LuoError::NameTwice { .. })));
    assert!(matches!(luo(&[("a", &[1, 1])]), Err(LuoError::TokenTwice { .. })));
    assert!(matches!(luo(&[("", &[])]), Err(LuoError::Name { .. })));
    assert!(matches!(luo(&[("a\n", &[])]), Err(LuoError::Name { .. })));
    assert!(matches!(luo(&[(&"a".repeat(64), &[])]), Err(LuoError::Name { .. })));
}
