//! What is done with any bytes: the fuzz targets call these, and so does `tests/fuzz_smoke.rs` in `cargo test`.

use kexec_core::cmdline::inherit::{Heir, inherit};
use kexec_core::cmdline::{control_block_of, first_program, panic_wish, security, without_second_threads};
use kexec_core::compression::Compression;
use kexec_core::cpus::parse_cpu_list;
use kexec_core::image::signature::{self, Trusted};
use kexec_core::image::{BzImage, KernelFacts, unified};
use kexec_core::initrd::{self, Limits};
use kexec_core::memory_map::iomem::{firmware_ram, kernel_image, parse_firmware_memmap, parse_iomem, system_ram};

#[path = "../../tests/support/bzimage.rs"]
mod bzimage;

/// A kernel image, payload and all.
pub fn image(bytes: &[u8]) {
    let _ = (signature::verify(bytes, &[]), Trusted::parse(bytes), unified::Unified::parse(bytes));
    let Ok(image) = BzImage::parse(bytes) else { return };
    assert!(image.payload().len() <= image.protected_mode().len() && image.protected_mode().len() <= bytes.len());
    assert!(image.alignment().is_power_of_two());
    assert!(!image.release().is_empty());
    let _ = (signature::verify(bytes, &[]), image.header_for_boot());
    let _ = KernelFacts::of(&image);
}

/// What is compressed inside a good image: zstd, ELF, and the texts that are searched.
pub fn payload(bytes: &[u8]) {
    let file = bzimage::with_payload(bytes, 0);
    let image = BzImage::parse(&file);
    // An empty payload is refused; all else is for the search to judge.
    assert!(image.is_ok() || bytes.is_empty(), "{:?}", image.err());
    if let Ok(image) = image {
        let _ = KernelFacts::of(&image);
    }
}

/// What the running kernel says of memory and CPUs, and its command line.
pub fn texts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(resources) = parse_iomem(&text) {
        let _ = (system_ram(&resources).total(), kernel_image(&resources).total());
    }
    let mut words = text.split('\n');
    let entries = std::iter::from_fn(|| Some((words.next()?, words.next()?, words.next()?)));
    if let Ok(entries) = parse_firmware_memmap(entries) {
        let _ = firmware_ram(&entries).total();
    }
    if let Ok(cpus) = parse_cpu_list(&text) {
        assert!(cpus.len() <= 1 << 16);
    }
    let _ = (control_block_of(&text), panic_wish(&text));
    let heir = Heir { highest_apic_id: 3, room: 400 << 20, cpu_number: &|cpu| cpu.checked_add(1) };
    let inherited = inherit(&text, "quiet", &heir);
    let _ = (security::weaker(&text, &inherited.line), first_program(&text), without_second_threads(&text, ""));
}

/// An initrd, and its joining with another.
pub fn initrd(bytes: &[u8]) {
    let limits = Limits { files: 1000, unpacked: 16 << 20 };
    let Ok(walked) = initrd::walk(bytes, limits, |compression| compression != Compression::Lz4) else { return };
    assert!(!walked.parts.is_empty() && walked.unpacked <= limits.unpacked);
    let joined = initrd::join(bytes, &walked, b"");
    assert!(initrd::walk(&joined, limits, |_| true).is_ok());
}
