//! `liar LIE`: runs on the incumbent while an update boots its successor, and changes what the two kernels tell each other, as a kernel
//! could that went mad: there is no isolation between them. It needs nothing of the product but what any root has, the device.
//!
//! It waits until the successor's memory is filled and nobody has read it yet, tells its lie, and says so on stdout. What it changed
//! in memory that outlives the update, it changes back when the update is over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::userland::kernels::{INSTANCES, Instance, parse_instances};
use anyhow::{Context, Result, bail, ensure};
use handover::channel::{Channel, Side};
use kexec_core::device::{Access, Device, Mapping};
use kexec_core::memory_map::Range;
use kexec_core::registry::State;
use state_schemas::control_block::{self, HANDOVER, RING_TO_INCUMBENT, RING_TO_SUCCESSOR, words};
use state_schemas::handover_record::{HandoverRecord, PhysRange};
use state_schemas::header::{Frame, HEADER_LEN, Kind};
use state_schemas::message::ToIncumbent;
use state_schemas::shared::SharedMemory;
use state_schemas::{Payload, arena};

/// A check and the making of an initrd come before the successor's memory.
const PATIENCE: Duration = Duration::from_secs(200);
/// How often `/proc/multikernel` is looked at: a successor takes seconds to come to its agent, and nothing tells of its states.
const LOOK: Duration = Duration::from_millis(5);

fn main() -> Result<()> {
    let lie = std::env::args().nth(1).context("which lie?")?;
    let successor = wait_for(|row| row.is_some_and(|row| row.state == State::Booting))?.context("it is gone again")?;
    let device = Device::open()?;
    let region = successor.region().with_context(|| format!("no region in {:?}", successor.ranges))?;
    let block = Range::with_len(region.start(), control_block::SIZE).context("no control block fits")?;
    let control = Arc::new(device.map(block, Access::ReadWrite)?);
    ensure!(control.load(words::MAGIC_AT) == words::MAGIC, "no control block at {block}");
    ensure!(control.load(words::BOOT_MARK_AT) == 0, "too late: the successor's agent runs already");

    let mut undo = None;
    match lie.as_str() {
        "control-magic" => control.store(words::MAGIC_AT, !words::MAGIC),
        "control-version" => control.store(words::VERSION_AT, u64::from(words::VERSION) + 1),
        "record-bit" => {
            let at = HANDOVER.offset + HEADER_LEN as u64 + 40;
            let mut byte = [0];
            control.read(at, &mut byte);
            control.write(at, &[byte[0] ^ 1]);
        }
        "record-version" => {
            let bytes = record_frame(&control);
            let future = Frame { version: 999, ..Frame::read(&bytes)? }.to_bytes();
            control.write(HANDOVER.offset, &future);
        }
        "record-count" => {
            // The first counted thing is the incumbent's release: 2^63 letters of it.
            let bytes = record_frame(&control);
            let frame = Frame::read(&bytes)?;
            let mut payload = frame.payload.to_vec();
            payload[16 + 4 + 8..][..8].copy_from_slice(&(1u64 << 63).to_le_bytes());
            control.write(HANDOVER.offset, &Frame { payload: &payload, ..frame }.to_bytes());
        }
        "record-arena-outside" => {
            rewrite(&control, |record| record.arenas[0].ranges = vec![PhysRange { start: 0, len: 1 << 40 }])?;
        }
        "record-overlap" => rewrite(&control, |record| record.grant.fragments.push(record.grant.region))?,
        // What the incumbent reads.
        "ring-counts" => control.store(RING_TO_INCUMBENT.offset, u64::MAX),
        "ring-crc" => {
            Channel::attach(control.clone(), Side::Successor)?.send(&ToIncumbent::Healthy)?;
            // Its last byte before the padding.
            control.write(RING_TO_INCUMBENT.offset + 0x100 + 16 + HEADER_LEN as u64 + 3, &[0xff]);
        }
        "ring-message" => {
            let rubbish = Frame { kind: Kind::ToIncumbent as u16, version: 1, payload: &[0xee; 40] }.to_bytes();
            Channel::attach(control.clone(), Side::Successor)?.send_bytes(&rubbish)?;
        }
        // What it reads of the other ring: how far the successor has taken.
        "ring-tail" => control.store(RING_TO_SUCCESSOR.offset + 0x80, 8),
        "arena-magic" => undo = Some(overwrite(&device, &control, 0, u64::from_le_bytes(*b"NOARENA\0"))?),
        "arena-version" => undo = Some(overwrite(&device, &control, 8, 4096 << 32 | 77)?),
        "arena-length" => undo = Some(overwrite(&device, &control, 16, u64::MAX)?),
        other => bail!("no lie is called {other:?}"),
    }
    println!("lied: {lie}");
    // While it is mapped, the incumbent could not give it back.
    drop(control);
    if let Some((page, at, truth)) = undo {
        wait_for(|row| row.is_none())?;
        page.store(at, truth);
        println!("took it back");
    }
    Ok(())
}

/// Waits for the successor to be so; gives it.
fn wait_for(so: impl Fn(Option<&Instance>) -> bool) -> Result<Option<Instance>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = std::fs::read_to_string(INSTANCES)?;
        let rows = parse_instances(&text).with_context(|| format!("{INSTANCES} reads {text:?}"))?;
        let successor = rows.into_iter().find(|row| row.name == "successor");
        if so(successor.as_ref()) {
            return Ok(successor);
        }
        ensure!(Instant::now() < deadline, "the successor is {successor:?} after {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
}

fn record_frame(control: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; HANDOVER.size as usize];
    control.read(HANDOVER.offset, &mut bytes);
    bytes
}

/// A record that is whole, and absurd.
fn rewrite(control: &Mapping, lie: impl FnOnce(&mut HandoverRecord)) -> Result<()> {
    let mut record = HandoverRecord::from_frame(&record_frame(control))?.alleged().clone();
    lie(&mut record);
    control.write(HANDOVER.offset, &record.to_frame(HandoverRecord::VERSION)?);
    Ok(())
}

/// Changes a word of the first arena's first page; what it takes to change it back.
fn overwrite(device: &Device, control: &Mapping, at: u64, word: u64) -> Result<(Mapping, u64, u64)> {
    let record = HandoverRecord::from_frame(&record_frame(control))?.alleged().clone();
    let piece = *record.arenas.first().and_then(|arena| arena.ranges.first()).context("no arena crosses")?;
    let page = Range::with_len(piece.start, arena::HEADER_LEN).context("the arena passes the end of memory")?;
    let page = device.map(page, Access::ReadWrite)?;
    ensure!(page.load(0) == u64::from_le_bytes(arena::MAGIC), "no arena at {:#x}", piece.start);
    let truth = page.load(at);
    page.store(at, word);
    Ok((page, at, truth))
}
