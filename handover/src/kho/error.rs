//! Why a handover cannot be written, read or believed.

use state_schemas::handover_record::PhysRange;
use thiserror::Error;

use super::memory::OutOfReach;

/// Two things in one place.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{what}: {:#x} bytes at {:#x} overlap {:#x} bytes at {:#x}, which are {other}",
    range.len, range.start, there.len, there.start
)]
pub struct Overlap {
    /// Of what.
    pub what: &'static str,
    /// Where.
    pub range: PhysRange,
    /// What else is there.
    pub other: &'static str,
    /// Where that is.
    pub there: PhysRange,
}

/// Scratch that is not made of blocks of `SCRATCH_ALIGNMENT_BYTES`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("scratch of {:#x} bytes at {:#x} is not made of blocks of {align:#x}", range.len, range.start)]
pub struct ScratchAlign {
    /// Where.
    pub range: PhysRange,
    /// Required of start and size.
    pub align: u64,
}

/// Ours to mend: what was to be handed over cannot be expressed, or does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OutgoingError {
    /// Not whole pages, empty, at address 0 or beyond 2^52.
    #[error("{what}: {:#x} bytes at {:#x} are not whole pages of physical memory", range.len, range.start)]
    Range {
        /// Of what.
        what: &'static str,
        /// Where.
        range: PhysRange,
    },
    /// Two things want the same memory.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// The pool is full.
    #[error("the handover needs at least {needed:#x} bytes, but its pool at {at:#x} has {pool:#x}")]
    PoolFull {
        /// Bytes, as far as known.
        needed: u64,
        /// The pool.
        at: u64,
        /// Its size.
        pool: u64,
    },
    /// The kernel's FDT is one page.
    #[error("{count} blobs make an FDT of {len} bytes, but the kernel reads {limit}: hand over fewer blobs")]
    FdtFull {
        /// How many.
        count: usize,
        /// Bytes.
        len: usize,
        /// Limit.
        limit: u64,
    },
    /// A name that the kernel could not look up.
    #[error("a blob cannot be named {name:?}: 1 to 31 letters, digits, or any of , . _ + -")]
    Name {
        /// The name.
        name: String,
    },
    /// The same name twice.
    #[error("there is a blob named {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A blob is one folio.
    #[error("{what} of {len:#x} bytes: the kernel takes 1 to {limit:#x} in one piece")]
    BlobSize {
        /// What.
        what: &'static str,
        /// Bytes.
        len: u64,
        /// Limit.
        limit: u64,
    },
    /// Scratch decides where the kernel may put what it allocates first.
    #[error("a KHO kernel cannot boot without scratch: set memory apart for it")]
    NoScratch,
    /// The scratch list is one page.
    #[error("{count} pieces of scratch, but at most {limit} fit the list")]
    ScratchFull {
        /// How many.
        count: usize,
        /// Limit.
        limit: usize,
    },
    /// Scratch of a wrong shape.
    #[error(transparent)]
    ScratchAlign(#[from] ScratchAlign),
    /// Orders that the key cannot hold.
    #[error("a folio of order {order} at {phys:#x}: it must be aligned to its size and of order {limit} at most")]
    Folio {
        /// Where.
        phys: u64,
        /// Its order.
        order: u32,
        /// `MAX_PAGE_ORDER`
        limit: u32,
    },
    /// `kho_vmalloc::total_pages` has 32 bits.
    #[error("{pages} pages are too many for one vmalloc area")]
    TooManyPages {
        /// How many.
        pages: u64,
    },
}

/// The other kernel's to mend: the bytes have not the shape that they should have. Nothing was believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A pointer led nowhere.
    #[error("{what}: {missing}")]
    Memory {
        /// What was to be there.
        what: &'static str,
        /// Where.
        missing: OutOfReach,
    },
    /// Not a device tree.
    #[error("the handover's FDT at {phys:#x} is not a device tree: {reason}")]
    Fdt {
        /// Where.
        phys: u64,
        /// What is wrong.
        reason: String,
    },
    /// A version that we do not speak.
    #[error("the handover is {found:?}; this version of Baton reads {spoken}")]
    Version {
        /// Its `compatible`.
        found: String,
        /// Ours.
        spoken: String,
    },
    /// A property is missing or has the wrong size.
    #[error("{node}: property {property} is {found}, but must be {expected} bytes")]
    Property {
        /// Node.
        node: String,
        /// Property.
        property: &'static str,
        /// Bytes, or that there is none.
        found: String,
        /// Bytes.
        expected: usize,
    },
    /// A number that leads out of memory, or to a place that is not aligned.
    #[error("{what} at {at:#x} is not where such a thing can be")]
    Place {
        /// What.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// More of something than allowed.
    #[error("{what}: {count} or more, but at most {limit} are accepted")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many, as far as counted.
        count: u64,
        /// Limit.
        limit: u64,
    },
    /// A structure leads back into itself.
    #[error("{what} at {at:#x} is reached twice")]
    Cycle {
        /// What.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// An address outside of what was preserved.
    #[error("{what} at {at:#x} is not the beginning of a preserved page")]
    NotKept {
        /// What.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// A key without an order.
    #[error("the tree of preserved pages holds the key {key:#x}, which is no page")]
    Key {
        /// The key.
        key: u64,
    },
    /// Numbers that should agree.
    #[error("{what}: {found} found, but {stated} stated")]
    Mismatch {
        /// Of what.
        what: &'static str,
        /// Counted.
        found: u64,
        /// Written down.
        stated: u64,
    },
    /// A field with a value that has no meaning.
    #[error("{what} is {value:#x}, which means nothing")]
    Value {
        /// Field.
        what: &'static str,
        /// Content.
        value: u64,
    },
    /// Text that is not.
    #[error("{what} is not a text that ends within its field: {bytes:02x?}")]
    Text {
        /// Field.
        what: &'static str,
        /// Its first bytes.
        bytes: Vec<u8>,
    },
}

/// The other kernel's to mend: well-formed, but it cannot be true of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// Where there is no memory.
    #[error("{what}: {:#x} bytes at {:#x} are not in the machine's memory", range.len, range.start)]
    NotMemory {
        /// What.
        what: &'static str,
        /// Where.
        range: PhysRange,
    },
    /// Two things in one place.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// Something that is used later, but not kept.
    #[error("{what}: {:#x} bytes at {:#x} are not among the preserved pages", range.len, range.start)]
    NotPreserved {
        /// What.
        what: &'static str,
        /// Where.
        range: PhysRange,
    },
    /// Scratch of a wrong shape.
    #[error(transparent)]
    ScratchAlign(#[from] ScratchAlign),
    /// The same name twice.
    #[error("two blobs are named {name:?}")]
    NameTwice {
        /// The name.
        name: String,
    },
}
