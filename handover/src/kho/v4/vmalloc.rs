//! Areas of memory that a kernel maps in one piece though their pages lie apart ("Kexec Handover ABI for vmalloc
//! Preservation" in `include/linux/kho/abi/kexec_handover.h`): a list of pages of page addresses.

use std::collections::HashSet;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::kho::error::ReadError;
use crate::kho::memory::{Memory, PAGE, read_page};
use crate::kho::model::Limits;

/// `KHO_VMALLOC_SIZE`: addresses of one chunk, behind the address of the next.
pub const CHUNK_PAGES: usize = PAGE as usize / 8 - 1;
/// `KHO_VMALLOC_ALLOC`: it came from `vmalloc`. What `vcalloc` gives has this and no other.
pub const ALLOC: u16 = 1;
/// `KHO_VMALLOC_HUGE_VMAP`: it may be mapped with huge pages.
pub const HUGE_VMAP: u16 = 2;

/// `struct kho_vmalloc`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Vmalloc {
    /// The first chunk; 0 for none.
    pub first: U64,
    /// Pages of 4 KiB in all.
    pub total_pages: U32,
    /// [`ALLOC`], [`HUGE_VMAP`].
    pub flags: U16,
    /// Each address is a page of this order.
    pub order: U16,
}

const _: () = assert!(size_of::<Vmalloc>() == 16);

/// The pages of chunks, in memory that `take` gives. Answers with the first.
pub(crate) fn write_chunks<E>(
    pages: &[u64],
    mut take: impl FnMut() -> Result<u64, E>,
    mut put: impl FnMut(u64, &[u8]),
) -> Result<u64, E> {
    let places = pages.chunks(CHUNK_PAGES).map(|_| take()).collect::<Result<Vec<_>, E>>()?;
    for (i, chunk) in pages.chunks(CHUNK_PAGES).enumerate() {
        let next = places.get(i + 1).copied().unwrap_or(0);
        let words = std::iter::once(next).chain(chunk.iter().copied());
        put(places[i], &words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
    }
    Ok(places.first().copied().unwrap_or(0))
}

impl Vmalloc {
    /// The addresses of its pages, each of order [`Vmalloc::order`].
    ///
    /// # Errors
    /// It is not what `kho_preserve_vmalloc` writes.
    pub fn pages(&self, memory: &impl Memory, limits: &Limits) -> Result<Vec<u64>, ReadError> {
        const WHAT: &str = "a chunk of a vmalloc area";
        let (flags, order, stated) = (self.flags.get(), self.order.get(), u64::from(self.total_pages.get()));
        if flags & !(ALLOC | HUGE_VMAP) != 0 {
            return Err(ReadError::Value { what: "flags of a vmalloc area", value: flags.into() });
        }
        if u32::from(order) > super::MAX_PAGE_ORDER {
            return Err(ReadError::Value { what: "order of a vmalloc area", value: order.into() });
        }
        if stated > limits.vmalloc_pages {
            return Err(ReadError::TooMany {
                what: "pages of a vmalloc area",
                count: stated,
                limit: limits.vmalloc_pages,
            });
        }
        let expected = (stated >> order) as usize;
        let size = PAGE << order;
        let mut pages = Vec::new();
        let mut seen = HashSet::new();
        let mut next = self.first.get();
        while next != 0 {
            if !next.is_multiple_of(PAGE) {
                return Err(ReadError::Place { what: WHAT, at: next });
            }
            // A chunk that is full may have an empty one behind it: the kernel begins the next one early.
            if !seen.insert(next) {
                return Err(ReadError::Cycle { what: WHAT, at: next });
            }
            if seen.len() > expected.div_ceil(CHUNK_PAGES) + 1 {
                let limit = expected.div_ceil(CHUNK_PAGES) as u64 + 1;
                return Err(ReadError::TooMany { what: "chunks of a vmalloc area", count: limit + 1, limit });
            }
            let chunk = read_page(memory, next).map_err(|missing| ReadError::Memory { what: WHAT, missing })?;
            let mut words = chunk.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            next = words.next().unwrap_or(0);
            for page in words.take_while(|page| *page != 0) {
                if !page.is_multiple_of(size) || page.checked_add(size).is_none_or(|end| end > limits.top) {
                    return Err(ReadError::Place { what: "a page of a vmalloc area", at: page });
                }
                if pages.len() == expected {
                    return Err(ReadError::Mismatch {
                        what: "pages of a vmalloc area",
                        found: ((pages.len() as u64) + 1) << order,
                        stated,
                    });
                }
                pages.push(page);
            }
        }
        let found = (pages.len() as u64) << order;
        if found != stated {
            return Err(ReadError::Mismatch { what: "pages of a vmalloc area", found, stated });
        }
        Ok(pages)
    }

    /// The first `len` bytes of the area.
    ///
    /// # Errors
    /// As [`Vmalloc::pages`]; or it is shorter than that, or its pages cannot be read.
    pub fn bytes(&self, memory: &impl Memory, len: u64, limits: &Limits) -> Result<Vec<u8>, ReadError> {
        let pages = self.pages(memory, limits)?;
        let size = PAGE << self.order.get();
        if len > pages.len() as u64 * size {
            let found = pages.len() as u64 * size;
            return Err(ReadError::Mismatch { what: "bytes of a vmalloc area", found, stated: len });
        }
        let mut bytes = vec![0; len as usize];
        for (piece, page) in bytes.chunks_mut(size as usize).zip(&pages) {
            memory
                .read(*page, piece)
                .map_err(|missing| ReadError::Memory { what: "a page of a vmalloc area", missing })?;
        }
        Ok(bytes)
    }
}
