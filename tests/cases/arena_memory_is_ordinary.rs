//! Arenas from a page to more than half of the machine are ordinary memory in every kernel they come to: direct I/O, futexes,
//! debuggers and sockets that do not copy take them. They grow while their service serves, they cross whole, in however many
//! pieces of memory they lie, and when the service has left for good their memory is the kernel's again.

use std::time::{Duration, Instant};

use agent::daemon::config::Service;
use anyhow::{Context, Result};
use baton_tests::{NEW, OLD, open, upgrade};
use demos::lab::{Guest, incumbent};
use demos::story::stage::{Shape, Stage};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Name, size at first, and what is added to it in the first kernel.
///
/// Two of them lie in several pieces by their nature. The second ends off every boundary, and what it grows by begins on one. The
/// third has no place in one piece: this machine's memory has its hole (for devices) at 2 GiB, and 2 GiB on either side of it.
const ARENAS: [(&str, u64, u64); 3] =
    [("probe-page", 4 * KIB, 0), ("probe-odd", 2 * MIB + 4 * KIB, 6 * MIB), ("probe-large", 2304 * MIB, 64 * MIB)];
const SEVERAL_PIECES: [&str; 2] = ["probe-odd", "probe-large"];

fn probe((name, bytes, more): (&str, u64, u64)) -> Service {
    let (arena, grow) = ((bytes / KIB).to_string(), (more / KIB).to_string());
    let words = ["/usr/sbin/arena-probe", "--name", name, "--arena-kib", &arena, "--grow-kib", &grow];
    let mut service = incumbent::demo_service();
    (service.name, service.exec) = (name.to_owned(), words.map(str::to_owned).to_vec());
    service
}

/// What a probe has found in this kernel.
fn found(guest: &Guest, name: &str) -> Result<Value> {
    let file = format!("/run/{name}.json");
    let until = Instant::now() + Duration::from_secs(60);
    while !guest.command(&["test", "-e", &file]).run()?.success() {
        anyhow::ensure!(Instant::now() < until, "{name} has written nothing");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(serde_json::from_str(&guest.check(&["cat", &file])?)?)
}

fn assert_ordinary(stage: &Stage, fresh: bool) -> Result<()> {
    let guest = stage.guest();
    for (name, bytes, more) in ARENAS {
        let found = found(&guest, name)?;
        eprintln!("{name}: {found}");
        assert_eq!((&found["fresh"], &found["bad_pages"]), (&Value::from(fresh), &Value::from(0)), "{name}");
        assert_eq!(found["bytes"], bytes + more, "{name} has grown");
        for what in ["direct_io", "private_futex", "process_vm_readv", "vmsplice", "zero_copy_send"] {
            assert_eq!(found[what], "ok", "{name}: {what}");
        }
        // Shared between processes a futex needs a file's page cache behind it: a memfd is the memory for that.
        let shared = found["shared_futex"].as_str().unwrap_or_default();
        assert!(shared.contains("Bad address"), "{name}: shared futexes: {shared}");
        // As another process sees it, through the kernel: the last page's mark.
        let address = found["address"].as_u64().context("an address")?;
        let last = (address + bytes + more) / 8 - 1;
        let script = format!(
            "p=$(pidof arena-probe | tr ' ' '\\n' | while read p; do tr '\\0' '\\n' < /proc/$p/cmdline | grep -qx {name} \
             && echo $p; done); dd if=/proc/$p/mem bs=8 skip={last} count=1 2>/dev/null | od -An -t u8"
        );
        let mark: u64 = guest.check(&["sh", "-c", &script])?.trim().parse().context("the mark")?;
        assert_eq!(!mark, (bytes + more) / (4 * KIB) - 1, "{name}: as a debugger sees it");
    }
    Ok(())
}

/// In which pieces each arena lies, as the handover record says that brought it to this kernel: pieces that touch are one.
fn assert_pieces(guest: &Guest) -> Result<()> {
    let shown: Value = serde_json::from_str(&guest.check(&["baton", "handover", "show", "--live", "--json"])?)?;
    let pieces = shown["pieces"].as_array().context("what crossed")?;
    let arenas = pieces.iter().find_map(|piece| piece["value"]["payload"]["arenas"].as_array());
    for (name, bytes, more) in ARENAS {
        let mine = arenas.into_iter().flatten().find(|arena| arena["name"] == name).context("the arena")?;
        let ranges = mine["ranges"].as_array().context("its ranges")?;
        eprintln!("{name}: {ranges:?}");
        let total: u64 = ranges.iter().filter_map(|range| range["len"].as_u64()).sum();
        assert_eq!(total, bytes + more, "{name}");
        assert_eq!(ranges.len() > 1, SEVERAL_PIECES.contains(&name), "{name}: {ranges:?}");
    }
    Ok(())
}

fn free_memory(guest: &Guest) -> Result<u64> {
    let kib = guest.check(&["awk", "/^MemFree:/ { print $2 }", "/proc/meminfo"])?;
    Ok(kib.trim().parse::<u64>()? * KIB)
}

#[test]
fn arenas_are_ordinary_memory_in_every_kernel_and_free_when_released() -> Result<()> {
    let mut shape = Shape { memory_mib: 4096, modules: vec!["brd".to_owned()], ..Shape::default() };
    shape.services = std::iter::once(incumbent::demo_service()).chain(ARENAS.map(probe)).collect();
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    assert_ordinary(stage, true)?;

    upgrade(stage, NEW, &[])?;
    assert_ordinary(stage, false)?;
    assert_pieces(&stage.guest())?;

    let guest = stage.guest();
    let (name, bytes, more) = ARENAS[2];
    let refused = guest.command(&["baton", "release", name]).run()?;
    assert!(!refused.success() && String::from_utf8_lossy(&refused.stderr).contains("is connected"), "{refused:?}");
    let script = format!(
        "for p in $(pidof arena-probe); do tr '\\0' '\\n' < /proc/$p/cmdline | grep -qx {name} && kill $p; done; \
         while pidof arena-probe | grep -q ' .* '; do sleep 0.1; done"
    );
    guest.check(&["sh", "-c", &script])?;
    let before = free_memory(&guest)?;
    let said = guest.check(&["baton", "release", name])?;
    assert!(said.contains("released"), "{said}");
    let gained = free_memory(&guest)?.saturating_sub(before);
    assert!(gained + 16 * MIB >= bytes + more, "{} MiB came back of {}", gained / MIB, (bytes + more) / MIB);
    assert!(!stage.status()?.services.iter().any(|service| service.name == name));
    Ok(())
}
