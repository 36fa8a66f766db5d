//! Memory that was reserved for a successor on the incumbent's command line (`memmap=SIZE$ADDRESS`) is where the successor goes: an
//! operator who cannot rely on free memory sets it aside, and says in the configuration (`update.reserved`) whom it is for.

use agent::daemon::config::Update;
use anyhow::Result;
use baton_tests::{NEW, OLD, console, open, snapshot, upgrade};
use demos::story::stage::Shape;

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
