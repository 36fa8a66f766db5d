//! The emulator that every other whole-machine test trusts: a busy machine goes on while BARs come and go, which every PCI scan of a successor
//! makes them do. QEMU 10.0.13 fails here within seconds: its TLB entries name a device's memory by an index into a table (`iotlb_to_section`,
//! system/physmem.c) that another CPU's change of the memory map replaces before the entries are flushed, so that writes to an APIC
//! or a doorbell go to another device: interfaces stop sending, timers never fire. It is why the lab takes a later one.

use std::time::Duration;

use anyhow::Result;
use baton_tests::clients::Clients;
use baton_tests::{OLD, open_with};
use demos::story::stage::Shape;

/// A device that no driver wants, with memory to map.
const DEVICE: [&str; 2] = ["-device", "pci-testdev,bus=pcie.0,addr=0x6,membar=1M"];
/// `COMMAND` (offset 4) without memory decoding, then with it: each a change of the memory map.
const FLAP: &str = "d=/sys/bus/pci/devices/0000:00:06.0/config; n=0; while [ $n -lt 200 ]; do \
    printf '\\000\\000' | dd of=$d bs=2 seek=2 conv=notrunc 2>/dev/null; \
    printf '\\002\\000' | dd of=$d bs=2 seek=2 conv=notrunc 2>/dev/null; n=$((n + 1)); done; od -An -tx1 -j4 -N1 $d";

#[test]
fn a_busy_machine_goes_on_while_bars_come_and_go() -> Result<()> {
    let played = open_with(OLD, &Shape::default(), &DEVICE)?;
    let clients = Clients::start(&played.stage, 200)?;
    let decoding = played.stage.guest().command(&["sh", "-c", FLAP]).timeout(Duration::from_secs(180)).check();
    let decoding = decoding.map_err(|why| anyhow::anyhow!("{why}\n{}", played.stage.machine.logs(60)))?;
    assert_eq!(decoding.trim(), "02", "the last write arrived");
    clients.await_more(50).unwrap_or_else(|why| panic!("{why}\n{}", played.stage.machine.logs(60)));
    let report = clients.finish()?;
    assert_eq!(report.lost, 0, "{report:?}");
    Ok(())
}
