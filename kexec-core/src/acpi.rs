//! The successor's firmware: RSDP, XSDT, FADT, an empty DSDT, the MADT that tells it how CPUs come and go, and, as they are, the
//! incumbent's tables of NUMA nodes.
//!
//! Two decisions made here are what lets a stock kernel run beside another one:
//!
//! 1. `HW_REDUCED_ACPI` and no legacy devices: the kernel looks for no PIT, no RTC, no 8259, no PM timer, no SCI. All
//!    these belong to the incumbent.
//! 2. **A phantom CPU comes first in the MADT.** Linux takes an APIC id that comes first, and is not the one it runs on, for the
//!    real BSP of a crashed machine and drops it (`check_for_real_bsp`); were the boot CPU first, the missing BSP flag in its
//!    APIC base MSR would make it "a crash kernel" with one CPU only. So an id that no CPU has is there to be dropped.
//!
//! Power-off and reset work nevertheless. A machine without the old registers has a sleep control register of 8 bits, with the sleep
//! type in bits 2 to 4 and the enable bit in 5: that is the layout of the upper byte of PM1a_CNT, so it is pointed there, and the
//! status register at the upper byte of PM1a_STS, where the wake status is bit 7 as well.

use acpi_tables::aml::{Name, Package};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, gas};
use state_schemas::platform::{Platform, PowerOff, Register, Reset};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, Unaligned};

use crate::memory_map::Range;

const OEM_ID: [u8; 6] = *b"BATON ";
const OEM_TABLE_ID: [u8; 8] = *b"BATONVFW";
const OEM_REVISION: u32 = 1;
const LOCAL_APIC: u32 = 0xfee0_0000;
/// The first id that a MADT entry of type 0 cannot carry: 0xff is its broadcast.
const FIRST_X2APIC_ID: u32 = 0xff;

/// What the tables have to say.
#[derive(Debug, Clone, Copy)]
pub struct AcpiRequest<'a> {
    /// Where they will lie; the RSDP at its start.
    pub room: Range,
    /// An APIC id that no CPU of the machine has.
    pub phantom: u32,
    /// APIC ids of all CPUs that this kernel may ever get, its boot CPU first.
    pub cpus: &'a [u32],
    /// Physical address of the wakeup mailbox.
    pub mailbox: u64,
    /// Physical address that an offlined CPU jumps to.
    pub reset_vector: u64,
    /// The machine's registers; a kernel that is not told of one does without.
    pub platform: Platform,
    /// Whole tables that say which CPUs and which memory are near to each other: [`crate::firmware::affinity`].
    pub affinity: &'a [Vec<u8>],
}

/// Finished tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// To be put at the start of the room.
    pub bytes: Vec<u8>,
    /// Physical address of the RSDP, for the zero page.
    pub rsdp: u64,
}

/// Why tables cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// No CPU.
    #[error("no CPU given: the boot CPU at least is needed")]
    NoCpu,
    /// The same id twice, or a real one as phantom.
    #[error("APIC id {id:#x} is listed twice")]
    Duplicate {
        /// Which.
        id: u32,
    },
    /// Not the id of one CPU.
    #[error("APIC id {id:#x} means every CPU")]
    Broadcast {
        /// Which.
        id: u32,
    },
    /// They do not fit.
    #[error("ACPI tables need {needed:#x} bytes, but only {room:#x} are set aside for them ({cpus} CPUs)")]
    NoRoom {
        /// Needed.
        needed: u64,
        /// There.
        room: u64,
        /// How many CPUs.
        cpus: usize,
    },
}

/// MADT entry of type 0.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct LocalApic {
    kind: u8,
    len: u8,
    uid: u8,
    apic_id: u8,
    flags: U32,
}

/// MADT entry of type 9.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    len: u8,
    reserved: U16,
    apic_id: U32,
    flags: U32,
    uid: U32,
}

/// MADT entry of type 16, version 1 (the first with a reset vector).
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct MultiprocessorWakeup {
    kind: u8,
    len: u8,
    version: U16,
    reserved: U32,
    mailbox: U64,
    reset_vector: U64,
}

const _: () = assert!(size_of::<LocalApic>() == 8);
const _: () = assert!(size_of::<LocalX2Apic>() == 16);
const _: () = assert!(size_of::<MultiprocessorWakeup>() == 24);

const ENABLED: u32 = 1;

impl AcpiTables {
    /// Builds the tables.
    pub fn build(request: &AcpiRequest<'_>) -> Result<AcpiTables, AcpiError> {
        let ids = check_ids(request)?;

        // RSDP first; each table behind the one before, on 16 bytes.
        let base = request.room.start();
        let mut bytes = vec![0; Rsdp::len()];
        let mut put = |table: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let at = base + bytes.len() as u64;
            bytes.extend_from_slice(table);
            at
        };
        let dsdt = put(sdt(*b"DSDT", 2, &dsdt_body(&request.platform)).as_slice());
        let fadt = put(&to_bytes(&fadt(dsdt, &request.platform)));
        let madt = put(sdt(*b"APIC", 5, &madt_body(&ids, request)).as_slice());
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(fadt);
        xsdt.add_entry(madt);
        for table in request.affinity {
            xsdt.add_entry(put(table));
        }
        let xsdt = put(&to_bytes(&xsdt));
        let rsdp = to_bytes(&Rsdp::new(OEM_ID, xsdt));
        bytes[..rsdp.len()].copy_from_slice(&rsdp);

        if bytes.len() as u64 > request.room.len() {
            let (needed, room) = (bytes.len() as u64, request.room.len());
            return Err(AcpiError::NoRoom { needed, room, cpus: request.cpus.len() });
        }
        Ok(AcpiTables { bytes, rsdp: base })
    }
}

/// The smallest xAPIC id, counted down from 0xfe, that is not in use; an x2APIC id where all are.
pub fn choose_phantom(used: impl IntoIterator<Item = u32>) -> u32 {
    let used: std::collections::BTreeSet<u32> = used.into_iter().collect();
    (0..FIRST_X2APIC_ID)
        .rev()
        .chain(FIRST_X2APIC_ID + 1..u32::MAX)
        .find(|id| !used.contains(id))
        .expect("no machine has four thousand million CPUs")
}

/// Phantom first, then the CPUs as given.
fn check_ids(request: &AcpiRequest<'_>) -> Result<Vec<u32>, AcpiError> {
    if request.cpus.is_empty() {
        return Err(AcpiError::NoCpu);
    }
    let ids: Vec<u32> = std::iter::once(request.phantom).chain(request.cpus.iter().copied()).collect();
    let mut seen = std::collections::BTreeSet::new();
    for &id in &ids {
        if id == FIRST_X2APIC_ID || id == u32::MAX {
            return Err(AcpiError::Broadcast { id });
        }
        if !seen.insert(id) {
            return Err(AcpiError::Duplicate { id });
        }
    }
    Ok(ids)
}

fn madt_body(ids: &[u32], request: &AcpiRequest<'_>) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + ids.len() * 16 + 24);
    body.extend(LOCAL_APIC.to_le_bytes());
    body.extend(0u32.to_le_bytes()); // no 8259 (PCAT_COMPAT)
    for &id in ids {
        // The uid need only be unique; the id is. An xAPIC entry has room for both only below 255.
        match u8::try_from(id) {
            Ok(short) if id < FIRST_X2APIC_ID => {
                let entry = LocalApic { kind: 0, len: 8, uid: short, apic_id: short, flags: ENABLED.into() };
                body.extend_from_slice(entry.as_bytes());
            }
            _ => {
                let entry = LocalX2Apic {
                    kind: 9,
                    len: 16,
                    reserved: 0.into(),
                    apic_id: id.into(),
                    flags: ENABLED.into(),
                    uid: id.into(),
                };
                body.extend_from_slice(entry.as_bytes());
            }
        }
    }
    let wakeup = MultiprocessorWakeup {
        kind: 16,
        len: 24,
        version: 1.into(),
        reserved: 0.into(),
        mailbox: request.mailbox.into(),
        reset_vector: request.reset_vector.into(),
    };
    body.extend_from_slice(wakeup.as_bytes());
    body
}

/// `\_S5`: what is written to the sleep type field to power off. The second number is for PM1b_CNT, which is not there.
fn dsdt_body(platform: &Platform) -> Vec<u8> {
    platform.power_off.map_or_else(Vec::new, |PowerOff { sleep_type, .. }| {
        to_bytes(&Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &0u8, &0u8, &0u8])))
    })
}

fn by_the_byte(register: Register) -> gas::GAS {
    let (space, address) = match register {
        Register::Memory(address) => (gas::AddressSpace::SystemMemory, address),
        Register::Port(port) => (gas::AddressSpace::SystemIo, port.into()),
    };
    gas::GAS::new(space, 8, 0, gas::AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64, platform: &Platform) -> acpi_tables::fadt::FADT {
    /// IA-PC boot architecture: the VGA range must not be probed; there is no CMOS RTC. (8042 and legacy bits stay 0.)
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Buttons are "control method" devices, that is: there are none.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    if let Some(PowerOff { control, status, .. }) = platform.power_off {
        (fadt.sleep_control_reg, fadt.sleep_status_reg) = (by_the_byte(control), by_the_byte(status));
    }
    if let Some(Reset { register, value }) = platform.reset {
        fadt = fadt.flag(Flags::ResetRegSup);
        (fadt.reset_reg, fadt.reset_value) = (by_the_byte(register), value);
    }
    fadt.finalize()
}

fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
