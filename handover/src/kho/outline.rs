//! What the root FDT alone says: for showing it to a human where the memory behind it cannot be read, such as the copy that a
//! kernel keeps in debugfs.

use state_schemas::checked::Received;
use state_schemas::handover_record::PhysRange;

use super::memory::Segments;
use super::{Abi, ReadError, Subtree, v4};

/// A root FDT's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// Its version.
    pub abi: Abi,
    /// Its bytes.
    pub len: u64,
    /// Physical address of the tree of preserved pages.
    pub tree_root: u64,
    /// The blobs that it names.
    pub subtrees: Vec<Subtree>,
}

impl Outline {
    /// Reads an FDT.
    ///
    /// # Errors
    /// It is not a device tree, or not of a version that we speak.
    pub fn read(fdt: &[u8]) -> Result<Received<Outline>, ReadError> {
        let range = PhysRange { start: 0, len: fdt.len() as u64 };
        let v4::fdt::Root { abi, len, tree_root, subtrees } =
            v4::fdt::read(&Segments::new([(0, fdt.to_vec())]), range)?;
        Ok(Received::new(Outline { abi, len, tree_root, subtrees }))
    }
}
