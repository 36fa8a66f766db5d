//! The firmware image's own code: its bytes, and the record that its probe writes.
#![expect(unsafe_code, reason = "assembles the test's firmware and reads its bytes")]

use core::arch::global_asm;
use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::image::{
    BOOT_SCRIPT, BOOT_SIPI, BOOT_SIPI_ROM, FAR32, GUEST, GUEST_SIZE, RECORDS, SAVED_RSP, SCRIPTS, STACKS,
};

/// The state in which a CPU came to the probe.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Record {
    pub visits: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub rflags: u64,
    pub dr7: u64,
    pub rsp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rbp: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub cs: u16,
    pub ds: u16,
    pub es: u16,
    pub ss: u16,
    pub fs: u16,
    pub gs: u16,
    pub ldt: u16,
    pub gdt_limit: u16,
    pub gdt_base: u64,
    reserved: [u16; 3],
    pub idt_limit: u16,
    pub idt_base: u64,
}

// sgdt and sidt write limit and base as ten bytes in a row.
const _: () = assert!(offset_of!(Record, gdt_limit) + 2 == offset_of!(Record, gdt_base));
const _: () = assert!(offset_of!(Record, idt_limit) + 2 == offset_of!(Record, idt_base));

global_asm!(
    include_str!("guest.S"),
    guest = const GUEST,
    guest_size = const GUEST_SIZE,
    boot_sipi_rom = const BOOT_SIPI_ROM,
    boot_sipi = const BOOT_SIPI,
    boot_script = const BOOT_SCRIPT,
    scripts = const SCRIPTS,
    records = const RECORDS,
    stacks = const STACKS,
    saved_rsp = const SAVED_RSP,
    far32 = const FAR32,
    rec_visits = const offset_of!(Record, visits),
    rec_cr0 = const offset_of!(Record, cr0),
    rec_cr3 = const offset_of!(Record, cr3),
    rec_cr4 = const offset_of!(Record, cr4),
    rec_efer = const offset_of!(Record, efer),
    rec_rflags = const offset_of!(Record, rflags),
    rec_dr7 = const offset_of!(Record, dr7),
    rec_rsp = const offset_of!(Record, rsp),
    rec_rsi = const offset_of!(Record, rsi),
    rec_rdi = const offset_of!(Record, rdi),
    rec_rax = const offset_of!(Record, rax),
    rec_rbx = const offset_of!(Record, rbx),
    rec_rbp = const offset_of!(Record, rbp),
    rec_fs_base = const offset_of!(Record, fs_base),
    rec_gs_base = const offset_of!(Record, gs_base),
    rec_cs = const offset_of!(Record, cs),
    rec_ds = const offset_of!(Record, ds),
    rec_es = const offset_of!(Record, es),
    rec_ss = const offset_of!(Record, ss),
    rec_fs = const offset_of!(Record, fs),
    rec_gs = const offset_of!(Record, gs),
    rec_ldt = const offset_of!(Record, ldt),
    rec_gdt_limit = const offset_of!(Record, gdt_limit),
    rec_idt_limit = const offset_of!(Record, idt_limit),
    options(att_syntax),
);

unsafe extern "C" {
    static trampoline_guest: [u8; GUEST_SIZE];
    static trampoline_guest_probe: u8;
}

/// The code, to lie at [`GUEST`].
pub fn code() -> [u8; GUEST_SIZE] {
    // SAFETY: guest.S, assembled above, defines the symbol with this size, in a section that nobody writes to.
    unsafe { trampoline_guest }
}

/// Physical address of the probe.
pub fn probe() -> u64 {
    let offset = (&raw const trampoline_guest_probe as usize) - (&raw const trampoline_guest as usize);
    GUEST + offset as u64
}
