//! The control block: the first MiB of a successor's region, where the two kernels meet.
//!
//! It is reserved memory for the successor (no struct pages) and stays so for as long as that kernel runs: its
//! firmware (ACPI tables, mailbox, park page) lives here. Offsets are from the region's start; each is the one
//! before plus its size, so that an overlap does not compile.
//!
//! ```text
//! 0x00000 boot_params      0x01000 command line     0x02000 control words   0x03000 yield arguments
//! 0x04000 mailbox          0x05000 park page        0x06000 yield page      0x07000 stack
//! 0x08000 transition table 0x0a000 setup_data       0x10000 ACPI tables     0x20000 page tables
//! 0x40000 handover record  0x80000 channel rings    0xc0000 spare           0x100000 end
//! ```

/// One reserved piece of the control block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Offset from the region's start, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

impl Piece {
    const fn after(previous: Piece, size: u64) -> Piece {
        Piece { offset: previous.offset + previous.size, size }
    }
    /// Offset of the first byte behind it.
    pub const fn end(self) -> u64 {
        self.offset + self.size
    }
}

const KIB: u64 = 1024;

/// Size of the control block: 1 MiB.
pub const SIZE: u64 = 1024 * KIB;
/// `struct boot_params`, the zero page (Documentation/arch/x86/zero-page.rst).
pub const BOOT_PARAMS: Piece = Piece { offset: 0, size: 4 * KIB };
/// The kernel's command line, NUL-terminated.
pub const CMDLINE: Piece = Piece::after(BOOT_PARAMS, 4 * KIB);
/// The [`words`].
pub const WORDS: Piece = Piece::after(CMDLINE, 4 * KIB);
/// Arguments of the incumbent's yield loop (`trampoline::YieldArgs`).
pub const YIELD_ARGS: Piece = Piece::after(WORDS, 4 * KIB);
/// The ACPI multiprocessor wakeup mailbox (`trampoline::Mailbox`).
pub const MAILBOX: Piece = Piece::after(YIELD_ARGS, 4 * KIB);
/// The park page, also the reset vector (`trampoline::park_page`).
pub const PARK_PAGE: Piece = Piece::after(MAILBOX, 4 * KIB);
/// The yield page (`trampoline::yield_page`).
pub const YIELD_PAGE: Piece = Piece::after(PARK_PAGE, 4 * KIB);
/// Stack for kernel entry; it grows down from the end.
pub const STACK: Piece = Piece::after(YIELD_PAGE, 4 * KIB);
/// Filled by the module at a yield: the leaving kernel's upper half over the identity map. On an even page: with page
/// table isolation, Linux's NMI entry takes a table on an odd page for that of user space (arch/x86/entry/calling.h).
pub const TRANSITION_TABLE: Piece = Piece::after(STACK, 8 * KIB);
/// `setup_data` nodes (SETUP_INDIRECT reservations).
pub const SETUP_DATA: Piece = Piece::after(TRANSITION_TABLE, 24 * KIB);
/// RSDP, XSDT, FADT, DSDT, MADT.
pub const ACPI: Piece = Piece::after(SETUP_DATA, 64 * KIB);
/// Identity page tables, four and five levels.
pub const PAGE_TABLES: Piece = Piece::after(ACPI, 128 * KIB);
/// The framed handover record ([`crate::handover_record`]).
pub const HANDOVER: Piece = Piece::after(PAGE_TABLES, 256 * KIB);
/// Ring from the incumbent to the successor.
pub const RING_TO_SUCCESSOR: Piece = Piece::after(HANDOVER, 128 * KIB);
/// Ring from the successor to the incumbent.
pub const RING_TO_INCUMBENT: Piece = Piece::after(RING_TO_SUCCESSOR, 128 * KIB);

const _: () = assert!(TRANSITION_TABLE.offset.is_multiple_of(0x2000));
const _: () = assert!(SETUP_DATA.end() == 0x10000);
const _: () = assert!(PAGE_TABLES.offset == 0x20000);
const _: () = assert!(HANDOVER.offset == 0x40000);
const _: () = assert!(RING_TO_SUCCESSOR.offset == 0x80000);
const _: () = assert!(RING_TO_INCUMBENT.end() <= SIZE);

/// Words that both kernels read and write while they run side by side. Each has one writer.
pub mod words {
    use super::WORDS;

    /// `MAGIC`, written by the incumbent before the successor starts.
    pub const MAGIC_AT: u64 = WORDS.offset;
    /// Layout version of the control block (u32).
    pub const VERSION_AT: u64 = WORDS.offset + 0x08;
    /// Where the incumbent's doorbell is: APIC id (low half), vector (high half); 0 until there is one.
    pub const INCUMBENT_BELL_AT: u64 = WORDS.offset + 0x10;
    /// The same of the successor.
    pub const SUCCESSOR_BELL_AT: u64 = WORDS.offset + 0x18;
    /// Epoch of the kernel whose services may answer. Written by the incumbent up to the cutover, then by the successor.
    pub const EPOCH_AT: u64 = WORDS.offset + 0x20;
    /// Not 0: the incumbent panicked.
    pub const INCUMBENT_PANIC_AT: u64 = WORDS.offset + 0x28;
    /// Not 0: the successor panicked.
    pub const SUCCESSOR_PANIC_AT: u64 = WORDS.offset + 0x30;
    /// The successor's agent marks here how far it has come (a [`BootMark`]).
    pub const BOOT_MARK_AT: u64 = WORDS.offset + 0x38;
    /// A moment just before the cutover, as the incumbent's TSC shows it; 0: the incumbent does not say.
    pub const CLOCK_TSC_AT: u64 = WORDS.offset + 0x40;
    /// The wall clock at that moment, in nanoseconds since 1970.
    pub const CLOCK_NS_AT: u64 = WORDS.offset + 0x48;
    /// The epoch in which the successor has let carried connections go: from then on their peers may have heard of it, and an incumbent
    /// that takes over again cannot go on with its own. 0: it has not.
    pub const CONNECTIONS_AT: u64 = WORDS.offset + 0x50;

    /// `"BATONCB\0"`.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"BATONCB\0");
    /// Version of this layout.
    pub const VERSION: u32 = 1;

    /// How far a successor's agent has come: what an incumbent that hears nothing of it can still read. (How far its CPU
    /// came before there was a kernel, the SIPI page says: `trampoline::Epitaph`.)
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    #[repr(u64)]
    pub enum BootMark {
        /// Nothing seen.
        None = 0,
        /// It has read and checked the handover record.
        Agent = 1,
        /// Its clock, the arenas and the network function are in place.
        Network = 2,
        /// Its services stand by.
        Standby = 3,
    }

    impl BootMark {
        /// The mark in this word; nothing when it is none.
        pub const fn of_word(word: u64) -> Option<BootMark> {
            match word {
                0 => Some(BootMark::None),
                1 => Some(BootMark::Agent),
                2 => Some(BootMark::Network),
                3 => Some(BootMark::Standby),
                _ => None,
            }
        }
    }
}
