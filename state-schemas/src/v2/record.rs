//! The handover record: what the successor's agent must know before it can be of use. The incumbent writes it into the
//! control block before the successor starts; nobody changes it afterwards.
//!
//! New against version 1: [`Service::arenas`], [`File`], [`Kho`], [`HandoverRecord::carried`].

use serde::{Deserialize, Serialize};

use crate::v1::record::{
    Arena, ClockPair, Ecam, Grant, Machine, Network, PhaseMark, PhysRange, Program, Retired, UpdateId,
};

/// More items of anything than any machine of today has; far less than the frame's limit allows.
pub const ITEM_LIMIT: u64 = 8192;
/// Most files: a fifth of the record's piece when every name is of usual length.
pub const FILE_LIMIT: u64 = 512;
/// Longest name, in bytes, of anything but a file.
pub const NAME_LIMIT: usize = 64;
/// Longest name of a file, in bytes: what systemd allows in `FDNAME=` (sd_pid_notify_with_fds(3)).
pub const FILE_NAME_LIMIT: usize = 255;
/// Every seal there is: `F_SEAL_SEAL` to `F_SEAL_EXEC` (include/uapi/linux/fcntl.h).
pub const SEALS: u32 = 0x3f;
/// Most frames that are carried through.
pub const CARRIED_LIMIT: u64 = 16;
/// Most bytes of them together: a quarter of the record's piece of the control block, so that there is always room for
/// what must be said.
pub const CARRIED_BYTES: u64 = 64 << 10;

/// A program that goes on in the successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// What it keeps in its arenas.
    pub schema_kind: u32,
    /// In which version.
    pub schema_version: u32,
    /// [`Arena::id`]s, in the order in which the service made them; none for one that keeps only files.
    pub arenas: Vec<u32>,
    /// Port at which clients reach it, at the network's service address.
    pub port: u16,
}

/// A memory file (memfd) that crosses: a view of an arena of its own. That arena belongs to no service and to no other
/// file, since its pages are the file's page cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Name of the service, or of the program, that kept it.
    pub service: String,
    /// The name it kept it under (`FDNAME=`); one name may stand for several files, in this order.
    pub name: String,
    /// [`Arena::id`].
    pub arena: u32,
    /// The file's size in bytes; its arena may be larger.
    pub len: u64,
    /// `F_SEAL_*`, to be put on it again.
    pub seals: u32,
}

/// Where a kernel with KHO finds what it was told, and where the agent finds it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kho {
    /// The format, as the kernel's `compatible` has it: "kho-v4".
    pub abi: String,
    /// The root device tree.
    pub fdt: PhysRange,
    /// The list of scratch areas (the list, not the areas).
    pub scratch: PhysRange,
    /// Everything of KHO's lies here, in the region and behind its control block.
    pub room: PhysRange,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverRecord {
    /// Which update this is.
    pub update: UpdateId,
    /// How many updates this machine has been through since it was switched on, this one included.
    pub hop: u32,
    /// Epoch of the incumbent; the successor's is the next.
    pub epoch: u64,
    /// The other side.
    pub incumbent: Program,
    /// To set the wall clock by, and to speak of the same time.
    pub clock: ClockPair,
    /// The machine.
    pub machine: Machine,
    /// The successor's part.
    pub grant: Grant,
    /// Memory that crosses. What no service and no file names is kept all the same.
    pub arenas: Vec<Arena>,
    /// Programs that go on.
    pub services: Vec<Service>,
    /// Memory files that cross.
    pub files: Vec<File>,
    /// How they are reached.
    pub network: Network,
    /// PCI, if any function is granted.
    pub ecam: Option<Ecam>,
    /// What is left of earlier kernels.
    pub retired: Vec<Retired>,
    /// The update so far, so that the successor can report all of it.
    pub journal: Vec<PhaseMark>,
    /// KHO, if the successor's kernel speaks it.
    pub kho: Option<Kho>,
    /// Whole frames ([`crate::header`]) of kinds that the writer does not know and was given itself: they cross untouched,
    /// for a later successor that knows them.
    pub carried: Vec<Vec<u8>>,
}
