//! The 128 KiB firmware image: fixed addresses of the machine, page tables, and a place for whatever a test brings.

use trampoline::{PAGE_SIZE, ParkArgs, SipiArgs, YieldArgs, park_page, sipi_page, yield_page};
use zerocopy::IntoBytes;

use crate::guest;
use crate::script::Script;

// ROM: the image ends below 1 MiB and, once more, below 4 GiB.
const ROM: u64 = 0xe0000;
const ROM_SIZE: usize = 0x20000;
/// guest.S.
pub const GUEST: u64 = 0xf8000;
pub const GUEST_SIZE: usize = 0x1000;
/// The boot CPU's SIPI page, before it is copied to [`BOOT_SIPI`].
pub const BOOT_SIPI_ROM: u64 = 0xf9000;
/// The boot CPU's first script.
pub const BOOT_SCRIPT: u64 = 0xfa000;
const RESET_VECTOR: u64 = 0xffff0;

// RAM below 1 MiB. All of it starts as zeros.
/// The boot CPU's SIPI page.
pub const BOOT_SIPI: u64 = 0x8000;
/// Another one, so that each test runs the same bytes at two addresses.
pub const SIPI: u64 = 0x9e000;
pub const SAVED_RSP: u64 = 0x3e000;
pub const FAR32: u64 = 0x3e010;
/// Script of each CPU at its next visit to the probe, by APIC id.
pub const SCRIPTS: u64 = 0x3f000;
/// Records of the probe, a page each; and the probe's stacks, which end at the next CPU's.
pub const RECORDS: u64 = 0x40000;
pub const STACKS: u64 = 0x61000;

// RAM above.
pub const PARK: u64 = 0x20_0000;
pub const MAILBOX: u64 = 0x20_1000;
pub const YIELD: u64 = 0x20_2000;
pub const YIELD_ARGS: u64 = 0x20_3000;
/// Words for the test's own use.
pub const WORDS: u64 = 0x20_4000;

/// Stack and argument that every SIPI page here carries.
pub const STACK_ARG: u64 = 0x7_0000;
pub const RSI_ARG: u64 = 0x1234_5678_9abc_def0;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;
// In ROM the CPU cannot set the accessed and dirty bits, so they are set.
const TABLE: u64 = PRESENT | WRITE | ACCESSED;
const LEAF: u64 = PRESENT | WRITE | ACCESSED | DIRTY;

/// An image under construction.
pub struct Image {
    rom: Vec<u8>,
    next: u64,
    /// The kernels' tables in this image: identity, four levels.
    pub kernel4: u64,
    /// The same with five.
    pub kernel5: u64,
    /// The firmware's (park page's) own.
    pub firmware4: u64,
    /// The same with five levels.
    pub firmware5: u64,
    /// What Linux leaves in force at the reset vector: its own code (here: the first 2 MiB) and the vector's page. The
    /// mailbox, next to it, is not there.
    pub dying4: u64,
}

impl Image {
    pub fn new() -> Image {
        let mut image =
            Image { rom: vec![0; ROM_SIZE], next: ROM, kernel4: 0, kernel5: 0, firmware4: 0, firmware5: 0, dying4: 0 };
        let identity: Vec<u64> = (0..512u64).map(|i| i << 30 | LEAF | LARGE).collect();
        let pdpt = image.table(&identity);
        image.kernel4 = image.table(&[pdpt | TABLE]);
        image.kernel5 = image.table(&[image.kernel4 | TABLE]);
        image.firmware4 = image.table(&[pdpt | TABLE]);
        image.firmware5 = image.table(&[image.firmware4 | TABLE]);
        let page = image.table(&[PARK | LEAF]);
        let directory = image.table(&[LEAF | LARGE, page | TABLE]);
        let pdpt = image.table(&[directory | TABLE]);
        image.dying4 = image.table(&[pdpt | TABLE]);

        image.put(GUEST, &guest::code());
        let boot = image.sipi_to(guest::probe());
        image.put(BOOT_SIPI_ROM, &boot);
        // ljmp $0xf000, $0x8000
        image.put(RESET_VECTOR, &[0xea, 0x00, 0x80, 0x00, 0xf0]);
        image
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = (at - ROM) as usize;
        self.rom[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn table(&mut self, entries: &[u64]) -> u64 {
        let at = self.place(entries.as_bytes());
        self.next = self.next.next_multiple_of(PAGE_SIZE as u64);
        at
    }

    /// Finds room in the ROM; page-aligned for a page and more.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        let align = if bytes.len() >= PAGE_SIZE { 4096 } else { 32 };
        let at = self.next.next_multiple_of(align);
        self.next = at + bytes.len() as u64;
        assert!(self.next <= GUEST, "the image is full");
        self.put(at, bytes);
        at
    }

    /// A script for some CPU; its address goes into `Script::next`.
    pub fn script(&mut self, script: &Script) -> u64 {
        self.place(&script.bytes())
    }

    fn sipi_to(&self, entry: u64) -> [u8; PAGE_SIZE] {
        sipi_page(&SipiArgs { cr3: self.kernel4, entry, arg: RSI_ARG, stack: STACK_ARG })
    }

    /// A SIPI page that leads there.
    pub fn place_sipi(&mut self, entry: u64) -> u64 {
        let page = self.sipi_to(entry);
        self.place(&page)
    }

    /// The beginning of most scripts of the boot CPU: the park page at `park`, and a SIPI page that leads there.
    pub fn park(&mut self, script: Script, park: u64) -> Script {
        let page = self.place(&park_page(&ParkArgs {
            cr3_4level: self.firmware4,
            cr3_5level: self.firmware5,
            mailbox: MAILBOX,
        }));
        let sipi = self.place_sipi(park);
        script.copy(park, page, PAGE_SIZE as u64).copy(SIPI, sipi, PAGE_SIZE as u64)
    }

    /// The yield page and its arguments.
    pub fn yields(&mut self, script: Script, args: &YieldArgs) -> Script {
        let page = self.place(&yield_page());
        // Nothing but zeros lies behind the first line of ids in these tests.
        let args = self.place(&args.as_bytes()[..0x100]);
        script.copy(YIELD, page, PAGE_SIZE as u64).copy(YIELD_ARGS, args, 0x100)
    }

    /// The finished image: `boot` is what the first CPU does.
    pub fn build(mut self, boot: &Script) -> Vec<u8> {
        let bytes = boot.bytes();
        assert!(BOOT_SCRIPT + bytes.len() as u64 <= RESET_VECTOR);
        self.put(BOOT_SCRIPT, &bytes);
        self.rom
    }
}
