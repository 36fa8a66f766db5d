//! The handover record: what the successor's agent must know before it can be of use. The incumbent writes it into the
//! control block before the successor starts; nobody changes it afterwards.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::checked::Check;

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

/// Why a record is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A number is out of bounds.
    #[error("{what} is {value:#x}, allowed is {low:#x} to {high:#x}")]
    Bounds {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Smallest allowed.
        low: u64,
        /// Largest allowed.
        high: u64,
    },
    /// A range is empty, wraps, or is not aligned.
    #[error("{what} {start:#x}+{len:#x} is empty, unaligned or wraps around")]
    Range {
        /// Which range.
        what: &'static str,
        /// Its start.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// A range lies where it must not.
    #[error("{what} {start:#x}+{len:#x} lies outside the machine's RAM or upon another range")]
    Place {
        /// Which range.
        what: &'static str,
        /// Its start.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// The record belongs to another region.
    #[error("the record is for the region at {record:#x}, it was found in the one at {found:#x}")]
    Region {
        /// Region in the record.
        record: u64,
        /// Region it was read from.
        found: u64,
    },
    /// Two things have one number, or a number names nothing.
    #[error("{what} {number} is named twice or not at all")]
    Name {
        /// What the number is of.
        what: &'static str,
        /// The number.
        number: u32,
    },
    /// A text is empty, too long, or not printable.
    #[error("{what} of {len} bytes: 1 to 64 printable characters are allowed")]
    Text {
        /// Which text.
        what: &'static str,
        /// Its length.
        len: usize,
    },
}

const PAGE: u64 = 4096;
/// More items of anything than any machine of today has; far less than the frame's limit allows.
const MANY: u64 = 8192;

fn bounds(what: &'static str, value: u64, low: u64, high: u64) -> Result<(), RecordError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(RecordError::Bounds { what, value, low, high })
}

fn text(what: &'static str, text: &str) -> Result<(), RecordError> {
    if (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Ok(());
    }
    Err(RecordError::Text { what, len: text.len() })
}

fn range(what: &'static str, range: PhysRange, align: u64) -> Result<(), RecordError> {
    let PhysRange { start, len } = range;
    let aligned = start.is_multiple_of(align) && len.is_multiple_of(align);
    if len == 0 || !aligned || range.end().is_none() {
        return Err(RecordError::Range { what, start, len });
    }
    Ok(())
}

fn prefix(net: Option<IpNet>) -> Result<(), RecordError> {
    match net {
        None => Ok(()),
        Some(net) => {
            let bits = match net.address {
                Ip::V4(_) => 32,
                Ip::V6(_) => 128,
            };
            bounds("network prefix", net.prefix.into(), 0, bits)
        }
    }
}

impl Check for HandoverRecord {
    /// The region that the record was read from.
    type Against = PhysRange;
    type Error = RecordError;

    fn check(&self, region: &PhysRange) -> Result<(), RecordError> {
        self.check_numbers()?;
        if self.grant.region != *region {
            return Err(RecordError::Region { record: self.grant.region.start, found: region.start });
        }
        self.check_memory()?;
        self.check_names()
    }
}

impl HandoverRecord {
    fn check_numbers(&self) -> Result<(), RecordError> {
        bounds("hop", self.hop.into(), 1, u32::MAX.into())?;
        // Room for every epoch that an update and its rollback may use.
        bounds("epoch", self.epoch, 0, u64::MAX - 4)?;
        // 1 MHz to 100 GHz.
        bounds("tsc_khz", self.clock.tsc_khz, 1_000, 100_000_000)?;
        let block = self.machine.memory_block;
        bounds("memory block", block, 2 << 20, 1 << 40)?;
        bounds("bits set in memory block", block.count_ones().into(), 1, 1)?;
        for (what, count, least) in [
            ("ram ranges", self.machine.ram.len(), 1),
            ("cpus", self.machine.cpus.len(), 1),
            ("fragments", self.grant.fragments.len(), 0),
            ("blocks", self.grant.blocks.len(), 0),
            ("arenas", self.arenas.len(), 0),
            ("services", self.services.len(), 0),
            ("functions", self.network.functions.len(), 0),
            ("retired instances", self.retired.len(), 0),
            ("journal marks", self.journal.len(), 0),
        ] {
            bounds(what, count as u64, least, MANY)?;
        }
        prefix(self.network.service)?;
        prefix(self.network.management)?;
        text("incumbent release", &self.incumbent.release)?;
        text("agent version", &self.incumbent.agent_version)?;
        self.journal.iter().try_for_each(|mark| text("phase name", &mark.phase))
    }

    fn check_memory(&self) -> Result<(), RecordError> {
        let mut before = 0;
        for &ram in &self.machine.ram {
            range("ram", ram, 1)?;
            if ram.start < before {
                let PhysRange { start, len } = ram;
                let what = "ram";
                return Err(RecordError::Place { what, start, len });
            }
            before = ram.start + ram.len;
        }
        let block = self.machine.memory_block;
        let mut owned = vec![("region", self.grant.region, 2 << 20)];
        owned.push(("low slot", self.grant.low_slot, PAGE));
        owned.extend(self.grant.fragments.iter().map(|&r| ("fragment", r, PAGE)));
        owned.extend(self.grant.blocks.iter().map(|&r| ("block", r, block)));
        let in_ram = |piece: PhysRange| self.machine.ram.iter().any(|ram| ram.contains(piece));
        for &(what, piece, align) in &owned {
            range(what, piece, align)?;
            if !in_ram(piece) {
                let PhysRange { start, len } = piece;
                return Err(RecordError::Place { what, start, len });
            }
        }
        no_overlap(owned.iter().map(|&(what, piece, _)| (what, piece)).collect())?;
        let mut arenas = Vec::new();
        for arena in &self.arenas {
            bounds("arena pieces", arena.ranges.len() as u64, 1, MANY)?;
            let mut size = 0u64;
            for &piece in &arena.ranges {
                let what = "arena";
                range(what, piece, PAGE)?;
                // An arena must be memory that the successor knows and leaves alone.
                if !self.grant.fragments.iter().any(|f| f.contains(piece)) {
                    let PhysRange { start, len } = piece;
                    return Err(RecordError::Place { what, start, len });
                }
                size = size.saturating_add(piece.len);
                arenas.push((what, piece));
            }
            bounds("arena length", arena.len, PAGE, size)?;
        }
        no_overlap(arenas)?;
        self.retired.iter().try_for_each(|retired| range("retired memory", retired.memory, PAGE))
    }

    fn check_names(&self) -> Result<(), RecordError> {
        let cpus = || self.machine.cpus.iter().map(|cpu| cpu.apic_id);
        unique("cpu", cpus())?;
        let number = self.grant.boot_cpu;
        if !cpus().any(|id| id == number) {
            let what = "boot cpu";
            return Err(RecordError::Name { what, number });
        }
        unique("arena", self.arenas.iter().map(|arena| arena.id))?;
        unique("arena of a service", self.services.iter().map(|s| s.arena))?;
        for arena in &self.arenas {
            text("arena name", &arena.name)?;
        }
        for service in &self.services {
            text("service name", &service.name)?;
            if !self.arenas.iter().any(|arena| arena.id == service.arena) {
                return Err(RecordError::Name { what: "arena of a service", number: service.arena });
            }
        }
        Ok(())
    }
}

fn unique(what: &'static str, mut numbers: impl Iterator<Item = u32>) -> Result<(), RecordError> {
    let mut seen = BTreeSet::new();
    match numbers.find(|&number| !seen.insert(number)) {
        Some(number) => Err(RecordError::Name { what, number }),
        None => Ok(()),
    }
}

fn no_overlap(mut pieces: Vec<(&'static str, PhysRange)>) -> Result<(), RecordError> {
    pieces.sort_by_key(|&(_, piece)| piece);
    for pair in pieces.windows(2) {
        let (what, piece) = pair[1];
        if pair[0].1.start + pair[0].1.len > piece.start {
            let PhysRange { start, len } = piece;
            return Err(RecordError::Place { what, start, len });
        }
    }
    Ok(())
}
