//! What shall outlive this kernel, written as the next one expects it.

use state_schemas::handover_record::PhysRange;
use zerocopy::IntoBytes;

use super::abi::Abi;
use super::error::{OutgoingError, Overlap, ScratchAlign};
use super::extents::Extents;
use super::memory::{PAGE, Segments};
use super::model::{Handed, Subtree};
use super::pool::Pool;
use super::v4::metadata::{self, Metadata};
use super::v4::tree::{self, Tree};
use super::v4::vmalloc::{self, Vmalloc};
use super::v4::{self, KhoData, MAX_PAGE_ORDER, SCRATCH_ALIGN, SCRATCH_LIMIT, Scratch};

/// No physical address of x86 is this high: they have 52 bits at most.
const TOP: u64 = 1 << 52;

/// A handover in the making. Everything it writes goes into its pool.
#[derive(Debug, Clone)]
pub struct Outgoing {
    abi: Abi,
    pool: Pool,
    fdt: u64,
    scratch_list: u64,
    scratch: Vec<PhysRange>,
    subtrees: Vec<Subtree>,
    tree: Tree,
    preserved: Extents,
}

/// A handover, ready to be put in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// What to write where.
    pub segments: Segments,
    /// What the successor's kernel is told ([`Written::setup_data`]).
    pub handed: Handed,
    /// The part of the pool that is in use until the successor has booted. Of it, the pages of the tree and gaps are
    /// free to the successor afterwards; the rest is preserved, or reserved for good.
    pub used: PhysRange,
}

impl Written {
    /// The payload of setup_data type 10 (`SETUP_KEXEC_KHO`), `struct kho_data`.
    pub fn setup_data(&self) -> Vec<u8> {
        let Handed { fdt, scratch } = self.handed;
        let data = KhoData {
            fdt_addr: fdt.start.into(),
            fdt_size: fdt.len.into(),
            scratch_addr: scratch.start.into(),
            scratch_size: scratch.len.into(),
        };
        data.as_bytes().to_vec()
    }
}

impl Outgoing {
    /// An empty handover. The pool is memory that the successor's e820 calls RAM, that is not scratch, and that nobody
    /// touches until it has booted.
    ///
    /// # Errors
    /// The pool is not whole pages, or too small for two.
    pub fn new(abi: Abi, pool: PhysRange) -> Result<Outgoing, OutgoingError> {
        let mut pool = Pool::new(pool)?;
        let (fdt, scratch_list) = (pool.take(0)?, pool.take(0)?);
        let mut new = Outgoing {
            abi,
            pool,
            fdt,
            scratch_list,
            scratch: Vec::new(),
            subtrees: Vec::new(),
            tree: Tree::default(),
            preserved: Extents::default(),
        };
        // The kernel looks into the FDT as long as it runs (kho_retrieve_subtree).
        new.keep("the handover's FDT", fdt, 0, 1)?;
        Ok(new)
    }

    /// The version in which it will be written.
    pub const fn abi(&self) -> Abi {
        self.abi
    }

    /// Keeps whole pages, as `kho_preserve_pages` does: `kho_restore_pages` of the same range takes them, as single
    /// pages. A range must not reach over the border between two NUMA nodes (`__kho_preserve_pages_order`).
    ///
    /// # Errors
    /// Not whole pages, or kept already, or part of the pool.
    pub fn preserve(&mut self, range: PhysRange) -> Result<(), OutgoingError> {
        self.foreign("memory to preserve", range)?;
        for (phys, order) in tree::pieces(range) {
            self.tree.insert(phys, order, 1);
        }
        Ok(())
    }

    /// Keeps a run of folios of one order, as `kho_preserve_folio` does for each: `kho_restore_folio` takes them one
    /// by one.
    ///
    /// # Errors
    /// As [`Outgoing::preserve`]; or no folio has this order, or the run does not start at a multiple of it.
    pub fn preserve_folios(&mut self, phys: u64, order: u32, count: u64) -> Result<(), OutgoingError> {
        folio(phys, order)?;
        let len = count.saturating_mul(PAGE << order);
        self.foreign("folios to preserve", PhysRange { start: phys, len })?;
        self.tree.insert(phys, order, count);
        Ok(())
    }

    /// Hands over bytes under a name (`kho_add_subtree`): a copy in one folio that the successor's user of that name
    /// may restore and free. Answers with where it is.
    ///
    /// # Errors
    /// The name cannot be looked up or is taken; the blob is empty, larger than a folio, or the pool is full.
    pub fn subtree(&mut self, name: &str, bytes: &[u8]) -> Result<PhysRange, OutgoingError> {
        self.name(name)?;
        let start = self.folio("a blob", bytes)?;
        Ok(self.add(name, PhysRange { start, len: bytes.len() as u64 }))
    }

    /// Hands over memory that is kept already, in place, under a name.
    ///
    /// # Errors
    /// The name cannot be looked up or is taken; the memory is not preserved.
    pub fn subtree_in_place(&mut self, name: &str, blob: PhysRange) -> Result<PhysRange, OutgoingError> {
        self.name(name)?;
        if blob.len == 0 || !self.preserved.covers(blob) {
            return Err(OutgoingError::Range { what: "a blob that is not preserved", range: blob });
        }
        Ok(self.add(name, blob))
    }

    /// Memory that holds nothing of value: the kernel decompresses itself into it and takes from it whatever it needs
    /// before it knows what is preserved. Named in the order in which it shall be tried; the first should be low.
    pub fn scratch(&mut self, range: PhysRange) {
        self.scratch.push(range);
    }

    /// Says who was here before. `kexec_count` is how many kernels have followed another, this one included.
    ///
    /// # Errors
    /// Said already, or the pool is full.
    pub fn metadata(&mut self, previous_release: &str, kexec_count: u32) -> Result<(), OutgoingError> {
        let metadata = Metadata { previous_release: previous_release.to_owned(), kexec_count };
        self.subtree(metadata::NAME, &metadata.to_bytes()).map(drop)
    }

    /// A copy of bytes in one folio of its own, kept (`kho_alloc_preserve`): what `kho_restore_free` can free.
    ///
    /// # Errors
    /// Empty, larger than a folio, or the pool is full.
    pub fn folio(&mut self, what: &'static str, bytes: &[u8]) -> Result<u64, OutgoingError> {
        let len = bytes.len() as u64;
        let limit = PAGE << MAX_PAGE_ORDER;
        if len == 0 || len > limit {
            return Err(OutgoingError::BlobSize { what, len, limit });
        }
        let order = len.div_ceil(PAGE).next_power_of_two().ilog2();
        let at = self.pool.take(order)?;
        self.keep(what, at, order, 1)?;
        self.pool.put(at, bytes);
        Ok(at)
    }

    /// Describes pages of one order as an area that `kho_restore_vmalloc` maps in this order. They are kept by this.
    ///
    /// # Errors
    /// As [`Outgoing::preserve`]; or there are too many.
    pub fn vmalloc(&mut self, pages: &[u64], order: u32) -> Result<Vmalloc, OutgoingError> {
        for page in pages {
            folio(*page, order)?;
            self.preserve(PhysRange { start: *page, len: PAGE << order })?;
        }
        self.describe(pages, order)
    }

    /// A copy of bytes in single pages, described as such an area.
    ///
    /// # Errors
    /// The pool is full, or there are too many.
    pub fn vmalloc_copy(&mut self, bytes: &[u8]) -> Result<Vmalloc, OutgoingError> {
        let mut pages = Vec::with_capacity(bytes.len().div_ceil(PAGE as usize));
        for page in bytes.chunks(PAGE as usize) {
            pages.push(self.folio("a page of a vmalloc area", page)?);
        }
        self.describe(&pages, 0)
    }

    fn describe(&mut self, pages: &[u64], order: u32) -> Result<Vmalloc, OutgoingError> {
        let total = (pages.len() as u64) << order;
        let total_pages = u32::try_from(total).map_err(|_| OutgoingError::TooManyPages { pages: total })?;
        let mut chunks = Vec::new();
        let pool = &mut self.pool;
        let mut contents = Vec::new();
        let first = vmalloc::write_chunks(
            pages,
            || {
                let at = pool.take(0)?;
                chunks.push(at);
                Ok::<_, OutgoingError>(at)
            },
            |at, bytes| contents.push((at, bytes.to_vec())),
        )?;
        for at in chunks {
            self.keep("a chunk of a vmalloc area", at, 0, 1)?;
        }
        for (at, bytes) in contents {
            self.pool.put(at, &bytes);
        }
        Ok(Vmalloc {
            first: first.into(),
            total_pages: total_pages.into(),
            flags: vmalloc::ALLOC.into(),
            order: (order as u16).into(),
        })
    }

    /// Bytes of the pool that [`Outgoing::write`] will have used.
    pub fn space_needed(&self) -> u64 {
        self.pool.used() + self.tree.nodes().saturating_sub(self.pool.spare()) * PAGE
    }

    /// The bytes of all of it.
    ///
    /// # Errors
    /// There is no scratch, or it is where something else is; the FDT is full, or the pool.
    pub fn write(mut self) -> Result<Written, OutgoingError> {
        self.check_scratch()?;
        let mut nodes = Vec::new();
        let pool = &mut self.pool;
        let root = self.tree.write(|| pool.take(0), |at, bytes| nodes.push((at, bytes.to_vec())))?;
        for (at, bytes) in nodes {
            self.pool.put(at, &bytes);
        }
        let fdt = match self.abi {
            Abi::V4 | Abi::V4Radix | Abi::V4RadixVmalloc => v4::fdt::write(self.abi, root, &self.subtrees)?,
        };
        self.pool.put(self.fdt, &fdt);
        let list: Vec<u8> = self
            .scratch
            .iter()
            .flat_map(|piece| Scratch { addr: piece.start.into(), size: piece.len.into() }.as_bytes().to_vec())
            .collect();
        self.pool.put(self.scratch_list, &list);
        let start = self.pool.range().start;
        let bytes = self.pool.into_bytes();
        Ok(Written {
            handed: Handed {
                fdt: PhysRange { start: self.fdt, len: v4::FDT_LIMIT },
                scratch: PhysRange { start: self.scratch_list, len: list.len() as u64 },
            },
            used: PhysRange { start, len: bytes.len() as u64 },
            segments: Segments::new([(start, bytes)]),
        })
    }

    fn check_scratch(&self) -> Result<(), OutgoingError> {
        let (count, limit) = (self.scratch.len(), SCRATCH_LIMIT);
        if count == 0 {
            return Err(OutgoingError::NoScratch);
        }
        if count > limit {
            return Err(OutgoingError::ScratchFull { count, limit });
        }
        let pool = self.pool.range();
        let mut others = Extents::default();
        for &range in &self.scratch {
            whole_pages("scratch", range)?;
            if [range.start, range.len].iter().any(|number| !number.is_multiple_of(SCRATCH_ALIGN)) {
                return Err(ScratchAlign { range, align: SCRATCH_ALIGN }.into());
            }
            let overlap = |other, there| Overlap { what: "scratch", range, other, there };
            if touch(range, pool) {
                return Err(overlap("the handover's pool", pool).into());
            }
            if let Some(there) = self.preserved.overlapping(range) {
                return Err(overlap("preserved", there).into());
            }
            others.insert(range).map_err(|there| overlap("scratch, too", there))?;
        }
        Ok(())
    }

    /// Memory of somebody else's, to be kept.
    fn foreign(&mut self, what: &'static str, range: PhysRange) -> Result<(), OutgoingError> {
        whole_pages(what, range)?;
        let overlap = |other, there| Overlap { what, range, other, there };
        if touch(range, self.pool.range()) {
            return Err(overlap("the handover's pool", self.pool.range()).into());
        }
        Ok(self.preserved.insert(range).map_err(|there| overlap("preserved already", there))?)
    }

    /// Memory of the pool, to be kept.
    fn keep(&mut self, what: &'static str, phys: u64, order: u32, count: u64) -> Result<(), OutgoingError> {
        let range = PhysRange { start: phys, len: count << order << PAGE.trailing_zeros() };
        self.preserved.insert(range).map_err(|there| Overlap { what, range, other: "preserved already", there })?;
        self.tree.insert(phys, order, count);
        Ok(())
    }

    fn name(&self, name: &str) -> Result<(), OutgoingError> {
        if !v4::fdt::name_is_good(name) {
            return Err(OutgoingError::Name { name: name.to_owned() });
        }
        match self.subtrees.iter().any(|subtree| subtree.name == name) {
            true => Err(OutgoingError::NameTaken { name: name.to_owned() }),
            false => Ok(()),
        }
    }

    fn add(&mut self, name: &str, blob: PhysRange) -> PhysRange {
        self.subtrees.push(Subtree { name: name.to_owned(), blob });
        blob
    }
}

fn whole_pages(what: &'static str, range: PhysRange) -> Result<(), OutgoingError> {
    let aligned = range.start.is_multiple_of(PAGE) && range.len.is_multiple_of(PAGE);
    match range.end() {
        Some(end) if aligned && range.start != 0 && range.len != 0 && end <= TOP => Ok(()),
        _ => Err(OutgoingError::Range { what, range }),
    }
}

fn folio(phys: u64, order: u32) -> Result<(), OutgoingError> {
    match order <= MAX_PAGE_ORDER && phys.is_multiple_of(PAGE << order) {
        true => Ok(()),
        false => Err(OutgoingError::Folio { phys, order, limit: MAX_PAGE_ORDER }),
    }
}

/// Both are whole pages below [`TOP`].
const fn touch(a: PhysRange, b: PhysRange) -> bool {
    a.start < b.start + b.len && b.start < a.start + a.len
}
