//! `/dev/baton`, call by call, with an error for each that says who has to act.
//!
//! Thin on purpose: it decides nothing, and knows nothing of updates. The module does not either: both are mechanism.

use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitflags::bitflags;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::memory_map::Range;
use crate::registry::State;
use crate::sys::{self, Call, Message};
pub use crate::sys::{Access, Mapping};

/// The id of the kernel that the module runs in.
pub const SELF: u32 = sys::SELF;

/// The open device. Doorbell and panic notice end with it.
#[derive(Debug)]
pub struct Device {
    door: Door,
}

/// Who answers the calls.
#[derive(Debug)]
enum Door {
    Module(File),
    Played(Arc<dyn Played>),
}

/// A module that a test plays, so that what is done with the device can be tested without one: it gets the very bytes that the module
/// would get, and answers as that would.
pub trait Played: fmt::Debug + Send + Sync {
    /// Answers one call: its number ([`Call::request`]) and its message ([`crate::sys`]), with the answer in the message afterwards.
    ///
    /// # Errors
    /// What the module would say.
    fn answer(&self, request: u32, message: &mut [u8]) -> Result<(), Errno>;
}

/// Who has to do something about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blame {
    /// The person: load the module, become root, switch lockdown off.
    Operator,
    /// Nobody: the same call may work with another range or CPU, or later.
    Circumstances,
    /// This machine or kernel cannot do it.
    Machine,
    /// Our own code: module and program contradict each other.
    Bug,
}

/// Why the device did not do it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No device.
    #[error("{} does not exist: the module is not loaded (modprobe baton)", .path.display())]
    ModuleMissing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Not allowed to open it, or no capability.
    #[error("no permission for {call} on the device: run as root (CAP_SYS_ADMIN, CAP_SYS_BOOT, CAP_SYS_RAWIO)")]
    NoPermission {
        /// Which call, or `open`.
        call: &'static str,
    },
    /// It opened, but is something else.
    #[error("{} is not the device of the module baton: {errno}", .path.display())]
    NotBaton {
        /// Which file.
        path: PathBuf,
        /// What it said to INFO.
        errno: Errno,
    },
    /// Another version of the module.
    #[error(
        "the loaded module speaks version {module} of the interface, this program {ours}: install both from one release, then unload and load the module"
    )]
    OtherVersion {
        /// Its version.
        module: u32,
        /// Our version.
        ours: u32,
    },
    /// Kernel lockdown.
    #[error(
        "kernel lockdown forbids starting another kernel (see /sys/kernel/security/lockdown); boot without it, or with Secure Boot off"
    )]
    Lockdown,
    /// The module lacks the call, or a field of it.
    #[error("the loaded module does not know {call} as this program uses it ({errno}): install both from one release")]
    Unknown {
        /// Which call.
        call: &'static str,
        /// ENOTTY or E2BIG.
        errno: Errno,
    },
    /// In use.
    #[error("{call} {subject}: in use, or cannot be moved now")]
    Busy {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
    },
    /// Not there.
    #[error("{call} {subject}: there is no such thing")]
    NoSuch {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
    },
    /// Taken already.
    #[error("{call} {subject}: overlaps what is there already")]
    Exists {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
    },
    /// Not here.
    #[error("{call} {subject}: this machine or kernel cannot do it")]
    Unsupported {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
    },
    /// Out of memory.
    #[error("{call} {subject}: the kernel has no memory left for it")]
    NoMemory {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
    },
    /// The arguments are wrong, which means that we are.
    #[error("{call} {subject}: refused as contradictory ({errno}); this is a bug in baton")]
    Refused {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
        /// EINVAL, ERANGE or EFAULT.
        errno: Errno,
    },
    /// A text that the module would not take.
    #[error("{what} {text:?} cannot be used: {reason}")]
    Text {
        /// `name` or `image`.
        what: &'static str,
        /// The text.
        text: String,
        /// Why.
        reason: String,
    },
    /// A file whose pages cannot become those of a memory object.
    #[error("the file's pages cannot be exchanged: {why} ({errno})")]
    File {
        /// What is wrong with it.
        why: &'static str,
        /// EINVAL, ERANGE, EOPNOTSUPP or EBUSY.
        errno: Errno,
    },
    /// A PCI function that cannot hibernate, or did not.
    #[error("PCI function {function} cannot be {what} another kernel: {why}")]
    Hibernation {
        /// Which.
        function: String,
        /// `given to` or `taken back from`.
        what: &'static str,
        /// What stands against it, and what to do.
        why: Obstacle,
    },
    /// Anything else.
    #[error("{call} {subject}: {errno}")]
    Other {
        /// Which call.
        call: &'static str,
        /// On what.
        subject: String,
        /// What the kernel said.
        errno: Errno,
    },
}

impl DeviceError {
    /// Who has to act.
    pub fn blame(&self) -> Blame {
        use DeviceError::*;
        match self {
            ModuleMissing { .. }
            | NoPermission { .. }
            | NotBaton { .. }
            | OtherVersion { .. }
            | Lockdown
            | Unknown { .. }
            | Text { .. } => Blame::Operator,
            Busy { .. } | NoMemory { .. } | NoSuch { .. } | Exists { .. } | File { .. } => Blame::Circumstances,
            Unsupported { .. } | Other { .. } | Hibernation { .. } => Blame::Machine,
            Refused { .. } => Blame::Bug,
        }
    }

    /// Whether the same call may work on something else, or later: EBUSY of a memory range or CPU.
    pub fn is_busy(&self) -> bool {
        matches!(self, DeviceError::Busy { .. })
    }
}

bitflags! {
    /// What a kernel is like.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct InfoFlags: u32 {
        /// The interrupt command register is written by MSR.
        const X2APIC = sys::INFO_X2APIC;
        /// Five-level page tables are in use.
        const LA57 = sys::INFO_LA57;
        /// Kernel lockdown.
        const LOCKDOWN = sys::INFO_LOCKDOWN;
    }
}

/// The kernel that the module runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// What it is like.
    pub flags: InfoFlags,
    /// Frequency of its TSC.
    pub tsc_khz: u32,
    /// Grain of [`Device::adopt_memory`] for what this kernel does not know.
    pub memory_block_size: u64,
    /// One more than the highest CPU number.
    pub possible_cpus: u32,
    /// Instances, this kernel not counted.
    pub instances: u32,
    /// Rings that this open device's doorbell has heard.
    pub rings: u64,
    /// Of these, how many came too thick to be signalled one by one. Another kernel that rings as often as that is broken, or wants
    /// to keep this one from its work: an update needs a few rings for each step.
    pub muffled: u64,
}

/// One logical CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuInfo {
    /// Linux's number.
    pub cpu: u32,
    /// Its APIC id.
    pub apic_id: u32,
    /// It is in the machine.
    pub present: bool,
    /// It runs this kernel.
    pub online: bool,
}

/// How memory is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum TakeMemory {
    /// Out of this kernel's allocator, moving what can be moved.
    Alloc = sys::MEM_ALLOC,
    /// Memory that this kernel's map of boot calls reserved, or, below 640 KiB, says nothing of.
    Outside = sys::MEM_OUTSIDE,
    /// RAM that was reserved at boot; it becomes ordinary allocated memory.
    Reserved = sys::MEM_RESERVED,
    /// RAM below 1 MiB that stays reserved.
    Borrow = sys::MEM_BORROW,
}

bitflags! {
    /// How a memory file behaves.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct FileFlags: u32 {
        /// It can only be mapped for reading.
        const READONLY = sys::FD_READONLY;
        /// Mapped by struct page, so that O_DIRECT, futexes and ptrace work on it.
        const PAGES = sys::FD_PAGES;
    }
}

/// Whose content stays when the pages of a memory object take the place of a file's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The file's: it is copied into the pages.
    OfFile,
    /// The pages': the file shows it.
    OfMemory,
}

/// How a CPU goes to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveCpu {
    /// INIT, SIPI, SIPI to this page below 1 MiB.
    Start {
        /// Physical address of the page.
        page: u64,
    },
    /// Only recorded; something else wakes it.
    Record,
}

/// How a CPU comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakeCpu {
    /// INIT first, so that whatever ran there stops. Never the CPU that the firmware booted: it would reset the machine.
    Fence,
    /// Only recorded.
    Record,
}

/// What it means for the machine that this kernel restarts, powers off, executes another one, or panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The machine is this kernel's, and ends with it. CPUs that were given away are stopped first.
    Machine,
    /// The machine is another kernel's: only this kernel stops.
    Alone,
}

/// Where a doorbell rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bell {
    /// CPU.
    pub apic_id: u32,
    /// Vector there.
    pub vector: u32,
}

impl Bell {
    /// As one word of the control block (`words::INCUMBENT_BELL_AT`).
    pub const fn to_word(self) -> u64 {
        self.apic_id as u64 | (self.vector as u64) << 32
    }

    /// From that word; nothing while there is no bell, or no possible one.
    pub const fn from_word(word: u64) -> Option<Bell> {
        let bell = Bell { apic_id: word as u32, vector: (word >> 32) as u32 };
        let possible = bell.vector >= 32 && bell.vector < 256 && bell.apic_id != u32::MAX && bell.apic_id != 0xff;
        if possible { Some(bell) } else { None }
    }
}

impl fmt::Display for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} at APIC id {:#x}", self.vector, self.apic_id)
    }
}

/// How the last CPU leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Yield {
    /// Where it jumps to (the yield page).
    pub entry: u64,
    /// Passed in `rsi` (the yield arguments).
    pub arg: u64,
    /// A page that becomes the transition table.
    pub table: u64,
    /// Root of the identity map whose lower half goes into it.
    pub identity: u64,
}

/// One PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PciFunction {
    /// Bus.
    pub bus: u8,
    /// Device, below 32.
    pub device: u8,
    /// Function, below 8.
    pub function: u8,
}

impl PciFunction {
    const fn bdf(self) -> u16 {
        (self.bus as u16) << 8 | (self.device as u16 & 31) << 3 | (self.function as u16 & 7)
    }
}

/// Why a PCI function cannot be frozen for another kernel. What is displayed names the driver and says who must act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// It is a bridge.
    #[error("it is a bridge, and bridges stay as they are; name a function behind it")]
    Bridge,
    /// A driver lacks what hibernation needs.
    #[error(
        "{driver}, the driver of {device}, cannot hibernate; give the device another driver, or take it out of the configuration"
    )]
    NoCallbacks {
        /// The device's name: the function itself, or what is below it.
        device: String,
        /// Its driver's name, as far as sysfs tells.
        driver: String,
    },
    /// No message interrupts.
    #[error(
        "{driver} runs it with neither MSI-X nor MSI, and another kernel has no other interrupts (is pci=nomsi on the command line?)"
    )]
    Intx {
        /// Its driver's name.
        driver: String,
    },
    /// A driver's callback said no.
    #[error("{driver}, the driver of {device}, said {errno}; see this kernel's log for why")]
    Failed {
        /// The device's name.
        device: String,
        /// Its driver's name.
        driver: String,
        /// What it said.
        errno: Errno,
    },
    /// Bus mastership cannot be taken away from it.
    #[error("it goes on being a bus master, so it could write into memory of another kernel: the device is broken")]
    Master,
    /// Something that a newer module knows.
    #[error("the module has a reason that this program does not know ({0}): install both from one release")]
    Unknown(u32),
}

/// A PCI function of this kernel, wherever its driver sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placed {
    /// PCI domain (segment).
    pub domain: u32,
    /// Bus, device and function in it.
    pub function: PciFunction,
}

impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}", self.domain, self.function)
    }
}

impl Device {
    /// Opens the device; refuses a module of another version, and a kernel under lockdown.
    pub fn open() -> Result<Device, DeviceError> {
        let device = Device::inspect()?;
        if device.info()?.flags.contains(InfoFlags::LOCKDOWN) {
            return Err(DeviceError::Lockdown);
        }
        Ok(device)
    }

    /// Opens the device to look only: lockdown is no obstacle to that.
    pub fn inspect() -> Result<Device, DeviceError> {
        Device::at(Path::new(sys::DEVICE))
    }

    fn at(path: &Path) -> Result<Device, DeviceError> {
        let path_buf = || path.to_owned();
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => DeviceError::ModuleMissing { path: path_buf() },
            io::ErrorKind::PermissionDenied => DeviceError::NoPermission { call: "open" },
            _ => match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
                // The node is there, the driver behind it is not.
                Errno::ENXIO | Errno::ENODEV => DeviceError::ModuleMissing { path: path_buf() },
                errno => DeviceError::Other { call: "open", subject: path.display().to_string(), errno },
            },
        })?;
        let mut info = sys::Info::default();
        sys::INFO.on(file.as_fd(), &mut info).map_err(|errno| match errno {
            Errno::E2BIG => DeviceError::Unknown { call: "INFO", errno },
            Errno::EPERM => DeviceError::NoPermission { call: "INFO" },
            errno => DeviceError::NotBaton { path: path_buf(), errno },
        })?;
        if info.abi != sys::ABI_VERSION {
            return Err(DeviceError::OtherVersion { module: info.abi, ours: sys::ABI_VERSION });
        }
        Ok(Device { door: Door::Module(file) })
    }

    /// A device that a test plays.
    pub fn played(module: Arc<dyn Played>) -> Device {
        Device { door: Door::Played(module) }
    }

    /// The same device, opened once more: with a doorbell and a panic notice of its own.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_again(&self) -> Result<Device, DeviceError> {
        match &self.door {
            Door::Module(_) => Device::open(),
            Door::Played(module) => Ok(Device::played(module.clone())),
        }
    }

    /// Keeps every other program that asks the same away from this machine's module, for as long as this value lives: two agents
    /// would each take back what the other holds.
    ///
    /// Gives false when another one has it. The lock is on the device's node, which all mount namespaces share and only root can
    /// open; the kernel drops it with the process.
    ///
    /// # Errors
    /// As flock(2).
    pub fn hold_alone(&self) -> io::Result<bool> {
        let Door::Module(file) = &self.door else { return Ok(true) };
        match file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// What this kernel is.
    pub fn info(&self) -> Result<Info, DeviceError> {
        let mut m = sys::Info::default();
        self.call(sys::INFO, &mut m, || "".into())?;
        Ok(Info {
            flags: InfoFlags::from_bits_retain(m.flags),
            tsc_khz: m.tsc_khz,
            memory_block_size: m.memory_block_size,
            possible_cpus: m.possible_cpus,
            instances: m.instances,
            rings: m.rings,
            muffled: m.muffled,
        })
    }

    /// One logical CPU; nothing past the last possible one.
    pub fn cpu_info(&self, cpu: u32) -> Result<Option<CpuInfo>, DeviceError> {
        let mut m = sys::CpuInfo { cpu, ..Default::default() };
        match self.call(sys::CPU_INFO, &mut m, || format!("of CPU {cpu}")) {
            Ok(()) => Ok(Some(CpuInfo {
                cpu,
                apic_id: m.apic_id,
                present: m.flags & sys::CPU_PRESENT != 0,
                online: m.flags & sys::CPU_ONLINE != 0,
            })),
            Err(DeviceError::NoSuch { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All possible CPUs.
    pub fn cpus(&self) -> Result<Vec<CpuInfo>, DeviceError> {
        let mut cpus = Vec::new();
        for cpu in 0..self.info()?.possible_cpus {
            cpus.extend(self.cpu_info(cpu)?);
        }
        Ok(cpus)
    }

    /// Adds a row to `/proc/multikernel`; gives its id.
    pub fn create_instance(&self, name: &str, image: &str, state: State) -> Result<u32, DeviceError> {
        let mut m = sys::Instance {
            state: state as u32,
            name: text("name", name)?,
            image: text("image", image)?,
            ..Default::default()
        };
        self.call(sys::INSTANCE_CREATE, &mut m, || format!("{name:?}"))?;
        Ok(m.id)
    }

    /// Sets its state, and its image's name when given.
    pub fn update_instance(&self, id: u32, state: State, image: Option<&str>) -> Result<(), DeviceError> {
        let image = text("image", image.unwrap_or_default())?;
        let mut m = sys::Instance { id, state: state as u32, image, ..Default::default() };
        self.call(sys::INSTANCE_UPDATE, &mut m, || format!("of instance {id}"))
    }

    /// Removes it, and gives back the memory it holds.
    pub fn destroy_instance(&self, id: u32) -> Result<(), DeviceError> {
        let mut m = sys::Instance { id, ..Default::default() };
        self.call(sys::INSTANCE_DESTROY, &mut m, || format!("of instance {id}"))
    }

    /// Makes a range a memory object of an instance.
    pub fn take_memory(&self, instance: u32, range: Range, how: TakeMemory) -> Result<(), DeviceError> {
        let mut m =
            sys::Mem { instance, how: how as u32, start: range.start(), len: range.len(), ..Default::default() };
        self.call(sys::MEM_TAKE, &mut m, || format!("of {range} ({how:?})"))
    }

    /// Ends a memory object.
    pub fn give_back_memory(&self, instance: u32, range: Range) -> Result<(), DeviceError> {
        let mut m = sys::Mem { instance, start: range.start(), len: range.len(), ..Default::default() };
        self.call(sys::MEM_GIVE_BACK, &mut m, || format!("of {range}"))
    }

    /// A file for part of a memory object. It can be passed on, and mapped with [`Mapping::new`].
    pub fn memory_file(&self, range: Range, flags: FileFlags) -> Result<OwnedFd, DeviceError> {
        let mut m =
            sys::MemFd { flags: flags.bits(), start: range.start(), len: range.len(), fd: -1, ..Default::default() };
        self.call(sys::MEM_FD, &mut m, || format!("of {range}"))?;
        sys::adopt_fd(m.fd).ok_or_else(|| DeviceError::Other {
            call: sys::MEM_FD.name(),
            subject: format!("of {range}"),
            errno: Errno::EBADF,
        })
    }

    /// Puts pages of a memory object in place of a memfd's own, from `offset` on; what is mapped stays mapped. A call may
    /// be repeated: pages that are there already are left alone.
    pub fn place_in_file(
        &self,
        range: Range,
        memfd: BorrowedFd<'_>,
        offset: u64,
        keep: Content,
    ) -> Result<(), DeviceError> {
        let flags = match keep {
            Content::OfFile => 0,
            Content::OfMemory => sys::FILE_KEEP,
        };
        let (start, len) = (range.start(), range.len());
        let mut m = sys::MemFile { flags, fd: memfd.as_raw_fd(), start, len, offset, ..Default::default() };
        self.send(sys::MEM_FILE, &mut m).map_err(|errno| {
            let why = match errno {
                Errno::EINVAL => "it is no memfd, or one with hugetlbfs pages",
                Errno::ERANGE => "it is shorter than the memory set aside for it: it was cut",
                Errno::EOPNOTSUPP => "it has huge pages (transparent ones, see /sys/kernel/mm/transparent_hugepage)",
                Errno::EBUSY => "a device writes into its pages just now, or its memory is in other use",
                errno => return self.explain(sys::MEM_FILE.name(), format!("of {range}"), errno),
            };
            DeviceError::File { why, errno }
        })
    }

    /// Maps part of a memory object.
    pub fn map(&self, range: Range, access: Access) -> Result<Mapping, DeviceError> {
        let flags = match access {
            Access::ReadOnly => FileFlags::READONLY,
            Access::ReadWrite => FileFlags::empty(),
        };
        let file = self.memory_file(range, flags)?;
        Mapping::new(&file, range.len(), access).map_err(|errno| self.explain("mmap", format!("of {range}"), errno))
    }

    /// Makes RAM this kernel's own, for good: whole memory blocks that it does not know, or pages that are reserved.
    pub fn adopt_memory(&self, range: Range) -> Result<(), DeviceError> {
        let mut m = sys::Adopt { start: range.start(), len: range.len(), ..Default::default() };
        self.call(sys::MEM_ADOPT, &mut m, || format!("of {range}"))
    }

    /// An offline CPU goes to an instance.
    pub fn give_cpu(&self, instance: u32, apic_id: u32, how: GiveCpu) -> Result<(), DeviceError> {
        let (how, start_pa) = match how {
            GiveCpu::Start { page } => (sys::CPU_START, page),
            GiveCpu::Record => (sys::CPU_RECORD, 0),
        };
        let mut m = sys::Cpu { instance, apic_id, how, start_pa, ..Default::default() };
        self.call(sys::CPU_GIVE, &mut m, || format!("of APIC id {apic_id:#x} to instance {instance}"))
    }

    /// It comes back.
    pub fn take_cpu(&self, instance: u32, apic_id: u32, how: TakeCpu) -> Result<(), DeviceError> {
        let how = match how {
            TakeCpu::Fence => sys::CPU_FENCE,
            TakeCpu::Record => sys::CPU_RECORD,
        };
        let mut m = sys::Cpu { instance, apic_id, how, ..Default::default() };
        self.call(sys::CPU_TAKE, &mut m, || format!("of APIC id {apic_id:#x} from instance {instance}"))
    }

    /// Opens this kernel's doorbell: each ring signals the eventfd. One per open device.
    pub fn open_doorbell(&self, eventfd: BorrowedFd<'_>) -> Result<Bell, DeviceError> {
        let mut m = sys::Doorbell { eventfd: eventfd.as_raw_fd(), ..Default::default() };
        self.call(sys::DOORBELL_OPEN, &mut m, || "".into())?;
        Ok(Bell { apic_id: m.apic_id, vector: m.vector })
    }

    /// Says where the bell is of a kernel that is no instance of this one's: its predecessor. Again, when
    /// that one's agent began anew: the vector may be another then, the CPU may not.
    pub fn connect_doorbell(&self, bell: Bell) -> Result<(), DeviceError> {
        let mut m = sys::Doorbell { apic_id: bell.apic_id, vector: bell.vector, ..Default::default() };
        self.call(sys::DOORBELL_CONNECT, &mut m, || bell.to_string())
    }

    /// Rings an instance's doorbell, wherever it says that it is; the module sees to it that a CPU of the instance is there.
    /// [`SELF`]: the bell that was connected.
    pub fn ring(&self, instance: u32, bell: Bell) -> Result<(), DeviceError> {
        let mut m = sys::Doorbell { apic_id: bell.apic_id, vector: bell.vector, instance, ..Default::default() };
        self.call(sys::DOORBELL_RING, &mut m, || format!("{bell} of instance {instance}"))
    }

    /// This kernel's last CPU leaves. Returns only when it comes back, with the TSC ticks in between.
    pub fn yield_last_cpu(&self, to: Yield) -> Result<u64, DeviceError> {
        let mut m = sys::Yield {
            entry_pa: to.entry,
            arg_pa: to.arg,
            table_pa: to.table,
            ident_pa: to.identity,
            ..Default::default()
        };
        self.call(sys::YIELD, &mut m, || format!("to {:#x}", to.entry))?;
        Ok(m.away_tsc)
    }

    /// A root bus that shows only these functions.
    pub fn add_pci(&self, domain: u32, ecam: u64, bus_end: u8, functions: &[PciFunction]) -> Result<(), DeviceError> {
        if functions.len() > sys::PCI_MAX {
            return Err(DeviceError::Refused {
                call: sys::PCI_ADD.name(),
                subject: format!("of {} functions (at most {})", functions.len(), sys::PCI_MAX),
                errno: Errno::EINVAL,
            });
        }
        let mut m = sys::Pci {
            domain,
            ecam_pa: ecam,
            bus_end: bus_end.into(),
            functions: functions.len() as u32,
            ..Default::default()
        };
        for (slot, function) in m.bdf.iter_mut().zip(functions) {
            *slot = function.bdf();
        }
        self.call(sys::PCI_ADD, &mut m, || format!("of {} functions, ECAM at {ecam:#x}", functions.len()))
    }

    /// Takes that bus away, with its devices.
    pub fn remove_pci(&self, domain: u32) -> Result<(), DeviceError> {
        let mut m = sys::Pci { domain, ..Default::default() };
        self.call(sys::PCI_REMOVE, &mut m, || format!("of domain {domain:#x}"))
    }

    /// Says what stands against [`Device::freeze_function`], as far as that is known beforehand. Touches nothing.
    ///
    /// # Errors
    /// [`DeviceError::Hibernation`]: it cannot be frozen. [`DeviceError::Busy`]: it is frozen already.
    pub fn look_at_function(&self, place: Placed) -> Result<(), DeviceError> {
        self.hibernate(sys::PCI_FREEZE, SELF, sys::FREEZE_LOOK, place).map(drop)
    }

    /// A function, with every device below it, hibernates here, so that the instance's kernel can have it. Gives how many devices
    /// that were. It ends with [`Device::restore_function`]; or with this open device, unless a CPU is recorded for the instance then.
    ///
    /// Blocks for as long as its drivers take, which is without end for a device that does not answer.
    ///
    /// # Errors
    /// [`DeviceError::Hibernation`]: it is as it was before.
    pub fn freeze_function(&self, instance: u32, place: Placed) -> Result<u32, DeviceError> {
        self.hibernate(sys::PCI_FREEZE, instance, 0, place)
    }

    /// It is this kernel's again, in whatever state the other one has left it.
    ///
    /// # Errors
    /// [`DeviceError::NoSuch`]: it is not frozen. [`DeviceError::Hibernation`]: it is not frozen any more, but a driver could not make it
    /// work again.
    pub fn restore_function(&self, place: Placed) -> Result<(), DeviceError> {
        self.hibernate(sys::PCI_RESTORE, SELF, 0, place).map(drop)
    }

    fn hibernate(
        &self,
        call: Call<sys::PciFunction>,
        instance: u32,
        how: u32,
        place: Placed,
    ) -> Result<u32, DeviceError> {
        let Placed { domain, function } = place;
        let mut m = sys::PciFunction { instance, how, domain, bdf: function.bdf().into(), ..Default::default() };
        match self.send(call, &mut m) {
            Ok(()) => Ok(m.devices),
            Err(Errno::EOPNOTSUPP | Errno::EIO) if m.obstacle != sys::OBSTACLE_NONE => Err(DeviceError::Hibernation {
                function: place.to_string(),
                what: if call.name() == sys::PCI_RESTORE.name() { "taken back from" } else { "given to" },
                why: Obstacle::of(&m),
            }),
            Err(errno) => Err(self.explain(call.name(), format!("of {place}"), errno)),
        }
    }

    /// When this kernel panics: write `value` to the word at `address`, and ring the bell that was connected. Ends with the device.
    pub fn panic_notice(&self, address: u64, value: u64, bell: Option<Bell>) -> Result<(), DeviceError> {
        let (apic_id, vector) = bell.map_or((0, 0), |b| (b.apic_id, b.vector));
        let mut m = sys::PanicNotice { apic_id, vector, pa: address, value, ..Default::default() };
        self.call(sys::PANIC_NOTICE, &mut m, || format!("at {address:#x}"))
    }

    /// Whose the machine is when this kernel ends. It stays so when the device is closed.
    pub fn set_end(&self, end: End) -> Result<(), DeviceError> {
        let how = match end {
            End::Machine => sys::END_MACHINE,
            End::Alone => sys::END_ALONE,
        };
        self.call(sys::END, &mut sys::End { how, ..Default::default() }, || format!("({end:?})"))
    }

    /// What ACPI says is written to the sleep type fields of PM1a_CNT and PM1b_CNT for a sleep state (5: off); nothing where
    /// the machine has no such state.
    pub fn sleep_type(&self, state: u32) -> Result<Option<(u8, u8)>, DeviceError> {
        let mut m = sys::SleepType { state, ..Default::default() };
        match self.call(sys::SLEEP_TYPE, &mut m, || format!("of S{state}")) {
            // The module gives three bits of each.
            Ok(()) => Ok(Some(((m.type_a & 7) as u8, (m.type_b & 7) as u8))),
            Err(DeviceError::Unsupported { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Masks every pin of the I/O APIC at this address, for good. Only where no other CPU of this kernel is online.
    pub fn mask_ioapic(&self, address: u64) -> Result<(), DeviceError> {
        let mut m = sys::Ioapic { pa: address, ..Default::default() };
        self.call(sys::IOAPIC_MASK, &mut m, || format!("at {address:#x}"))
    }

    /// Has every IOMMU that this kernel has set up pass DMA untranslated, for good; nothing where there is none. Only where no other CPU
    /// of this kernel is online.
    pub fn switch_iommu_off(&self) -> Result<(), DeviceError> {
        self.call(sys::IOMMU_OFF, &mut sys::Iommu::default(), || "of this kernel's".to_owned())
    }

    fn call<M: Message>(
        &self,
        call: Call<M>,
        message: &mut M,
        subject: impl FnOnce() -> String,
    ) -> Result<(), DeviceError> {
        self.send(call, message).map_err(|errno| self.explain(call.name(), subject(), errno))
    }

    fn send<M: Message>(&self, call: Call<M>, message: &mut M) -> Result<(), Errno> {
        match &self.door {
            Door::Module(file) => call.on(file.as_fd(), message),
            Door::Played(module) => module.answer(call.request(), message.as_mut_bytes()),
        }
    }

    fn explain(&self, call: &'static str, subject: String, errno: Errno) -> DeviceError {
        match errno {
            Errno::ENOTTY | Errno::E2BIG => DeviceError::Unknown { call, errno },
            Errno::EPERM | Errno::EACCES => {
                // One errno for two causes: ask which.
                let mut info = sys::Info::default();
                match self.send(sys::INFO, &mut info) {
                    Ok(()) if info.flags & sys::INFO_LOCKDOWN != 0 => DeviceError::Lockdown,
                    _ => DeviceError::NoPermission { call },
                }
            }
            Errno::EBUSY => DeviceError::Busy { call, subject },
            Errno::ENOENT => DeviceError::NoSuch { call, subject },
            Errno::EEXIST => DeviceError::Exists { call, subject },
            Errno::EOPNOTSUPP => DeviceError::Unsupported { call, subject },
            Errno::ENOMEM => DeviceError::NoMemory { call, subject },
            Errno::EINVAL | Errno::ERANGE | Errno::EFAULT => DeviceError::Refused { call, subject, errno },
            errno => DeviceError::Other { call, subject, errno },
        }
    }
}

impl fmt::Display for PciFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{:x}", self.bus, self.device, self.function)
    }
}

impl Obstacle {
    fn of(m: &sys::PciFunction) -> Obstacle {
        let len = m.device.iter().position(|&b| b == 0).unwrap_or(m.device.len());
        let device = String::from_utf8_lossy(&m.device[..len]).into_owned();
        let driver = driver_of(&device);
        match m.obstacle {
            sys::OBSTACLE_BRIDGE => Obstacle::Bridge,
            sys::OBSTACLE_NO_CALLBACKS => Obstacle::NoCallbacks { device, driver },
            sys::OBSTACLE_INTX => Obstacle::Intx { driver },
            sys::OBSTACLE_FAILED => Obstacle::Failed { device, driver, errno: Errno::from_raw(m.error.cast_signed()) },
            sys::OBSTACLE_MASTER => Obstacle::Master,
            other => Obstacle::Unknown(other),
        }
    }
}

/// The driver of a device that the module names: of a PCI function, or of what is on the buses below one.
fn driver_of(device: &str) -> String {
    let links = ["pci", "virtio", "scsi", "usb"].map(|bus| format!("/sys/bus/{bus}/devices/{device}/driver"));
    let found = links.iter().find_map(|link| std::fs::read_link(link).ok());
    let name = found.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "no driver".to_owned())
}

/// A NUL-terminated field. What may be in it is the module's rule; checked here for the sake of the message.
fn text<const N: usize>(what: &'static str, text: &str) -> Result<[u8; N], DeviceError> {
    let refuse = |reason: String| DeviceError::Text { what, text: text.to_owned(), reason };
    let bytes = CString::new(text).map_err(|_| refuse("it contains a NUL".into()))?.into_bytes_with_nul();
    if bytes.len() > N {
        return Err(refuse(format!("it has {} bytes, at most {} fit", bytes.len() - 1, N - 1)));
    }
    let name = what == "name";
    if name && text.is_empty() {
        return Err(refuse("it is empty".into()));
    }
    let allowed = |b: u8| match name {
        true => b.is_ascii_alphanumeric() || b"._+-".contains(&b),
        false => b == b' ' || b.is_ascii_graphic(),
    };
    if let Some(bad) = text.bytes().find(|&b| !allowed(b)) {
        return Err(refuse(format!("byte {bad:#04x} is not allowed")));
    }
    let mut field = [0; N];
    field[..bytes.len()].copy_from_slice(&bytes);
    Ok(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_module_is_named() {
        let error = Device::at(Path::new("/nonexistent/baton")).unwrap_err();
        assert!(error.to_string().contains("modprobe baton"), "{error}");
        assert_eq!(error.blame(), Blame::Operator);
    }

    #[test]
    fn another_device_is_recognised() {
        let error = Device::at(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, DeviceError::NotBaton { errno: Errno::ENOTTY, .. }), "{error}");
    }

    #[test]
    fn texts_are_checked_before_the_module_sees_them() {
        assert_eq!(text::<4>("name", "abc").unwrap(), *b"abc\0");
        for (what, bad) in [("name", "abcd"), ("name", "a b"), ("name", ""), ("image", "\n"), ("image", "a\0")] {
            let error = text::<4>(what, bad).unwrap_err();
            assert_eq!(error.blame(), Blame::Operator, "{error}");
        }
    }

    #[test]
    fn bells_cross_as_one_word() {
        let bell = Bell { apic_id: 3, vector: 0x31 };
        assert_eq!(Bell::from_word(bell.to_word()), Some(bell));
        for hostile in [0, u64::MAX, 0x1f_0000_0000, 0x100_0000_0001, 0x31_0000_00ff] {
            assert_eq!(Bell::from_word(hostile), None);
        }
    }

    #[test]
    fn an_obstacle_names_the_device_and_who_must_act() {
        let said = |obstacle, error, name: &[u8]| {
            let mut m = sys::PciFunction { obstacle, error, ..Default::default() };
            m.device[..name.len()].copy_from_slice(name);
            let function = Placed { domain: 1, function: PciFunction { bus: 2, device: 3, function: 0 } };
            let why = Obstacle::of(&m);
            DeviceError::Hibernation { function: function.to_string(), what: "given to", why }.to_string()
        };
        let text = said(sys::OBSTACLE_NO_CALLBACKS, 0, b"ffff:02:03.0");
        assert!(text.starts_with("PCI function 0001:02:03.0 cannot be given to another kernel"), "{text}");
        assert!(text.contains("the driver of ffff:02:03.0") && text.contains("another driver"), "{text}");
        let text = said(sys::OBSTACLE_FAILED, 5, &[b'x'; 32]);
        assert!(text.contains(&"x".repeat(32)) && text.contains("EIO"), "{text}");
        assert!(said(99, 0, b"").contains("does not know (99)"));
    }

    #[test]
    fn pci_functions_are_packed_as_the_header_says() {
        let function = PciFunction { bus: 1, device: 3, function: 2 };
        assert_eq!(function.bdf(), 0x11a);
        assert_eq!(function.to_string(), "01:03.2");
    }
}
