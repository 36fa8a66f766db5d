//! Images: the lab's stock kernels, and everything that is not one.

mod support;

use std::time::Instant;

use kexec_core::image::signature::{SignatureError, Trusted, verify};
use kexec_core::image::unified::Unified;
use kexec_core::image::{BzImage, KernelFacts, PayloadError, payload};
use proptest::prelude::*;
use support::synthetic_image;

#[test]
fn stock_kernels_are_what_they_are() {
    for (series, path) in support::lab_kernels() {
        let file = std::fs::read(&path).unwrap();
        let image = BzImage::parse(&file).unwrap();
        assert!(image.release().starts_with(series), "{} is not {series}", image.release());
        assert!(path.display().to_string().contains(image.release()), "{}", image.release());
        assert_eq!(image.alignment(), 2 << 20);
        assert_eq!(image.pref_address(), 16 << 20);
        assert!(image.init_size() > image.protected_mode().len() as u64);
        assert!(image.five_level());
        assert_eq!(image.protocol(), 0x20f);

        let started = Instant::now();
        let facts = KernelFacts::of(&image).unwrap();
        println!("{}: {facts:?}, {:?}", image.release(), started.elapsed());
        assert!(facts.mailbox_reset_vector, "{}", image.release());
        // The lab's tree may have a kernel of its own making, too.
        let ours = image.release().contains("-kho-");
        assert_eq!(facts.kho.is_some(), ours, "Debian leaves KEXEC_HANDOVER out: {}", image.release());
        let banner = format!("Linux version {} ", image.release());
        assert!(payload::contains(&image, banner.as_bytes()).unwrap());
    }
}

/// Debian signs its kernels; the lab's own one is not signed.
#[test]
fn a_signature_counts_for_the_image_that_was_signed() {
    let stranger = Trusted::parse(include_bytes!("data/authority.pem")).unwrap();
    let mut signed = 0;
    for (_, path) in support::lab_kernels() {
        let file = std::fs::read(&path).unwrap();
        let started = Instant::now();
        let verified = match verify(&file, &[]) {
            Err(SignatureError::None) => {
                assert!(path.display().to_string().contains("-kho-"), "{} is not signed", path.display());
                continue;
            }
            verified => verified.unwrap(),
        };
        println!("{}: signed by {}, {:?}", path.display(), verified.signer, started.elapsed());
        signed += 1;
        assert!(verified.signer.contains("Debian") && !verified.trusted);
        let untrusted = verify(&file, std::slice::from_ref(&stranger)).unwrap_err();
        assert!(matches!(untrusted, SignatureError::Untrusted { trusted: 1, .. }), "{untrusted}");
        let end = u32::from_le_bytes(file[0x3c..0x40].try_into().unwrap()) as usize + 24 + 112 + 4 * 8;
        let table = u32::from_le_bytes(file[end..end + 4].try_into().unwrap()) as usize;
        // One bit anywhere: in the boot header, the kernel, its last byte.
        for at in [0, 0x1f1, 0x202, 0x5000, file.len() / 2, table - 1] {
            let mut changed = file.clone();
            changed[at] ^= 1;
            let why = verify(&changed, &[]);
            assert!(why.is_err(), "byte {at:#x}");
            if at > 0x1000 {
                assert!(
                    matches!(why, Err(SignatureError::OtherImage { algorithm: "SHA-256", .. })),
                    "byte {at:#x}: {why:?}"
                );
            }
        }
        // The signer's own certificate, trusted: no bit of the signature can be changed without a refusal, or to no effect.
        let certificates = (table..file.len() - 4).filter(|&at| file[at..at + 2] == [0x30, 0x82]);
        let own = certificates
            .filter_map(|at| {
                let len = 4 + usize::from(file[at + 2]) * 256 + usize::from(file[at + 3]);
                Trusted::parse(file.get(at..at + len)?).ok()
            })
            .collect::<Vec<_>>();
        let trusted = verify(&file, &own).unwrap();
        assert!(trusted.trusted && trusted.signer == verified.signer);
        for at in (table..file.len()).step_by(7) {
            let mut changed = file.clone();
            changed[at] ^= 0x10;
            if let Ok(other) = verify(&changed, &own) {
                assert_eq!(other, trusted, "byte {at:#x}");
            }
        }
        // Something behind it, or a table that is not there any more.
        assert!(verify(&[file.as_slice(), b"x"].concat(), &[]).is_err());
        assert!(verify(&file[..file.len() - 8], &[]).is_err());
    }
    assert!(signed > 0, "the lab has a kernel of Debian's");
}

/// A PE file of one header and these sections.
fn unified(sections: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut file = vec![0; 0x400];
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x40;
    file[0x40..0x44].copy_from_slice(b"PE\0\0");
    file[0x44..0x46].copy_from_slice(&0x8664u16.to_le_bytes());
    file[0x46] = sections.len() as u8;
    file[0x54] = 240; // of the optional header
    file[0x58..0x5a].copy_from_slice(&0x20bu16.to_le_bytes());
    file[0x58 + 108] = 16; // data directories
    for (n, (name, content)) in sections.iter().enumerate() {
        let at = file.len() as u32;
        let header = 0x58 + 240 + 40 * n;
        file[header..header + name.len()].copy_from_slice(name);
        file[header + 8..header + 12].copy_from_slice(&(content.len() as u32).to_le_bytes());
        file[header + 16..header + 20].copy_from_slice(&(content.len() as u32).to_le_bytes());
        file[header + 20..header + 24].copy_from_slice(&at.to_le_bytes());
        file.extend_from_slice(content);
    }
    file
}

#[test]
fn a_unified_image_is_named_and_can_be_taken_apart() {
    let kernel = synthetic_image();
    let sections: [(&[u8], &[u8]); 4] =
        [(b".uname", b"6.99.1-test"), (b".cmdline", b"quiet ro\n\0"), (b".initrd", b"070701"), (b".linux", &kernel)];
    let file = unified(&sections);
    let why = BzImage::parse(&file).unwrap_err().to_string();
    assert!(why.contains("unified kernel image of 6.99.1-test") && why.contains("objcopy"), "{why}");
    let parts = Unified::parse(&file).unwrap();
    assert_eq!(
        (parts.linux, &*parts.initrd, parts.cmdline.as_str()),
        (kernel.as_slice(), b"070701".as_slice(), "quiet ro")
    );
    assert!(BzImage::parse(parts.linux).is_ok());
    assert_eq!(Unified::parse(&unified(&sections[..3])), None, "no kernel in it");
    assert_eq!(Unified::parse(&kernel), None);
}

#[test]
fn a_synthetic_image_is_read() {
    let file = synthetic_image();
    let image = BzImage::parse(&file).unwrap();
    assert_eq!(image.release(), "6.99.1-test");
    assert_eq!(image.protected_mode().len(), 0x2000);
    assert_eq!(image.payload().len(), 0x1000);
    assert_eq!(verify(&file, &[]), Err(SignatureError::None));
    assert!(matches!(KernelFacts::of(&image), Err(PayloadError::Unknown { len: 0x1000, .. })));
}

/// Each kind of bad image, and what is said of it.
#[test]
fn bad_images_are_named() {
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = synthetic_image();
        change(&mut file);
        BzImage::parse(&file).unwrap_err().to_string()
    };
    let set =
        |at: usize, bytes: &'static [u8]| move |file: &mut Vec<u8>| file[at..at + bytes.len()].copy_from_slice(bytes);

    assert!(refused(&|f| f.truncate(0x210)).starts_with("kernel image is truncated: the boot header needs"));
    let cut = refused(&|f| f.truncate(0x2000));
    assert_eq!(cut, "kernel image is truncated: the kernel needs 10752 bytes, but the file has 8192");
    assert!(refused(&set(0x202, b"XXXX")).contains("not a Linux kernel image"));
    assert!(refused(&|f| f[..4].copy_from_slice(b"\x7fELF")).contains("vmlinux"));
    assert!(refused(&|f| *f = b"PK\x03\x04".repeat(200)).starts_with("not a Linux kernel image: 0x04"));
    assert!(refused(&|f| f.clear()).contains("truncated"));
    assert_eq!(refused(&set(0x206, b"\x05\x02")), "boot protocol 2.05 is too old: 2.12 (Linux 3.8) is needed");
    assert!(refused(&set(0x236, b"\x7e\x00")).contains("32-bit only"));
    assert!(refused(&set(0x234, b"\x00")).contains("CONFIG_RELOCATABLE"));
    assert!(refused(&set(0x211, b"\x00")).contains("loaded high"));
    assert_eq!(refused(&set(0x230, b"\x03\x00\x00\x00")), "kernel header is damaged: kernel_alignment is 0x3");
    assert!(refused(&set(0x260, b"\x00\x01\x00\x00")).contains("init_size"));
    assert!(refused(&set(0x1f4, b"\xff\xff\xff\xff")).contains("syssize is 0xffffffff"));
    assert!(refused(&set(0x1f4, b"\x00\x00\x00\x00")).contains("syssize"));
    assert!(refused(&set(0x24c, b"\xff\xff\xff\xff")).contains("payload_length"));
    assert!(refused(&set(0x20e, b"\x00\x00")).contains("kernel_version"));
    assert!(refused(&set(0x20e, b"\xff\xff")).contains("kernel_version"));
    assert!(refused(&set(0x600, b"../../etc/x")).contains("kernel_version"));
    assert!(refused(&set(0x600, b"6.1\x1b[2J")).contains("kernel_version"));
    assert!(refused(&set(0x201, b"\x10")).contains("jump"));
    let huge = vec![0; (256 << 20) + 1];
    assert!(BzImage::parse(&huge).unwrap_err().to_string().contains("too large"));
}

#[test]
fn a_damaged_payload_is_an_error_and_no_answer() {
    let (_, path) = support::lab_kernels().remove(0);
    let mut file = std::fs::read(&path).unwrap();
    let middle = file.len() / 2;
    file[middle..middle + 64].fill(0x55);
    let image = BzImage::parse(&file).unwrap();
    let error = payload::contains(&image, b"this text is in no kernel").unwrap_err();
    assert!(matches!(error, PayloadError::Damaged { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_it_panic(mut file in prop::collection::vec(any::<u8>(), 0..0x400), real: bool) {
        if real && file.len() > 0x210 {
            file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            file[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        }
        let _ = BzImage::parse(&file);
    }

    #[test]
    fn no_damage_to_the_header_makes_it_panic(at in 0usize..0x280, bytes in prop::collection::vec(any::<u8>(), 1..9), len in 0usize..0x3000) {
        let mut file = synthetic_image();
        file[at..at + bytes.len()].copy_from_slice(&bytes);
        file.truncate(len);
        if let Ok(image) = BzImage::parse(&file) {
            prop_assert!(image.protected_mode().len() as u64 <= image.init_size());
            prop_assert!(!image.release().is_empty());
            let _ = KernelFacts::of(&image);
        }
    }
}
