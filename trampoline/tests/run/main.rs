//! The three pages, run by a CPU: flat firmware images in QEMU, a fraction of a second each, with true INIT and SIPI,
//! true mode switches and several CPUs. No kernel, no module: what a page promises in README.md, and nothing else.
//!
//! A test builds an image (image.rs), says in scripts what each CPU does (script.rs, interpreted by guest.S), and
//! checks the state in which CPUs arrived at the probe.

mod guest;
mod image;
#[path = "../../../tests/support/lab_tree.rs"]
mod lab_tree;
mod qemu;
mod script;

use std::mem::offset_of;

use guest::{Record, probe};
use image::{BOOT_SIPI, Image, MAILBOX, PARK, RSI_ARG, SIPI, STACK_ARG, WORDS, YIELD, YIELD_ARGS};
use qemu::{Machine, SIGNAL, run, take};
use script::{MS, Script};
use trampoline::{CR0_LONG, CR4_PAE, Mailbox, YieldArgs, mailbox_command, yield_command, yield_reason};

const EFER_SCE: u64 = 1;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const EFER_SVME: u64 = 1 << 12;
const EFER_CLEAN: u64 = EFER_LME | EFER_LMA | EFER_NXE;

const PAE: u64 = CR4_PAE as u64;
const CR4_MCE: u64 = 1 << 6;
const CR4_LA57: u64 = 1 << 12;
/// What a kernel may have set on top: PGE, OSFXSR, OSXMMEXCPT, SMEP, SMAP.
const CR4_KERNEL: u64 = 1 << 7 | 1 << 9 | 1 << 10 | 1 << 20 | 1 << 21;
/// The same where process-context ids are used.
const CR4_PCIDE: u64 = 1 << 17;
const PCID: u64 = 5;

const HEARTBEAT: u64 = YIELD_ARGS + offset_of!(YieldArgs, heartbeat) as u64;
const COMMAND: u64 = YIELD_ARGS + offset_of!(YieldArgs, command) as u64;

/// Above 4 GiB on a machine of 4 GiB.
const HIGH_PARK: u64 = 0x1_4000_0000;

fn cpus(cpus: u32) -> Machine {
    Machine { cpus, ..Machine::default() }
}

/// What both pages promise about a CPU that leaves them.
fn arrives_clean(record: &Record, page: u64) {
    assert_eq!(record.cr0, CR0_LONG.into());
    assert_eq!(record.cs, 0x10);
    for data in [record.ds, record.es, record.ss, record.fs, record.gs] {
        assert_eq!(data, 0x18);
    }
    assert_eq!((record.fs_base, record.gs_base), (0, 0));
    assert_eq!(record.ldt, 0);
    let arithmetic = 0x8d5;
    assert_eq!(record.rflags & !arithmetic, 2, "IF, DF, TF, NT, AC are clear");
    assert_eq!(record.dr7, 0x400, "no breakpoint");
    assert_eq!(record.gdt_limit, 31);
    assert!((page..page + 4096).contains(&record.gdt_base));
}

/// What the park page promises besides.
fn leaves_park(record: &Record, park: u64, cr3: u64, cr4: u64) {
    arrives_clean(record, park);
    assert_eq!(record.cr3, cr3);
    assert_eq!(record.cr4, cr4);
    assert_eq!(record.idt_limit, 303, "machine check and below");
    assert!((park..park + 4096).contains(&record.idt_base));
}

/// CPU 1 is woken into `die`, which has it park again as a kernel does that offlines it; there it bears what `parked` does to it, and is
/// woken once more. Its state then.
fn back_from_the_dead(mut image: Image, die: &Script, machine: Machine, parked: impl Fn(Script) -> Script) -> Record {
    let die = image.script(die);
    let halt = image.script(&Script::new().halt());
    let boot = image.park(Script::new(), PARK).next(1, die).start(1, SIPI).parked(0b10).wake(1, probe()).parked(0b10);
    let boot = parked(boot).next(1, halt).wake(1, probe()).arrived(1, 2).dump_record(1).pass();
    take(&mut &run(&image.build(&boot), machine)[..])
}

#[test]
fn sipi_page_brings_the_boot_cpu_to_64_bit_mode() {
    let image = Image::new();
    let kernel4 = image.kernel4;
    let out = run(&image.build(&Script::new().dump_record(0).dump(BOOT_SIPI + 0xff0, 16).pass()), Machine::default());
    let out = &mut &out[..];
    let record: Record = take(out);
    arrives_clean(&record, BOOT_SIPI);
    assert_eq!(record.efer, EFER_CLEAN);
    assert_eq!(record.cr3, kernel4);
    assert_eq!(record.cr4, CR4_PAE.into());
    assert_eq!((record.idt_base, record.idt_limit), (0, 0));
    assert_eq!(record.rsp, STACK_ARG);
    assert_eq!(record.rsi, RSI_ARG);
    assert_eq!(record.rax, probe());
    assert_eq!((record.rdi, record.rbx, record.rbp), (0, 0, 0));
    assert_eq!(&out[..12], b"baton.sijump");
}

#[test]
fn parked_cpus_are_counted_tested_and_woken_one_by_one() {
    let mut image = Image::new();
    let firmware4 = image.firmware4;
    let boot = image
        .park(Script::new(), PARK)
        .start(1, SIPI)
        .parked(0b0010)
        .start(2, SIPI)
        .start(3, SIPI)
        .parked(0b1110)
        .ask(2, mailbox_command::TEST, 0)
        .acknowledged()
        .parked(0b1110)
        .wake(3, probe())
        .arrived(3, 1)
        .parked(0b0110)
        .wake(1, probe())
        .arrived(1, 1)
        .parked(0b0100)
        .dump_record(1)
        .dump_record(3)
        .dump(PARK + 0xff0, 16)
        .pass();
    let out = run(&image.build(&boot), cpus(4));
    let out = &mut &out[..];
    for _ in [1, 3] {
        let record: Record = take(out);
        leaves_park(&record, PARK, firmware4, PAE | CR4_MCE);
        assert_eq!(record.efer, EFER_CLEAN);
    }
    assert_eq!(out, b"baton.pawoke\x01\0\0\0");
}

/// Linux offlines a CPU: its own identity map, in which of ours only the vector's page exists, and its own everything.
#[test]
fn a_dying_kernels_cpu_parks_and_comes_back_clean() {
    let image = Image::new();
    let (firmware4, dying4) = (image.firmware4, image.dying4);
    let efer_off = EFER_NXE; // worse than Linux leaves it
    let die = Script::new().next(1, 0).efer(efer_off, EFER_SVME | EFER_SCE).die(PARK, CR4_KERNEL | CR4_MCE, dying4);
    let record = back_from_the_dead(image, &die, cpus(2), |boot| boot.nmi(1).nmis(1));
    leaves_park(&record, PARK, firmware4, PAE | CR4_MCE);
    assert_eq!(record.efer, EFER_CLEAN | EFER_SCE, "NXE on, SVME off, the rest as it was");
}

#[test]
fn process_context_ids_are_switched_off_with_care() {
    let image = Image::new();
    let (firmware4, dying4) = (image.firmware4, image.dying4);
    let die = Script::new().next(1, 0).die(PARK, CR4_KERNEL | CR4_PCIDE, dying4 | PCID);
    let record = back_from_the_dead(image, &die, Machine { cpu: "max", ..cpus(2) }, |boot| boot);
    leaves_park(&record, PARK, firmware4, PAE | CR4_MCE);
}

#[test]
fn five_level_cpus_get_five_level_tables() {
    let image = Image::new();
    let (kernel5, firmware5) = (image.kernel5, image.firmware5);
    let die = Script::new().next(1, 0).five_levels(kernel5).die(PARK, CR4_KERNEL | CR4_PCIDE, kernel5 | PCID);
    let record = back_from_the_dead(image, &die, Machine { cpu: "max", ..cpus(2) }, |boot| boot);
    leaves_park(&record, PARK, firmware5, PAE | CR4_MCE | CR4_LA57);
}

#[test]
fn park_page_works_above_4_gib() {
    let mut image = Image::new();
    let firmware4 = image.firmware4;
    let boot = image
        .park(Script::new(), HIGH_PARK)
        .start(1, SIPI)
        .parked(0b10)
        .nmi(1)
        .nmis(1)
        .wake(1, probe())
        .arrived(1, 1)
        .dump_record(1)
        .pass();
    let machine = Machine { mib: 4096, ..cpus(2) };
    let out = run(&image.build(&boot), machine);
    leaves_park(&take(&mut &out[..]), HIGH_PARK, firmware4, PAE | CR4_MCE);
}

#[test]
fn the_apic_id_comes_from_leaf_1_where_there_is_no_other() {
    let mut image = Image::new();
    let boot = image
        .park(Script::new(), PARK)
        .start(1, SIPI)
        .start(2, SIPI)
        .parked(0b110)
        .wake(2, probe())
        .arrived(2, 1)
        .parked(0b010)
        .pass();
    let machine = Machine { cpu: "EPYC,cpuid-0xb=off", ..cpus(3) };
    run(&image.build(&boot), machine);
}

/// Linux sends NMIs to all but itself when it panics, other kernels' parked CPUs included.
#[test]
fn parked_cpus_survive_nmis() {
    let mut image = Image::new();
    let firmware4 = image.firmware4;
    let mut boot = image.park(Script::new(), PARK).start(1, SIPI).start(2, SIPI).start(3, SIPI).parked(0b1110);
    for round in 1..=10 {
        boot = boot.nmi_all_but_self().nmis(3 * round);
    }
    boot = boot.nmi(2).nmis(31).parked(0b1110);
    for cpu in 1..=3 {
        boot = boot.wake(cpu, probe()).arrived(cpu, 1).dump_record(cpu);
    }
    let out = run(&image.build(&boot.parked(0).pass()), cpus(4));
    let out = &mut &out[..];
    for _ in 1..=3 {
        leaves_park(&take(out), PARK, firmware4, PAE | CR4_MCE);
    }
}

/// On many CPUs a machine check is everybody's, whoever it concerns; and one that comes while another is in progress shuts the CPU
/// down. Each of these comes when the last one has been taken. A CPU without machine checks parks like any other.
#[test]
fn parked_cpus_survive_machine_checks() {
    let mut image = Image::new();
    let firmware4 = image.firmware4;
    let mut boot = image.park(Script::new(), PARK).start(1, SIPI).start(2, SIPI).parked(0b110);
    for taken in 1..=3 {
        boot = boot.dump(WORDS, SIGNAL).machine_checks(taken);
    }
    boot = boot.parked(0b110);
    for cpu in 1..=2 {
        boot = boot.wake(cpu, probe()).arrived(cpu, 1).dump_record(cpu);
    }
    // Uncorrected, enabled, valid; in progress, and the interrupted code can go on (5) or not (4).
    let machine = Machine {
        monitor: &[
            "mce 1 4 0xb000000000000000 0x5 0x1000 0",
            "mce 1 4 0xb000000000000000 0x4 0x1000 0",
            "mce 2 4 0xb000000000000000 0x4 0x1000 0",
        ],
        ..cpus(3)
    };
    let out = run(&image.build(&boot.parked(0).pass()), machine);
    let out = &mut &out[3 * SIGNAL..];
    for _ in 1..=2 {
        leaves_park(&take(out), PARK, firmware4, PAE | CR4_MCE);
    }

    let mut image = Image::new();
    let firmware4 = image.firmware4;
    let boot =
        image.park(Script::new(), PARK).start(1, SIPI).parked(0b10).wake(1, probe()).arrived(1, 1).dump_record(1);
    let machine = Machine { cpu: "EPYC,mce=off,mca=off", ..cpus(2) };
    let out = run(&image.build(&boot.pass()), machine);
    leaves_park(&take(&mut &out[..]), PARK, firmware4, PAE);
}

/// A kernel that gives up on a test leaves its command in place and writes the next id over it.
#[test]
fn requests_for_others_are_left_alone() {
    let mut image = Image::new();
    let boot = image
        .park(Script::new(), PARK)
        .start(1, SIPI)
        .parked(0b10)
        .ask(9, mailbox_command::TEST, 0)
        .still(MAILBOX, 5 * MS, WORDS)
        .until(WORDS, u64::MAX, 1)
        .ask(1, 0x7777, 0)
        .still(MAILBOX, 5 * MS, WORDS)
        .until(WORDS, u64::MAX, 1)
        .ask(9, mailbox_command::TEST, 0)
        .store32(MAILBOX + offset_of!(Mailbox, apic_id) as u64, 1)
        .acknowledged()
        .parked(0b10)
        .pass();
    run(&image.build(&boot), cpus(2));
}

/// Ids past 255 exist in x2APIC mode only; leaf 1 of CPUID shows their low byte, here 0: the boot CPU's.
#[test]
fn apic_ids_are_not_cut_to_a_byte() {
    const ID: u32 = 256;
    let parked = MAILBOX + (offset_of!(Mailbox, parked) + 256 / 8) as u64;
    let mut image = Image::new();
    let halt = image.script(&Script::new().halt());
    let boot = image
        .park(Script::new().x2apic(), PARK)
        .start(ID, SIPI)
        .until(parked, u64::MAX, 1)
        .parked_count(1)
        .next(0, halt)
        .wake(ID, probe())
        .arrived(0, 2) // the probe goes by leaf 1
        .until(parked, u64::MAX, 0)
        .parked_count(0)
        .pass();
    let machine = Machine {
        cpu: "EPYC,+x2apic",
        more: &[
            "-smp",
            "1,sockets=2,cores=129,threads=1,maxcpus=258",
            "-device",
            "EPYC-x86_64-cpu,x2apic=on,socket-id=1,core-id=0,thread-id=0",
        ],
        ..Machine::default()
    };
    run(&image.build(&boot), machine);
}

/// Requests to different CPUs as close together as can be: a CPU that takes its neighbour's command together with its
/// own id would go before it is asked, and the request would stand for ever.
#[test]
fn wakes_in_quick_succession_are_neither_lost_nor_early() {
    const ROUNDS: u64 = 40;
    let mut image = Image::new();
    let firmware4 = image.firmware4;
    let die = image.script(&Script::new().die(PARK, CR4_KERNEL, firmware4));
    let mut boot = image.park(Script::new(), PARK);
    for cpu in 1..=3 {
        boot = boot.next(cpu, die).start(cpu, SIPI);
    }
    boot = boot.parked(0b1110);
    for _ in 0..ROUNDS {
        for cpu in [2, 1, 3] {
            boot = boot.wake(cpu, probe());
        }
        boot = boot.parked(0b1110);
    }
    for cpu in 1..=3 {
        boot = boot.arrived(cpu, ROUNDS);
    }
    run(&image.build(&boot.pass()), cpus(4));
}

/// The yield arguments and what `Script::yields` found changed.
fn after_yield(out: &mut &[u8]) -> YieldArgs {
    let changed: u64 = take(out);
    assert_eq!(changed, 0, "stack, flags, registers, CR3 (a bit each)");
    take(out)
}

/// The boot CPU yields while CPU 1 runs `successor`, and comes back.
fn yields_to(args: &YieldArgs, successor: &Script) -> YieldArgs {
    let mut image = Image::new();
    let successor = image.script(successor);
    let to_probe = image.place_sipi(probe());
    let boot = image
        .yields(Script::new(), args)
        .copy(SIPI, to_probe, 4096)
        .next(1, successor)
        .start(1, SIPI)
        .yields(YIELD, YIELD_ARGS, WORDS)
        .dump(WORDS, 8)
        .dump(YIELD_ARGS, 4096)
        .pass();
    let args = after_yield(&mut &run(&image.build(&boot), cpus(2))[..]);
    assert_eq!(args.reason, yield_reason::RESUMED);
    args
}

#[test]
fn a_yielded_cpu_resumes_when_told() {
    let mut args = YieldArgs::new(PARK);
    args.arm(1000 * MS, &[1]).unwrap();
    // Beats for longer than the deadline: it is the silence that counts. A command nobody knows changes nothing.
    let beat = Script::new()
        .beat(HEARTBEAT, 30, 25 * MS)
        .store(COMMAND, 99)
        .beat(HEARTBEAT, 30, 25 * MS)
        .store(COMMAND, yield_command::RESUME)
        .halt();
    let args = yields_to(&args, &beat);
    assert_eq!(args.command, yield_command::RESUME);
    assert_eq!(&args.epitaph.step, b"back");
    assert!(args.silence_ticks < args.deadline_ticks);
}

#[test]
fn without_a_deadline_a_yielded_cpu_waits() {
    let resume = Script::new().delay(100 * MS).store(COMMAND, yield_command::RESUME).halt();
    let args = yields_to(&YieldArgs::new(PARK), &resume);
    assert_eq!(args.silence_ticks, 0);
}

/// The successor hangs on all its CPUs, in loops of their own; the switch stops them, and a SIPI alone starts them again.
fn dead_man(machine: Machine, x2apic: bool, fence: &[u32]) -> YieldArgs {
    let mut image = Image::new();
    let mut args = YieldArgs::new(PARK);
    args.arm(50 * MS, fence).unwrap();
    let crash: Vec<u64> = (1..machine.cpus)
        .map(|cpu| {
            let word = WORDS + 0x100 + 8 * u64::from(cpu);
            image.script(&Script::with_apic(x2apic).beat(HEARTBEAT, 5, MS).spin(word))
        })
        .collect();
    let to_probe = image.place_sipi(probe());
    let mut boot = image.yields(Script::with_apic(x2apic), &args).copy(SIPI, to_probe, 4096);
    for cpu in 1..machine.cpus {
        boot = boot.next(cpu, crash[cpu as usize - 1]).start(cpu, SIPI);
    }
    boot = boot.yields(YIELD, YIELD_ARGS, WORDS).dump(WORDS, 8).dump(YIELD_ARGS, 4096);
    boot = image.park(boot, PARK);
    for cpu in 1..machine.cpus {
        boot = boot.summon(cpu, SIPI);
    }
    boot = boot.parked((1 << machine.cpus) - 2).pass();

    let out = run(&image.build(&boot), machine);
    let args = after_yield(&mut &out[..]);
    assert_eq!(args.reason, yield_reason::DEAD_MAN);
    assert_eq!(args.command, yield_command::FIRED);
    assert_eq!(&args.epitaph.step, b"back");
    let overshoot = args.deadline_ticks / 16 + 1;
    assert!(
        (args.deadline_ticks..=args.deadline_ticks + overshoot).contains(&args.silence_ticks),
        "{} ticks of silence",
        args.silence_ticks
    );
    args
}

/// 0x100 must not be taken for CPU 0, which is the one that sends, nor 0xff for everybody.
#[test]
fn dead_man_stops_a_crashed_successor() {
    let args = dead_man(cpus(4), false, &[1, 0xff, 2, 0x100, 3]);
    assert_eq!(args.epitaph.apic_id, 3, "the last one stopped");
}

#[test]
fn dead_man_works_with_x2apic() {
    let machine = Machine { cpu: "EPYC,+x2apic", ..cpus(3) };
    dead_man(machine, true, &[2, 1]);
}

#[test]
fn a_yielded_cpu_can_be_parked_for_good_and_woken_by_the_successor() {
    for (cpu, x2apic) in [("EPYC", false), ("max", false), ("EPYC,+x2apic", true)] {
        let mut image = Image::new();
        let (kernel4, firmware4) = (image.kernel4, image.firmware4);
        let mut args = YieldArgs::new(PARK);
        args.arm(2000 * MS, &[1]).unwrap();
        let boot_again = image.script(&Script::new().dump_record(0).dump(YIELD_ARGS, 4096).pass());
        let successor = image.script(
            &Script::with_apic(x2apic)
                .beat(HEARTBEAT, 10, MS)
                .next(0, boot_again)
                .store(COMMAND, yield_command::PARK)
                .parked(0b01)
                .nmi(0)
                .nmis(1)
                .wake(0, probe())
                .halt(),
        );
        let to_probe = image.place_sipi(probe());
        let script = image.yields(Script::with_apic(x2apic), &args);
        let boot = image
            .park(script, PARK)
            .copy(SIPI, to_probe, 4096)
            .next(1, successor)
            .start(1, SIPI)
            .yields(YIELD, YIELD_ARGS, WORDS);
        let machine = Machine { cpu, ..cpus(2) };
        let out = run(&image.build(&boot), machine);
        let out = &mut &out[..];
        let record: Record = take(out);
        assert_eq!(record.visits, 2);
        assert_ne!(kernel4, firmware4);
        leaves_park(&record, PARK, firmware4, PAE | CR4_MCE);
        let args: YieldArgs = take(out);
        assert_eq!(args.reason, yield_reason::NONE);
        assert_eq!(&args.epitaph.step, b"gone");
    }
}
