//! One handover that has a little of everything, as bytes: the golden one, and what the attacks start from.

use handover::kho::{Abi, Outgoing, PAGE, Written};
use handover::luo::memfd_v2::{DIRTY, UPTODATE};
use handover::luo::{File, Flb, Memfd, Names, Orchestration, Piece, Session};

use crate::entry::{BASE, HANDED, PAGES};
use crate::round_trip::{MIB, range};

pub const ARENA: u64 = 0x1_0000_3000;
pub const CONTENT: u64 = 0x2_0000_0000;

pub struct Sample {
    pub written: Written,
    /// Where the sample's memfd is.
    pub memfd: u64,
    pub luo: Orchestration,
    pub content: Memfd,
}

/// The sample as Linux 7.3 expects it.
pub fn sample() -> Sample {
    sample_named(Abi::V4, Names::default())
}

/// The sample as a kernel with these names expects it.
pub fn sample_named(abi: Abi, names: Names) -> Sample {
    let mut out = Outgoing::new(abi, range(BASE, PAGES * PAGE)).unwrap();
    out.metadata("6.12.95-amd64", 3).unwrap();
    out.preserve(range(ARENA, 0x2345_6000)).unwrap();
    out.preserve_folios(0x3_0000_0000, 9, 5).unwrap();
    out.subtree("our", b"a blob of ours").unwrap();
    let flags = DIRTY | UPTODATE;
    let content = Memfd {
        size: 50 * PAGE + 1,
        pos: 17,
        seals: 6,
        pieces: vec![
            Piece { phys: CONTENT, order: 0, count: 3, index: 0, flags },
            Piece { phys: CONTENT + 8 * PAGE, order: 2, count: 2, index: 8, flags: 0 },
            Piece { phys: CONTENT + 32 * PAGE, order: 0, count: 20, index: 31, flags },
        ],
    };
    let memfd = content.write(&mut out).unwrap();
    let empty = Memfd::over(range(CONTENT, 0), 0, 0).write(&mut out).unwrap();
    let files = vec![File::memfd(0x1234_5678_9abc_def0, memfd), File::memfd(2, empty)];
    let session = |name: &str, files| Session { name: name.to_owned(), files };
    let luo = Orchestration {
        update: 2,
        sessions: vec![session("kv", files), session("nothing in it", vec![])],
        flbs: vec![Flb { name: "iommu-v1".to_owned(), data: 0x77, count: 1 }],
        names,
    };
    luo.write(&mut out).unwrap();
    out.scratch(range(0x4200_0000, 64 * MIB));
    out.scratch(range(0x4800_0000, 256 * MIB));
    let written = out.write().unwrap();
    assert_eq!(written.handed, HANDED);
    Sample { written, memfd, luo, content }
}

/// The sample's memory, one piece from [`BASE`] on.
pub fn bytes(written: &Written) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    for (phys, piece) in written.segments.iter() {
        bytes[(phys - BASE) as usize..][..piece.len()].copy_from_slice(piece);
    }
    bytes
}
