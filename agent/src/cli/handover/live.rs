//! What lies in this machine's memory now: the control block of this kernel's own birth, or of the successor that an update
//! is starting, and the arenas' first pages. Read-only, through the module; batond need not answer.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use kexec_core::cmdline::control_block_of;
use kexec_core::device::{Access, Device};
use kexec_core::memory_map::Range;
use state_schemas::Payload;
use state_schemas::arena::HEADER_LEN;
use state_schemas::control_block::{self, HANDOVER};
use state_schemas::latest::handover_record::HandoverRecord;
use state_schemas::shared::SharedMemory;

use super::show::{self, INPUT_LIMIT, Piece};
use crate::daemon::outcome::Failure;
use crate::machine::hardware;
use crate::takeover::birth::phys;
use crate::userland::kernels;

/// Where the kernel shows what it was handed through KHO (kernel/liveupdate/kexec_handover_debugfs.c).
const KHO: &str = "/sys/kernel/debug/kho";

/// All there is.
pub fn pieces() -> Result<Vec<Piece>> {
    let cmdline = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    let own = control_block_of(&cmdline).map(|base| ("this kernel's control block", base));
    let begun = kernels::others(&hardware::Live)?.first().and_then(|row| Some(row.region()?.start()));
    let blocks: Vec<(&str, u64)> =
        own.into_iter().chain(begun.map(|base| ("the successor's control block", base))).collect();
    let mut pieces = kho(Path::new(KHO));
    if blocks.is_empty() && pieces.is_empty() {
        return Err(Failure::precondition(
            "the firmware booted this kernel, and no update is under way: nothing is handed over here",
            "ask on a kernel that took over, or name a file",
        )
        .into());
    }
    if !blocks.is_empty() {
        let device = Device::open()?;
        for (what, base) in blocks {
            let block =
                Range::with_len(base, control_block::SIZE).context("the control block passes the end of memory")?;
            let bytes = copy(&device, block)?;
            let at = format!("{what}, {base:#x}");
            match show::pieces(&at, &bytes, bytes.len() as u64) {
                Ok(shown) => pieces.extend(shown),
                Err(error) => pieces.push(Piece {
                    format: "control block".to_owned(),
                    at: at.clone(),
                    value: serde_json::Value::Null,
                    problem: Some(error.to_string()),
                }),
            }
            let frame = bytes.get(HANDOVER.offset as usize..).unwrap_or_default();
            if let Ok(received) = HandoverRecord::from_frame(frame) {
                let record = received.alleged();
                pieces.extend(arenas(&device, record));
                pieces.extend(kho_of_region(&device, base, record));
            }
        }
    }
    Ok(pieces)
}

fn copy(device: &Device, range: Range) -> Result<Vec<u8>> {
    let memory = device.map(range, Access::ReadOnly)?;
    let mut bytes = vec![0; usize::try_from(range.len())?];
    memory.read(0, &mut bytes);
    Ok(bytes)
}

/// What the kernel says that it was handed (`in`), and what it would hand to a kernel that it starts itself (`out`).
fn kho(folder: &Path) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for way in ["in", "out"] {
        let folder = folder.join(way);
        if let Some((at, bytes)) = content(&folder.join("fdt")) {
            pieces.push(show::device_tree(&at, &bytes));
        }
        let Ok(blobs) = fs::read_dir(folder.join("sub_fdts")) else { continue };
        let mut paths: Vec<_> = blobs.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            pieces.extend(content(&path).map(|(at, bytes)| show::blob(&name, &at, &bytes)));
        }
    }
    pieces
}

fn content(path: &Path) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(INPUT_LIMIT).read_to_end(&mut bytes).ok()?;
    Some((path.display().to_string(), bytes))
}

/// The first page of each arena that the record names and that this kernel may look at.
fn arenas(device: &Device, record: &HandoverRecord) -> Vec<Piece> {
    let first_pages = record.arenas.iter().filter_map(|arena| Some((arena, *arena.ranges.first()?)));
    first_pages
        .filter_map(|(arena, piece)| {
            let page = Range::with_len(piece.start, HEADER_LEN)?;
            let at = format!("arena {} {:?}, {:#x}", arena.id, arena.name, piece.start);
            let shown = copy(device, page).map(|bytes| show::pieces(&at, &bytes, arena.len));
            match shown {
                Ok(Ok(shown)) => Some(shown.into_iter().next()?),
                // A memory file, or a service with a form of its own.
                Ok(Err(_)) => Some(raw(at, "of a form that is not Baton's")),
                Err(error) => Some(raw(at, &format!("not readable here: {error:#}"))),
            }
        })
        .collect()
}

/// KHO's structures of a successor that does not run yet or not long: its region is still a memory object of this kernel's module.
/// To the successor itself the region is RAM like any other, which no program may look into; there debugfs shows what it does.
fn kho_of_region(device: &Device, base: u64, record: &HandoverRecord) -> Option<Piece> {
    let kho = record.kho.as_ref()?;
    let region = Range::with_len(base, record.grant.region.len)?;
    let mapping = device.map(region, Access::ReadOnly).ok()?;
    Some(super::kho::piece(&super::kho::Region { range: phys(region), mapping }, record, kho))
}

fn raw(at: String, what: &str) -> Piece {
    Piece { format: "arena".to_owned(), at, value: what.into(), problem: None }
}
