//! Reads the log of a kernel out of a dump of its memory, as QEMU's `pmemsave 0 SIZE FILE` writes it:
//!
//! `cargo run -p kexec-core --example klog -- DUMP [MARK] [--keep FILE]`
//!
//! `--keep` writes the pages that were looked at: what `tests/klog.rs` reads is made this way, and then compressed by zstd.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::process::ExitCode;

use kexec_core::klog::{FoundBy, KernelLog, LogTail, PhysicalMemory};
use kexec_core::layout::PAGE;
use kexec_core::memory_map::Range;

/// A dump that begins at address 0, and which of its pages were read, but for the two searches through all memory: those
/// read either a few bytes of each page, or many pages at once.
struct Dump {
    bytes: Vec<u8>,
    read: RefCell<BTreeSet<u64>>,
}

impl PhysicalMemory for Dump {
    fn ranges(&self) -> Vec<Range> {
        vec![Range::new(0, self.bytes.len() as u64)]
    }

    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let part = usize::try_from(address).ok().and_then(|at| self.bytes.get(at..)?.get(..into.len()));
        let Some(part) = part else { return false };
        into.copy_from_slice(part);
        if into.len() != 10 && into.len() as u64 <= PAGE {
            let last = address + into.len() as u64 - 1;
            self.read.borrow_mut().extend((address / PAGE..=last / PAGE).map(|page| page * PAGE));
        }
        true
    }
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let keep = arguments.iter().position(|word| word == "--keep").map(|at| {
        let file = arguments.remove(at + 1);
        arguments.remove(at);
        file
    });
    let bytes = std::fs::read(&arguments[0]).expect("the dump");
    let dump = Dump { bytes, read: RefCell::default() };
    let log = match KernelLog::find(&dump, arguments.get(1).map(String::as_str)) {
        Ok(log) => log,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::FAILURE;
        }
    };
    if log.found_by() == FoundBy::Search {
        // Also where it was not.
        dump.read.borrow_mut().clear();
    }
    let records = log.read(&dump, None, usize::MAX);
    for record in &records {
        println!("{record}");
    }
    let tail = LogTail::of(&records, 30);
    eprintln!("found by {:?}, release {:?}, {} records: {tail}", log.found_by(), log.release(), records.len());
    if let Some(file) = keep {
        let pages = dump.read.borrow();
        let head = [dump.bytes.len() as u64, pages.len() as u64];
        let mut kept: Vec<u8> = head.iter().chain(pages.iter()).flat_map(|word| word.to_le_bytes()).collect();
        for page in pages.iter() {
            kept.extend(&dump.bytes[*page as usize..][..PAGE as usize]);
        }
        std::fs::write(file, kept).expect("the pages");
    }
    ExitCode::SUCCESS
}
