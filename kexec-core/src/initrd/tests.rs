use std::io::Write;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits { files: 1000, unpacked: 64 << 20 };

/// One entry of an archive.
fn entry(name: &str, mode: u32, body: &[u8]) -> Vec<u8> {
    let fields = [1, mode, 0, 0, 1, 0, body.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    let mut bytes = b"070701".to_vec();
    fields.iter().for_each(|field| write!(bytes, "{field:08X}").unwrap());
    bytes.extend(name.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An archive with one file, as `cpio -H newc` ends it: padded to 512.
fn archive(name: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = [entry(name, 0o100_644, body), entry("TRAILER!!!", 0, b"")].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    let block = lz4_flex::block::compress(bytes);
    packed.extend((block.len() as u32).to_le_bytes());
    packed.extend(block);
    packed
}

fn boot_config(text: &str) -> Vec<u8> {
    let sum: u32 = text.bytes().map(u32::from).sum();
    [text.as_bytes(), &(text.len() as u32).to_le_bytes(), &sum.to_le_bytes(), b"#BOOTCONFIG\n"].concat()
}

fn walked(bytes: &[u8]) -> Result<Initrd, InitrdError> {
    walk(bytes, LIMITS, |_| true)
}

fn refused(bytes: &[u8]) -> String {
    walked(bytes).unwrap_err().to_string()
}

#[test]
fn all_parts_are_walked() {
    let microcode = archive("kernel/x86/microcode/GenuineIntel.bin", &[7; 100]);
    let main = gzip(&[archive("./init", b"#!/bin/sh"), archive("bin/sh", b"x")].concat());
    let bytes = [microcode.as_slice(), &main, &[0; 5], &lz4(&archive("a", &[1; 3000])), &[0; 9]].concat();
    let initrd = walked(&bytes).unwrap();
    let kinds: Vec<_> = initrd.parts.iter().map(|part| (part.compression.map(Compression::name), part.files)).collect();
    assert_eq!(kinds, [(None, 1), (Some("gzip"), 2), (Some("lz4"), 1)]);
    assert_eq!(initrd.parts[1].at, microcode.len() as u64);
    assert_eq!(initrd.unpacked, 100 + 9 + 1 + 3000);
    assert!(initrd.has("/init") && initrd.has("bin/sh") && !initrd.has("TRAILER!!!") && initrd.has_microcode());
    assert_eq!(initrd.boot_config, None);
}

#[test]
fn links_are_told_until_something_else_takes_their_place() {
    let link = entry("lib", 0o120_777, b"usr/lib");
    let both = [link.clone(), entry("lib", 0o040_755, b"")].concat();
    assert_eq!(walked(&link).unwrap().links["lib"], "usr/lib");
    assert!(walked(&both).unwrap().links.is_empty() && walked(&both).unwrap().paths.is_empty());
}

#[test]
fn what_linux_would_not_unpack_is_refused_with_the_place() {
    let good = archive("init", &[1; 2000]);
    let packed = gzip(&good);
    assert_eq!(refused(b""), "it is empty");
    assert_eq!(refused(&[0; 512]), "it is empty");
    assert!(refused(b"a text\n").contains("text?"));
    assert!(refused(b"MZ\x90\0").contains("unified kernel image"));
    assert!(
        refused(&[&good, b"garbage".as_slice()].concat()).contains("at byte 2560 there is no archive"),
        "{}",
        refused(&[&good, b"garbage".as_slice()].concat())
    );
    assert!(refused(&[&packed, b"garbage".as_slice()].concat()).contains(&format!("at byte {} ", packed.len())));
    assert!(
        refused(&gzip(&[&good, b"garbage".as_slice()].concat()))
            .contains("behind its entries there is garbage, from 0x67")
    );
    assert!(refused(&packed[..packed.len() - 9]).contains("damaged"));
    assert!(refused(&good[..1000]).contains("init lacks 1116 bytes"), "{}", refused(&good[..1000]));
    assert!(refused(&good[..50]).contains("header is not whole"));
    assert!(refused(&gzip(&good[..1000])).contains("init lacks"));
    assert!(refused(b"07070700000").contains("header is not whole"));
    let mut old = good.clone();
    old[5] = b'7';
    assert!(refused(&old).contains("cpio -H newc"));
    let mut odd = good.clone();
    odd[10] = b'x';
    assert!(refused(&odd).contains("header has"));
    let odd = (1..9).map(|n| gzip(&archive("a", &vec![7; n * n]))).find(|packed| packed.len() % 4 != 0).unwrap();
    assert!(refused(&[odd.as_slice(), &good].concat()).contains("does not begin on a multiple of four"));
    assert!(refused(b"\x89LZO\0\r\n").contains("lzo, which cannot be looked into"));
    assert!(refused(&gzip(b"a text")).contains("garbage"));
}

#[test]
fn a_compression_that_the_successor_lacks_is_named() {
    let error = walk(&lz4(&archive("a", b"")), LIMITS, |compression| compression != Compression::Lz4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the part at byte 0 is compressed with lz4, which the successor's kernel was not built for (CONFIG_RD_LZ4)"
    );
}

#[test]
fn growth_is_bounded() {
    let large = gzip(&archive("zeros", &vec![0; 65 << 20]));
    assert!(refused(&large).contains("more than 64 MiB"));
    let many: Vec<u8> = (0..1001).flat_map(|n| entry(&n.to_string(), 0o040_755, b"")).collect();
    assert!(refused(&gzip(&many)).contains("1000 files"));
}

#[test]
fn a_boot_configuration_stays_last() {
    let config = boot_config("kernel.maxcpus = 4 # no\n");
    for padding in 0..4 {
        let given = [archive("init", b"x"), config.clone(), vec![0; padding]].concat();
        let initrd = walked(&given).unwrap();
        let found = initrd.boot_config.clone().unwrap();
        assert_eq!((found.at, found.text.as_str()), (512, "kernel.maxcpus = 4 # no\n"));
        assert!(found.has_kernel_words());
        let joined = join(&given, &initrd, &archive("ours", b""));
        let again = walked(&joined).unwrap();
        assert!(again.has("init") && again.has("ours") && again.boot_config.is_some());
        assert!(joined.ends_with(&given[512..]));
    }
    let mut wrong = [archive("init", b"x"), config].concat();
    wrong[514] ^= 1;
    assert!(refused(&wrong).contains("the sum is"));
    assert!(refused(b"#BOOTCONFIG\n").contains("length"));
    assert!(!BootConfig { at: 0, text: "init.x = kernels # kernel.y".into() }.has_kernel_words());
    assert!(BootConfig { at: 0, text: "a { }\nkernel {\n x }".into() }.has_kernel_words());
}

/// Whatever the operator's initrd ends with, ours is found behind it.
#[test]
fn ours_is_found_behind_every_compression() {
    let ours = archive("ours", b"content");
    for given in
        [archive("a", b""), gzip(&archive("a", b"xy")), lz4(&archive("a", &[1; 777])), entry("a", 0o100_644, b"123")]
    {
        let joined = join(&given, &walked(&given).unwrap(), &ours);
        let initrd = walked(&joined).unwrap();
        assert!(initrd.has("a") && initrd.has("ours"), "{:?}", initrd.parts);
    }
}

proptest! {
    #[test]
    fn no_bytes_confuse_the_walker(mut bytes in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), kind in 0usize..3) {
        let _ = walked(&bytes);
        let mut good = match kind {
            0 => archive("init", b"123"),
            1 => gzip(&archive("init", b"123")),
            _ => [archive("init", b"123"), boot_config("a")].concat(),
        };
        let at = at.index(good.len());
        bytes.truncate(8);
        good.splice(at..(at + bytes.len()).min(good.len()), bytes);
        if let Ok(initrd) = walked(&good) {
            let _ = walked(&join(&good, &initrd, &archive("ours", b"")));
        }
    }
}
