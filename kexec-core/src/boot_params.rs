//! The zero page, its e820 table, and the setup_data list (Documentation/arch/x86/{zero-page,boot}.rst).
//!
//! What the successor's kernel learns of the machine, it learns here. Two rules are easy to break from outside and are
//! therefore checked here: more e820 entries than the zero page holds go to a `SETUP_E820_EXT` node, and there are at
//! most [`MAX_RESERVATIONS`] reserved ranges, because a kernel that sees more forgets some of them silently.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::image::bzimage::{HEADER_AT, SetupHeader};
use crate::memory_map::Range;

/// Entries in the zero page itself.
pub const E820_MAX_ZEROPAGE: usize = 128;
/// `setup_data` type: more e820 entries.
pub const SETUP_E820_EXT: u32 = 1;
/// `setup_data` type: KHO's FDT and scratch list (Linux 6.16 and newer).
pub const SETUP_KEXEC_KHO: u32 = 10;
/// `setup_data` type: the node only points to its data.
pub const SETUP_INDIRECT: u32 = 1 << 31;

/// Reserved ranges that a stock kernel surely remembers. It reserves them (`early_reserve_memory`) before its list of
/// reservations can grow; that list has 128 places (`INIT_MEMBLOCK_REGIONS`), the error of a full list is ignored, and
/// the kernel itself, initrd, low memory and KASLR's own leave some 20 of them taken.
pub const MAX_RESERVATIONS: usize = 96;

/// `struct boot_e820_entry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawE820Entry {
    /// First byte.
    pub addr: U64,
    /// Bytes.
    pub size: U64,
    /// [`E820Kind`].
    pub kind: U32,
}

/// `struct boot_params`: the fields that we fill in, and the rest as zeros.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(missing_docs, reason = "the names and meanings are the kernel's, in Documentation/arch/x86/zero-page.rst")]
pub struct RawBootParams {
    pub screen_info_to_tboot: [u8; 0x070],
    pub acpi_rsdp_addr: U64,
    pub ist_info_to_olpc: [u8; 0x0c0 - 0x078],
    pub ext_ramdisk_image: U32,
    pub ext_ramdisk_size: U32,
    pub ext_cmd_line_ptr: U32,
    pub pad_to_alt_mem_k: [u8; 0x1e8 - 0x0cc],
    pub e820_entries: u8,
    pub eddbuf_entries: u8,
    pub edd_mbr_sig_buf_entries: u8,
    pub kbd_status: u8,
    pub secure_boot: u8,
    pub pad5: [u8; 2],
    /// Must be 0: another value tells the kernel that the loader copied rubbish.
    pub sentinel: u8,
    pub pad6: [u8; 1],
    pub hdr: SetupHeader,
    pub pad_to_edd_mbr_sig: [u8; 0x2d0 - HEADER_AT - size_of::<SetupHeader>()],
    pub e820_table: [RawE820Entry; E820_MAX_ZEROPAGE],
    pub pad8_and_edd: [u8; 0x1000 - 0x2d0 - 20 * E820_MAX_ZEROPAGE],
}

const _: () = assert!(size_of::<RawE820Entry>() == 20);
const _: () = assert!(size_of::<RawBootParams>() == 4096);
const _: () = assert!(std::mem::offset_of!(RawBootParams, hdr) == HEADER_AT);
const _: () = assert!(std::mem::offset_of!(RawBootParams, e820_entries) == 0x1e8);
const _: () = assert!(std::mem::offset_of!(RawBootParams, sentinel) == 0x1ef);
const _: () = assert!(std::mem::offset_of!(RawBootParams, e820_table) == 0x2d0);

/// What an e820 entry calls its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable.
    Ram = 1,
    /// Not the kernel's.
    Reserved = 2,
}

/// One line of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// Where.
    pub range: Range,
    /// What.
    pub kind: E820Kind,
}

impl E820Entry {
    /// Usable memory.
    pub const fn ram(range: Range) -> E820Entry {
        E820Entry { range, kind: E820Kind::Ram }
    }

    /// Memory to keep away from.
    pub const fn reserved(range: Range) -> E820Entry {
        E820Entry { range, kind: E820Kind::Reserved }
    }

    fn raw(self) -> RawE820Entry {
        RawE820Entry { addr: self.range.start().into(), size: self.range.len().into(), kind: (self.kind as u32).into() }
    }
}

/// One node of the setup_data list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetupData {
    /// Reserves a range that e820 calls RAM: struct pages exist, nobody allocates there, and the decompressor's KASLR
    /// stays away.
    Reserve(Range),
    /// Any other type, as the kernel defines it.
    Raw {
        /// `SETUP_*`.
        kind: u32,
        /// Its content.
        bytes: Vec<u8>,
    },
}

/// Everything that goes into the zero page beyond the image's own header.
#[derive(Debug, Clone)]
pub struct BootParams {
    /// From [`crate::image::BzImage::header_for_boot`].
    pub header: SetupHeader,
    /// Where the command line is.
    pub cmdline: u64,
    /// Where the initrd is; empty for none.
    pub initrd: Range,
    /// Where the RSDP is.
    pub rsdp: u64,
    /// The memory map, ascending.
    pub e820: Vec<E820Entry>,
    /// Nodes, in this order.
    pub setup_data: Vec<SetupData>,
}

/// The bytes of both.
#[derive(Debug, Clone)]
pub struct BuiltBootParams {
    /// The zero page.
    pub zero_page: Box<RawBootParams>,
    /// The list, to be put where `build` was told; maybe empty.
    pub setup_data: Vec<u8>,
}

/// Why boot parameters cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootParamsError {
    /// Entries out of order.
    #[error("memory map entries {first} and {second} overlap or are out of order")]
    E820Order {
        /// One.
        first: Range,
        /// The one behind it.
        second: Range,
    },
    /// Too many reserved ranges.
    #[error(
        "{count} separate ranges to reserve, but a kernel remembers only {MAX_RESERVATIONS} that early: use fewer, larger arenas"
    )]
    TooManyReservations {
        /// Asked for.
        count: usize,
    },
    /// The list is too long.
    #[error("setup_data needs {needed:#x} bytes, but only {room:#x} are set aside for it")]
    SetupDataRoom {
        /// Needed.
        needed: u64,
        /// There.
        room: u64,
    },
    /// A raw node of the type that is ours to write.
    #[error(
        "a raw setup_data node of type {kind:#x} is not allowed: reservations and memory map entries have their own way"
    )]
    RawKind {
        /// Its type.
        kind: u32,
    },
}

impl BootParams {
    /// Builds the bytes; the setup_data list will lie at `room`.
    pub fn build(&self, room: Range) -> Result<BuiltBootParams, BootParamsError> {
        for pair in self.e820.windows(2) {
            let [first, second] = [pair[0].range, pair[1].range];
            if first.end() > second.start() {
                return Err(BootParamsError::E820Order { first, second });
            }
        }
        let (head, surplus) = self.e820.split_at(self.e820.len().min(E820_MAX_ZEROPAGE));

        let mut nodes = Vec::new();
        if !surplus.is_empty() {
            let bytes = surplus.iter().flat_map(|e| e.raw().as_bytes().to_vec()).collect();
            nodes.push((SETUP_E820_EXT, bytes));
        }
        let count = self.setup_data.iter().filter(|node| matches!(node, SetupData::Reserve(_))).count();
        if count > MAX_RESERVATIONS {
            return Err(BootParamsError::TooManyReservations { count });
        }
        for node in &self.setup_data {
            nodes.push(match node {
                SetupData::Reserve(range) => (SETUP_INDIRECT, indirect(*range)),
                SetupData::Raw { kind, bytes } if *kind != SETUP_E820_EXT && kind & SETUP_INDIRECT == 0 => {
                    (*kind, bytes.clone())
                }
                SetupData::Raw { kind, .. } => return Err(BootParamsError::RawKind { kind: *kind }),
            });
        }
        let setup_data = chain(&nodes, room.start());
        if setup_data.len() as u64 > room.len() {
            return Err(BootParamsError::SetupDataRoom { needed: setup_data.len() as u64, room: room.len() });
        }

        let mut page = Box::new(RawBootParams::new_zeroed());
        page.hdr = self.header;
        page.hdr.type_of_loader = 0xff; // no registered number
        (page.hdr.cmd_line_ptr, page.ext_cmd_line_ptr) = halves(self.cmdline);
        if !self.initrd.is_empty() {
            (page.hdr.ramdisk_image, page.ext_ramdisk_image) = halves(self.initrd.start());
            (page.hdr.ramdisk_size, page.ext_ramdisk_size) = halves(self.initrd.len());
        }
        page.acpi_rsdp_addr = self.rsdp.into();
        page.hdr.setup_data = if setup_data.is_empty() { 0 } else { room.start() }.into();
        page.e820_entries = u8::try_from(head.len()).expect("at most 128");
        for (slot, entry) in page.e820_table.iter_mut().zip(head) {
            *slot = entry.raw();
        }
        Ok(BuiltBootParams { zero_page: page, setup_data })
    }
}

fn halves(value: u64) -> (U32, U32) {
    (U32::new(value as u32), U32::new((value >> 32) as u32))
}

/// `struct setup_indirect`. Its own type must not be SETUP_INDIRECT, else both the kernel and its decompressor skip it.
fn indirect(range: Range) -> Vec<u8> {
    const SETUP_NONE: u32 = 0;
    let mut bytes = Vec::with_capacity(24);
    bytes.extend(SETUP_NONE.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(range.len().to_le_bytes());
    bytes.extend(range.start().to_le_bytes());
    bytes
}

/// `struct setup_data` after `struct setup_data`, without gaps where the sizes allow it: adjacent reservations of the
/// nodes themselves become one, and [`MAX_RESERVATIONS`] counts on that.
fn chain(nodes: &[(u32, Vec<u8>)], at: u64) -> Vec<u8> {
    let mut list: Vec<u8> = Vec::new();
    for (i, (kind, bytes)) in nodes.iter().enumerate() {
        debug_assert!(list.len().is_multiple_of(8));
        let end = (list.len() + 16 + bytes.len()).next_multiple_of(8);
        let next = if i + 1 == nodes.len() { 0 } else { at + end as u64 };
        list.extend(next.to_le_bytes());
        list.extend(kind.to_le_bytes());
        list.extend((bytes.len() as u32).to_le_bytes());
        list.extend(bytes);
        list.resize(end, 0);
    }
    list
}
