//! Bytes from a kernel that lies. Each is refused, and the refusal says what is wrong; none makes a reader panic, loop,
//! or read more than its limits allow (`fuzz/src/entry.rs` counts).

use std::fs;
use std::path::Path;

use handover::kho::{Handed, Incoming, IncomingError, Limits, PAGE, ReadError, Segments};
use handover::luo::{LuoError, Memfd, Orchestration};
use proptest::prelude::*;

use crate::entry::{self, BASE, HANDED, LIMITS, machine, sparse};
use crate::golden::kept;
use crate::sample::{Sample, bytes, sample};

/// The sample, to be spoilt.
struct Lie {
    bytes: Vec<u8>,
    incoming: Incoming,
    memfd: u64,
}

impl Lie {
    fn new() -> Lie {
        let Sample { written, memfd, .. } = sample();
        let bytes = bytes(&written);
        let incoming = Incoming::read(&written.segments, HANDED, &LIMITS).unwrap().check(&machine()).unwrap();
        Lie { bytes, incoming, memfd }
    }

    fn get(&self, phys: u64) -> u64 {
        let at = (phys - BASE) as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn put(&mut self, phys: u64, value: u64) -> &mut Lie {
        self.lay(phys, &value.to_le_bytes())
    }

    /// Where a property's value or any other bytes are in a page.
    fn find(&self, page: u64, what: &[u8]) -> u64 {
        let at = (page - BASE) as usize;
        let found = self.bytes[at..at + PAGE as usize].windows(what.len()).position(|here| here == what).unwrap();
        page + found as u64
    }

    fn replace(&mut self, page: u64, what: &[u8], with: &[u8]) -> &mut Lie {
        self.lay(self.find(page, what), with)
    }

    fn lay(&mut self, phys: u64, bytes: &[u8]) -> &mut Lie {
        let at = (phys - BASE) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The tree's root.
    fn root(&self) -> u64 {
        self.incoming.tree_nodes[0]
    }

    /// Slots of the nodes on the way down to the first leaf, root first.
    fn slots(&self) -> Vec<u64> {
        let mut node = self.root();
        let mut slots = Vec::new();
        for _ in 0..5 {
            let slot = (0..512).map(|i| node + 8 * i).find(|slot| self.get(*slot) != 0).unwrap();
            slots.push(slot);
            node = self.get(slot);
        }
        slots
    }

    fn luo(&self) -> u64 {
        self.incoming.subtree("LUO").unwrap().start
    }

    fn memory(&self) -> Segments {
        Segments::new([(BASE, self.bytes.clone())])
    }

    /// The refusal; and the attack is kept for the fuzzer to start from.
    fn kho(&self, name: &str) -> ReadError {
        kept(&format!("fuzz/corpus/kho/{name}.bin"), &sparse(&self.bytes));
        assert!(!entry::kho_in(self.bytes.clone()), "{name} was believed");
        Incoming::read(&self.memory(), HANDED, &LIMITS).unwrap_err()
    }

    fn checked(&self, name: &str) -> IncomingError {
        kept(&format!("fuzz/corpus/kho/{name}.bin"), &sparse(&self.bytes));
        assert!(!entry::kho_in(self.bytes.clone()), "{name} was believed");
        Incoming::read(&self.memory(), HANDED, &LIMITS).unwrap().check(&machine()).unwrap_err()
    }

    fn sessions(&self, name: &str) -> ReadError {
        kept(&format!("fuzz/corpus/kho/{name}.bin"), &sparse(&self.bytes));
        assert!(!entry::kho_in(self.bytes.clone()), "{name} was believed");
        Orchestration::read(&self.memory(), &self.incoming, &LIMITS).unwrap_err()
    }

    fn content(&self, name: &str) -> ReadError {
        kept(&format!("fuzz/corpus/kho/{name}.bin"), &sparse(&self.bytes));
        assert!(!entry::kho_in(self.bytes.clone()), "{name} was believed");
        Memfd::read(&self.memory(), &self.incoming, self.memfd, &LIMITS).unwrap_err()
    }
}

#[test]
fn an_honest_handover_is_believed() {
    let lie = Lie::new();
    assert!(entry::kho_in(lie.bytes.clone()));
    assert!(entry::kho_in(entry::memory(&sparse(&lie.bytes))), "the sparse form loses something");
    kept("fuzz/corpus/kho/honest.bin", &sparse(&lie.bytes));
    kept("fuzz/corpus/fdt/honest.bin", &lie.bytes[..1024]);
    kept("fuzz/corpus/image/versions.bin", b"\0kho-v4\0luo-v5\0memfd-v2\0");
    // For `luo` the orchestrator's blob is the first page, and a memfd the second.
    let mut moved = lie.bytes.clone();
    let page = |phys: u64| (phys - BASE) as usize..(phys - BASE + PAGE) as usize;
    moved.copy_within(page(lie.luo()), 0);
    moved.copy_within(page(lie.memfd), PAGE as usize);
    kept("fuzz/corpus/luo/honest.bin", &sparse(&moved));
}

#[test]
fn lies_in_the_fdt() {
    let lie = Lie::new;
    let fdt = BASE;
    assert!(matches!(lie().put(fdt, 0).kho("fdt_no_magic"), ReadError::Fdt { .. }));
    assert!(matches!(
        lie().replace(fdt + 4, &[0, 0], &[0xff, 0xff]).kho("fdt_longer_than_its_page"),
        ReadError::Fdt { .. }
    ));
    assert!(
        matches!(lie().replace(fdt, b"kho-v4", b"kho-v5").kho("fdt_future_version"), ReadError::Version { found, .. } if found == "kho-v5")
    );
    assert!(matches!(
        lie().replace(fdt, b"kho-v4\0", b"kho-v42").kho("fdt_version_without_an_end"),
        ReadError::Version { .. }
    ));
    assert!(matches!(
        lie().replace(fdt, b"preserved-memory-map", b"reserved-memory-maps").kho("fdt_no_map"),
        ReadError::Property { .. }
    ));
    assert!(matches!(
        lie().replace(fdt, b"blob-size", b"blob-sizf").kho("fdt_blob_without_a_size"),
        ReadError::Property { .. }
    ));
    let root = lie().root();
    let map = |value: u64| {
        let mut lie = lie();
        lie.replace(fdt, &root.to_le_bytes(), &value.to_le_bytes());
        lie
    };
    assert!(matches!(map(root.swap_bytes()).kho("fdt_big_endian"), ReadError::Place { .. } | ReadError::Memory { .. }));
    assert!(matches!(map(0).kho("tree_at_0"), ReadError::Place { at: 0, .. }));
    assert!(matches!(map(root + 8).kho("tree_between_pages"), ReadError::Place { .. }));
    assert!(matches!(map(!0 << 12).kho("tree_at_the_end_of_all_addresses"), ReadError::Memory { .. }));

    let luo = lie().luo();
    // Behind the address: token, length and name of the next property, then its value.
    let size = lie().find(fdt, &luo.to_le_bytes()) + 8 + 12;
    assert_eq!(lie().get(size), 32);
    let blob = |value: u64| {
        let mut lie = lie();
        lie.replace(fdt, &luo.to_le_bytes(), &value.to_le_bytes());
        lie
    };
    assert!(matches!(blob(0x5_0000_0000).checked("blob_that_is_not_kept"), IncomingError::NotPreserved { .. }));
    assert!(matches!(blob(u64::MAX - 3).checked("blob_beyond_all_addresses"), IncomingError::NotPreserved { .. }));
    assert!(matches!(lie().put(size, u64::MAX).checked("blob_without_bounds"), IncomingError::NotPreserved { .. }));
    assert!(matches!(
        lie().replace(fdt, b"our\0", b"LUO\0").checked("blob_named_twice"),
        IncomingError::NameTwice { .. }
    ));
}

#[test]
fn lies_in_the_tree() {
    let lie = Lie::new;
    let (root, slots) = (lie().root(), lie().slots());
    assert!(matches!(lie().put(slots[0], root).kho("tree_root_below_itself"), ReadError::Cycle { .. }));
    assert!(matches!(lie().put(slots[4], root).kho("tree_leaf_is_the_root"), ReadError::Cycle { .. }));
    let mut shared = lie();
    let leaf = shared.get(slots[4]);
    assert!(matches!(shared.put(slots[4] + 8, leaf).kho("tree_leaf_shared"), ReadError::Cycle { .. }));
    assert!(matches!(lie().put(slots[2], 0x5_0000_0000).kho("tree_node_nowhere"), ReadError::Memory { .. }));
    assert!(matches!(lie().put(slots[2], 1).kho("tree_node_unaligned"), ReadError::Place { .. }));
    // A leaf at key 0: orders that no page has.
    let mut low = lie();
    let nodes = low.incoming.tree_nodes.clone();
    for (at, child) in
        [(nodes[0], nodes[1]), (nodes[1], nodes[2]), (nodes[2], nodes[3]), (nodes[3], nodes[4]), (nodes[4], nodes[5])]
    {
        for i in 0..512 {
            low.put(at + 8 * i, 0);
        }
        low.put(at, child);
    }
    for i in 0..512 {
        low.put(nodes[5] + 8 * i, u64::MAX);
    }
    assert!(matches!(low.kho("tree_key_0"), ReadError::Key { key: 0 }));
    // Bit 53 and above.
    let mut high = lie();
    let child = high.get(slots[0]);
    high.put(slots[0], 0).put(root + 8 * 511, child);
    assert!(matches!(high.kho("tree_key_too_wide"), ReadError::Key { .. }));
    // Every bit of the first leaf: pages that other leaves keep in other orders, or memory that does not exist.
    let mut full = lie();
    for i in 0..512 {
        full.put(leaf + 8 * i, u64::MAX);
    }
    full.checked("tree_leaf_full");
    // One page of 2 MiB more, over memory that is kept in larger ones.
    let mut twice = lie();
    let key = (1u64 << 43) | (0x1_0060_0000 >> 21);
    let leaf_of_order_9 =
        (1..6).rev().fold(root, |node, level| twice.get(node + 8 * (key >> (15 + 9 * (level - 1)) & 511)));
    let word = leaf_of_order_9 + key % (1 << 15) / 64 * 8;
    let bits = twice.get(word) | 1 << (key % 64);
    assert!(matches!(twice.put(word, bits).checked("tree_page_kept_twice"), IncomingError::Overlap { .. }));
    let mut half = lie();
    for i in 0..512 {
        half.put(leaf + 8 * i, 0x5555_5555_5555_5555);
    }
    assert!(matches!(half.kho("tree_leaf_of_many_runs"), ReadError::TooMany { .. }));
    let few = Limits { nodes: lie().incoming.tree_nodes.len() - 1, ..LIMITS };
    assert!(matches!(Incoming::read(&lie().memory(), HANDED, &few), Err(ReadError::TooMany { .. })));
}

#[test]
fn lies_about_scratch() {
    let lie = Lie::new;
    let list = BASE + PAGE;
    assert!(matches!(lie().put(list, 0x4200_1000).checked("scratch_unaligned"), IncomingError::ScratchAlign { .. }));
    assert!(matches!(
        lie().put(list + 8, 0).checked("scratch_empty"),
        IncomingError::NotMemory { .. } | IncomingError::ScratchAlign { .. }
    ));
    assert!(matches!(
        lie().put(list + 8, u64::MAX << 22).checked("scratch_without_bounds"),
        IncomingError::NotMemory { .. }
    ));
    assert!(matches!(lie().put(list, 0x4800_0000).checked("scratch_twice"), IncomingError::Overlap { .. }));
    assert!(matches!(lie().put(list, 0x1_0000_0000).checked("scratch_over_preserved"), IncomingError::Overlap { .. }));
    assert!(matches!(lie().put(list, 0x4000_0000).checked("scratch_over_the_tree"), IncomingError::Overlap { .. }));
    let mut long = HANDED;
    long.scratch.len = u64::MAX;
    assert!(matches!(Incoming::read(&lie().memory(), long, &LIMITS), Err(ReadError::TooMany { .. })));
    for len in [0, 1, 31, 33, 64] {
        assert!(matches!(Handed::from_setup_data(&vec![0; len]), Err(ReadError::Mismatch { .. })));
    }
}

#[test]
fn lies_of_the_orchestrator() {
    let lie = Lie::new;
    let luo = lie().luo();
    let sessions = lie().get(luo + 16);
    let files = lie().get(sessions + 16 + 64);
    assert!(matches!(
        lie().replace(luo, b"luo-v5", b"luo-v6").sessions("luo_future_version"),
        ReadError::Version { .. }
    ));
    assert!(matches!(lie().put(luo + 16, 0x1_0000_0000).sessions("luo_sessions_not_kept"), ReadError::NotKept { .. }));
    assert!(matches!(
        lie().put(luo + 16, sessions + 8).sessions("luo_sessions_between_pages"),
        ReadError::NotKept { .. }
    ));
    assert!(matches!(lie().put(sessions, sessions).sessions("luo_block_behind_itself"), ReadError::Cycle { .. }));
    assert!(matches!(lie().put(files, sessions).sessions("luo_files_are_sessions"), ReadError::Cycle { .. }));
    assert!(matches!(lie().put(sessions + 8, 0).sessions("luo_block_of_nothing"), ReadError::Value { .. }));
    assert!(matches!(lie().put(sessions + 8, 52).sessions("luo_block_too_full"), ReadError::Value { value: 52, .. }));
    assert!(matches!(lie().put(sessions + 8, u64::MAX).sessions("luo_block_without_bounds"), ReadError::Value { .. }));
    assert!(matches!(
        lie().put(sessions + 16 + 72, 3).sessions("luo_fewer_files_than_stated"),
        ReadError::Mismatch { .. }
    ));
    assert!(matches!(
        lie().lay(sessions + 16, &[b'x'; 64]).sessions("luo_name_without_an_end"),
        ReadError::Text { .. }
    ));
    let check = |lie: &mut Lie, name: &str| {
        kept(&format!("fuzz/corpus/kho/{name}.bin"), &sparse(&lie.bytes));
        assert!(!entry::kho_in(lie.bytes.clone()), "{name} was believed");
        Orchestration::read(&lie.memory(), &lie.incoming, &LIMITS).unwrap().unwrap().check(&lie.incoming).unwrap_err()
    };
    assert!(matches!(
        check(lie().replace(sessions, b"kv\0", b"\0\0\0"), "luo_session_without_a_name"),
        LuoError::Name { .. }
    ));
    assert!(matches!(
        check(lie().replace(sessions, b"nothing in it", b"kv\0\0\0\0\0\0\0\0\0\0\0"), "luo_two_sessions_of_one_name"),
        LuoError::NameTwice { .. }
    ));
    let mut same = lie();
    let token = same.get(files + 16 + 56);
    assert!(matches!(
        check(same.put(files + 16 + 64 + 56, token), "luo_two_files_of_one_token"),
        LuoError::TokenTwice { .. }
    ));
    let mut same = lie();
    let data = same.get(files + 16 + 48);
    assert!(matches!(
        check(same.put(files + 16 + 64 + 48, data), "luo_two_files_of_one_memfd"),
        LuoError::DataTwice { .. }
    ));
    assert!(matches!(check(lie().put(files + 16 + 48, 0x5_0000_0000), "luo_memfd_not_kept"), LuoError::Kho(_)));
}

#[test]
fn lies_of_a_memfd() {
    let lie = Lie::new;
    let memfd = lie().memfd;
    let (count, chunk) = (lie().get(memfd + 24), lie().get(memfd + 32));
    let folios = lie().get(chunk + 8);
    assert_eq!(count, 25);
    assert!(matches!(lie().put(memfd + 24, u64::MAX).content("memfd_of_all_pages"), ReadError::TooMany { .. }));
    assert!(matches!(
        lie().put(memfd + 24, 257).content("memfd_of_more_folios_than_listed"),
        ReadError::Mismatch { .. }
    ));
    assert!(matches!(lie().put(memfd + 16, 1 << 32).content("memfd_flags"), ReadError::Value { .. }));
    assert!(matches!(lie().put(chunk, chunk).content("vmalloc_chunk_behind_itself"), ReadError::Cycle { .. }));
    assert!(matches!(lie().put(memfd + 32, chunk + 1).content("vmalloc_between_pages"), ReadError::Place { .. }));
    assert!(matches!(
        lie().put(chunk + 16, folios).content("vmalloc_more_pages_than_stated"),
        ReadError::Mismatch { .. }
    ));
    assert!(matches!(lie().put(chunk + 8, 0).content("vmalloc_fewer_pages_than_stated"), ReadError::Mismatch { .. }));
    assert!(matches!(lie().put(memfd + 40, u64::MAX).content("vmalloc_nonsense"), ReadError::Value { .. }));
    assert!(matches!(
        lie().put(memfd + 40, 1 << 32 | 0xffff_ffff).content("vmalloc_of_all_pages"),
        ReadError::TooMany { .. }
    ));
    assert!(matches!(lie().put(folios, 1 << 40).content("memfd_folio_not_kept"), ReadError::NotKept { .. }));
    let check = |lie: &mut Lie, name: &str| {
        kept(&format!("fuzz/corpus/kho/{name}.bin"), &sparse(&lie.bytes));
        assert!(!entry::kho_in(lie.bytes.clone()), "{name} was believed");
        Memfd::read(&lie.memory(), &lie.incoming, lie.memfd, &LIMITS).unwrap().check(&()).unwrap_err()
    };
    let (first, second) = (lie().get(folios), lie().get(folios + 16));
    assert_eq!(first + 1, second);
    assert!(matches!(check(lie().put(folios, second), "memfd_page_twice"), LuoError::PageTwice { .. }));
    assert!(matches!(check(lie().put(folios + 8, 1), "memfd_index_twice"), LuoError::Index { .. }));
    assert!(matches!(check(lie().put(folios + 8, u64::MAX), "memfd_index_beyond"), LuoError::Index { .. }));
    assert!(matches!(check(lie().put(folios, first | 1 << 63), "memfd_folio_flags"), LuoError::Flags { .. }));
    assert!(matches!(check(lie().put(memfd + 8, 1 << 63), "memfd_size"), LuoError::Size { .. }));
    assert!(matches!(check(lie().put(memfd + 16, 0x40), "memfd_seals"), LuoError::Seals { .. }));
}

/// What was kept, and what the fuzzer has found since, through the same entry points.
#[test]
fn the_corpus_is_survived() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut inputs = 0;
    for (target, run) in
        [("kho", entry::kho as fn(&[u8])), ("luo", entry::luo), ("fdt", entry::fdt), ("image", entry::image)]
    {
        for file in fs::read_dir(corpus.join(target)).unwrap() {
            let input = fs::read(file.unwrap().path()).unwrap();
            run(&input);
            // Cut anywhere.
            (0..input.len()).step_by(input.len() / 16 + 1).for_each(|len| run(&input[..len]));
            inputs += 1;
        }
    }
    assert!(inputs > 50, "{inputs} inputs");
}

/// Changes of an honest handover: bytes, addresses of other structures, numbers at the edges.
fn changes() -> impl Strategy<Value = Vec<(usize, u64)>> {
    let used = sample().written.used.len as usize / 8;
    let value = prop_oneof![
        any::<u64>(),
        (0u64..32).prop_map(|page| BASE + page * PAGE),
        (0u64..1024).prop_map(|small| small),
        (0u32..64).prop_map(|bit| 1 << bit),
        Just(u64::MAX),
    ];
    prop::collection::vec((0..used, value), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_change_is_survived(changes in changes(), dense in any::<bool>()) {
        let mut lie = Lie::new();
        // Most of the memory is zeros that nobody looks at; half the time only words that say something are changed.
        let words: Vec<usize> =
            (0..lie.bytes.len() / 8).filter(|word| !dense || lie.bytes[word * 8..][..8] != [0; 8]).collect();
        for (at, value) in changes {
            lie.put(BASE + words[at % words.len()] as u64 * 8, value);
        }
        entry::kho_in(lie.bytes.clone());
        entry::luo(&sparse(&lie.bytes));
        entry::fdt(&lie.bytes);
    }

    #[test]
    fn any_bytes_are_survived(input in prop::collection::vec(any::<u8>(), 0..3000)) {
        entry::kho(&input);
        entry::luo(&input);
        entry::fdt(&input);
        entry::image(&input);
    }
}
