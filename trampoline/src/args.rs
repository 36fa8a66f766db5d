//! What the assembly reads and writes in memory. Each offset that appears in a `.S` file comes from `offset_of!` on
//! one of these, so the two cannot drift apart.

use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::epitaph::Epitaph;

/// Arguments of the SIPI page: where a CPU that comes out of real mode shall go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SipiArgs {
    /// Top-level page table, four levels, below 4 GiB (32-bit code loads it). Identity-maps the SIPI page and `entry`.
    pub cr3: u64,
    /// Entered in 64-bit mode: a kernel's 64-bit entry, or the park page.
    pub entry: u64,
    /// In `rsi` there: for Linux the physical address of its boot_params.
    pub arg: u64,
    /// In `rsp` there.
    pub stack: u64,
}

const _: () = assert!(size_of::<SipiArgs>() == 32);

/// Arguments of the park page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ParkArgs {
    /// Top-level table for a CPU in four-level mode. Identity-maps, writable and executable, without the user bit:
    /// the park page, the mailbox, and whatever page a wakeup vector lies in.
    pub cr3_4level: u64,
    /// The same for a CPU in five-level mode (LA57 cannot change while paging is on).
    pub cr3_5level: u64,
    /// Physical address of the [`Mailbox`].
    pub mailbox: u64,
}

const _: () = assert!(size_of::<ParkArgs>() == 24);

/// Values of [`Mailbox::command`] (ACPI 6.4, "Multiprocessor Wakeup Mailbox Structure").
pub mod mailbox_command {
    /// Nothing asked, or the last request is acknowledged.
    pub const NOOP: u16 = 0;
    /// The CPU `apic_id` jumps to `wakeup_vector`.
    pub const WAKEUP: u16 = 1;
    /// The CPU `apic_id` acknowledges, and stays.
    pub const TEST: u16 = 2;
}

/// APIC ids that [`Mailbox::parked`] has a bit for. A CPU with a higher one parks and wakes like any other, but cannot
/// be seen parked (Linux counts to 8192 CPUs).
pub const MAILBOX_APIC_IDS: u32 = 32 * PARKED_WORDS as u32;
const PARKED_WORDS: usize = 0x600 / 4;

/// The ACPI multiprocessor wakeup mailbox. The first half is the operating system's, the second the firmware's: ours.
///
/// The firmware half starts as zeros. Whoever stops a parked CPU by INIT clears its bit and takes it off the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Mailbox {
    /// One of [`mailbox_command`]; written last by the kernel, cleared by the CPU that was meant.
    pub command: u16,
    /// Zero.
    pub reserved: u16,
    /// The CPU that is meant.
    pub apic_id: u32,
    /// Where it shall go.
    pub wakeup_vector: u64,
    /// The rest of the operating system's half; not looked at.
    pub os: [u8; 0x7f0],
    /// How many CPUs wait here. For people and logs: an NMI between a CPU's two writes can make it wrong by one,
    /// so decide by [`Mailbox::is_parked`].
    pub parked_count: u32,
    /// NMIs that parked CPUs took and ignored.
    pub nmis: u32,
    /// Machine checks that they took; what they were about is in their banks.
    pub machine_checks: u32,
    /// Zero.
    pub firmware: [u8; 0x1f4],
    /// A bit for each APIC id: set while that CPU waits here.
    pub parked: [u32; PARKED_WORDS],
}

const _: () = assert!(size_of::<Mailbox>() == 4096);
const _: () = assert!(core::mem::offset_of!(Mailbox, wakeup_vector) == 8);
const _: () = assert!(core::mem::offset_of!(Mailbox, parked_count) == 0x800);
const _: () = assert!(core::mem::offset_of!(Mailbox, parked) == 0xa00);

impl Mailbox {
    /// Whether this CPU waits in the park page, so that a kernel may online it (Linux waits for the answer without limit).
    pub fn is_parked(&self, apic_id: u32) -> bool {
        self.parked.get((apic_id / 32) as usize).is_some_and(|word| word & 1 << (apic_id % 32) != 0)
    }
}

/// Values of [`YieldArgs::command`].
pub mod yield_command {
    /// Keep watching.
    pub const WAIT: u64 = 0;
    /// Go back to the kernel that yielded.
    pub const RESUME: u64 = 1;
    /// Go to [`YieldArgs::park_entry`](super::YieldArgs::park_entry), never to come back.
    pub const PARK: u64 = 2;
    /// Written by the loop itself: the dead-man switch has fired. Whoever gives a command does it by
    /// compare-and-exchange from [`WAIT`], so that exactly one side wins.
    pub const FIRED: u64 = 3;
}

/// Values of [`YieldArgs::reason`].
pub mod yield_reason {
    /// It has not come back.
    pub const NONE: u64 = 0;
    /// It was told to resume.
    pub const RESUMED: u64 = 1;
    /// The heartbeat stopped for longer than the deadline; the successor's CPUs were stopped first.
    pub const DEAD_MAN: u64 = 2;
}

/// CPUs that a dead-man switch can stop.
pub const MAX_FENCE: usize = (4096 - 0x88) / 4;

/// Arguments of the yield loop, a page that both kernels see. One writer for each field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct YieldArgs {
    /// One of [`yield_command`].
    pub command: u64,
    /// The park page.
    pub park_entry: u64,
    /// TSC ticks without a heartbeat after which the switch fires; 0 = never. Time that the loop did not itself watch (a
    /// stopped virtual machine, system management mode) does not count: a single look adds a sixteenth of it at most.
    pub deadline_ticks: u64,
    /// Out: one of [`yield_reason`].
    pub reason: u64,
    /// Out: the silence counted when it came back, TSC ticks.
    pub silence_ticks: u64,
    /// Zero.
    pub reserved: u64,
    /// Out: what the loop is doing.
    pub epitaph: Epitaph,
    /// Written by the successor, anything that differs from the value before. On a cache line of its own.
    pub heartbeat: u64,
    /// Zero.
    pub reserved_line: [u64; 7],
    /// How many of `fence_ids` count.
    pub fence_count: u64,
    /// APIC ids of all CPUs that the successor runs on.
    pub fence_ids: [u32; MAX_FENCE],
}

const _: () = assert!(size_of::<YieldArgs>() == 4096);
const _: () = assert!(core::mem::offset_of!(YieldArgs, heartbeat) % 64 == 0);

/// Why a set of CPUs cannot be fenced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FenceError {
    /// The list is one page with the rest.
    #[error("{given} CPUs to fence, but the yield arguments hold {MAX_FENCE}")]
    TooMany {
        /// How many were given.
        given: usize,
    },
    /// It would stop the CPU that runs the loop, and all others with it.
    #[error("APIC id 0xffffffff is the broadcast address")]
    Broadcast,
}

impl YieldArgs {
    /// Waiting, with no dead-man switch and nobody to fence.
    pub fn new(park_entry: u64) -> YieldArgs {
        let mut args = YieldArgs::new_zeroed();
        args.park_entry = park_entry;
        args.epitaph = Epitaph::of(b"baton.yi");
        args
    }

    /// Fire after `deadline_ticks` without a heartbeat, and stop these CPUs then.
    ///
    /// Leave out the CPU that the firmware booted (IA32_APIC_BASE.BSP): INIT sends it to the firmware's reset vector.
    pub fn arm(&mut self, deadline_ticks: u64, apic_ids: &[u32]) -> Result<(), FenceError> {
        if apic_ids.len() > MAX_FENCE {
            return Err(FenceError::TooMany { given: apic_ids.len() });
        }
        // 0xff is a CPU in x2APIC mode and broadcast in xAPIC mode. Only the loop knows the mode; it leaves out what
        // xAPIC cannot address.
        if apic_ids.contains(&u32::MAX) {
            return Err(FenceError::Broadcast);
        }
        self.deadline_ticks = deadline_ticks;
        self.fence_count = apic_ids.len() as u64;
        self.fence_ids = [0; MAX_FENCE];
        self.fence_ids[..apic_ids.len()].copy_from_slice(apic_ids);
        Ok(())
    }
}
