//! What is checked of a record before it is believed. Every record is converted to the newest version first, so that
//! these bounds are the only ones.

use std::collections::BTreeSet;

use thiserror::Error;

use super::record::{
    CARRIED_BYTES, CARRIED_LIMIT, FILE_LIMIT, FILE_NAME_LIMIT, HandoverRecord, ITEM_LIMIT, Kho, NAME_LIMIT, SEALS,
};
use crate::checked::Check;
use crate::control_block;
use crate::header::{FIRST_CARRIED_KIND, Frame, HeaderError};
use crate::v1::record::{Ip, IpNet, PhysRange};

/// Why a record is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A number is out of bounds.
    #[error("{what} is {value:#x}, allowed is {low:#x} to {high:#x}")]
    Bounds {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Smallest allowed.
        low: u64,
        /// Largest allowed.
        high: u64,
    },
    /// A range is empty, wraps, or is not aligned.
    #[error("{what} {start:#x}+{len:#x} is empty, unaligned or wraps around")]
    Range {
        /// Which range.
        what: &'static str,
        /// Its start.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// A range lies where it must not.
    #[error("{what} {start:#x}+{len:#x} lies outside the machine's RAM or upon another range")]
    Place {
        /// Which range.
        what: &'static str,
        /// Its start.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// The record belongs to another region.
    #[error("the record is for the region at {record:#x}, it was found in the one at {found:#x}")]
    Region {
        /// Region in the record.
        record: u64,
        /// Region it was read from.
        found: u64,
    },
    /// Two things have one number, or a number names nothing.
    #[error("{what} {number} is named twice or not at all")]
    Name {
        /// What the number is of.
        what: &'static str,
        /// The number.
        number: u32,
    },
    /// Two things have one name.
    #[error("there are two of {what} {name}")]
    Twice {
        /// What has the name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A text is empty, too long, or not printable.
    #[error("{what} of {len} bytes: 1 to {most} printable characters are allowed")]
    Text {
        /// Which text.
        what: &'static str,
        /// Its length.
        len: usize,
        /// Most allowed.
        most: usize,
    },
    /// What is to be carried through is no frame.
    #[error("carried frame {index} is not whole")]
    Carried {
        /// Which one.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: HeaderError,
    },
    /// What is to be carried through is more or less than one frame, or one that has a place of its own.
    #[error(
        "carried frame {index} has {frame} of {len} bytes and is of kind {kind}; kinds from {FIRST_CARRIED_KIND} on are carried"
    )]
    NotForeign {
        /// Which one.
        index: usize,
        /// Its kind.
        kind: u16,
        /// Bytes of the frame.
        frame: usize,
        /// Bytes there are.
        len: usize,
    },
}

const PAGE: u64 = 4096;

fn bounds(what: &'static str, value: u64, low: u64, high: u64) -> Result<(), RecordError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(RecordError::Bounds { what, value, low, high })
}

fn text(what: &'static str, text: &str, most: usize) -> Result<(), RecordError> {
    if (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Ok(());
    }
    Err(RecordError::Text { what, len: text.len(), most })
}

fn name(what: &'static str, name: &str) -> Result<(), RecordError> {
    text(what, name, NAME_LIMIT)
}

fn range(what: &'static str, range: PhysRange, align: u64) -> Result<(), RecordError> {
    let PhysRange { start, len } = range;
    let aligned = start.is_multiple_of(align) && len.is_multiple_of(align);
    if len == 0 || !aligned || range.end().is_none() {
        return Err(RecordError::Range { what, start, len });
    }
    Ok(())
}

fn prefix(net: Option<IpNet>) -> Result<(), RecordError> {
    match net {
        None => Ok(()),
        Some(net) => {
            let bits = match net.address {
                Ip::V4(_) => 32,
                Ip::V6(_) => 128,
            };
            bounds("network prefix", net.prefix.into(), 0, bits)
        }
    }
}

impl Check for HandoverRecord {
    /// The region that the record was read from.
    type Against = PhysRange;
    type Error = RecordError;

    fn check(&self, region: &PhysRange) -> Result<(), RecordError> {
        self.check_numbers()?;
        if self.grant.region != *region {
            return Err(RecordError::Region { record: self.grant.region.start, found: region.start });
        }
        self.check_memory()?;
        self.check_names()?;
        self.check_files()?;
        self.kho.as_ref().map_or(Ok(()), |kho| check_kho(kho, *region))?;
        self.check_carried()
    }
}

impl HandoverRecord {
    fn check_numbers(&self) -> Result<(), RecordError> {
        bounds("hop", self.hop.into(), 1, u32::MAX.into())?;
        // Room for every epoch that an update and its rollback may use.
        bounds("epoch", self.epoch, 0, u64::MAX - 4)?;
        // 1 MHz to 100 GHz.
        bounds("tsc_khz", self.clock.tsc_khz, 1_000, 100_000_000)?;
        let block = self.machine.memory_block;
        bounds("memory block", block, 2 << 20, 1 << 40)?;
        bounds("bits set in memory block", block.count_ones().into(), 1, 1)?;
        for (what, count, least) in [
            ("ram ranges", self.machine.ram.len(), 1),
            ("cpus", self.machine.cpus.len(), 1),
            ("fragments", self.grant.fragments.len(), 0),
            ("blocks", self.grant.blocks.len(), 0),
            ("arenas", self.arenas.len(), 0),
            ("services", self.services.len(), 0),
            ("functions", self.network.functions.len(), 0),
            ("retired instances", self.retired.len(), 0),
            ("journal marks", self.journal.len(), 0),
        ] {
            bounds(what, count as u64, least, ITEM_LIMIT)?;
        }
        bounds("files", self.files.len() as u64, 0, FILE_LIMIT)?;
        bounds("carried frames", self.carried.len() as u64, 0, CARRIED_LIMIT)?;
        prefix(self.network.service)?;
        prefix(self.network.management)?;
        name("incumbent release", &self.incumbent.release)?;
        name("agent version", &self.incumbent.agent_version)?;
        self.journal.iter().try_for_each(|mark| name("phase name", &mark.phase))
    }

    fn check_memory(&self) -> Result<(), RecordError> {
        let mut before = 0;
        for &ram in &self.machine.ram {
            range("ram", ram, 1)?;
            if ram.start < before {
                let PhysRange { start, len } = ram;
                let what = "ram";
                return Err(RecordError::Place { what, start, len });
            }
            before = ram.start + ram.len;
        }
        let block = self.machine.memory_block;
        let mut owned = vec![("region", self.grant.region, 2 << 20)];
        owned.push(("low slot", self.grant.low_slot, PAGE));
        owned.extend(self.grant.fragments.iter().map(|&r| ("fragment", r, PAGE)));
        owned.extend(self.grant.blocks.iter().map(|&r| ("block", r, block)));
        let in_ram = |piece: PhysRange| self.machine.ram.iter().any(|ram| ram.contains(piece));
        for &(what, piece, align) in &owned {
            range(what, piece, align)?;
            if !in_ram(piece) {
                let PhysRange { start, len } = piece;
                return Err(RecordError::Place { what, start, len });
            }
        }
        no_overlap(owned.iter().map(|&(what, piece, _)| (what, piece)).collect())?;
        let mut arenas = Vec::new();
        for arena in &self.arenas {
            bounds("arena pieces", arena.ranges.len() as u64, 1, ITEM_LIMIT)?;
            let mut size = 0u64;
            for &piece in &arena.ranges {
                let what = "arena";
                range(what, piece, PAGE)?;
                // An arena must be memory that the successor knows and leaves alone.
                if !self.grant.fragments.iter().any(|f| f.contains(piece)) {
                    let PhysRange { start, len } = piece;
                    return Err(RecordError::Place { what, start, len });
                }
                size = size.saturating_add(piece.len);
                arenas.push((what, piece));
            }
            bounds("arena length", arena.len, PAGE, size)?;
        }
        no_overlap(arenas)?;
        if let Some(ecam) = self.ecam {
            // One bus has 1 MiB of it (PCI Express base specification, 7.2.2); it is a device's, not RAM.
            let what = "PCI configuration space";
            let space = PhysRange { start: ecam.address, len: (u64::from(ecam.bus_end) + 1) << 20 };
            range(what, space, 1 << 20)?;
            no_overlap(self.machine.ram.iter().map(|&ram| ("ram", ram)).chain([(what, space)]).collect())?;
        }
        self.retired.iter().try_for_each(|retired| range("retired memory", retired.memory, PAGE))
    }

    fn check_names(&self) -> Result<(), RecordError> {
        let cpus = || self.machine.cpus.iter().map(|cpu| cpu.apic_id);
        unique("cpu", cpus())?;
        let number = self.grant.boot_cpu;
        if !cpus().any(|id| id == number) {
            let what = "boot cpu";
            return Err(RecordError::Name { what, number });
        }
        unique("arena", self.arenas.iter().map(|arena| arena.id))?;
        // What a service or a file keeps is its own.
        let kept = self.services.iter().flat_map(|service| service.arenas.iter().copied());
        let kept: Vec<u32> = kept.chain(self.files.iter().map(|file| file.arena)).collect();
        let arenas: BTreeSet<u32> = self.arenas.iter().map(|arena| arena.id).collect();
        if let Some(&number) = kept.iter().find(|&id| !arenas.contains(id)) {
            return Err(RecordError::Name { what: "arena of a service or file", number });
        }
        unique("arena of a service or file", kept.into_iter())?;
        self.arenas.iter().try_for_each(|arena| name("arena name", &arena.name))?;
        let mut names = BTreeSet::new();
        for service in &self.services {
            name("service name", &service.name)?;
            if !names.insert(&service.name) {
                return Err(RecordError::Twice { what: "service", name: service.name.clone() });
            }
        }
        Ok(())
    }

    /// After the names: every file has its arena.
    fn check_files(&self) -> Result<(), RecordError> {
        for file in &self.files {
            name("service name of a file", &file.service)?;
            text("file name", &file.name, FILE_NAME_LIMIT)?;
            bounds("file seals", file.seals.into(), 0, SEALS.into())?;
            let arena = self.arenas.iter().find(|arena| arena.id == file.arena);
            bounds("file length", file.len, 0, arena.map_or(0, |arena| arena.len))?;
        }
        Ok(())
    }

    fn check_carried(&self) -> Result<(), RecordError> {
        let total = self.carried.iter().map(|frame| frame.len() as u64).sum();
        bounds("bytes in carried frames", total, 0, CARRIED_BYTES)?;
        for (index, bytes) in self.carried.iter().enumerate() {
            let carried = |source| RecordError::Carried { index, source };
            let (frame, length) = (Frame::read(bytes).map_err(carried)?, Frame::length(bytes).map_err(carried)?);
            if length != bytes.len() || frame.kind < FIRST_CARRIED_KIND {
                return Err(RecordError::NotForeign { index, kind: frame.kind, frame: length, len: bytes.len() });
            }
        }
        Ok(())
    }
}

fn check_kho(kho: &Kho, region: PhysRange) -> Result<(), RecordError> {
    name("KHO format", &kho.abi)?;
    range("KHO room", kho.room, PAGE)?;
    // `region` is a range and has a control block: both were checked.
    let behind =
        PhysRange { start: region.start + control_block::SIZE, len: region.len.saturating_sub(control_block::SIZE) };
    for (what, piece, within, align) in [
        ("KHO room", kho.room, behind, PAGE),
        ("KHO device tree", kho.fdt, kho.room, 1),
        ("KHO scratch list", kho.scratch, kho.room, 8),
    ] {
        range(what, piece, align)?;
        if !within.contains(piece) {
            let PhysRange { start, len } = piece;
            return Err(RecordError::Place { what, start, len });
        }
    }
    no_overlap(vec![("KHO device tree", kho.fdt), ("KHO scratch list", kho.scratch)])
}

fn unique(what: &'static str, mut numbers: impl Iterator<Item = u32>) -> Result<(), RecordError> {
    let mut seen = BTreeSet::new();
    match numbers.find(|&number| !seen.insert(number)) {
        Some(number) => Err(RecordError::Name { what, number }),
        None => Ok(()),
    }
}

fn no_overlap(mut pieces: Vec<(&'static str, PhysRange)>) -> Result<(), RecordError> {
    pieces.sort_by_key(|&(_, piece)| piece);
    for pair in pieces.windows(2) {
        let (what, piece) = pair[1];
        if pair[0].1.start + pair[0].1.len > piece.start {
            let PhysRange { start, len } = piece;
            return Err(RecordError::Place { what, start, len });
        }
    }
    Ok(())
}
