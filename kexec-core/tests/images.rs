//! Images: the lab's stock kernels, and everything that is not one.

mod support;

use std::time::Instant;

use kexec_core::image::bzimage::{ImageError, SignaturePolicy};
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
        image.check_signature(SignaturePolicy::Optional).unwrap();
        assert_eq!(image.check_signature(SignaturePolicy::Required).is_ok(), image.is_signed());

        let started = Instant::now();
        let facts = KernelFacts::of(&image).unwrap();
        println!("{}: {facts:?}, signed: {}, {:?}", image.release(), image.is_signed(), started.elapsed());
        assert!(facts.mailbox_reset_vector, "{}", image.release());
        // The lab's tree may have a kernel of its own making, too.
        let ours = image.release().contains("-kho-");
        assert_eq!(facts.kho.is_some(), ours, "Debian leaves KEXEC_HANDOVER out: {}", image.release());
        let banner = format!("Linux version {} ", image.release());
        assert!(payload::contains(&image, banner.as_bytes()).unwrap());
    }
}

#[test]
fn a_synthetic_image_is_read() {
    let file = synthetic_image();
    let image = BzImage::parse(&file).unwrap();
    assert_eq!(image.release(), "6.99.1-test");
    assert_eq!(image.protected_mode().len(), 0x2000);
    assert_eq!(image.payload().len(), 0x1000);
    assert_eq!(image.check_signature(SignaturePolicy::Required), Err(ImageError::Unsigned));
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
