//! What the firmware's ACPI tables say of the machine, for kernels that cannot ask it: read on the kernel that the firmware
//! booted, out of `/sys/firmware/acpi/tables`. Pure; a table that is cut off or absurd only says less.

use state_schemas::platform::{Platform, PowerButton, PowerOff, Register, Reset};

/// Bits of the FADT's flags (ACPI 6.5, table 5.10).
const POWER_BUTTON_ELSEWHERE: u32 = 1 << 4;
const RESET_SUPPORTED: u32 = 1 << 10;
const HW_REDUCED: u32 = 1 << 20;

/// The registers in a FADT (`FACP`), with what `\_S5` says is written to PM1a_CNT.
///
/// A machine whose registers are in two blocks, PM1a and PM1b, is powered off by writing both, which no successor's tables can say;
/// its button may be in either. So it has neither here.
pub fn platform(fadt: &[u8], s5_type: Option<u8>) -> Platform {
    let fadt = Fadt(fadt);
    let flags = fadt.u32(112).unwrap_or(0);
    let (control, status) = if flags & HW_REDUCED != 0 {
        (fadt.address(244), fadt.address(256))
    } else {
        let upper_byte = |block: Option<Register>| block.and_then(|register| beside(register, 1));
        let two_control_blocks = fadt.block(68, 184).is_some();
        (upper_byte(fadt.block(64, 172)).filter(|_| !two_control_blocks), upper_byte(fadt.block(56, 148)))
    };
    let two_event_blocks = fadt.block(60, 160).is_some();
    let power_off = match (control, status, s5_type) {
        (Some(control), Some(status), Some(sleep_type @ 0..=7)) => Some(PowerOff { control, status, sleep_type }),
        _ => None,
    };
    let power_button = status
        .filter(|_| flags & (HW_REDUCED | POWER_BUTTON_ELSEWHERE) == 0 && !two_event_blocks)
        .and_then(|status| Some(PowerButton { status, enable: beside(status, fadt.u8(88)? / 2)? }));
    let reset = fadt
        .address(116)
        .filter(|_| flags & RESET_SUPPORTED != 0)
        .and_then(|register| Some(Reset { register, value: fadt.u8(128)? }));
    Platform { power_off, reset, power_button }
}

/// Addresses of the I/O APICs in a MADT (`APIC`): entries of type 1.
pub fn io_apics(madt: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    let mut rest = madt.get(44..).unwrap_or_default();
    while let [kind, len, ..] = *rest
        && let Some((entry, behind)) = rest.split_at_checked(usize::from(len).max(2))
    {
        if let (1, Some(address)) = (kind, entry.get(4..8)) {
            found.push(u32::from_le_bytes(address.try_into().expect("four bytes")));
        }
        rest = behind;
    }
    found
}

/// The most bytes of a table of NUMA nodes that is handed on: what there is room for beside the tables that every successor needs. A
/// machine with a thousand CPUs fits.
const AFFINITY_LIMIT: usize = 24 << 10;

/// The tables that say which CPUs and which memory make a node (`SRAT`), and how far nodes are apart (`SLIT`), to be handed on as they
/// are: they name CPUs by APIC id and memory by physical address, and both are the same in every kernel. Nothing where the first is missing,
/// damaged or too long; without the second all other nodes are equally far.
pub fn affinity(srat: Option<Vec<u8>>, slit: Option<Vec<u8>>) -> Vec<Vec<u8>> {
    let Some(srat) = srat.filter(|table| is_whole(table, *b"SRAT")) else { return Vec::new() };
    let room = AFFINITY_LIMIT - srat.len();
    let slit = slit.filter(|table| is_whole(table, *b"SLIT") && table.len() <= room);
    std::iter::once(srat).chain(slit).collect()
}

/// A table of this name, of the length that it says, with the right sum.
fn is_whole(table: &[u8], signature: [u8; 4]) -> bool {
    const HEADER: usize = 36;
    (HEADER..=AFFINITY_LIMIT).contains(&table.len())
        && table.starts_with(&signature)
        && table[4..8] == (table.len() as u32).to_le_bytes()
        && table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

/// The register so many bytes further on.
fn beside(register: Register, bytes: u8) -> Option<Register> {
    match register {
        Register::Memory(address) => address.checked_add(bytes.into()).map(Register::Memory),
        Register::Port(port) => port.checked_add(bytes.into()).map(Register::Port),
    }
}

struct Fadt<'a>(&'a [u8]);

impl Fadt<'_> {
    fn u8(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.0.get(at..at + 4)?.try_into().ok()?))
    }

    /// A generic address structure: space, width, offset, access size, address. Nothing where it names no register that two
    /// kernels can reach alike.
    fn address(&self, at: usize) -> Option<Register> {
        let structure = self.0.get(at..at + 12)?;
        let address = u64::from_le_bytes(structure[4..12].try_into().ok()?);
        match structure[0] {
            _ if address == 0 => None,
            0 => Some(Register::Memory(address)),
            1 => u16::try_from(address).ok().map(Register::Port),
            _ => None,
        }
    }

    /// A register block: in its newer field, else in the older one, which is a port.
    fn block(&self, old: usize, new: usize) -> Option<Register> {
        let port = || self.u32(old).and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
        self.address(new).or_else(|| port().map(Register::Port))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// q35's, as QEMU 11 writes it.
    fn q35() -> Vec<u8> {
        let mut fadt = vec![0u8; 244];
        fadt[56..60].copy_from_slice(&0x600u32.to_le_bytes());
        fadt[64..68].copy_from_slice(&0x604u32.to_le_bytes());
        (fadt[88], fadt[89]) = (4, 2);
        fadt[112..116].copy_from_slice(&(RESET_SUPPORTED | 0xa5 & !POWER_BUTTON_ELSEWHERE).to_le_bytes());
        fadt[116..128].copy_from_slice(&[1, 8, 0, 0, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0]);
        fadt[128] = 0x0f;
        fadt[148..160].copy_from_slice(&[1, 32, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        fadt[172..184].copy_from_slice(&[1, 16, 0, 0, 4, 6, 0, 0, 0, 0, 0, 0]);
        fadt
    }

    #[test]
    fn the_registers_of_an_ordinary_machine() {
        let (control, status) = (Register::Port(0x605), Register::Port(0x601));
        let all = Platform {
            power_off: Some(PowerOff { control, status, sleep_type: 0 }),
            reset: Some(Reset { register: Register::Port(0xcf9), value: 15 }),
            power_button: Some(PowerButton { status, enable: Register::Port(0x603) }),
        };
        assert_eq!(platform(&q35(), Some(0)), all);
        assert_eq!(platform(&q35()[..148], Some(0)), all, "an old table has ports only");
        assert_eq!(platform(&q35(), None), Platform { power_off: None, ..all });
        assert_eq!(platform(&[], Some(5)), Platform::default());
    }

    #[test]
    fn two_blocks_are_one_too_many() {
        let mut fadt = q35();
        fadt[68] = 8; // PM1b_CNT
        assert_eq!(platform(&fadt, Some(5)).power_off, None);
        let mut fadt = q35();
        fadt[60] = 8; // PM1b_EVT
        assert!(platform(&fadt, Some(5)).power_off.is_some());
        assert_eq!(platform(&fadt, Some(5)).power_button, None);
    }

    #[test]
    fn a_machine_without_the_old_registers_names_its_own() {
        let mut fadt = q35();
        fadt.resize(276, 0);
        fadt[112..116].copy_from_slice(&HW_REDUCED.to_le_bytes());
        fadt[244..256].copy_from_slice(&[0, 8, 0, 1, 0, 0, 0, 0xfe, 0, 0, 0, 0]);
        fadt[256..268].copy_from_slice(&[0, 8, 0, 1, 1, 0, 0, 0xfe, 0, 0, 0, 0]);
        let (control, status) = (Register::Memory(0xfe00_0000), Register::Memory(0xfe00_0001));
        let power_off = Some(PowerOff { control, status, sleep_type: 5 });
        assert_eq!(platform(&fadt, Some(5)), Platform { power_off, ..Platform::default() });
    }

    #[test]
    fn io_apics_are_found_among_other_entries() {
        let mut madt = vec![0; 44];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        madt.extend([2, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
        madt.extend([1, 12, 1, 0, 0, 0x10, 0xc0, 0xfe, 24, 0, 0, 0]);
        assert_eq!(io_apics(&madt), [0xfec0_0000, 0xfec0_1000]);
        assert_eq!(io_apics(&madt[..56]), [0; 0], "the second entry is cut off");
    }

    fn whole(signature: [u8; 4], len: usize) -> Vec<u8> {
        let mut table = vec![0; len];
        table[..4].copy_from_slice(&signature);
        table[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        table[9] = table.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        table
    }

    #[test]
    fn tables_of_nodes_are_handed_on_whole_or_not_at_all() {
        let (srat, slit) = (whole(*b"SRAT", 200), whole(*b"SLIT", 48));
        assert_eq!(affinity(Some(srat.clone()), Some(slit.clone())), [srat.clone(), slit.clone()]);
        assert_eq!(affinity(Some(srat.clone()), None), std::slice::from_ref(&srat));
        assert!(affinity(None, Some(slit.clone())).is_empty(), "distances between nobody knows what");
        let mut damaged = srat.clone();
        damaged[40] ^= 1;
        for bad in
            [damaged, srat[..199].to_vec(), slit.clone(), whole(*b"SRAT", AFFINITY_LIMIT + 1), vec![], vec![0; 36]]
        {
            assert!(affinity(Some(bad), None).is_empty());
        }
        let long = whole(*b"SRAT", AFFINITY_LIMIT - 47);
        assert_eq!(affinity(Some(long.clone()), Some(slit)), [long], "there is no room for both");
    }

    proptest! {
        #[test]
        fn any_table_says_something_credible(bytes in prop::collection::vec(any::<u8>(), 0..400), s5 in any::<Option<u8>>()) {
            use state_schemas::checked::Check;
            prop_assert_eq!(platform(&bytes, s5).check(&()), Ok(()));
            prop_assert!(io_apics(&bytes).len() <= bytes.len() / 8);
        }
    }
}
