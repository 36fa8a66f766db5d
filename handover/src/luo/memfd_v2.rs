//! "memfd-v2", as in Linux 7.3: `include/linux/kho/abi/memfd.h`, `mm/memfd_luo.c`.
//!
//! The successor's kernel puts the very pages into the page cache of a new memfd. Nothing is copied.

use state_schemas::checked::{Check, Received};
use state_schemas::handover_record::PhysRange;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::LuoError;
use super::names;
use crate::kho::{Incoming, Limits, Memory, Outgoing, PAGE, ReadError, Vmalloc};

/// Whether a handler of this name restores memfds of this form.
pub fn is_ours(compatible: &str) -> bool {
    names::MEMFD.contains(&compatible)
}

/// `MEMFD_LUO_ALL_SEALS`
pub const SEALS: u32 = state_schemas::handover_record::SEALS;
/// `MEMFD_LUO_FOLIO_DIRTY`: the content counts. Without it the kernel may throw the page away.
pub const DIRTY: u16 = 1;
/// `MEMFD_LUO_FOLIO_UPTODATE`: the content is content. Without it the kernel fills the page with zeros.
pub const UPTODATE: u16 = 2;

/// `struct memfd_luo_ser`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMemfd {
    pos: U64,
    size: U64,
    seals: U32,
    flags: U32,
    nr_folios: U64,
    folios: Vmalloc,
}

/// `struct memfd_luo_folio_ser`: a bit field, page number below and flags above (the first member takes the low bits
/// on x86).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFolio {
    pfn_and_flags: U64,
    index: U64,
}

const _: () = assert!(size_of::<RawMemfd>() == 48);
const _: () = assert!(size_of::<RawFolio>() == 16);

const PFN_BITS: u32 = 52;

/// A file in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memfd {
    /// Its size in bytes.
    pub size: u64,
    /// The file position.
    pub pos: u64,
    /// `F_SEAL_*`
    pub seals: u32,
    /// Its content, by ascending index. What is not there reads as zeros.
    pub pieces: Vec<Piece>,
}

/// Folios of one order, next to each other in memory and in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The first one's address.
    pub phys: u64,
    /// Of each. 0 is what every kernel takes; larger ones need huge pages in shmem.
    pub order: u32,
    /// How many.
    pub count: u64,
    /// Where in the file, in pages.
    pub index: u64,
    /// [`DIRTY`], [`UPTODATE`].
    pub flags: u16,
}

impl Piece {
    /// Its memory; it is known to be in bounds.
    const fn range(self) -> PhysRange {
        PhysRange { start: self.phys, len: self.count * (PAGE << self.order) }
    }
}

impl Memfd {
    /// A file whose content lies in one piece: `len` bytes from the start of `pages`.
    pub fn over(pages: PhysRange, len: u64, seals: u32) -> Memfd {
        Memfd::across(&[pages], len, seals)
    }

    /// A file whose content lies in several pieces, one behind the other. Pages behind its end are not handed over.
    pub fn across(ranges: &[PhysRange], len: u64, seals: u32) -> Memfd {
        let mut pieces = Vec::new();
        let (mut index, pages) = (0, len.div_ceil(PAGE));
        for range in ranges {
            let count = (range.len / PAGE).min(pages - index);
            if count > 0 {
                pieces.push(Piece { phys: range.start, order: 0, count, index, flags: DIRTY | UPTODATE });
            }
            index += count;
        }
        Memfd { size: len, pos: 0, seals, pieces }
    }

    /// Puts it into a handover, which keeps its pages by this (do not preserve them a second time). Answers with what
    /// [`crate::luo::File::memfd`] needs.
    ///
    /// # Errors
    /// Something that the kernel would not restore, pages that are kept already, or the pool is full.
    pub fn write(&self, out: &mut Outgoing) -> Result<u64, LuoError> {
        self.consistent()?;
        let mut folios = Vec::new();
        for piece in &self.pieces {
            out.preserve_folios(piece.phys, piece.order, piece.count)?;
            for i in 0..piece.count {
                let pfn = (piece.phys >> PAGE.trailing_zeros()) + (i << piece.order);
                let raw = RawFolio {
                    pfn_and_flags: (u64::from(piece.flags) << PFN_BITS | pfn).into(),
                    index: (piece.index + (i << piece.order)).into(),
                };
                folios.extend(raw.as_bytes());
            }
        }
        let ser = RawMemfd {
            pos: self.pos.into(),
            size: self.size.into(),
            seals: self.seals.into(),
            flags: 0.into(),
            nr_folios: (folios.len() as u64 / size_of::<RawFolio>() as u64).into(),
            folios: if folios.is_empty() { Vmalloc::default() } else { out.vmalloc_copy(&folios)? },
        };
        Ok(out.folio("a memfd", ser.as_bytes())?)
    }

    /// Reads the memfd that a file's data refer to.
    ///
    /// # Errors
    /// Structures that lead out of preserved pages, that contradict themselves, or exceed a limit.
    pub fn read(
        memory: &impl Memory,
        incoming: &Incoming,
        data: u64,
        limits: &Limits,
    ) -> Result<Received<Memfd>, ReadError> {
        const WHAT: &str = "a memfd";
        if incoming.folio_at(data).is_none() {
            return Err(ReadError::NotKept { what: WHAT, at: data });
        }
        let mut bytes = [0; size_of::<RawMemfd>()];
        memory.read(data, &mut bytes).map_err(|missing| ReadError::Memory { what: WHAT, missing })?;
        let ser = RawMemfd::read_from_bytes(&bytes).expect("the array has its size");
        if ser.flags.get() != 0 {
            return Err(ReadError::Value { what: "flags of a memfd", value: ser.flags.get().into() });
        }
        let count = ser.nr_folios.get();
        let mut pieces = Vec::new();
        if count > 0 {
            let len = count.checked_mul(size_of::<RawFolio>() as u64).filter(|len| len / PAGE <= limits.vmalloc_pages);
            let limit = limits.vmalloc_pages * (PAGE / size_of::<RawFolio>() as u64);
            let len = len.ok_or(ReadError::TooMany { what: "folios of a memfd", count, limit })?;
            for page in ser.folios.pages(memory, limits)? {
                if incoming.folio_at(page).is_none() {
                    return Err(ReadError::NotKept { what: "a list of folios", at: page });
                }
            }
            let folios = ser.folios.bytes(memory, len, limits)?;
            for raw in folios.chunks_exact(size_of::<RawFolio>()).filter_map(|raw| RawFolio::read_from_bytes(raw).ok())
            {
                add(&mut pieces, raw, incoming, limits)?;
            }
        }
        Ok(Received::new(Memfd { size: ser.size.get(), pos: ser.pos.get(), seals: ser.seals.get(), pieces }))
    }

    /// Everything that holds whatever the machine.
    fn consistent(&self) -> Result<(), LuoError> {
        if self.seals & !SEALS != 0 {
            return Err(LuoError::Seals { seals: self.seals, known: SEALS });
        }
        let Memfd { size, pos, .. } = *self;
        if [size, pos].iter().any(|number| *number > i64::MAX as u64) {
            return Err(LuoError::Size { size, pos });
        }
        let pages = size.div_ceil(PAGE);
        if pages > u64::from(u32::MAX) {
            return Err(LuoError::TooMany { what: "pages of a memfd", count: pages, limit: u32::MAX.into() });
        }
        let mut next = 0;
        let mut places = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let known = DIRTY | UPTODATE;
            if piece.flags & !known != 0 {
                return Err(LuoError::Flags { flags: piece.flags, known });
            }
            let Piece { index, order, count, .. } = *piece;
            let bad = |end| LuoError::Index { index, end, order, pages };
            let folio =
                1u64.checked_shl(order).filter(|_| order <= crate::kho::v4::MAX_PAGE_ORDER).ok_or(bad(index))?;
            let end = count.checked_mul(folio).and_then(|pages| pages.checked_add(index)).ok_or(bad(u64::MAX))?;
            // The last folio may reach beyond the file's end, if the end is in it.
            let inside = count > 0 && end - folio < pages;
            if !inside
                || index < next
                || !index.is_multiple_of(folio)
                || piece.phys.checked_add(count * folio * PAGE).is_none()
            {
                return Err(bad(end));
            }
            next = end;
            places.push(piece.range());
        }
        places.sort();
        match places.windows(2).find(|pair| pair[0].start + pair[0].len > pair[1].start) {
            Some(pair) => Err(LuoError::PageTwice { range: pair[1] }),
            None => Ok(()),
        }
    }
}

/// One more folio: at the end of the last piece, or a new one.
fn add(pieces: &mut Vec<Piece>, raw: RawFolio, incoming: &Incoming, limits: &Limits) -> Result<(), ReadError> {
    let pfn = raw.pfn_and_flags.get() & ((1 << PFN_BITS) - 1);
    let flags = (raw.pfn_and_flags.get() >> PFN_BITS) as u16;
    let index = raw.index.get();
    if pfn == 0 {
        return Ok(()); // a hole: the kernel passes it over
    }
    let at = pfn << PAGE.trailing_zeros();
    // Its size is what the tree says, as for the kernel (kho_restore_page).
    let order = incoming.folio_at(at).ok_or(ReadError::NotKept { what: "a folio of a memfd", at })?;
    if let Some(last) = pieces.last_mut()
        && (last.order, last.flags) == (order, flags)
        && at == last.phys + last.range().len
        && Some(index) == last.index.checked_add(last.count << order)
    {
        last.count += 1;
        return Ok(());
    }
    if pieces.len() >= limits.runs {
        let limit = limits.runs as u64;
        return Err(ReadError::TooMany { what: "separate folios of a memfd", count: limit + 1, limit });
    }
    pieces.push(Piece { phys: at, order, count: 1, index, flags });
    Ok(())
}

impl Check for Memfd {
    type Against = ();
    type Error = LuoError;

    fn check(&self, (): &()) -> Result<(), LuoError> {
        self.consistent()
    }
}
