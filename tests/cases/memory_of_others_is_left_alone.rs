//! Memory that is somebody else's stays so: persistent memory made on the command line, a range that is reserved for another user, what lies above
//! `mem=`. A pattern lies in each; after an update, if that is made at all, it lies there still, and the successor has no more memory than there was.

use anyhow::{Context, Result, ensure};
use baton_tests::findings::Checked;
use baton_tests::refusal::said;
use baton_tests::{NEW, OLD, console, kernel, open, snapshot};
use demos::lab::Guest;
use demos::story::stage::{Shape, Stage, Upgraded};

const MIB: u64 = 1 << 20;
/// A word of the pattern at an address.
fn word(at: u64) -> u64 {
    at.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Where the pattern's words lie in a range: at both ends and every 16 MiB.
fn places((start, len): (u64, u64)) -> Vec<u64> {
    (0..len / (16 * MIB)).map(|n| start + n * 16 * MIB).chain([start + len - 8]).collect()
}

/// Reads or writes words of physical memory that is no kernel's RAM.
fn touch(guest: &Guest, ranges: &[(u64, u64)], write: bool) -> Result<String> {
    let mut script = String::new();
    for at in ranges.iter().flat_map(|range| places(*range)) {
        script += &if write {
            format!("devmem {at:#x} 64 {:#x} || {{ echo {at:#x} cannot be written >&2; exit 1; }}\n", word(at))
        } else {
            format!("echo {at:#x} $(devmem {at:#x} 64 2>&1)\n")
        };
    }
    Ok(guest.check(&["sh", "-c", &script])?)
}

fn assert_pattern(guest: &Guest, ranges: &[(u64, u64)]) -> Result<()> {
    let said = touch(guest, ranges, false)?;
    let wanted: String =
        ranges.iter().flat_map(|range| places(*range)).map(|at| format!("{at:#x} 0x{:016X}\n", word(at))).collect();
    ensure!(
        said == wanted,
        "somebody else's memory was written to, or is this kernel's now:\n{said}\nwanted:\n{wanted}"
    );
    Ok(())
}

/// A check and an update of a machine with such ranges: refused in words that name one of them, or made, and they are left alone.
fn left_alone(stage: &mut Stage, ranges: &[(u64, u64)], words: &[&str]) -> Result<()> {
    let guest = stage.guest();
    touch(&guest, ranges, true).context("writing the pattern")?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let before = snapshot::of(stage)?;
    let checked = Checked::ask(&guest, &image, &[])?;
    let accept: Vec<&str> = checked.refused_names().into_iter().collect();
    if checked.exit == Some(3) {
        let said: String = checked.refused().map(|finding| format!("{}\n", finding.text)).collect();
        ensure!(words.iter().all(|word| said.contains(word)), "refused for another reason: {said}");
        eprintln!("refused: {said}");
        if checked.refused().any(|finding| finding.accept.is_none()) {
            return assert_pattern(&guest, ranges);
        }
    }
    // Whoever accepts that it is absent for a while does not accept that it is overwritten.
    let list = accept.join(",");
    let more: Vec<&str> = if list.is_empty() { vec![] } else { vec!["--accept", &list] };
    match stage.upgrade(&kernel(NEW).release, &more)? {
        Upgraded::Refused(ran) => {
            ensure!(ran.exit.code == Some(3), "{}", said(&ran));
        }
        Upgraded::Drained(_) => {
            let after = snapshot::of(stage)?;
            let (had, has) = (before.mem_total_kib, after.mem_total_kib);
            ensure!((97..=101).contains(&(has * 100 / had)), "{had} KiB before, {has} KiB after");
        }
    }
    assert_pattern(&stage.guest(), ranges)
}

#[test]
#[ignore = "its pattern cannot be written: /dev/mem refuses (EPERM) where nd_e820 had been"]
fn persistent_memory_and_a_range_of_another_user() -> Result<()> {
    // The gap between is too small for a region, so whoever picks the largest free range picks one of these.
    let (pmem, other) = ((0x4000_0000, 512 * MIB), (0x7000_0000, 64 * MIB));
    let mut shape = Shape { cmdline: "memmap=512M!1G memmap=64M$0x70000000 iomem=relaxed".into(), ..Shape::default() };
    shape.incumbent_modules = ["nd_e820", "nd_pmem"].map(str::to_owned).to_vec();
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    // It is a disk to its owner, and its file system is mounted. The pattern is written behind that.
    let mount = "mke2fs -F /dev/pmem0 >/dev/null && mkdir -p /mnt/p && mount -t ext4 /dev/pmem0 /mnt/p && echo kept > /mnt/p/kept && sync";
    guest.check(&["sh", "-c", mount])?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    Checked::ask(&guest, &image, &[])?.assert_refuses("a mounted pmem", "mounts", &["/mnt/p", "pmem0"])?;
    guest.check(&["umount", "/mnt/p"])?;
    // Claimed by its driver, it cannot be written to by its address.
    // Its region, bound to a driver that is built in, keeps nd_e820 loaded.
    let release = "rmmod nd_pmem && cd /sys/bus/nd/drivers/nd_region && for r in region*; do echo $r > unbind; done && rmmod nd_e820";
    guest.check(&["sh", "-c", release])?;
    left_alone(stage, &[pmem, other], &[])?;
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

#[test]
fn what_lies_above_mem() -> Result<()> {
    let shape = Shape { memory_mib: 4096, cmdline: "mem=2G".into(), ..Shape::default() };
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    // QEMU's q35 puts what does not fit below its hole at 4 GiB.
    left_alone(stage, &[(0x1_0000_0000, 2048 * MIB)], &["mem="])?;
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
