//! What is done with any bytes: the fuzz targets call these, and so does `tests/fuzz_smoke.rs` in `cargo test`.

use kexec_core::cmdline::{control_block_of, panic_wish};
use kexec_core::cpus::parse_cpu_list;
use kexec_core::image::bzimage::SignaturePolicy;
use kexec_core::image::{BzImage, KernelFacts};
use kexec_core::memory_map::iomem::{firmware_ram, kernel_image, parse_firmware_memmap, parse_iomem, system_ram};

/// Where the setup code of a small image ends, and its payload begins.
const SETUP: usize = 5 * 512;
const PAYLOAD_AT: usize = 0x300;

/// A kernel image, payload and all.
pub fn image(bytes: &[u8]) {
    let Ok(image) = BzImage::parse(bytes) else { return };
    assert!(image.payload().len() <= image.protected_mode().len() && image.protected_mode().len() <= bytes.len());
    assert!(image.alignment().is_power_of_two());
    assert!(!image.release().is_empty());
    let _ = (image.check_signature(SignaturePolicy::Required), image.header_for_boot());
    let _ = KernelFacts::of(&image);
}

/// What is compressed inside a good image: zstd, ELF, and the texts that are searched.
pub fn payload(bytes: &[u8]) {
    let mut file = vec![0; (SETUP + PAYLOAD_AT + bytes.len()).next_multiple_of(16)];
    let kernel = file.len() - SETUP;
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // As in `tests/support`; what each field is for is in `bzimage.rs`.
    put(0x1f1, &[4]);
    put(0x1f4, &(kernel as u32 / 16).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x20e, &0x400u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &(PAYLOAD_AT as u32).to_le_bytes());
    put(0x24c, &(bytes.len() as u32).to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x300_0000u32.to_le_bytes());
    put(0x600, b"6.99.1-test (builder@host) #1\0");
    put(SETUP + PAYLOAD_AT, bytes);
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
}
