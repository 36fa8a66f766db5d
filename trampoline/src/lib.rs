// Only where it is read: a page that changes is no reason to build every program anew.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "README.md, beside this crate, is its page.")]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the trampoline is x86-64 machine code; there is no other");

mod args;
mod epitaph;
mod pages;
mod registers;

pub use args::{
    FenceError, MAILBOX_APIC_IDS, MAX_FENCE, Mailbox, ParkArgs, SipiArgs, YieldArgs, mailbox_command, yield_command,
    yield_reason,
};
pub use epitaph::{Epitaph, step};
pub use pages::{PAGE_SIZE, ParkPage, SipiPage, park_page, sipi_page, yield_page};
pub use registers::{CR0_LONG, CR4_KEPT, CR4_PAE, EFER_NXE, SELECTOR_CODE32, SELECTOR_CODE64, SELECTOR_DATA};
