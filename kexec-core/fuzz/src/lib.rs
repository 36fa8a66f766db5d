//! What is done with any bytes: the fuzz targets call these, and so does `tests/fuzz_smoke.rs` in `cargo test`.

use kexec_core::cmdline::inherit::{Heir, inherit};
use kexec_core::cmdline::{control_block_of, first_program, panic_wish, security, without_second_threads};
use kexec_core::compression::Compression;
use kexec_core::cpus::parse_cpu_list;
use kexec_core::image::signature::{self, Trusted};
use kexec_core::image::{BzImage, KernelFacts, unified};
use kexec_core::initrd::{self, Limits};
use kexec_core::klog::{KernelLog, LogTail};
use kexec_core::memory_map::iomem::{firmware_ram, kernel_image, parse_firmware_memmap, parse_iomem, system_ram};

#[path = "../../tests/support/bzimage.rs"]
mod bzimage;
#[path = "../../tests/support/printk.rs"]
mod printk;

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

/// The log of another kernel: what it says of its structures, or, where that is not it, changes of its memory: twelve bytes each,
/// where and what.
pub fn klog(bytes: &[u8]) {
    let [flags, start, kaslr, rest @ ..] = bytes else { return };
    let mut kernel = printk::Printk::new(printk::Shape {
        start: u64::from(*start) << 21,
        kaslr: u64::from(*kaslr),
        direct_gib: u64::from(*kaslr),
        five_levels: flags & 1 != 0,
        moved: flags & 2 != 0,
        callers: flags & 4 != 0,
        count_bits: 5,
    });
    for n in 0..40 {
        kernel.say(&format!("message {n}"), 6, 0);
    }
    kernel.begin("begun");
    if flags & 8 != 0 {
        kernel.say_vmcoreinfo();
    }
    if rest.starts_with(b"OSRELEASE=") {
        kernel.put_vmcoreinfo(rest);
    } else {
        for change in rest.chunks_exact(12) {
            let (place, value) = change.split_first_chunk().expect("four bytes of twelve");
            let room = kernel.ram.len() as u64 / 8;
            let value = value.try_into().expect("eight bytes of twelve");
            kernel.put(u64::from(u32::from_le_bytes(*place)) % room * 8, u64::from_le_bytes(value));
        }
    }
    if let Ok(log) = KernelLog::find(&kernel, None) {
        let records = log.read(&kernel, None, usize::MAX);
        let text: usize = records.iter().map(|record| record.text.len()).sum();
        // A byte becomes at most four characters.
        assert!(text <= 4 * kernel.ram.len());
        assert!(records.iter().all(|record| record.lines().all(|line| !line.contains(['\n', '\u{1b}']))));
        let _ = LogTail::of(&records, 30).to_string();
    }
}
