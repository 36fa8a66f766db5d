//! Scripts: what a CPU does once the probe has noted down its state. Interpreted by guest.S.

use std::mem::offset_of;

use trampoline::{Mailbox, mailbox_command};

use crate::image::{MAILBOX, RECORDS, SCRIPTS};

/// One step; the order is that of `guest_steps` in guest.S.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
enum Op {
    /// 0, so that a CPU without a script, which reads zeros, halts.
    Halt,
    Exit,
    Store,
    Store16,
    Store32,
    Await,
    Copy,
    Ipi,
    Dump,
    X2apic,
    Efer,
    Delay,
    Beat,
    Spin,
    Still,
    Yield,
    Die,
    La57,
    Summon,
}

/// Exit code that means: the script ran to its end. QEMU turns it into 2 * 16 + 1.
pub const PASSED: u64 = 0x10;

/// TSC ticks of a millisecond: QEMU's emulated TSC counts nanoseconds.
pub const MS: u64 = 1_000_000;

const ICR_INIT: u64 = 0x4500;
const ICR_SIPI: u64 = 0x4600;
const ICR_NMI: u64 = 0x4400;
const ICR_ALL_BUT_SELF: u64 = 0xc_0000;

/// Steps in order. Each method adds one, or a few that belong together.
#[derive(Debug, Clone, Default)]
pub struct Script {
    words: Vec<u64>,
}

impl Script {
    pub fn new() -> Script {
        Script::default()
    }
    /// For a CPU that is to be in x2APIC mode, or not.
    pub fn with_apic(x2apic: bool) -> Script {
        if x2apic { Script::new().x2apic() } else { Script::new() }
    }
    pub fn bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| zerocopy::IntoBytes::as_bytes(w).to_vec()).collect()
    }
    fn op(mut self, op: Op, a: u64, b: u64, c: u64) -> Script {
        self.words.extend([op as u64, a, b, c]);
        self
    }

    /// The test has passed as far as the machine can tell.
    pub fn pass(self) -> Script {
        self.op(Op::Exit, PASSED, 0, 0)
    }
    pub fn halt(self) -> Script {
        self.op(Op::Halt, 0, 0, 0)
    }
    pub fn store(self, at: u64, value: u64) -> Script {
        self.op(Op::Store, at, value, 0)
    }
    pub fn store16(self, at: u64, value: u16) -> Script {
        self.op(Op::Store16, at, value.into(), 0)
    }
    pub fn store32(self, at: u64, value: u32) -> Script {
        self.op(Op::Store32, at, value.into(), 0)
    }
    /// Waits until the word, masked, has this value.
    pub fn until(self, at: u64, mask: u64, value: u64) -> Script {
        self.op(Op::Await, at, mask, value)
    }
    pub fn copy(self, to: u64, from: u64, len: u64) -> Script {
        self.op(Op::Copy, to, from, len)
    }
    /// Memory as it is now, into the run's output.
    pub fn dump(self, at: u64, len: usize) -> Script {
        self.op(Op::Dump, at, len as u64, 0)
    }
    pub fn x2apic(self) -> Script {
        self.op(Op::X2apic, 0, 0, 0)
    }
    pub fn efer(self, clear: u64, set: u64) -> Script {
        self.op(Op::Efer, clear, set, 0)
    }
    pub fn delay(self, ticks: u64) -> Script {
        self.op(Op::Delay, ticks, 0, 0)
    }
    pub fn beat(self, at: u64, times: u64, every: u64) -> Script {
        self.op(Op::Beat, at, times, every)
    }
    pub fn spin(self, at: u64) -> Script {
        self.op(Op::Spin, at, 0, 0)
    }
    /// `[out]` = whether the word stays as it is for so many ticks.
    pub fn still(self, at: u64, ticks: u64, out: u64) -> Script {
        self.op(Op::Still, at, ticks, out)
    }
    /// Into the yield page and, perhaps, back: `[out]` = 0 when everything promised was kept.
    pub fn yields(self, page: u64, args: u64, out: u64) -> Script {
        self.op(Op::Yield, page, args, out)
    }
    /// As a kernel dies: garbage in every register and table, a jump.
    pub fn die(self, to: u64, cr4: u64, cr3: u64) -> Script {
        self.op(Op::Die, to, cr4, cr3)
    }
    pub fn five_levels(self, table: u64) -> Script {
        self.op(Op::La57, table, 0, 0)
    }
    pub fn init(self, cpu: u32) -> Script {
        self.op(Op::Ipi, cpu.into(), ICR_INIT, 0)
    }
    pub fn nmi(self, cpu: u32) -> Script {
        self.op(Op::Ipi, cpu.into(), ICR_NMI, 0)
    }
    pub fn nmi_all_but_self(self) -> Script {
        self.op(Op::Ipi, 0, ICR_NMI | ICR_ALL_BUT_SELF, 0)
    }
    /// INIT, SIPI as a kernel sends them. The pause between is the SIPI's precondition, not a guess: it is lost on a
    /// CPU that has not yet taken the INIT.
    pub fn start(self, cpu: u32, page: u64) -> Script {
        assert!(page.is_multiple_of(4096) && page < 1 << 20);
        self.init(cpu).delay(MS).op(Op::Ipi, cpu.into(), ICR_SIPI | page >> 12, 0)
    }

    /// SIPIs, and no INIT, until the CPU is parked. A CPU that runs ignores them, so this ends only if it has taken an INIT
    /// before. (Again and again, because an INIT that is sent is not yet taken: the emulated CPU's thread may sleep.)
    pub fn summon(self, cpu: u32, page: u64) -> Script {
        assert!(page.is_multiple_of(4096) && page < 1 << 20 && cpu < 64);
        let parked = MAILBOX + offset_of!(Mailbox, parked) as u64;
        self.op(Op::Summon, cpu.into(), ICR_SIPI | page >> 12, parked)
    }

    /// What this CPU does the next time it comes to the probe.
    pub fn next(self, cpu: u32, script: u64) -> Script {
        self.store(SCRIPTS + 8 * u64::from(cpu), script)
    }
    /// Waits until a CPU has come to the probe so many times.
    pub fn arrived(self, cpu: u32, times: u64) -> Script {
        self.until(record(cpu), u64::MAX, times)
    }
    /// The mailbox, as a kernel writes it: id and vector, the command last.
    pub fn ask(self, cpu: u32, command: u16, vector: u64) -> Script {
        self.store32(MAILBOX + offset_of!(Mailbox, apic_id) as u64, cpu)
            .store(MAILBOX + offset_of!(Mailbox, wakeup_vector) as u64, vector)
            .store16(MAILBOX + offset_of!(Mailbox, command) as u64, command)
    }
    /// Waits for the acknowledgement.
    pub fn acknowledged(self) -> Script {
        self.until(MAILBOX + offset_of!(Mailbox, command) as u64, 0xffff, 0)
    }
    pub fn wake(self, cpu: u32, vector: u64) -> Script {
        self.ask(cpu, mailbox_command::WAKEUP, vector).acknowledged()
    }
    /// Waits until exactly these CPUs are parked (a bit each).
    pub fn parked(self, cpus: u64) -> Script {
        self.until(MAILBOX + offset_of!(Mailbox, parked) as u64, u64::MAX, cpus).parked_count(cpus.count_ones())
    }
    pub fn parked_count(self, count: u32) -> Script {
        let at = MAILBOX + offset_of!(Mailbox, parked_count) as u64;
        self.until(at, 0xffff_ffff, count.into())
    }
    /// Waits until parked CPUs have taken so many NMIs in all.
    pub fn nmis(self, count: u64) -> Script {
        let at = MAILBOX + offset_of!(Mailbox, nmis) as u64;
        self.until(at & !7, 0xffff_ffff << (8 * (at & 7)), count << (8 * (at & 7)))
    }
    /// Waits until parked CPUs have taken so many machine checks in all.
    pub fn machine_checks(self, count: u64) -> Script {
        let at = MAILBOX + offset_of!(Mailbox, machine_checks) as u64;
        self.until(at, 0xffff_ffff, count)
    }
    pub fn dump_record(self, cpu: u32) -> Script {
        self.dump(record(cpu), size_of::<crate::guest::Record>())
    }
}

/// Where a CPU's record lies.
pub fn record(cpu: u32) -> u64 {
    RECORDS + 4096 * u64::from(cpu)
}
