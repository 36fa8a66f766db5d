//! The three pages as bytes: every instruction decodes in the mode the CPU will be in, refers to nothing outside its
//! page and its arguments, and the data between them is what the manual wants. Whether it *works* is the matter of `run/`.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use proptest::prelude::*;
use std::mem::offset_of;
use trampoline::{
    Epitaph, FenceError, MAILBOX_APIC_IDS, MAX_FENCE, Mailbox, PAGE_SIZE, ParkArgs, ParkPage, SELECTOR_CODE32,
    SELECTOR_CODE64, SipiArgs, SipiPage, YieldArgs, park_page, sipi_page, yield_page,
};
use zerocopy::{FromBytes, FromZeros};

const SIPI: SipiArgs = SipiArgs { cr3: 0x1234_5000, entry: 0x1_2345_6789, arg: 0x2_3456_789a, stack: 0x3_4567_89ab };
const PARK: ParkArgs = ParkArgs { cr3_4level: 0x11_1111_1000, cr3_5level: 0x22_2222_2000, mailbox: 0x33_3333_3000 };

/// Decodes from `from` in one mode, up to and including the first instruction for which `last` holds.
fn decode(page: &[u8], from: usize, bits: u32, mut last: impl FnMut(&Instruction) -> bool) -> Vec<Instruction> {
    let mut decoder = Decoder::with_ip(bits, &page[from..], from as u64, DecoderOptions::NONE);
    let mut out = Vec::new();
    loop {
        let instruction = decoder.decode();
        assert!(!instruction.is_invalid(), "{bits}-bit: no instruction at {:#x}", instruction.ip());
        out.push(instruction);
        if last(&instruction) {
            return out;
        }
        assert!(decoder.can_decode(), "{bits}-bit code from {from:#x} has no end");
    }
}

fn end(code: &[Instruction]) -> usize {
    code.last().expect("there is at least the last one").next_ip() as usize
}

/// Direct branches stay within the code they belong to, and land on an instruction.
fn branches_are_local(code: &[Instruction]) {
    for i in code {
        if matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64) {
            let target = i.near_branch_target();
            assert!(code.iter().any(|t| t.ip() == target), "branch at {:#x} to {target:#x}", i.ip());
        }
        assert!(
            !matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32),
            "far branch to a fixed address at {:#x}",
            i.ip()
        );
    }
}

/// 64-bit code may address this page relative to rip, and through `bases`; no fixed addresses, no segments, no stack.
fn operands_are_relative(code: &[Instruction], bases: &[Register]) {
    for i in code {
        for operand in 0..i.op_count() {
            if i.op_kind(operand) != OpKind::Memory {
                assert_ne!(i.op_kind(operand), OpKind::Immediate64, "{:#x}", i.ip());
                continue;
            }
            assert_eq!(i.segment_prefix(), Register::None, "{:#x}", i.ip());
            if i.is_ip_rel_memory_operand() {
                let target = i.ip_rel_memory_address();
                assert!(target < PAGE_SIZE as u64, "{:#x} refers to {target:#x}", i.ip());
            } else {
                assert!(bases.contains(&i.memory_base()), "{:#x}: base {:?}", i.ip(), i.memory_base());
                assert!(i.memory_displacement64() < PAGE_SIZE as u64, "{:#x}", i.ip());
            }
        }
    }
}

fn touches_stack(i: &Instruction) -> bool {
    i.is_stack_instruction()
}

fn u64_at(page: &[u8], at: usize) -> u64 {
    u64::read_from_bytes(&page[at..at + 8]).expect("8 bytes")
}

#[test]
fn sipi_page_goes_through_all_three_modes() {
    let page = sipi_page(&SIPI);
    let far_indirect = |i: &Instruction| i.is_jmp_far_indirect();

    let real = decode(&page, 0, 16, far_indirect);
    let protected = decode(&page, end(&real), 32, far_indirect);
    let long = decode(&page, end(&protected), 64, |i| i.flow_control() == FlowControl::IndirectBranch);
    for code in [&real, &protected, &long] {
        branches_are_local(code);
        assert!(!code.iter().any(touches_stack));
    }
    operands_are_relative(&long, &[Register::RBX]);
    assert_eq!(long.last().unwrap().op0_register(), Register::RAX);

    // 16-bit: memory only by displacement in the page's own segment, or as the linear address being computed.
    for i in real.iter().filter(|i| i.code() != Code::Lea_r32_m) {
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
            assert_eq!(i.memory_base(), Register::None, "{:#x}", i.ip());
            assert_eq!(i.memory_segment(), Register::DS, "{:#x}", i.ip());
            assert!(i.memory_displacement32() < PAGE_SIZE as u32, "{:#x}", i.ip());
        }
    }
    for i in &protected {
        if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
            assert_eq!(i.memory_base(), Register::EBX, "{:#x}", i.ip());
            assert!(i.memory_displacement32() < PAGE_SIZE as u32, "{:#x}", i.ip());
        }
    }

    // The far pointers: which label is stored into each, and with which selector it is used.
    let stored = |pointer: u32| {
        let at = real
            .iter()
            .position(|i| {
                i.op0_kind() == OpKind::Memory
                    && i.op1_kind() == OpKind::Register
                    && i.memory_displacement32() == pointer
            })
            .expect("someone fills the pointer in");
        assert_eq!(real[at - 1].code(), Code::Lea_r32_m);
        assert_eq!(real[at - 1].memory_base(), Register::EBX);
        real[at - 1].memory_displacement32() as usize
    };
    let to_protected = real.last().unwrap().memory_displacement32();
    let to_long = protected.last().unwrap().memory_displacement32();
    assert_eq!(stored(to_protected), end(&real));
    assert_eq!(stored(to_long), end(&protected));
    let selector = |pointer: u32| u64_at(&page, pointer as usize) >> 32;
    assert_eq!(selector(to_protected), u64::from(SELECTOR_CODE32));
    assert_eq!(selector(to_long), u64::from(SELECTOR_CODE64));

    // The descriptor table register: base filled in, limit of four descriptors.
    let lgdt = real.iter().find(|i| i.code() == Code::Lgdt_m1632).expect("lgdt");
    let gdtr = lgdt.memory_displacement32() as usize;
    assert_eq!(u64_at(&page, gdtr) & 0xffff, 4 * 8 - 1);
    descriptors_at(&page, stored(gdtr as u32 + 2));
    let lidt = real.iter().find(|i| i.code() == Code::Lidt_m1632).expect("lidt");
    assert_eq!(u64_at(&page, lidt.memory_displacement32() as usize) << 16, 0);
}

/// Four descriptors, written here as the manual's fields rather than as the constants of the assembly.
fn descriptors_at(page: &[u8], at: usize) {
    let flat = |kind: u64, long: u64| {
        let (present, not_system, pages) = (1, 1, 1);
        0xffff | kind << 40 | not_system << 44 | present << 47 | 0xf << 48 | long << 53 | (1 - long) << 54 | pages << 55
    };
    let (execute_read_accessed, read_write_accessed) = (0b1011, 0b0011);
    assert_eq!(u64_at(page, at), 0);
    assert_eq!(u64_at(page, at + 0x08), flat(execute_read_accessed, 0));
    assert_eq!(u64_at(page, at + 0x10), flat(execute_read_accessed, 1));
    assert_eq!(u64_at(page, at + 0x18), flat(read_write_accessed, 0));
}

#[test]
fn park_page_needs_only_itself_until_its_tables_are_loaded() {
    let page = park_page(&PARK);
    let mut returns = 0;
    let code = decode(&page, 0, 64, |i| {
        returns += u32::from(i.code() == Code::Iretq);
        returns == 3 // the second ends the NMI handler, the third the machine checks', the last of the code
    });
    assert!(end(&code) <= 0x300, "code ends at {:#x}", end(&code));
    branches_are_local(&code);
    // rax: the handler's pointer to the mailbox.
    operands_are_relative(&code, &[Register::RSI, Register::RAX]);
    assert_eq!(code[0].code(), Code::Endbr64);
    assert_eq!(code[1].code(), Code::Cli);

    // Before CR3 nothing is written, and only the arguments are read.
    let cr3 = code
        .iter()
        .position(|i| i.code() == Code::Mov_cr_r64 && i.op0_register() == Register::CR3)
        .expect("CR3 is loaded");
    let before = &code[..cr3];
    let read: Vec<u64> = before
        .iter()
        .filter(|i| i.is_ip_rel_memory_operand())
        .inspect(|i| assert_eq!(i.op1_kind(), OpKind::Memory))
        .map(|i| i.ip_rel_memory_address())
        .collect();
    let args = offset_of!(ParkPage, args);
    assert_eq!(
        read,
        [(args + offset_of!(ParkArgs, cr3_4level)) as u64, (args + offset_of!(ParkArgs, cr3_5level)) as u64]
    );
    // The only pops are those of the constant frames: popfq, and iretq which loads rsp itself.
    for i in code.iter().filter(|i| touches_stack(i)) {
        assert!(matches!(i.code(), Code::Popfq | Code::Iretq), "{:#x}", i.ip());
    }
    // CR4 is normalised after CR3: with PCIDE on, CR3's low bits would otherwise be reinterpreted.
    let cr4 = code
        .iter()
        .position(|i| i.code() == Code::Mov_cr_r64 && i.op0_register() == Register::CR4)
        .expect("CR4 is loaded");
    assert!(cr3 < cr4);
}

#[test]
fn park_page_data_is_what_the_cpu_will_read() {
    let page = park_page(&PARK);
    let mut returns = 0;
    let code = decode(&page, 0, 64, |i| {
        returns += u32::from(i.code() == Code::Iretq);
        returns == 3
    });
    let address = |wanted: Code| {
        code.iter().find(|i| i.code() == wanted).expect("table register is loaded").ip_rel_memory_address() as usize
    };
    let (gdtr, idtr) = (address(Code::Lgdt_m1664), address(Code::Lidt_m1664));
    assert_eq!(gdtr % 8, 6, "the base is an aligned word");
    let limit = |at: usize| u16::read_from_bytes(&page[at..at + 2]).unwrap();
    assert_eq!(limit(gdtr), 4 * 8 - 1);
    assert_eq!(limit(idtr), 19 * 16 - 1, "vectors 0 to 18");
    // Which lea feeds the word at `pointer`.
    let stored = |pointer: usize| {
        let at = code
            .iter()
            .position(|i| {
                i.op0_kind() == OpKind::Memory
                    && i.is_ip_rel_memory_operand()
                    && i.ip_rel_memory_address() == pointer as u64
            })
            .expect("someone fills it in");
        let lea = code[..at].iter().rev().find(|i| i.code() == Code::Lea_r64_m).expect("from a lea");
        lea.ip_rel_memory_address() as usize
    };
    descriptors_at(&page, stored(gdtr + 2));

    let idt = stored(idtr + 2);
    let (present, interrupt_gate) = (1u64 << 47, 0xe << 40);
    let returns: Vec<usize> = code.iter().filter(|i| i.code() == Code::Iretq).map(|i| i.next_ip() as usize).collect();
    for (vector, body) in [(2, returns[0]..returns[1]), (18, returns[1]..returns[2])] {
        let gate = idt + 16 * vector;
        let handler = stored(gate);
        assert_eq!(stored(gate + 6), handler);
        assert_eq!(stored(gate + 8), handler);
        assert!(body.contains(&handler) && code.iter().any(|i| i.ip() as usize == handler));
        assert_eq!(u64_at(&page, gate), u64::from(SELECTOR_CODE64) << 16 | present | interrupt_gate);
    }
    for vector in (0..19).filter(|vector| ![2, 18].contains(vector)) {
        assert_eq!(page[idt + 16 * vector..idt + 16 * vector + 16], [0; 16], "vector {vector} is not present");
    }

    // The constant frame, and room for an NMI below each value that rsp can have.
    let ready = code.iter().find(|i| i.code() == Code::Iretq).unwrap().next_ip() as usize;
    let frame = code
        .iter()
        .filter(|i| i.code() == Code::Lea_r64_m && i.op0_register() == Register::RSP)
        .map(|i| i.ip_rel_memory_address() as usize)
        .max()
        .unwrap();
    assert_eq!(stored(frame), ready);
    let scratch = stored(frame + 24);
    assert_eq!(u64_at(&page, frame + 8), 0x10);
    assert_eq!(u64_at(&page, frame + 16), 2);
    assert_eq!(u64_at(&page, frame + 32), 0x18);
    assert_eq!(u64_at(&page, scratch), 2, "popfq reads RFLAGS there");
    for rsp in [scratch, scratch + 8, frame] {
        let top = rsp & !15;
        let written = top - 40..top;
        assert!(written.start >= end(&code));
        for kept in [scratch..scratch + 8, frame..frame + 40] {
            assert!(
                written.end <= kept.start || kept.end <= written.start,
                "an NMI at rsp {rsp:#x} would write {written:x?} over {kept:x?}"
            );
        }
    }
}

#[test]
fn yield_page_touches_its_arguments_and_the_apic_only() {
    let page = yield_page();
    let code =
        decode(&page, 0, 64, |i| i.flow_control() == FlowControl::IndirectBranch && i.op0_kind() == OpKind::Memory);
    branches_are_local(&code);
    operands_are_relative(&code, &[Register::RSI, Register::RDX]);
    assert_eq!(code[0].code(), Code::Endbr64);
    assert_eq!(code[1].code(), Code::Cli);
    assert!(!code.iter().any(touches_stack), "the kernel's stack stays as it is");
    // Each wait for the interrupt controller counts its looks: between it and where it begins again there is a counter.
    let waits =
        code.windows(2).filter(|pair| pair[0].code() == Code::Test_rm32_imm32 && pair[1].code() == Code::Jne_rel8_64);
    let counted = waits.map(|pair| {
        let around = pair[1].near_branch_target()..pair[1].ip();
        code.iter().any(|i| around.contains(&i.ip()) && i.code() == Code::Dec_rm32)
    });
    assert_eq!(counted.collect::<Vec<_>>(), [true, true]);

    // Registers that the way back promises to leave alone.
    let kept = [
        Register::RBX,
        Register::RBP,
        Register::RSP,
        Register::RSI,
        Register::RDI,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    let mut info = iced_x86::InstructionInfoFactory::new();
    for i in &code {
        for used in info.info(i).used_registers() {
            if kept.contains(&used.register().full_register()) {
                assert!(
                    matches!(used.access(), iced_x86::OpAccess::Read | iced_x86::OpAccess::CondRead),
                    "{:#x} writes {:?}",
                    i.ip(),
                    used.register()
                );
            }
        }
        assert!(
            !matches!(i.code(), Code::Mov_cr_r64 | Code::Lgdt_m1664 | Code::Lidt_m1664 | Code::Sti),
            "{:#x} changes the kernel's state",
            i.ip()
        );
    }
    assert!(page[end(&code)..].iter().all(|&b| b == 0), "nothing but code");
}

#[test]
fn arguments_lie_where_the_layout_says() {
    let page = sipi_page(&SIPI);
    let layout = SipiPage::ref_from_bytes(&page).unwrap();
    assert_eq!(layout.args, SIPI);
    assert_eq!(&layout.epitaph.owner, b"baton.si");
    let page = park_page(&PARK);
    let layout = ParkPage::ref_from_bytes(&page).unwrap();
    assert_eq!(layout.args, PARK);
    assert_eq!(&layout.epitaph.owner, b"baton.pa");
    for at in [offset_of!(SipiPage, epitaph), offset_of!(ParkPage, epitaph)] {
        assert_eq!(at + size_of::<Epitaph>(), PAGE_SIZE, "the last line of the page's hexdump");
    }
}

/// The numbers that other rooms, the C module and ACPI have on their side.
#[test]
fn shared_offsets_are_pinned() {
    assert_eq!(offset_of!(Mailbox, command), 0);
    assert_eq!(offset_of!(Mailbox, apic_id), 4);
    assert_eq!(offset_of!(Mailbox, wakeup_vector), 8);
    assert_eq!(offset_of!(Mailbox, parked_count), 0x800);
    assert_eq!(offset_of!(Mailbox, nmis), 0x804);
    assert_eq!(offset_of!(Mailbox, machine_checks), 0x808);
    assert_eq!(offset_of!(Mailbox, parked), 0xa00);
    assert_eq!(offset_of!(YieldArgs, command), 0x00);
    assert_eq!(offset_of!(YieldArgs, park_entry), 0x08);
    assert_eq!(offset_of!(YieldArgs, deadline_ticks), 0x10);
    assert_eq!(offset_of!(YieldArgs, reason), 0x18);
    assert_eq!(offset_of!(YieldArgs, silence_ticks), 0x20);
    assert_eq!(offset_of!(YieldArgs, epitaph), 0x30);
    assert_eq!(offset_of!(YieldArgs, heartbeat), 0x40);
    assert_eq!(offset_of!(YieldArgs, fence_count), 0x80);
    assert_eq!(offset_of!(YieldArgs, fence_ids), 0x88);
}

#[test]
#[should_panic(expected = "cr3 0x100000000 is not a page between 0 and 4 GiB")]
fn sipi_page_refuses_a_table_that_32_bit_code_cannot_load() {
    sipi_page(&SipiArgs { cr3: 1 << 32, ..SIPI });
}

#[test]
#[should_panic(expected = "cr3_5level 0x0 is not a page")]
fn park_page_refuses_a_missing_table() {
    park_page(&ParkArgs { cr3_5level: 0, ..PARK });
}

#[test]
fn fence_lists_are_bounded() {
    let mut args = YieldArgs::new(0x1000);
    let full: Vec<u32> = (0..MAX_FENCE as u32).collect();
    args.arm(5, &full).unwrap();
    assert_eq!(args.fence_count as usize, MAX_FENCE);
    let over: Vec<u32> = (0..=MAX_FENCE as u32).collect();
    let before = args;
    assert_eq!(args.arm(9, &over), Err(FenceError::TooMany { given: MAX_FENCE + 1 }));
    assert_eq!(args.arm(9, &[1, u32::MAX]), Err(FenceError::Broadcast));
    assert_eq!(args, before, "a refused list changes nothing");
}

proptest! {
    #[test]
    fn a_parked_bit_is_its_own_cpu_only(id in 0..MAILBOX_APIC_IDS, other in any::<u32>()) {
        let mut mailbox = Mailbox::new_zeroed();
        mailbox.parked[(id / 32) as usize] |= 1 << (id % 32);
        prop_assert!(mailbox.is_parked(id));
        prop_assert_eq!(mailbox.is_parked(other), other == id);
    }

    #[test]
    fn arguments_never_reach_the_code(entry in 1u64.., arg: u64, stack: u64, cr3 in 1u64..0x10_0000) {
        let page = sipi_page(&SipiArgs { cr3: cr3 << 12, entry, arg, stack });
        let same = sipi_page(&SIPI);
        prop_assert_eq!(&page[..offset_of!(SipiPage, args)], &same[..offset_of!(SipiPage, args)]);
    }
}
