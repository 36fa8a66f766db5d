//! The three pages: the assembled bytes, and the functions that fill in their arguments.
//!
//! The bytes lie in this program's read-only data. They are never run there; they are copied to physical memory.
#![expect(unsafe_code, reason = "the crate's one door: assembling the pages and reading their bytes")]

use core::arch::global_asm;
use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::args::{
    MAILBOX_APIC_IDS, MAX_FENCE, Mailbox, ParkArgs, SipiArgs, YieldArgs, mailbox_command, yield_command, yield_reason,
};
use crate::epitaph::{Epitaph, step};
use crate::registers as r;

/// Each page is one page: Linux maps no more than that of a reset vector.
pub const PAGE_SIZE: usize = 4096;

/// Code and tables of the SIPI and the park page end here at the latest; then come the arguments.
const ARGS_AT: usize = 0xf00;

/// Layout of the SIPI page.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SipiPage {
    /// Entry at offset 0, real mode.
    pub code: [u8; ARGS_AT],
    /// Where to go.
    pub args: SipiArgs,
    reserved: [u8; PAGE_SIZE - ARGS_AT - size_of::<SipiArgs>() - size_of::<Epitaph>()],
    /// How far the CPU came.
    pub epitaph: Epitaph,
}

/// Layout of the park page.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ParkPage {
    /// Entry at offset 0, 64-bit mode.
    pub code: [u8; ARGS_AT],
    /// Tables and mailbox.
    pub args: ParkArgs,
    reserved: [u8; PAGE_SIZE - ARGS_AT - size_of::<ParkArgs>() - size_of::<Epitaph>()],
    /// What the last CPU did here.
    pub epitaph: Epitaph,
}

const _: () = assert!(size_of::<SipiPage>() == PAGE_SIZE);
const _: () = assert!(size_of::<ParkPage>() == PAGE_SIZE);

global_asm!(
    include_str!("x86_64/sipi.S"),
    args = const offset_of!(SipiPage, args),
    arg_cr3 = const offset_of!(SipiPage, args.cr3),
    arg_entry = const offset_of!(SipiPage, args.entry),
    arg_arg = const offset_of!(SipiPage, args.arg),
    arg_stack = const offset_of!(SipiPage, args.stack),
    epitaph_step = const offset_of!(SipiPage, epitaph.step),
    step_real = const step::word(step::REAL),
    step_protected = const step::word(step::PROTECTED),
    step_jump = const step::word(step::JUMP),
    code32 = const r::SELECTOR_CODE32,
    code64 = const r::SELECTOR_CODE64,
    data = const r::SELECTOR_DATA,
    cr0_protected = const r::CR0_PROTECTED,
    cr0_long = const r::CR0_LONG,
    cr4_pae = const r::CR4_PAE,
    msr_efer = const r::MSR_EFER,
    efer_long = const r::EFER_LONG,
    page_size = const PAGE_SIZE,
    options(att_syntax),
);

global_asm!(
    include_str!("x86_64/park.S"),
    arg_cr3_4level = const offset_of!(ParkPage, args.cr3_4level),
    arg_cr3_5level = const offset_of!(ParkPage, args.cr3_5level),
    arg_mailbox = const offset_of!(ParkPage, args.mailbox),
    args = const offset_of!(ParkPage, args),
    epitaph_step = const offset_of!(ParkPage, epitaph.step),
    epitaph_apic_id = const offset_of!(ParkPage, epitaph.apic_id),
    step_enter = const step::word(step::ENTER),
    step_parked = const step::word(step::PARKED),
    step_tested = const step::word(step::TESTED),
    step_woken = const step::word(step::WOKEN),
    mb_command = const offset_of!(Mailbox, command),
    mb_apic_id = const offset_of!(Mailbox, apic_id),
    mb_vector = const offset_of!(Mailbox, wakeup_vector),
    mb_count = const offset_of!(Mailbox, parked_count),
    mb_nmis = const offset_of!(Mailbox, nmis),
    mb_machine_checks = const offset_of!(Mailbox, machine_checks),
    mb_parked = const offset_of!(Mailbox, parked),
    mb_apic_ids = const MAILBOX_APIC_IDS,
    command_wakeup = const mailbox_command::WAKEUP,
    command_test = const mailbox_command::TEST,
    code64 = const r::SELECTOR_CODE64,
    data = const r::SELECTOR_DATA,
    cr0_long = const r::CR0_LONG,
    cr4_pae = const r::CR4_PAE,
    cr4_kept = const r::CR4_KEPT,
    cr4_mce = const r::CR4_MCE,
    cpuid_machine_checks = const r::CPUID_MACHINE_CHECKS,
    msr_mcg_status = const r::MSR_MCG_STATUS,
    cr4_la57 = const r::CR4_LA57,
    cr4_vmxe = const r::CR4_VMXE,
    msr_efer = const r::MSR_EFER,
    efer_nxe_bit = const r::EFER_NXE_BIT,
    efer_svme_bit = const r::EFER_SVME_BIT,
    page_size = const PAGE_SIZE,
    options(att_syntax),
);

global_asm!(
    include_str!("x86_64/yield.S"),
    command = const offset_of!(YieldArgs, command),
    park_entry = const offset_of!(YieldArgs, park_entry),
    deadline = const offset_of!(YieldArgs, deadline_ticks),
    reason = const offset_of!(YieldArgs, reason),
    silence = const offset_of!(YieldArgs, silence_ticks),
    epitaph_step = const offset_of!(YieldArgs, epitaph.step),
    epitaph_apic_id = const offset_of!(YieldArgs, epitaph.apic_id),
    heartbeat = const offset_of!(YieldArgs, heartbeat),
    fence_count = const offset_of!(YieldArgs, fence_count),
    fence_ids = const offset_of!(YieldArgs, fence_ids),
    max_fence = const MAX_FENCE,
    command_resume = const yield_command::RESUME,
    command_park = const yield_command::PARK,
    command_fired = const yield_command::FIRED,
    reason_resumed = const yield_reason::RESUMED,
    reason_dead_man = const yield_reason::DEAD_MAN,
    step_watch = const step::word(step::WATCH),
    step_fence = const step::word(step::FENCE),
    step_back = const step::word(step::BACK),
    step_gone = const step::word(step::GONE),
    msr_apic_base = const r::MSR_APIC_BASE,
    apic_base_extd_bit = const r::APIC_BASE_EXTD_BIT,
    msr_x2apic_icr = const r::MSR_X2APIC_ICR,
    xapic_icr_low = const r::XAPIC_ICR_LOW,
    xapic_icr_high = const r::XAPIC_ICR_HIGH,
    icr_pending = const r::ICR_PENDING,
    icr_patience = const r::ICR_PATIENCE,
    icr_init = const r::ICR_INIT,
    page_size = const PAGE_SIZE,
    options(att_syntax),
);

unsafe extern "C" {
    static trampoline_sipi_page: [u8; PAGE_SIZE];
    static trampoline_park_page: [u8; PAGE_SIZE];
    static trampoline_yield_page: [u8; PAGE_SIZE];
}

/// The SIPI page: copy it to any page below 1 MiB, and start a CPU there by INIT and SIPI.
///
/// # Panics
/// If the arguments cannot work whatever the machine: a table that 32-bit code cannot load, or no entry.
pub fn sipi_page(args: &SipiArgs) -> [u8; PAGE_SIZE] {
    assert!(
        args.cr3 != 0 && args.cr3.is_multiple_of(4096) && args.cr3 < 1 << 32,
        "cr3 {:#x} is not a page between 0 and 4 GiB",
        args.cr3
    );
    assert!(args.entry != 0, "entry is 0");
    // SAFETY:
    // 1. sipi.S, assembled above into this very crate, defines the symbol and asserts its size of one page.
    // 2. It lies in a read-only section, so no one writes to it; every byte pattern is a valid u8.
    let template = unsafe { &trampoline_sipi_page };
    let mut page = *template;
    let layout = SipiPage::mut_from_bytes(&mut page).expect("the layout is one page of bytes");
    layout.args = *args;
    layout.epitaph = Epitaph::of(b"baton.si");
    page
}

/// The park page: copy it to any page, and enter it at offset 0 in 64-bit mode.
///
/// # Panics
/// If one of the addresses is 0 or no page's.
pub fn park_page(args: &ParkArgs) -> [u8; PAGE_SIZE] {
    for (what, at) in [("cr3_4level", args.cr3_4level), ("cr3_5level", args.cr3_5level), ("mailbox", args.mailbox)] {
        assert!(at != 0 && at.is_multiple_of(4096), "{what} {at:#x} is not a page");
    }
    // SAFETY: as in `sipi_page`, with park.S.
    let template = unsafe { &trampoline_park_page };
    let mut page = *template;
    let layout = ParkPage::mut_from_bytes(&mut page).expect("the layout is one page of bytes");
    layout.args = *args;
    layout.epitaph = Epitaph::of(b"baton.pa");
    page
}

/// The yield page: copy it to any page, and enter it at offset 0 with `rsi` = [`YieldArgs`], `rdi` = the way back.
pub fn yield_page() -> [u8; PAGE_SIZE] {
    // SAFETY: as in `sipi_page`, with yield.S.
    unsafe { trampoline_yield_page }
}
