//! What another kernel has handed over: read within bounds, then checked against the machine.

use std::collections::BTreeSet;

use state_schemas::checked::{Check, Received};
use state_schemas::handover_record::PhysRange;
use zerocopy::FromBytes;

use super::abi::Abi;
use super::error::{IncomingError, Overlap, ReadError, ScratchAlign};
use super::extents::Extents;
use super::memory::{Memory, PAGE};
use super::model::{Handed, Limits, Run, Subtree};
use super::v4::{self, SCRATCH_ALIGN, SCRATCH_LIMIT, Scratch, metadata, tree};

/// A handover that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Its version.
    pub abi: Abi,
    /// Its FDT.
    pub fdt: PhysRange,
    /// The pages of the tree: not preserved by it, and needed until it has been read.
    pub tree_nodes: Vec<u64>,
    /// What is preserved, ascending.
    pub preserved: Vec<Run>,
    /// Memory without content that counts.
    pub scratch: Vec<PhysRange>,
    /// Blobs.
    pub subtrees: Vec<Subtree>,
}

impl Incoming {
    /// Reads what lies in memory.
    ///
    /// # Errors
    /// It is not a handover of a version that we speak, or exceeds a limit.
    pub fn read(memory: &impl Memory, handed: Handed, limits: &Limits) -> Result<Received<Incoming>, ReadError> {
        let root = v4::fdt::read(memory, handed.fdt)?;
        let mut walked = tree::walk(memory, root.tree_root, limits)?;
        walked.runs.sort_unstable();
        Ok(Received::new(Incoming {
            abi: root.abi,
            fdt: PhysRange { start: handed.fdt.start, len: root.len },
            tree_nodes: walked.nodes,
            preserved: walked.runs,
            scratch: read_scratch(memory, handed.scratch)?,
            subtrees: root.subtrees,
        }))
    }

    /// Where the blob of this name is.
    pub fn subtree(&self, name: &str) -> Option<PhysRange> {
        self.subtrees.iter().find(|subtree| subtree.name == name).map(|subtree| subtree.blob)
    }

    /// The blob of this name; `None` if there is none.
    ///
    /// # Errors
    /// It is larger than allowed, or not in memory.
    pub fn blob(&self, memory: &impl Memory, name: &str, limits: &Limits) -> Result<Option<Vec<u8>>, ReadError> {
        let Some(blob) = self.subtree(name) else { return Ok(None) };
        if blob.len > limits.blob {
            return Err(ReadError::TooMany { what: "bytes of a blob", count: blob.len, limit: limits.blob });
        }
        let mut bytes = vec![0; blob.len as usize];
        memory.read(blob.start, &mut bytes).map_err(|missing| ReadError::Memory { what: "a blob", missing })?;
        Ok(Some(bytes))
    }

    /// Who was here before, if it says so.
    ///
    /// # Errors
    /// It says so in a way that we do not understand.
    pub fn metadata(&self, memory: &impl Memory, limits: &Limits) -> Result<Option<v4::metadata::Metadata>, ReadError> {
        let blob = self.blob(memory, metadata::NAME, limits)?;
        blob.map(|bytes| metadata::Metadata::from_bytes(&bytes)).transpose()
    }

    /// The order in which the page at this address is preserved, if one begins there: what `kho_restore_folio` finds.
    pub fn folio_at(&self, phys: u64) -> Option<u32> {
        let behind = self.preserved.partition_point(|run| run.start <= phys);
        let run = self.preserved[..behind].last()?;
        let inside = phys - run.start < run.range().len && (phys - run.start).is_multiple_of(PAGE << run.order);
        inside.then_some(run.order)
    }

    /// Bytes of all preserved pages.
    pub fn preserved_bytes(&self) -> u64 {
        self.preserved.iter().map(|run| run.range().len).sum()
    }
}

fn read_scratch(memory: &impl Memory, list: PhysRange) -> Result<Vec<PhysRange>, ReadError> {
    const WHAT: &str = "the scratch list";
    if list.len == 0 {
        return Ok(Vec::new());
    }
    let limit = (SCRATCH_LIMIT * size_of::<Scratch>()) as u64;
    if list.len > limit {
        return Err(ReadError::TooMany { what: "bytes of the scratch list", count: list.len, limit });
    }
    // The kernel divides and drops the remainder (kho_populate).
    let mut bytes = vec![0; list.len as usize / size_of::<Scratch>() * size_of::<Scratch>()];
    memory.read(list.start, &mut bytes).map_err(|missing| ReadError::Memory { what: WHAT, missing })?;
    let pieces = <[Scratch]>::ref_from_bytes(&bytes).unwrap_or(&[]);
    Ok(pieces.iter().map(|piece| PhysRange { start: piece.addr.get(), len: piece.size.get() }).collect())
}

/// What a handover is measured against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its memory.
    pub ram: Vec<PhysRange>,
}

impl Check for Incoming {
    type Against = Machine;
    type Error = IncomingError;

    fn check(&self, machine: &Machine) -> Result<(), IncomingError> {
        let ram = ram(machine);
        let in_ram = |what, range| match ram.covers(range) {
            true => Ok(()),
            false => Err(IncomingError::NotMemory { what, range }),
        };

        let mut scratch = Extents::default();
        for &range in &self.scratch {
            in_ram("scratch", range)?;
            if range.len == 0 || [range.start, range.len].iter().any(|number| !number.is_multiple_of(SCRATCH_ALIGN)) {
                return Err(ScratchAlign { range, align: SCRATCH_ALIGN }.into());
            }
            let overlap = |there| Overlap { what: "scratch", range, other: "scratch, too", there };
            scratch.insert(range).map_err(overlap)?;
        }

        let mut preserved = Extents::default();
        for run in &self.preserved {
            let (what, range) = ("preserved pages", run.range());
            in_ram(what, range)?;
            let overlap = |other, there| Overlap { what, range, other, there };
            if let Some(there) = scratch.overlapping(range) {
                return Err(overlap("scratch", there).into());
            }
            preserved.insert(range).map_err(|there| overlap("preserved in another order", there))?;
        }

        for &start in &self.tree_nodes {
            let (what, range) = ("a node of the tree of preserved pages", PhysRange { start, len: PAGE });
            in_ram(what, range)?;
            if let Some(there) = scratch.overlapping(range) {
                return Err(Overlap { what, range, other: "scratch", there }.into());
            }
        }

        let kept = |what, range| match preserved.covers(range) {
            true => Ok(()),
            false => Err(IncomingError::NotPreserved { what, range }),
        };
        kept("the handover's FDT", self.fdt)?;
        let mut names = BTreeSet::new();
        for Subtree { name, blob } in &self.subtrees {
            kept("a blob", *blob)?;
            if !names.insert(name) {
                return Err(IncomingError::NameTwice { name: name.clone() });
            }
        }
        Ok(())
    }
}

/// As one set; ranges that are no ranges, or that repeat, add nothing.
fn ram(machine: &Machine) -> Extents {
    let mut all: Vec<_> = machine.ram.iter().filter(|range| range.end().is_some() && range.len > 0).collect();
    all.sort();
    let mut set = Extents::default();
    for range in all {
        // A part that is there already would be refused as a whole: keep what is new of it.
        let from = set.overlapping(*range).map_or(range.start, |there| there.start + there.len);
        if let Some(len) = (range.start + range.len).checked_sub(from).filter(|len| *len > 0) {
            let _ = set.insert(PhysRange { start: from, len });
        }
    }
    set
}
