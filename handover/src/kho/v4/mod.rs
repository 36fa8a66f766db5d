//! "kho-v4", as in Linux 7.2 and 7.3: `include/linux/kho/abi/kexec_handover.h`.
//!
//! | what | form |
//! |---|---|
//! | FDT | at most one page; integers are the kernel's own, little-endian ([`fdt`]) |
//! | preserved pages | [`tree`]: six levels, each node one page, leaves are bitmaps |
//! | scratch list | array of [`Scratch`] |
//! | vmalloc areas | [`vmalloc`]: list of pages of addresses |
//! | `kexec-metadata` | [`metadata`] |
//! | setup_data type 10 | [`KhoData`] |

pub mod fdt;
pub mod metadata;
pub mod tree;
pub mod vmalloc;

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::ReadError;
use super::memory::PAGE;

/// `KHO_FDT_COMPATIBLE`
pub const COMPATIBLE: &str = "kho-v4";
/// The FDT is one page: `kho_alloc_preserve(PAGE_SIZE)`, and kexec hands on `fdt_size = PAGE_SIZE`.
pub const FDT_LIMIT: u64 = PAGE;
/// `MAX_PAGE_ORDER` of x86: the largest folio, and so the largest blob.
pub const MAX_PAGE_ORDER: u32 = 10;
/// `SCRATCH_ALIGNMENT_BYTES`: the page allocator looks at neighbours up to that size.
pub const SCRATCH_ALIGN: u64 = PAGE << MAX_PAGE_ORDER;
/// Pieces of scratch that fit one page. The kernel writes one per NUMA node and two more.
pub const SCRATCH_LIMIT: usize = PAGE as usize / size_of::<Scratch>();

/// `struct kho_data` (arch/x86/include/uapi/asm/setup_data.h): the payload of setup_data type 10.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct KhoData {
    /// Where the FDT is.
    pub fdt_addr: U64,
    /// Bytes to map of it.
    pub fdt_size: U64,
    /// Where the scratch list is.
    pub scratch_addr: U64,
    /// Its bytes.
    pub scratch_size: U64,
}

/// `struct kho_scratch` (include/linux/kexec_handover.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Scratch {
    /// First byte.
    pub addr: U64,
    /// Bytes.
    pub size: U64,
}

const _: () = assert!(size_of::<KhoData>() == 32);
const _: () = assert!(size_of::<Scratch>() == 16);

/// A text in a field that it need not fill: printable, and ended by a zero.
pub(crate) fn text(what: &'static str, field: &[u8]) -> Result<String, ReadError> {
    let bad = || ReadError::Text { what, bytes: field[..field.len().min(16)].to_vec() };
    let len = field.iter().position(|byte| *byte == 0).ok_or_else(bad)?;
    let text = std::str::from_utf8(&field[..len]).map_err(|_| bad())?;
    if text.chars().any(char::is_control) {
        return Err(bad());
    }
    Ok(text.to_owned())
}
