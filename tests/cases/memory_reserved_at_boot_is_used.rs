//! Memory that was reserved for a successor on the incumbent's command line (`memmap=SIZE$ADDRESS`) is where the successor goes: an
//! operator who cannot rely on free memory sets it aside, and says in the configuration (`update.reserved`) whom it is for.

use agent::daemon::config::Update;
use anyhow::Result;
use baton_tests::{NEW, OLD, console, open, open_with, snapshot, upgrade};
use demos::story::stage::Shape;
use kexec_core::memory_map::Range;
use kexec_core::memory_map::iomem::{parse_iomem, system_ram};
use serde_json::json;

/// Four whole memory blocks, away from where this kernel was put and from the end of low memory.
const RESERVED: &str = "512M$0x30000000";
const REGION: &str = "region=0x30000000-0x4fffffff";

#[test]
fn the_successor_goes_into_memory_that_was_reserved_for_it() -> Result<()> {
    let reserved = vec![RESERVED.to_owned().try_into().map_err(anyhow::Error::msg)?];
    let update = Update { reserved, ..Update::default() };
    let shape = Shape { cmdline: format!("memmap={RESERVED}"), update, ..Shape::default() };
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let before = snapshot::of(stage)?;
    let from = stage.machine.serial(0).position();
    upgrade(stage, NEW, &[])?;
    let said = stage.machine.serial(0).text_from(from);
    let line = said.lines().find(|line| line.contains("memory for the successor")).unwrap_or("no such line");
    assert!(line.contains(REGION), "{line}");
    // What was reserved is ordinary memory now.
    let after = snapshot::of(stage)?;
    assert!(
        after.mem_total_kib >= before.mem_total_kib + (500 << 10),
        "{} KiB before, {} KiB after",
        before.mem_total_kib,
        after.mem_total_kib
    );
    assert_eq!(console::complaints(&stage.machine), [""; 0]);
    Ok(())
}

/// Persistent memory, what `mem=` leaves out, a reservation of another's, a low page: each is RAM to the firmware.
const OTHERS: &str = "mem=4608M memmap=256M!0x48000000 memmap=64M$0x60000000 memmap=4K$0x12000";
/// A word in each, by QEMU: at both ends, where a region or a block would begin or end.
const WORDS: [u64; 6] = [0x4800_0000, 0x57ff_fff8, 0x6000_0000, 0x63ff_fff8, 0x1_2000_0000, 0x1_3fff_fff8];

#[test]
fn memory_of_others_is_left_alone() -> Result<()> {
    let shape = Shape { cmdline: OTHERS.to_owned(), ..Shape::default() };
    let value = |at: u64| 0x5a5a_0000_0000_0000 | at;
    let loaded: Vec<String> = WORDS
        .iter()
        .flat_map(|&at| ["-device".to_owned(), format!("loader,addr={at:#x},data={:#x},data-len=8", value(at))])
        .collect();
    let loaded: Vec<&str> = loaded.iter().map(String::as_str).collect();
    let mut played = open_with(OLD, &shape, &loaded)?;
    let stage = &mut played.stage;
    let before = snapshot::of(stage)?;
    upgrade(stage, NEW, &[])?;
    let after = snapshot::of(stage)?;
    let percent = after.mem_total_kib * 100 / before.mem_total_kib;
    assert!((97..=103).contains(&percent), "{} KiB before, {} KiB after", before.mem_total_kib, after.mem_total_kib);

    let iomem = stage.guest().check(&["cat", "/proc/iomem"])?;
    let ram = system_ram(&parse_iomem(&iomem)?);
    let others =
        [(0x12000, 0x13000), (0x4800_0000, 0x5800_0000), (0x6000_0000, 0x6400_0000), (0x1_2000_0000, 0x1_4000_0000)];
    for (start, end) in others {
        assert!(
            !ram.overlaps(Range::new(start, end)),
            "{start:#x}-{end:#x} is another's, and the successor's RAM is {ram}"
        );
    }
    for at in WORDS {
        let command = json!({"command-line": format!("xp /1gx {at:#x}")});
        let word = stage.machine.qmp().execute("human-monitor-command", command)?.to_string();
        assert!(word.contains(&format!("{:#018x}", value(at))), "{at:#x} reads {word}");
    }
    assert_eq!(console::complaints(&stage.machine), [""; 0]);
    Ok(())
}
