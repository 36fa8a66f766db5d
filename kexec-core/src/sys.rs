//! The module's header in Rust, and the two system calls that need `unsafe`: ioctl and mmap.
//!
//! `kmod/uapi/baton.h` is the definition; `tests/uapi.rs` compiles it and compares every size, offset and constant with
//! this file. Nothing here decides anything: see [`crate::device`].

#![expect(unsafe_code, reason = "the door: ioctl, mmap, and memory that another kernel writes")]

use std::marker::PhantomData;
use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use state_schemas::shared::SharedMemory;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// `BATON_ABI_VERSION`.
pub const ABI_VERSION: u32 = 1;
/// `BATON_DEVICE`.
pub const DEVICE: &str = "/dev/baton";
/// `BATON_NAME_LEN`, NUL included.
pub const NAME_LEN: usize = 32;
/// `BATON_IMAGE_LEN`, NUL included.
pub const IMAGE_LEN: usize = 64;
/// `BATON_PCI_MAX`.
pub const PCI_MAX: usize = 32;
/// `BATON_SELF`.
pub const SELF: u32 = 0;

/// Every number of the header but the calls', under its name there, without `BATON_`.
pub const ALL_NUMBERS: &[(&str, u64)] = &[
    ("ABI_VERSION", ABI_VERSION as u64),
    ("NAME_LEN", NAME_LEN as u64),
    ("IMAGE_LEN", IMAGE_LEN as u64),
    ("PCI_MAX", PCI_MAX as u64),
    ("SELF", SELF as u64),
    ("INFO_X2APIC", INFO_X2APIC as u64),
    ("INFO_LA57", INFO_LA57 as u64),
    ("INFO_LOCKDOWN", INFO_LOCKDOWN as u64),
    ("CPU_PRESENT", CPU_PRESENT as u64),
    ("CPU_ONLINE", CPU_ONLINE as u64),
    ("MEM_ALLOC", MEM_ALLOC as u64),
    ("MEM_OUTSIDE", MEM_OUTSIDE as u64),
    ("MEM_RESERVED", MEM_RESERVED as u64),
    ("MEM_BORROW", MEM_BORROW as u64),
    ("FD_READONLY", FD_READONLY as u64),
    ("FD_PAGES", FD_PAGES as u64),
    ("FILE_KEEP", FILE_KEEP as u64),
    ("CPU_RECORD", CPU_RECORD as u64),
    ("CPU_START", CPU_START as u64),
    ("CPU_FENCE", CPU_FENCE as u64),
    ("FREEZE_LOOK", FREEZE_LOOK as u64),
    ("OBSTACLE_NONE", OBSTACLE_NONE as u64),
    ("OBSTACLE_BRIDGE", OBSTACLE_BRIDGE as u64),
    ("OBSTACLE_NO_CALLBACKS", OBSTACLE_NO_CALLBACKS as u64),
    ("OBSTACLE_INTX", OBSTACLE_INTX as u64),
    ("OBSTACLE_FAILED", OBSTACLE_FAILED as u64),
    ("OBSTACLE_MASTER", OBSTACLE_MASTER as u64),
    ("END_MACHINE", END_MACHINE as u64),
    ("END_ALONE", END_ALONE as u64),
];

/// `BATON_INFO_X2APIC`.
pub const INFO_X2APIC: u32 = 1 << 0;
/// `BATON_INFO_LA57`.
pub const INFO_LA57: u32 = 1 << 1;
/// `BATON_INFO_LOCKDOWN`.
pub const INFO_LOCKDOWN: u32 = 1 << 2;
/// `BATON_CPU_PRESENT`.
pub const CPU_PRESENT: u32 = 1 << 0;
/// `BATON_CPU_ONLINE`.
pub const CPU_ONLINE: u32 = 1 << 1;
/// `BATON_MEM_ALLOC`.
pub const MEM_ALLOC: u32 = 0;
/// `BATON_MEM_OUTSIDE`.
pub const MEM_OUTSIDE: u32 = 1;
/// `BATON_MEM_RESERVED`.
pub const MEM_RESERVED: u32 = 2;
/// `BATON_MEM_BORROW`.
pub const MEM_BORROW: u32 = 3;
/// `BATON_FD_READONLY`.
pub const FD_READONLY: u32 = 1 << 0;
/// `BATON_FD_PAGES`.
pub const FD_PAGES: u32 = 1 << 1;
/// `BATON_FILE_KEEP`.
pub const FILE_KEEP: u32 = 1 << 0;
/// `BATON_CPU_RECORD`.
pub const CPU_RECORD: u32 = 0;
/// `BATON_CPU_START`.
pub const CPU_START: u32 = 1;
/// `BATON_CPU_FENCE`.
pub const CPU_FENCE: u32 = 2;

/// `BATON_FREEZE_LOOK`.
pub const FREEZE_LOOK: u32 = 1 << 0;
/// `BATON_OBSTACLE_NONE`.
pub const OBSTACLE_NONE: u32 = 0;
/// `BATON_OBSTACLE_BRIDGE`.
pub const OBSTACLE_BRIDGE: u32 = 1;
/// `BATON_OBSTACLE_NO_CALLBACKS`.
pub const OBSTACLE_NO_CALLBACKS: u32 = 2;
/// `BATON_OBSTACLE_INTX`.
pub const OBSTACLE_INTX: u32 = 3;
/// `BATON_OBSTACLE_FAILED`.
pub const OBSTACLE_FAILED: u32 = 4;
/// `BATON_OBSTACLE_MASTER`.
pub const OBSTACLE_MASTER: u32 = 5;

/// `BATON_END_MACHINE`.
pub const END_MACHINE: u32 = 0;
/// `BATON_END_ALONE`.
pub const END_ALONE: u32 = 1;

/// A struct of the header: plain data whose first field is its own size.
pub trait Message: Copy + FromBytes + IntoBytes + Immutable + KnownLayout {
    /// Fills in `size`.
    fn set_size(&mut self, size: u32);
}

/// What the compiler made of a [`Message`], for the comparison with the header.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// The struct's name in the header.
    pub name: &'static str,
    /// Its size.
    pub size: usize,
    /// Name, offset and size of each field.
    pub fields: &'static [(&'static str, usize, usize)],
}

/// Size of the field that this closure would give.
const fn field_size<M, F>(_: fn(&M) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $c_name:literal { $($field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[expect(missing_docs, reason = "the fields are the header's, described there")]
        pub struct $name { pub size: u32, $(pub $field: $type),* }

        impl Message for $name {
            fn set_size(&mut self, size: u32) { self.size = size; }
        }

        impl Default for $name {
            fn default() -> Self { Self::new_zeroed() }
        }
    )*
        /// Every struct of the header.
        pub const ALL_MESSAGES: &[Layout] = &[$(Layout {
            name: $c_name,
            size: size_of::<$name>(),
            fields: &[
                ("size", offset_of!($name, size), 4),
                $((stringify!($field), offset_of!($name, $field), field_size(|m: &$name| &m.$field))),*
            ],
        }),*];
    };
}

messages! {
    /// `struct baton_info`.
    Info = "baton_info" { abi: u32, flags: u32, tsc_khz: u32, memory_block_size: u64, possible_cpus: u32, instances: u32, rings: u64, muffled: u64 }
    /// `struct baton_cpu_info`.
    CpuInfo = "baton_cpu_info" { cpu: u32, apic_id: u32, flags: u32 }
    /// `struct baton_instance`.
    Instance = "baton_instance" { id: u32, state: u32, reserved: u32, name: [u8; NAME_LEN], image: [u8; IMAGE_LEN] }
    /// `struct baton_mem`.
    Mem = "baton_mem" { instance: u32, how: u32, reserved: u32, start: u64, len: u64 }
    /// `struct baton_mem_fd`.
    MemFd = "baton_mem_fd" { flags: u32, start: u64, len: u64, fd: i32, reserved: u32 }
    /// `struct baton_mem_file`.
    MemFile = "baton_mem_file" { flags: u32, fd: i32, reserved: u32, start: u64, len: u64, offset: u64 }
    /// `struct baton_adopt`.
    Adopt = "baton_adopt" { reserved: u32, start: u64, len: u64 }
    /// `struct baton_cpu`.
    Cpu = "baton_cpu" { instance: u32, apic_id: u32, how: u32, start_pa: u64 }
    /// `struct baton_doorbell`.
    Doorbell = "baton_doorbell" { eventfd: i32, apic_id: u32, vector: u32, instance: u32 }
    /// `struct baton_yield`.
    Yield = "baton_yield" { reserved: u32, entry_pa: u64, arg_pa: u64, table_pa: u64, ident_pa: u64, away_tsc: u64 }
    /// `struct baton_pci`.
    Pci = "baton_pci" { domain: u32, ecam_pa: u64, bus_end: u32, functions: u32, bdf: [u16; PCI_MAX] }
    /// `struct baton_pci_function`.
    PciFunction = "baton_pci_function" { instance: u32, domain: u32, bdf: u32, how: u32, devices: u32, obstacle: u32, error: u32, device: [u8; NAME_LEN] }
    /// `struct baton_panic_notice`.
    PanicNotice = "baton_panic_notice" { apic_id: u32, vector: u32, reserved: u32, pa: u64, value: u64 }
    /// `struct baton_end`.
    End = "baton_end" { how: u32 }
    /// `struct baton_sleep_type`.
    SleepType = "baton_sleep_type" { state: u32, type_a: u32, type_b: u32, reserved: u32 }
    /// `struct baton_ioapic`.
    Ioapic = "baton_ioapic" { reserved: u32, pa: u64 }
    /// `struct baton_iommu`.
    Iommu = "baton_iommu" { reserved: u32 }
}

const _: () = assert!(size_of::<Info>() == 48);
const _: () = assert!(size_of::<CpuInfo>() == 16);
const _: () = assert!(size_of::<Instance>() == 16 + NAME_LEN + IMAGE_LEN);
const _: () = assert!(size_of::<Mem>() == 32);
const _: () = assert!(size_of::<MemFd>() == 32);
const _: () = assert!(size_of::<MemFile>() == 40);
const _: () = assert!(size_of::<Adopt>() == 24);
const _: () = assert!(size_of::<Cpu>() == 24);
const _: () = assert!(size_of::<Doorbell>() == 20);
const _: () = assert!(size_of::<Yield>() == 48);
const _: () = assert!(size_of::<Pci>() == 24 + 2 * PCI_MAX);
const _: () = assert!(size_of::<PciFunction>() == 32 + NAME_LEN);
const _: () = assert!(size_of::<PanicNotice>() == 32);
const _: () = assert!(size_of::<End>() == 8);
const _: () = assert!(size_of::<SleepType>() == 20);
const _: () = assert!(size_of::<Ioapic>() == 16);
const _: () = assert!(size_of::<Iommu>() == 8);

/// One call of the device and the struct that goes with it. Only this file makes them: the pairing is what makes
/// [`Call::on`] sound.
#[derive(Debug, Clone, Copy)]
pub struct Call<M: Message> {
    nr: u8,
    name: &'static str,
    message: PhantomData<M>,
}

impl<M: Message> Call<M> {
    const fn new(nr: u8, name: &'static str) -> Call<M> {
        Call { nr, name, message: PhantomData }
    }

    /// The number as `ioctl` takes it: `_IO(0xBA, nr)`.
    pub const fn request(self) -> u32 {
        0xba << 8 | self.nr as u32
    }

    /// Its name without `BATON_IOC_`.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Makes the call; the module's answer is in `message` afterwards.
    pub fn on(self, device: BorrowedFd<'_>, message: &mut M) -> Result<(), Errno> {
        message.set_size(size_of::<M>() as u32);
        // SAFETY:
        // 1. `device` is open for the duration of the call.
        // 2. The third argument points to `size_of::<M>()` bytes that we borrow exclusively, and their first field says
        //    so: the module reads and writes no more than that (copy_struct_from_user and its counterpart).
        // 3. Every bit pattern is a valid `M` (FromBytes), so whatever is written leaves it valid.
        // 4. Another device with the same numbers is ruled out by `Device::open`, which asks for INFO first; INFO's
        //    number, `_IO(0xBA, 0)`, belongs to no driver in Documentation/userspace-api/ioctl/ioctl-number.rst.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), self.request().into(), std::ptr::from_mut(message)) };
        Errno::result(result).map(drop)
    }
}

macro_rules! calls {
    ($($name:ident: $message:ident = $nr:literal;)*) => {
        $(
            #[doc = concat!("`BATON_IOC_", stringify!($name), "`.")]
            pub const $name: Call<$message> = Call::new($nr, stringify!($name));
        )*
        /// Name and number of every call, for the comparison with the header.
        pub const ALL_CALLS: &[(&str, u32)] = &[$((stringify!($name), $name.request())),*];
    };
}

calls! {
    INFO: Info = 0x00;
    CPU_INFO: CpuInfo = 0x01;
    INSTANCE_CREATE: Instance = 0x10;
    INSTANCE_UPDATE: Instance = 0x11;
    INSTANCE_DESTROY: Instance = 0x12;
    MEM_TAKE: Mem = 0x20;
    MEM_GIVE_BACK: Mem = 0x21;
    MEM_FD: MemFd = 0x22;
    MEM_ADOPT: Adopt = 0x23;
    MEM_FILE: MemFile = 0x24;
    CPU_GIVE: Cpu = 0x30;
    CPU_TAKE: Cpu = 0x31;
    DOORBELL_OPEN: Doorbell = 0x40;
    DOORBELL_RING: Doorbell = 0x41;
    DOORBELL_CONNECT: Doorbell = 0x42;
    YIELD: Yield = 0x50;
    PCI_ADD: Pci = 0x60;
    PCI_REMOVE: Pci = 0x61;
    PCI_FREEZE: PciFunction = 0x62;
    PCI_RESTORE: PciFunction = 0x63;
    PANIC_NOTICE: PanicNotice = 0x70;
    END: End = 0x80;
    SLEEP_TYPE: SleepType = 0x81;
    IOAPIC_MASK: Ioapic = 0x82;
    IOMMU_OFF: Iommu = 0x83;
}

/// Takes over a file descriptor that the module has made for us.
pub(crate) fn adopt_fd(fd: i32) -> Option<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: BATON_IOC_MEM_FD has just installed this descriptor in our table (fd >= 0 is checked), and nobody else
    // knows its number. (A played module gives a descriptor away that it has made for this call.)
    (fd >= 0).then(|| unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}

/// Whether a mapping can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writing panics.
    ReadOnly,
    /// Writing works.
    ReadWrite,
}

/// A shared mapping of a file: of the module (`BATON_IOC_MEM_FD`), or an ordinary one (tests, memfd).
///
/// Another kernel may write this memory at any time, so no reference into it is ever made: bytes are copied by
/// volatile accesses, words are atomic.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    access: Access,
}

// SAFETY: 1. The mapping belongs to the process, not to a thread. 2. All access is volatile or atomic, and made for
// memory that others write at the same time; a second thread is just one more of those.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of the file. A file that is shorter, or made shorter later, would end us with SIGBUS:
    /// the module's files cannot be, memfds should carry `F_SEAL_SHRINK`.
    pub fn new(file: impl AsFd, len: u64, access: Access) -> Result<Mapping, Errno> {
        let len = usize::try_from(len).ok().and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        let protection = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice, so nothing that exists is replaced.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Mapping { start: start.cast(), len: len.get(), access })
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty range cannot be mapped.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Panics unless `[offset, offset + len)` lies in the mapping.
    fn at(&self, offset: u64, len: usize) -> NonNull<u8> {
        let fits = usize::try_from(offset).is_ok_and(|o| o.checked_add(len).is_some_and(|end| end <= self.len));
        assert!(fits, "{len} bytes at {offset:#x} are outside of a mapping of {:#x}", self.len);
        // SAFETY: checked above: the result is in the mapping or one past its end.
        unsafe { self.start.add(offset as usize) }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let at = self.at(offset, 8).cast::<u64>();
        assert!(at.is_aligned(), "word at {offset:#x} is not 8-aligned");
        // SAFETY: 1. eight bytes in the mapping (checked), 2. aligned (checked), 3. mapped for as long as `self` is
        // borrowed, 4. every access to it from this process is atomic or volatile, and what another kernel
        // does to it is as if another process did it.
        unsafe { AtomicU64::from_ptr(at.as_ptr()) }
    }

    /// The memory as a slice: for an arena, whose content a program uses in place.
    ///
    /// # Safety
    /// While the result lives:
    /// 1. nobody else writes this memory: no other process, and no other kernel. Between two kernels that is the rule of
    ///    the epoch (only its holder touches arenas; the other has frozen); within one it is the caller's business;
    /// 2. [`SharedMemory::write`] and [`SharedMemory::store`] are not used on it.
    pub unsafe fn as_bytes(&self) -> &[u8] {
        // SAFETY: 1. start and len are those of the mapping; 2. any byte is a valid u8; 3. unchanging by the contract.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// As [`Mapping::as_bytes`], and nobody else reads it either.
    pub unsafe fn as_bytes_mut(&mut self) -> &mut [u8] {
        assert_eq!(self.access, Access::ReadWrite, "mapping is read-only");
        // SAFETY: as in `as_bytes`; writable (checked); exclusive by the contract and by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and no reference into it outlives `self`.
        let result = unsafe { munmap(self.start.cast(), self.len) };
        debug_assert_eq!(result, Ok(()));
    }
}

impl SharedMemory for Mapping {
    fn size(&self) -> u64 {
        self.len as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        let (head, body) = split(from, into.len());
        let (first, rest) = into.split_at_mut(head);
        let (words, last) = rest.split_at_mut(body);
        // SAFETY (all three): the source lies in the mapping (checked by `at`), the words are aligned by `split`, and
        // volatile reads may see any mixture of old and new bytes, each of which is a valid u8.
        for (i, byte) in first.iter_mut().enumerate() {
            // SAFETY: see above.
            *byte = unsafe { from.add(i).read_volatile() };
        }
        for (i, word) in words.chunks_exact_mut(8).enumerate() {
            // SAFETY: see above.
            let value = unsafe { from.add(head + 8 * i).cast::<u64>().read_volatile() };
            word.copy_from_slice(&u64::to_le_bytes(value));
        }
        for (i, byte) in last.iter_mut().enumerate() {
            // SAFETY: see above.
            *byte = unsafe { from.add(head + body + i).read_volatile() };
        }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        assert_eq!(self.access, Access::ReadWrite, "mapping is read-only");
        let into = self.at(offset, from.len());
        let (head, body) = split(into, from.len());
        let (first, rest) = from.split_at(head);
        let (words, last) = rest.split_at(body);
        // SAFETY (all three): the target lies in the mapping and is writable (checked), and no reference into the mapping
        // exists (contract of `as_bytes`).
        for (i, byte) in first.iter().enumerate() {
            // SAFETY: see above.
            unsafe { into.add(i).write_volatile(*byte) };
        }
        for (i, word) in words.chunks_exact(8).enumerate() {
            let value = u64::from_le_bytes(word.try_into().expect("a chunk of 8"));
            // SAFETY: see above; aligned by `split`.
            unsafe { into.add(head + 8 * i).cast::<u64>().write_volatile(value) };
        }
        for (i, byte) in last.iter().enumerate() {
            // SAFETY: see above.
            unsafe { into.add(head + body + i).write_volatile(*byte) };
        }
    }

    fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    fn store(&self, offset: u64, value: u64) {
        assert_eq!(self.access, Access::ReadWrite, "mapping is read-only");
        self.word(offset).store(value, Ordering::Release);
    }
}

/// How many bytes come before the first aligned word, and how many bytes the words have.
fn split(at: NonNull<u8>, len: usize) -> (usize, usize) {
    let head = at.align_offset(8).min(len);
    (head, (len - head) & !7)
}
