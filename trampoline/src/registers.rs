//! The register values that the pages load, each defined once: the assembly gets them as operands, callers and tests
//! read them from here. Names are those of the processor manuals.

/// CR0 of a CPU that leaves a page: PG, WP, NE, ET, MP, PE. CD and NW are clear (INIT leaves them as they were, and
/// a CPU that was never started comes with its caches off).
pub const CR0_LONG: u32 = 0x8001_0033;
/// CR0 on the way there: NE, ET, PE; paging still off.
pub(crate) const CR0_PROTECTED: u32 = 0x0000_0031;

/// CR4.PAE: long mode cannot be without it.
pub const CR4_PAE: u32 = 1 << 5;
/// CR4.MCE: machine checks are exceptions. With it clear, one stops the machine at once. Linux's own start-up code keeps it.
pub const CR4_MCE: u32 = 1 << 6;
/// CR4 bits that the park page leaves as it finds them, at first; it clears all others but PAE. LA57 cannot change while
/// paging is on. MCE is set a little later, where the CPU has machine checks.
pub const CR4_KEPT: u32 = CR4_LA57 | CR4_MCE;
/// CPUID leaf 1, edx: MCE and MCA, machine checks and the MSRs that tell of them.
pub(crate) const CPUID_MACHINE_CHECKS: u32 = 1 << 7 | 1 << 14;
/// IA32_MCG_STATUS. 0: no machine check is in progress.
pub(crate) const MSR_MCG_STATUS: u32 = 0x17a;
/// CR4.LA57: five levels of page tables.
pub(crate) const CR4_LA57: u32 = 1 << 12;
/// CR4.VMXE. Linux sets it right before VMXON and clears it right after VMXOFF.
pub(crate) const CR4_VMXE: u32 = 1 << 13;

/// EFER: LME, NXE. What a CPU out of INIT gets; LMA follows from paging.
pub(crate) const EFER_LONG: u32 = 1 << 8 | EFER_NXE;
/// EFER.NXE. Linux's `trampoline_start64` takes it for granted: its page tables have NX bits.
pub const EFER_NXE: u32 = 1 << 11;
pub(crate) const EFER_NXE_BIT: u32 = 11;
/// EFER.SVME: AMD's virtualisation.
pub(crate) const EFER_SVME_BIT: u32 = 12;
pub(crate) const MSR_EFER: u32 = 0xc000_0080;

/// Selector of the flat 32-bit code segment in both pages' descriptor tables.
pub const SELECTOR_CODE32: u16 = 0x08;
/// Selector of the 64-bit code segment: `__BOOT_CS` of the Linux boot protocol.
pub const SELECTOR_CODE64: u16 = 0x10;
/// Selector of the flat data segment: `__BOOT_DS` of the Linux boot protocol.
pub const SELECTOR_DATA: u16 = 0x18;

pub(crate) const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_APIC_BASE.EXTD: the local APIC is in x2APIC mode.
pub(crate) const APIC_BASE_EXTD_BIT: u32 = 10;
/// Interrupt command register in x2APIC mode: destination in the upper half.
pub(crate) const MSR_X2APIC_ICR: u32 = 0x830;
/// The same in xAPIC mode, as offsets from the APIC's page.
pub(crate) const XAPIC_ICR_LOW: u32 = 0x300;
pub(crate) const XAPIC_ICR_HIGH: u32 = 0x310;
/// ICR: delivery status, xAPIC only.
pub(crate) const ICR_PENDING: u32 = 1 << 12;
/// How often the yield page looks whether an interrupt was delivered, before it goes on: 50 ms or so, where Linux waits 100 ms.
pub(crate) const ICR_PATIENCE: u32 = 1 << 20;
/// ICR: INIT, edge, assert. No de-assert has to follow, unlike the level form that Linux sends for the sake of
/// the 82489DX.
pub(crate) const ICR_INIT: u32 = 0x4500;
