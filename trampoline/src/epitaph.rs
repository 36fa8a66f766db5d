//! Where the code writes what it is doing. No kernel runs then, so nobody can print: this is what `x/16bx` on the
//! machine, a memory dump, or the kernel that fenced the CPU will find.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One line of a hexdump: `baton.si prot ....`.
///
/// Several CPUs may run one page; each writes over what the one before wrote. So it tells what the *last* CPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Epitaph {
    /// Which code this is: `baton.si`, `baton.pa`, `baton.yi`.
    pub owner: [u8; 8],
    /// One of [`step`]; zero until a CPU has come by.
    pub step: [u8; 4],
    /// Park page: the CPU that wrote `step`. Yield loop: the CPU being fenced. SIPI page: unused.
    pub apic_id: u32,
}

const _: () = assert!(size_of::<Epitaph>() == 16);

impl Epitaph {
    pub(crate) const fn of(owner: &[u8; 8]) -> Epitaph {
        Epitaph { owner: *owner, step: [0; 4], apic_id: 0 }
    }
}

/// The steps, four letters each.
pub mod step {
    /// SIPI page: in real mode.
    pub const REAL: [u8; 4] = *b"real";
    /// SIPI page: in 32-bit protected mode.
    pub const PROTECTED: [u8; 4] = *b"prot";
    /// SIPI page: in 64-bit mode, its arguments read, about to jump. The arguments may be overwritten now.
    pub const JUMP: [u8; 4] = *b"jump";
    /// Park page: own tables loaded, not parked yet.
    pub const ENTER: [u8; 4] = *b"entr";
    /// Park page: in the mailbox loop, its bit set.
    pub const PARKED: [u8; 4] = *b"park";
    /// Park page: answered a test.
    pub const TESTED: [u8; 4] = *b"test";
    /// Park page: about to jump to the wakeup vector.
    pub const WOKEN: [u8; 4] = *b"woke";
    /// Yield loop: watching.
    pub const WATCH: [u8; 4] = *b"wtch";
    /// Yield loop: the deadline passed, CPUs are being stopped.
    pub const FENCE: [u8; 4] = *b"fenc";
    /// Yield loop: gone back to its kernel.
    pub const BACK: [u8; 4] = *b"back";
    /// Yield loop: gone to the park page, for good.
    pub const GONE: [u8; 4] = *b"gone";

    /// As the immediate of a 32-bit store.
    pub(crate) const fn word(step: [u8; 4]) -> u32 {
        // x86 stores the low byte first, and so the letters stand in reading order.
        (step[0] as u32) | (step[1] as u32) << 8 | (step[2] as u32) << 16 | (step[3] as u32) << 24
    }
}
