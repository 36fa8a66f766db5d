//! Entry points for hostile bytes. Also part of `handover/tests/kho`, by path, so that a stable toolchain runs them.
//!
//! Structures point to each other over whole pages, of which most bytes are zeros. So that inputs stay small and a
//! mutation of one byte means something, memory is given in a sparse form: patches of zeroed memory, one behind the
//! other, each `offset: u32, length: u8, bytes`, little-endian. Whatever does not fit is left out.

use std::cell::Cell;

use handover::kho::abi::Expected;
use handover::kho::{
    Abi, Handed, Incoming, Limits, Machine, Memory, OutOfReach, Outline, PAGE, ReadError, Run, Segments, Subtree,
};
use handover::luo::{Memfd, Orchestration};
use state_schemas::handover_record::PhysRange;

/// Where the memory of an input begins. Its first page is the FDT, its second the scratch list.
pub const BASE: u64 = 0x4010_0000;
/// How much there is.
pub const PAGES: u64 = 96;
/// Small, so that exceeding one is easy.
pub const LIMITS: Limits =
    Limits { nodes: 128, runs: 1 << 12, order: 30, top: 1 << 52, blob: 1 << 16, vmalloc_pages: 256, blocks: 128 };

/// The machine that an input is measured against.
pub fn machine() -> Machine {
    Machine { ram: vec![PhysRange { start: 1 << 20, len: 1 << 44 }] }
}

/// Memory from its sparse form.
pub fn memory(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    while let Some((head, rest)) = input.split_first_chunk::<5>() {
        let at = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let len = usize::from(head[4]).min(rest.len());
        if let Some(place) = bytes.get_mut(at..).filter(|place| place.len() >= len) {
            place[..len].copy_from_slice(&rest[..len]);
        }
        input = &rest[len..];
    }
    bytes
}

/// The sparse form of memory.
pub fn sparse(bytes: &[u8]) -> Vec<u8> {
    let mut patches = Vec::new();
    for (line, bytes) in bytes.chunks(32).enumerate().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
        let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(0);
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        patches.extend(((line * 32 + first) as u32).to_le_bytes());
        patches.push((end - first) as u8);
        patches.extend(&bytes[first..end]);
    }
    patches
}

/// Memory that counts what is read of it.
struct Counting {
    memory: Segments,
    read: Cell<u64>,
}

impl Memory for Counting {
    fn read(&self, phys: u64, into: &mut [u8]) -> Result<(), OutOfReach> {
        self.read.set(self.read.get() + into.len() as u64);
        self.memory.read(phys, into)
    }
}

fn counting(bytes: Vec<u8>) -> Counting {
    Counting { memory: Segments::new([(BASE, bytes)]), read: Cell::new(0) }
}

/// What `setup_data` says of an input's memory.
pub const HANDED: Handed =
    Handed { fdt: PhysRange { start: BASE, len: PAGE }, scratch: PhysRange { start: BASE + PAGE, len: 32 } };

/// A whole handover, in sparse form.
pub fn kho(input: &[u8]) {
    kho_in(memory(input));
}

/// A whole handover. Says whether it was believed.
pub fn kho_in(bytes: Vec<u8>) -> bool {
    let memory = counting(bytes);
    let received = Incoming::read(&memory, HANDED, &LIMITS);
    assert!(memory.read.get() <= (LIMITS.nodes as u64 + 2) * PAGE, "{} bytes read", memory.read.get());
    let Ok(received) = received else { return false };
    assert!(received.alleged().preserved.len() <= LIMITS.runs && received.alleged().tree_nodes.len() <= LIMITS.nodes);
    let Ok(incoming) = received.check(&machine()) else { return false };
    // What has been checked can be relied on.
    for pair in incoming.preserved.windows(2) {
        assert!(pair[0].range().end().unwrap() <= pair[1].start, "{pair:?} overlap");
    }
    let _ = incoming.metadata(&memory, &LIMITS);
    for Subtree { name, blob } in &incoming.subtrees {
        memory.read.set(0);
        if let Ok(bytes) = incoming.blob(&memory, name, &LIMITS) {
            assert_eq!(bytes.map(|bytes| bytes.len() as u64), Some(blob.len));
        }
        assert!(memory.read.get() <= LIMITS.blob);
    }
    sessions(&memory, &incoming)
}

/// Sessions alone: all memory is preserved, the orchestrator's blob is its first page.
pub fn luo(input: &[u8]) {
    let incoming = Incoming {
        abi: Abi::V4,
        fdt: PhysRange { start: BASE, len: PAGE },
        tree_nodes: Vec::new(),
        preserved: vec![Run { start: BASE, order: 0, count: PAGES }],
        scratch: Vec::new(),
        subtrees: vec![Subtree { name: "LUO".to_owned(), blob: PhysRange { start: BASE, len: 32 } }],
    };
    let memory = counting(memory(input));
    sessions(&memory, &incoming);
    // A memfd is also tried where no session leads to it.
    memfd(&memory, &incoming, BASE + PAGE);
}

/// Says whether all of it was believed.
fn sessions(memory: &Counting, incoming: &Incoming) -> bool {
    memory.read.set(0);
    let found = Orchestration::read(memory, incoming, &LIMITS);
    assert!(memory.read.get() <= LIMITS.blob + LIMITS.blocks as u64 * PAGE);
    let Ok(Some(received)) = found else { return matches!(found, Ok(None)) };
    let Ok(luo) = received.check(incoming) else { return false };
    let files = luo.sessions.iter().flat_map(|session| &session.files).filter(|file| file.compatible == "memfd-v2");
    // What is checked names each memfd once, and there are not more than pages.
    files.map(|file| memfd(memory, incoming, file.data)).fold(true, |all, believed| all & believed)
}

fn memfd(memory: &Counting, incoming: &Incoming, data: u64) -> bool {
    memory.read.set(0);
    let found = Memfd::read(memory, incoming, data, &LIMITS);
    let most = 2 * (LIMITS.vmalloc_pages + LIMITS.vmalloc_pages / 511 + 3) * PAGE;
    assert!(memory.read.get() <= most, "{} bytes read", memory.read.get());
    found.is_ok_and(|received| received.check(&()).is_ok())
}

/// An FDT alone.
pub fn fdt(input: &[u8]) {
    let mut bytes = input[..input.len().min(PAGE as usize)].to_vec();
    let outline = Outline::read(&bytes).is_ok();
    bytes.resize((2 * PAGE) as usize, 0);
    let memory = counting(bytes.clone());
    kho_in(bytes);
    // What can be read by itself can be read where it lies.
    if outline {
        assert!(!matches!(Incoming::read(&memory, HANDED, &LIMITS), Err(ReadError::Fdt { .. })));
    }
}

/// A kernel's image.
pub fn image(input: &[u8]) {
    let expected = Expected::of_kernel(input);
    for name in expected.kho.iter().chain(&expected.luo).chain(&expected.memfd) {
        assert!(name.len() < 48, "{name}");
    }
    let _ = (expected.abi(), handover::luo::Names::of(&expected));
}
