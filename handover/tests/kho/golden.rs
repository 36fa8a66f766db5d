//! The bytes of each released version. The files under `golden/` are never edited: what this program writes must be the
//! same, and what stands there must still be read, to the same meaning. What they say is the kernel's, not ours: it
//! cannot change without a new name.
//!
//! `BATON_GOLDEN=write` writes files that do not exist yet. It does not touch those that do.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use handover::kho::{Abi, Handed, Incoming, Limits, Machine, Metadata, Outline, Segments};
use handover::luo::{Memfd, Names, Orchestration};

use crate::entry::BASE;
use crate::round_trip::range;
use crate::sample::{Sample, bytes, sample, sample_named};

/// Writes what is missing, if that is asked for.
pub fn kept(file: &str, bytes: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if !path.exists() && std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Lines of 16 bytes; those of zeros are left out.
fn dump(bytes: &[u8]) -> String {
    let mut text = String::from("kho-v4 with luo-v5 and memfd-v2. address: bytes; lines of zeros are left out.\n");
    for (line, bytes) in bytes.chunks(16).enumerate().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
        write!(text, "{:08x}:", BASE + 16 * line as u64).unwrap();
        bytes.iter().for_each(|byte| write!(text, " {byte:02x}").unwrap());
        text.push('\n');
    }
    text
}

fn undump(text: &str) -> Segments {
    let line = |line: &str| {
        let (at, bytes) = line.split_once(": ").unwrap();
        let bytes = bytes.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect::<Vec<_>>();
        (u64::from_str_radix(at, 16).unwrap(), bytes)
    };
    let mut memory = vec![0; bytes(&sample().written).len()];
    for (at, bytes) in text.lines().skip(1).map(line) {
        memory[(at - BASE) as usize..][..16].copy_from_slice(&bytes);
    }
    Segments::new([(BASE, memory)])
}

#[test]
fn the_bytes_of_kho_v4() {
    let Sample { written, memfd, luo, content } = sample();
    let text = dump(&bytes(&written));
    let golden = String::from_utf8(kept("golden/kho-v4.txt", text.as_bytes())).unwrap();
    for (today, then) in text.lines().zip(golden.lines()) {
        assert_eq!(today, then, "a released version may not change");
    }
    assert_eq!(text.len(), golden.len());

    // Old bytes, read by today's code.
    let memory = undump(&golden);
    let limits = Limits::default();
    let setup_data = [
        0x00, 0x00, 0x10, 0x40, 0, 0, 0, 0, 0x00, 0x10, 0, 0, 0, 0, 0, 0, // FDT at 0x40100000, 4096 bytes
        0x00, 0x10, 0x10, 0x40, 0, 0, 0, 0, 0x20, 0x00, 0, 0, 0, 0, 0, 0, // scratch list at 0x40101000, 32 bytes
    ];
    assert_eq!(written.setup_data(), setup_data);
    let handed = Handed::from_setup_data(&setup_data).unwrap();
    let machine = Machine { ram: vec![range(1 << 20, 1 << 36)] };
    let incoming = Incoming::read(&memory, handed, &limits).unwrap().check(&machine).unwrap();
    let metadata = Metadata { previous_release: "6.12.95-amd64".to_owned(), kexec_count: 3 };
    assert_eq!(incoming.metadata(&memory, &limits).unwrap(), Some(metadata));
    assert_eq!(incoming.blob(&memory, "our", &limits).unwrap().unwrap(), b"a blob of ours");
    let read = Orchestration::read(&memory, &incoming, &limits).unwrap().unwrap().check(&incoming).unwrap();
    assert_eq!(read, luo);
    assert_eq!(Memfd::read(&memory, &incoming, memfd, &limits).unwrap().check(&()).unwrap(), content);
}

/// A newer tree names the parts of its formats. Nothing but the names is different, and they are written and read as a whole.
#[test]
fn names_of_parts_are_written_for_a_kernel_that_has_them() {
    let names = Names { luo: "luo-v5;block-v1", memfd: "memfd-v2;vmalloc-v1" };
    let Sample { written, memfd, luo, content } = sample_named(Abi::V4RadixVmalloc, names);
    let memory = &written.segments;
    let has = |text: &[u8]| bytes(&written).windows(text.len()).filter(|window| *window == text).count();
    assert_eq!(has(b"kho-v4;radix-v1;vmalloc-v1\0"), 1);
    assert_eq!((has(b"memfd-v2;vmalloc-v1\0"), has(b"memfd-v2\0")), (2, 0));

    let limits = Limits::default();
    let machine = Machine { ram: vec![range(1 << 20, 1 << 36)] };
    let incoming = Incoming::read(memory, written.handed, &limits).unwrap().check(&machine).unwrap();
    assert_eq!(incoming.abi, Abi::V4RadixVmalloc);
    let blob = incoming.blob(memory, "LUO", &limits).unwrap().unwrap();
    // LUO_ABI_COMPAT_LEN: the field of the name ends at a multiple of 8 bytes.
    assert_eq!((blob.len(), &blob[..16], blob[16]), (40, b"luo-v5;block-v1\0".as_slice(), 2));

    let read = Orchestration::read(memory, &incoming, &limits).unwrap().unwrap().check(&incoming).unwrap();
    assert_eq!((read.names, read.update), (names, luo.update));
    let files = |luo: &Orchestration| -> Vec<_> {
        luo.sessions.iter().flat_map(|session| &session.files).map(|file| (file.token, file.data)).collect()
    };
    assert_eq!(files(&read), files(&luo));
    assert!(read.sessions[0].files.iter().all(|file| file.compatible == names.memfd));
    assert_eq!(Memfd::read(memory, &incoming, memfd, &limits).unwrap().check(&()).unwrap(), content);
}

/// What libfdt makes of the calls of `kho_out_fdt_setup` and `kho_add_subtree`: sub-nodes from last to first, each
/// property before those that were set earlier. Made once, with the libfdt of Linux 7.3.
#[test]
fn an_fdt_by_the_kernels_libfdt_is_read() {
    let bytes = kept("golden/fdt-by-libfdt.dtb", &[]);
    let mut page = bytes.clone();
    page.resize(4096, 0xaa); // whatever else is in its page
    for bytes in [&bytes, &page] {
        let outline = Outline::read(bytes).unwrap();
        let found = outline.alleged();
        assert_eq!((found.abi, found.tree_root, found.len), (Abi::V4, 0x1234_5000, bytes_of(&bytes[4..8])));
        let blobs: Vec<_> = found.subtrees.iter().map(|subtree| (subtree.name.as_str(), subtree.blob)).collect();
        let (test, luo, metadata) = (range(0x10_3000, 500), range(0x10_2000, 32), range(0x10_1000, 73));
        assert_eq!(blobs, [("kho_test", test), ("LUO", luo), ("kexec-metadata", metadata)]);
    }
}

fn bytes_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
