//! The root FDT, by `dtoolkit`, whose API changes with each release: nobody else in this crate calls it.
//!
//! Not a device tree by its content: numbers are stored as the kernel's `u64`, little-endian, at 4-byte alignment
//! (`kho_add_subtree` hands libfdt the address of a variable).

use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node, Property};
use state_schemas::handover_record::PhysRange;
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::U32;

use super::FDT_LIMIT;
use crate::kho::abi::{Abi, SPOKEN};
use crate::kho::error::{OutgoingError, ReadError};
use crate::kho::memory::Memory;
use crate::kho::model::Subtree;

/// `KHO_FDT_MEMORY_MAP_PROP_NAME`
const MEMORY_MAP: &str = "preserved-memory-map";
/// `KHO_SUB_TREE_PROP_NAME`
const BLOB: &str = "preserved-data";
/// `KHO_SUB_TREE_SIZE_PROP_NAME`
const BLOB_SIZE: &str = "blob-size";
/// `struct fdt_header`
const HEADER: usize = 40;

/// A blob's name: what libfdt finds by plain comparison. An `@` would make it match other names, too.
pub fn name_is_good(name: &str) -> bool {
    (1..=31).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b",._+-".contains(&byte))
}

/// The bytes of the FDT.
pub(crate) fn write(abi: Abi, tree_root: u64, subtrees: &[Subtree]) -> Result<Vec<u8>, OutgoingError> {
    let mut tree = DeviceTree::new();
    tree.root.add_property(property("compatible", [abi.compatible().as_bytes(), b"\0"].concat()));
    tree.root.add_property(number(MEMORY_MAP, tree_root));
    for Subtree { name, blob } in subtrees {
        let mut node = DeviceTreeNode::new(name.as_str()).map_err(|_| OutgoingError::Name { name: name.clone() })?;
        node.add_property(number(BLOB, blob.start));
        node.add_property(number(BLOB_SIZE, blob.len));
        tree.root.add_child(node);
    }
    let bytes = tree.to_dtb();
    if bytes.len() as u64 > FDT_LIMIT {
        return Err(OutgoingError::FdtFull { count: subtrees.len(), len: bytes.len(), limit: FDT_LIMIT });
    }
    Ok(bytes)
}

fn property(name: &str, value: Vec<u8>) -> DeviceTreeProperty {
    DeviceTreeProperty::new_unchecked(name, value)
}

fn number(name: &str, value: u64) -> DeviceTreeProperty {
    property(name, value.to_le_bytes().to_vec())
}

/// What an FDT says.
pub(crate) struct Root {
    pub(crate) abi: Abi,
    /// Bytes of the FDT itself.
    pub(crate) len: u64,
    pub(crate) tree_root: u64,
    pub(crate) subtrees: Vec<Subtree>,
}

/// Reads it; `at` is where it is and how much of that may be looked at.
pub(crate) fn read(memory: &impl Memory, at: PhysRange) -> Result<Root, ReadError> {
    let bad = |reason: String| ReadError::Fdt { phys: at.start, reason };
    let room = at.len.min(FDT_LIMIT) as usize;
    if room < HEADER {
        return Err(bad(format!("{} bytes are too few for one", at.len)));
    }
    let mut bytes = vec![0; room];
    memory.read(at.start, &mut bytes).map_err(|missing| ReadError::Memory { what: "the handover's FDT", missing })?;
    // `totalsize`: how much of the page belongs to it.
    let stated = U32::read_from_bytes(&bytes[4..8]).map_or(0, |stated| stated.get() as usize);
    if !(HEADER..=room).contains(&stated) {
        return Err(bad(format!("it states {stated} bytes of {room}")));
    }
    let fdt = Fdt::new(&bytes[..stated]).map_err(|error| bad(error.to_string()))?;
    let root = fdt.root();

    let compatible = root.property("compatible").map(|found| found.value().to_vec()).unwrap_or_default();
    let abi = compatible
        .split(|byte| *byte == 0)
        .filter_map(|name| Abi::from_compatible(std::str::from_utf8(name).ok()?))
        .next()
        .ok_or_else(|| ReadError::Version {
            found: String::from_utf8_lossy(&compatible[..compatible.len().min(64)]).trim_end_matches('\0').to_owned(),
            spoken: SPOKEN.iter().map(|abi| abi.compatible()).collect::<Vec<_>>().join(", "),
        })?;
    let tree_root = read_number(&root, "/", MEMORY_MAP)?;
    let mut subtrees = Vec::new();
    for node in root.children() {
        let name = node.name().to_owned();
        // As the kernel: a node without a blob is not one of ours, and is passed over (kho_in_debugfs_init).
        if node.property(BLOB).is_some() {
            let start = read_number(&node, &name, BLOB)?;
            let len = read_number(&node, &name, BLOB_SIZE)?;
            subtrees.push(Subtree { name, blob: PhysRange { start, len } });
        }
    }
    Ok(Root { abi, len: stated as u64, tree_root, subtrees })
}

fn read_number(node: &impl Node, name: &str, property: &'static str) -> Result<u64, ReadError> {
    let found = node.property(property);
    let value = found.as_ref().map(|found| found.value());
    match value.and_then(|value| <[u8; 8]>::try_from(value).ok()) {
        Some(bytes) => Ok(u64::from_le_bytes(bytes)),
        None => Err(ReadError::Property {
            node: name.to_owned(),
            property,
            found: value.map_or("missing".to_owned(), |value| format!("{} bytes", value.len())),
            expected: 8,
        }),
    }
}
