//! A stock kernel boots from a placement alone: an emulated machine without any firmware, whose memory holds the
//! placement's segments and the SIPI page, and whose one CPU starts where SIPI would have started it.
//!
//! What it shows is everything of this crate that a kernel can judge: entry, page tables, zero page, e820, reservations,
//! ACPI tables. What it cannot show is another kernel beside it; whole machines are the business of `tests`.

mod support;

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kexec_core::image::BzImage;
use kexec_core::layout::{LowSlot, SIPI_PAGE};
use kexec_core::memory_map::{Range, RangeSet};
use kexec_core::placement::{Placement, PlacementRequest};
use state_schemas::platform::Platform;
use trampoline::sipi_page;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Ends the machine with the test.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// 64 KiB at the top of the first MiB; at the reset vector: `ljmp $0x0800, $0`, the state after SIPI with vector 8.
fn reset_to_sipi_page() -> Vec<u8> {
    let mut rom = vec![0xf4; 64 << 10];
    let segment = (SIPI_PAGE >> 4) as u16;
    rom[0xfff0..0xfff3].copy_from_slice(&[0xea, 0, 0]);
    rom[0xfff3..0xfff5].copy_from_slice(&segment.to_le_bytes());
    rom
}

/// Boots it; gives what it said on the serial line until it said `last`.
fn boot(placement: &Placement<'_>, cpu: &str, memory_mib: u64, folder: &Path, last: &str) -> String {
    let tree = support::lab_tree();
    let lib = tree.join("usr/lib/x86_64-linux-gnu");
    std::fs::write(folder.join("rom"), reset_to_sipi_page()).unwrap();
    let mut command = Command::new(lib.join("ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(&lib)
        .arg(tree.join("usr/bin/qemu-system-x86_64"))
        .args(["-M", "q35", "-accel", "tcg", "-cpu", cpu, "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-m", &format!("{memory_mib}M"), "-L"])
        .arg(tree.join("usr/share/qemu"))
        .args(["-bios", "rom"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let sipi = sipi_page(&placement.boot);
    let parts = placement.segments.iter().map(|s| (s.at, s.bytes.as_ref())).chain([(SIPI_PAGE, sipi.as_slice())]);
    for (at, bytes) in parts {
        std::fs::write(folder.join(format!("{at:x}")), bytes).unwrap();
        command.args(["-device", &format!("loader,file={at:x},addr={at:#x},force-raw=on")]);
    }
    let mut machine = Machine(command.spawn().unwrap_or_else(|e| panic!("qemu of the lab: {e}; run `cargo demo lab`")));
    let mut serial = machine.0.stdout.take().unwrap();
    let (said, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = serial.read(&mut piece) {
            if said.send(piece[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + Duration::from_secs(180);
    let mut log = String::new();
    while !log.contains(last) {
        let left = deadline.saturating_duration_since(Instant::now());
        match heard.recv_timeout(left) {
            Ok(piece) => log.push_str(&String::from_utf8_lossy(&piece)),
            Err(reason) => panic!("{reason} before {last:?}; the machine said:\n{log}"),
        }
    }
    log
}

fn has_line(log: &str, parts: &[&str]) {
    assert!(log.lines().any(|line| parts.iter().all(|part| line.contains(part))), "no line with {parts:?} in\n{log}");
}

#[test]
fn stock_kernels_boot_from_a_placement_alone() {
    // Below 4 GiB; and above it, where SIPI's root page is what makes it possible at all, on a CPU with five levels of
    // page tables: the decompressor then goes through 32-bit mode once more, by code at the end of the low slot.
    let machines = [
        ("EPYC,topoext=off", 46, 1024, Range::new(512 * MIB, 960 * MIB)),
        ("max", 52, 5120, Range::new(4 * GIB + 256 * MIB, 4 * GIB + 704 * MIB)),
    ];
    for ((series, path), (cpu, physical_bits, memory_mib, region)) in support::lab_kernels().into_iter().zip(machines) {
        let file = std::fs::read(path).unwrap();
        let image = BzImage::parse(&file).unwrap();
        let arena = Range::new(128 * MIB, 192 * MIB);
        let fragment = Range::new(400 * MIB + 4096, 401 * MIB);
        let placement = Placement::new(&PlacementRequest {
            image: &image,
            initrd: &[],
            cmdline: "console=ttyS0 earlyprintk=ttyS0,115200 panic=0",
            region,
            low_slot: LowSlot::new(2).unwrap(),
            boot_cpu: 0,
            other_cpus: &[1, 2, 3],
            phantom: None,
            reserved_ram: RangeSet::from(vec![arena, fragment]),
            cap: None,
            identity: RangeSet::new(),
            gigabyte_pages: false,
            tsc_khz: 1_000_000,
            platform: Platform::default(),
            affinity: &[],
            kho: None,
        })
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        // Without initrd and devices this is where every kernel ends that has started all it has.
        let log = boot(&placement, cpu, memory_mib, folder.path(), "Unable to mount root fs");

        has_line(&log, &["Linux version ", series]);
        // MAX_PHYSMEM_BITS: 46 with four levels, 52 with five. So that the second machine is what it is meant to be.
        has_line(&log, &[&format!("max_arch_pfn = {:#x}", 1u64 << (physical_bits - 12))]);
        has_line(&log, &["Command line: ", &placement.cmdline]);
        for entry in &placement.e820 {
            let (first, last) = (entry.range.start(), entry.range.end() - 1);
            has_line(&log, &[&format!("{first:016x}-0x{last:016x}]")]);
        }
        has_line(&log, &["ACPI: RSDP", "BATON"]);
        has_line(&log, &["tsc: Detected 1000.000 MHz"]);
        has_line(&log, &["wakeup_secondary_cpu_64() replaced with acpi_wakeup_cpu()"]);
        has_line(&log, &["Allowing 5 present CPUs"]); // the phantom is only dropped where the boot CPU is no BSP
        // All of the 65 MiB are RAM to the kernel, and reserved: less is available than the region alone has.
        has_line(&log, &["Memory: ", "available"]);
        let memory = log.lines().find(|l| l.contains("Memory: ") && l.contains("available")).unwrap();
        let number = |text: &str| text.trim_end_matches('K').parse::<u64>().unwrap();
        let (available, total) =
            memory.split("Memory: ").nth(1).unwrap().split(' ').next().unwrap().split_once('/').unwrap();
        let ram: u64 = placement.e820.iter().filter(|e| e.kind as u32 == 1).map(|e| e.range.len()).sum();
        assert!(number(total) <= ram / 1024 && number(total) + 1024 >= ram / 1024, "{memory}");
        assert!(number(available) * 1024 < region.len(), "{memory}");
        for bad in ["BUG:", "cut here", "Oops", "Failed to setup MADT reset vector", "ACPI Error", "Crash kernel"] {
            assert!(!log.contains(bad), "{bad} in\n{log}");
        }
        println!("{} on {cpu}: {memory}", image.release());
    }
}
