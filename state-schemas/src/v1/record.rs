//! The handover record: what the successor's agent must know before it can be of use. The incumbent writes it into the
//! control block before the successor starts; nobody changes it afterwards.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Identity of one update, the same in every log line of both kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UpdateId(pub [u8; 16]);

impl std::fmt::Display for UpdateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Physical memory from `start` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PhysRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl PhysRange {
    /// First byte behind it; `None` beyond 2^64.
    pub const fn end(self) -> Option<u64> {
        self.start.checked_add(self.len)
    }
    /// All of `other` lies within.
    pub fn contains(self, other: PhysRange) -> bool {
        match (self.end(), other.end()) {
            (Some(end), Some(other_end)) => self.start <= other.start && other_end <= end,
            _ => false,
        }
    }
}

/// One CPU of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Its local APIC id, by which both kernels mean the same CPU.
    pub apic_id: u32,
    /// The firmware started the machine on this one: it must never get INIT while its kernel runs.
    pub firmware_boot: bool,
}

/// Which program runs on the other side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Kernel release, as in `uname -r`.
    pub release: String,
    /// Version of the agent.
    pub agent_version: String,
}

/// One moment on two clocks, and the rate of the first. The TSC goes on counting across the update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockPair {
    /// Time stamp counter.
    pub tsc: u64,
    /// Wall clock at that count, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// Counts per millisecond.
    pub tsc_khz: u64,
}

/// The whole machine, of which the successor sees only its part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// All RAM, ascending.
    pub ram: Vec<PhysRange>,
    /// Memory can be added in blocks of this size.
    pub memory_block: u64,
    /// All CPUs.
    pub cpus: Vec<Cpu>,
}

/// What of it the successor has, and what it will get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Instance number, as in `/proc/multikernel`.
    pub instance: u32,
    /// CPU it is started on.
    pub boot_cpu: u32,
    /// Its own memory; the control block is the first MiB.
    pub region: PhysRange,
    /// Its slot below 1 MiB.
    pub low_slot: PhysRange,
    /// RAM that its e820 lists and that is reserved: to be released page by page after commit, arenas excepted.
    pub fragments: Vec<PhysRange>,
    /// Whole memory blocks, to be added after commit.
    pub blocks: Vec<PhysRange>,
}

/// Memory that crosses in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arena {
    /// Number by which services and messages name it.
    pub id: u32,
    /// Name, as in its header page.
    pub name: String,
    /// Where it lies: these pieces in this order.
    pub ranges: Vec<PhysRange>,
    /// Bytes of it that are used; the pieces may be larger.
    pub len: u64,
}

/// A program that goes on in the successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// What it keeps in its arena.
    pub schema_kind: u32,
    /// In which version.
    pub schema_version: u32,
    /// [`Arena::id`].
    pub arena: u32,
    /// Port at which clients reach it, at the network's service address.
    pub port: u16,
}

/// An IP address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ip {
    /// 0: version 4.
    V4([u8; 4]),
    /// 1: version 6.
    V6([u8; 16]),
}

impl From<IpAddr> for Ip {
    fn from(address: IpAddr) -> Ip {
        match address {
            IpAddr::V4(address) => Ip::V4(address.octets()),
            IpAddr::V6(address) => Ip::V6(address.octets()),
        }
    }
}

impl From<Ip> for IpAddr {
    fn from(address: Ip) -> IpAddr {
        match address {
            Ip::V4(octets) => Ipv4Addr::from(octets).into(),
            Ip::V6(octets) => Ipv6Addr::from(octets).into(),
        }
    }
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpNet {
    /// The address.
    pub address: Ip,
    /// Bits of the network.
    pub prefix: u8,
}

/// What a PCI function is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// 0: clients come in here; the service address moves to it.
    Service,
    /// 1: operators come in here.
    Management,
    /// 2: anything else.
    Other,
}

/// A PCI function that the successor gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciFunction {
    /// Bus number.
    pub bus: u8,
    /// Device in the upper five bits, function in the lower three.
    pub devfn: u8,
    /// What it is for.
    pub role: Role,
    /// MAC address of its interface, if it is a network interface.
    pub mac: Option<[u8; 6]>,
}

/// How clients reach the services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The address that moves at the cutover.
    pub service: Option<IpNet>,
    /// Default gateway.
    pub gateway: Option<Ip>,
    /// Address of the successor's management interface, from its start.
    pub management: Option<IpNet>,
    /// The functions granted.
    pub functions: Vec<PciFunction>,
}

/// Where PCI configuration space lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ecam {
    /// Physical address of bus 0's configuration space.
    pub address: u64,
    /// PCI segment.
    pub segment: u16,
    /// Last bus.
    pub bus_end: u8,
}

/// A kernel that ran before the incumbent, of which something is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// Its instance number.
    pub instance: u32,
    /// Its control block or whatever else of it must not be used.
    pub memory: PhysRange,
}

/// A phase of the update that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseMark {
    /// Name of the phase.
    pub phase: String,
    /// TSC at its beginning.
    pub start_tsc: u64,
    /// TSC at its end.
    pub end_tsc: u64,
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
    /// Memory that crosses.
    pub arenas: Vec<Arena>,
    /// Programs that go on.
    pub services: Vec<Service>,
    /// How they are reached.
    pub network: Network,
    /// PCI, if any function is granted.
    pub ecam: Option<Ecam>,
    /// What is left of earlier kernels.
    pub retired: Vec<Retired>,
    /// The update so far, so that the successor can report all of it.
    pub journal: Vec<PhaseMark>,
}
