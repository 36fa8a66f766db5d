//! What the writer and the reader of a handover, and the formats of its versions, have in common.

use state_schemas::handover_record::PhysRange;
use zerocopy::FromBytes;

use super::error::ReadError;
use super::memory::PAGE;
use super::v4::{self, KhoData};

/// Where a handover begins: what `struct kho_data` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handed {
    /// The FDT, and how much of it to look at.
    pub fdt: PhysRange,
    /// The scratch list; empty where it is not known (a kernel that runs hands it on only to the next).
    pub scratch: PhysRange,
}

impl Handed {
    /// From the payload of setup_data type 10.
    ///
    /// # Errors
    /// It has another size.
    pub fn from_setup_data(payload: &[u8]) -> Result<Handed, ReadError> {
        let data = KhoData::read_from_bytes(payload).map_err(|_| ReadError::Mismatch {
            what: "bytes of kho_data",
            found: payload.len() as u64,
            stated: size_of::<KhoData>() as u64,
        })?;
        Ok(Handed {
            fdt: PhysRange { start: data.fdt_addr.get(), len: data.fdt_size.get() },
            scratch: PhysRange { start: data.scratch_addr.get(), len: data.scratch_size.get() },
        })
    }
}

/// How much a reader puts up with. Time and memory of reading are in proportion to these, whatever the bytes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Pages of the tree. 1 TiB in single pages takes some 8,300.
    pub nodes: usize,
    /// Runs of preserved pages of one order next to each other.
    pub runs: usize,
    /// The highest order.
    pub order: u32,
    /// No memory at or above this address.
    pub top: u64,
    /// Bytes of one blob.
    pub blob: u64,
    /// Pages of one vmalloc area.
    pub vmalloc_pages: u64,
    /// Blocks of one list of the Live Update Orchestrator, as in the kernel (`KHO_MAX_BLOCKS`).
    pub blocks: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            nodes: 1 << 14,
            runs: 1 << 20,
            order: 30, // restoring one shifts an int: kho_init_folio
            top: 1 << 52,
            blob: PAGE << v4::MAX_PAGE_ORDER,
            vmalloc_pages: 1 << 16,
            blocks: 10_000,
        }
    }
}

/// Preserved pages of one order, next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The first one's address.
    pub start: u64,
    /// Of each.
    pub order: u32,
    /// How many.
    pub count: u64,
}

impl Run {
    /// The memory of all of them.
    pub const fn range(self) -> PhysRange {
        PhysRange { start: self.start, len: self.count * (PAGE << self.order) }
    }
}

/// A blob with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subtree {
    /// Under which it is looked up.
    pub name: String,
    /// Where it is.
    pub blob: PhysRange,
}
