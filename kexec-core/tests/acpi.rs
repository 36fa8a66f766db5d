//! The firmware tables, read back by three who had no part in writing them: a reader of forty lines, the `acpi` crate, and
//! ACPICA's own disassembler (the code base that Linux uses).
#![expect(unsafe_code, reason = "the acpi crate reads physical memory, and asks for a mapping of it")]

mod support;

use std::ptr::NonNull;

use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiHandler, AcpiTables as Reader, PhysicalMapping};
use kexec_core::acpi::{AcpiError, AcpiRequest, AcpiTables, choose_phantom};
use kexec_core::memory_map::Range;
use proptest::prelude::*;
use state_schemas::platform::{Platform, PowerOff, Register, Reset};

const ROOM: Range = Range::new(0x1_5801_0000, 0x1_5802_0000);
const MAILBOX: u64 = 0x1_5800_4000;
const PARK: u64 = 0x1_5800_5000;

fn build(phantom: u32, cpus: &[u32]) -> Result<AcpiTables, AcpiError> {
    build_with(phantom, cpus, Platform::default())
}

fn build_with(phantom: u32, cpus: &[u32], platform: Platform) -> Result<AcpiTables, AcpiError> {
    AcpiTables::build(&AcpiRequest {
        room: ROOM,
        phantom,
        cpus,
        mailbox: MAILBOX,
        reset_vector: PARK,
        platform,
        affinity: &[],
    })
}

/// They are named after the others, as they are.
#[test]
fn tables_of_nodes_are_handed_on() {
    let given = |name: &[u8; 4], len: u8| {
        let mut table = vec![0; len.into()];
        table[..4].copy_from_slice(name);
        table[4] = len;
        table[9] = table.iter().fold(0, |sum, byte| sum.wrapping_sub(*byte));
        table
    };
    let affinity = [given(b"SRAT", 201), given(b"SLIT", 48)];
    let (platform, cpus) = (Platform::default(), [0]);
    let tables = AcpiTables::build(&AcpiRequest {
        room: ROOM,
        phantom: 9,
        cpus: &cpus,
        mailbox: MAILBOX,
        reset_vector: PARK,
        platform,
        affinity: &affinity,
    });
    let tables = tables.unwrap();
    let rsdp = &tables.bytes[(tables.rsdp - ROOM.start()) as usize..][..36];
    let entries: Vec<u64> = table(&tables, le(&rsdp[24..32]), b"XSDT")[36..].chunks(8).map(le).collect();
    assert_eq!(entries.len(), 4);
    assert_eq!(table(&tables, entries[2], b"SRAT"), affinity[0]);
    assert_eq!(table(&tables, entries[3], b"SLIT"), affinity[1]);
}

/// An ordinary machine's.
fn registers() -> Platform {
    Platform {
        power_off: Some(PowerOff { control: Register::Port(0x605), status: Register::Port(0x601), sleep_type: 5 }),
        reset: Some(Reset { register: Register::Port(0xcf9), value: 15 }),
        power_button: None,
    }
}

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// A table of the given signature, its checksum verified.
fn table<'a>(tables: &'a AcpiTables, at: u64, signature: &[u8; 4]) -> &'a [u8] {
    let bytes = &tables.bytes[(at - ROOM.start()) as usize..];
    let bytes = &bytes[..le(&bytes[4..8]) as usize];
    assert_eq!(&bytes[..4], signature);
    assert_eq!(bytes.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)), 0, "checksum of {signature:?}");
    bytes
}

/// From the RSDP to (FADT, DSDT, MADT), as ACPI 6.5 chapter 5.2 says.
fn read(tables: &AcpiTables) -> (&[u8], &[u8], &[u8]) {
    let rsdp = &tables.bytes[(tables.rsdp - ROOM.start()) as usize..][..36];
    assert_eq!((&rsdp[..8], rsdp[15]), (b"RSD PTR ".as_slice(), 2));
    for part in [&rsdp[..20], rsdp] {
        assert_eq!(part.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)), 0);
    }
    let xsdt = table(tables, le(&rsdp[24..32]), b"XSDT");
    let entries: Vec<u64> = xsdt[36..].chunks(8).map(le).collect();
    assert_eq!(entries.len(), 2);
    let fadt = table(tables, entries[0], b"FACP");
    (fadt, table(tables, le(&fadt[140..148]), b"DSDT"), table(tables, entries[1], b"APIC"))
}

/// The MADT's entries: type and bytes.
fn entries(madt: &[u8]) -> Vec<(u8, &[u8])> {
    let mut rest = &madt[44..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (entry, behind) = rest.split_at(rest[1].into());
        found.push((entry[0], entry));
        rest = behind;
    }
    found
}

#[test]
fn the_kernel_finds_what_it_needs() {
    let tables = build(0xfe, &[3, 0, 1, 0x1_0000]).unwrap();
    let (fadt, dsdt, madt) = read(&tables);
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5), "FADT 6.5");
    let flags = le(&fadt[112..116]);
    assert_eq!(flags, 1 << 20 | 1 << 5 | 1 << 4 | 1, "HW_REDUCED, no fixed buttons, WBINVD");
    assert_eq!(le(&fadt[109..111]), 1 << 2 | 1 << 5, "no VGA, no CMOS RTC, no legacy devices");
    assert_eq!(le(&fadt[40..44]), 0, "only the 64-bit DSDT address: a region may lie above 4 GiB");
    assert_eq!(dsdt.len(), 36);
    assert_eq!(madt[8], 5);
    assert_eq!((le(&madt[36..40]), le(&madt[40..44])), (0xfee0_0000, 0));
    let entries = entries(madt);
    let ids: Vec<u64> = entries[..4].iter().map(|(kind, e)| (assert_eq!(*kind, 0), u64::from(e[3])).1).collect();
    assert_eq!(ids, [0xfe, 3, 0, 1], "phantom first, then the boot CPU");
    assert_eq!((entries[4].0, le(&entries[4].1[4..8])), (9, 0x1_0000));
    let (kind, wakeup) = entries[5];
    assert_eq!((kind, wakeup.len(), le(&wakeup[2..4])), (16, 24, 1));
    assert_eq!((le(&wakeup[8..16]), le(&wakeup[16..24])), (MAILBOX, PARK));
    assert_eq!(entries.len(), 6, "no IOAPIC, no overrides");
}

#[test]
fn a_machine_can_be_powered_off_and_reset() {
    let tables = build_with(0xfe, &[3, 0], registers()).unwrap();
    let (fadt, dsdt, _) = read(&tables);
    assert_eq!(le(&fadt[112..116]) & (1 << 10), 1 << 10, "RESET_REG_SUP");
    let port = |port: u64| [&[1, 8, 0, 1], port.to_le_bytes().as_slice()].concat();
    assert_eq!((&fadt[116..128], fadt[128]), (port(0xcf9).as_slice(), 15));
    assert_eq!((&fadt[244..256], &fadt[256..268]), (port(0x605).as_slice(), port(0x601).as_slice()));
    // Name (_S5_, Package (4) { 5, 0, 0, 0 })
    assert_eq!(&dsdt[36..], b"\x08_S5_\x12\x07\x04\x0a\x05\0\0\0");
}

/// "Physical memory" that holds the tables and nothing else.
#[derive(Clone)]
struct Memory<'a>(&'a AcpiTables);

impl AcpiHandler for Memory<'_> {
    unsafe fn map_physical_region<T>(&self, at: usize, size: usize) -> PhysicalMapping<Self, T> {
        let offset = at - ROOM.start() as usize;
        let bytes = &self.0.bytes[offset..offset + size];
        // SAFETY: the bytes are borrowed for as long as `self`, which the mapping keeps; the crate's tables are packed
        // structs of integers, and it is told the size that was checked by the slice above.
        unsafe { PhysicalMapping::new(at, NonNull::from(bytes).cast(), size, size, self.clone()) }
    }

    fn unmap_physical_region<T>(_: &PhysicalMapping<Self, T>) {}
}

#[test]
fn the_acpi_crate_reads_the_same() {
    let tables = build(0xfe, &[3, 0, 0x1_0000]).unwrap();
    // SAFETY: `Memory` maps exactly the tables that the RSDP leads to.
    let reader = unsafe { Reader::from_rsdp(Memory(&tables), tables.rsdp as usize) }.unwrap();
    let fadt = reader.find_table::<acpi::fadt::Fadt>().unwrap();
    fadt.validate().unwrap();
    let flags = fadt.flags;
    assert!(flags.system_is_hw_reduced_acpi());
    assert!(reader.dsdt().is_ok());
    let madt = reader.find_table::<Madt>().unwrap();
    assert_eq!(madt.get().get_mpwk_mailbox_addr().unwrap(), MAILBOX);
    let ids: Vec<u32> = madt
        .get()
        .entries()
        .filter_map(|entry| match entry {
            MadtEntry::LocalApic(apic) => Some(apic.apic_id.into()),
            MadtEntry::LocalX2Apic(apic) => Some(apic.x2apic_id),
            _ => None,
        })
        .collect();
    assert_eq!(ids, [0xfe, 3, 0, 0x1_0000]);
}

#[test]
fn iasl_disassembles_every_table() {
    let tables = build_with(0xfe, &[3, 0, 1, 0x1_0000], registers()).unwrap();
    let (fadt, dsdt, madt) = read(&tables);
    let folder = tempfile::tempdir().unwrap();
    let disassemble = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(format!("{name}.aml")), bytes).unwrap();
        let said = support::in_lab("iasl", &["-d", &format!("{name}.aml")], folder.path());
        for complaint in ["rror", "arning", "nvalid", "ncorrect", "nknown"] {
            assert!(!said.contains(complaint), "iasl about {name}: {said}");
        }
        std::fs::read_to_string(folder.path().join(format!("{name}.dsl"))).unwrap()
    };
    let fadt = disassemble("facp", fadt);
    let line = |text: &str, key: &str| {
        let found = text.lines().find(|l| l.contains(key)).unwrap_or_else(|| panic!("no {key:?} in {text}"));
        found.split(" : ").nth(1).unwrap_or_default().trim().to_owned()
    };
    assert_eq!(line(&fadt, "Hardware Reduced (V5)"), "1");
    assert_eq!(line(&fadt, "CMOS RTC Not Present"), "1");
    assert_eq!(line(&fadt, "8042 Present"), "0");
    let madt = disassemble("apic", madt);
    // Type 16; iasl of 2025 spells its name wrong, and does not know version 1's reset vector yet.
    assert!(madt.contains("Subtable Type : 10 "), "{madt}");
    assert_eq!(line(&madt, "Mailbox Version"), "0001");
    assert_eq!(line(&madt, "Mailbox Address"), "0000000158004000");
    assert!(disassemble("dsdt", dsdt).contains("Name (_S5, Package (0x04)"));
}

#[test]
fn contradictions_are_refused() {
    assert_eq!(build(0xfe, &[]), Err(AcpiError::NoCpu));
    assert_eq!(build(3, &[3]).unwrap_err().to_string(), "APIC id 0x3 is listed twice");
    assert_eq!(build(0xfe, &[0xff]), Err(AcpiError::Broadcast { id: 0xff }));
    let many: Vec<u32> = (0x1000..0x3000).collect();
    assert!(matches!(build(0xfe, &many), Err(AcpiError::NoRoom { cpus: 0x2000, .. })));
}

proptest! {
    #[test]
    fn all_ids_survive(ids in prop::collection::btree_set(0u32..100_000, 1..300)) {
        let cpus: Vec<u32> = ids.into_iter().filter(|id| *id != 0xff).collect();
        prop_assume!(!cpus.is_empty());
        let phantom = choose_phantom(cpus.iter().copied());
        prop_assert!(!cpus.contains(&phantom));
        let tables = build(phantom, &cpus).unwrap();
        let (_, _, madt) = read(&tables);
        let mut read_back = Vec::new();
        for (kind, entry) in entries(madt) {
            match kind {
                0 => {
                    prop_assert_eq!((entry[2], le(&entry[4..8])), (entry[3], 1));
                    read_back.push(u32::from(entry[3]));
                }
                9 => read_back.push(le(&entry[4..8]) as u32),
                _ => prop_assert_eq!(kind, 16),
            }
        }
        prop_assert_eq!(read_back[0], phantom);
        prop_assert_eq!(&read_back[1..], &cpus);
    }
}
