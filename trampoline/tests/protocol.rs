//! The mailbox protocol, checked on every interleaving: the park page's own instructions, decoded and interpreted, on two
//! CPUs, against a kernel that writes requests field by field, with an NMI wherever one may strike.
//!
//! A run in QEMU sees a few of these orders and never the rare ones; this sees all of them, but knows only the
//! instructions between `park_announce` and the jump, and takes memory for sequentially consistent (on x86 the loop relies on
//! no more than the order of stores and of loads, which x86 keeps).

use std::collections::HashMap;
use std::mem::offset_of;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use trampoline::{Mailbox, ParkArgs, ParkPage, mailbox_command, park_page};

const MAILBOX: u64 = 0x1000_0000;
const IDS: [u32; 2] = [5, 9];

const COMMAND: u64 = offset_of!(Mailbox, command) as u64;
const APIC_ID: u64 = offset_of!(Mailbox, apic_id) as u64;
const VECTOR: u64 = offset_of!(Mailbox, wakeup_vector) as u64;
const COUNT: u64 = offset_of!(Mailbox, parked_count) as u64;
const NMIS: u64 = offset_of!(Mailbox, nmis) as u64;
const PARKED: u64 = offset_of!(Mailbox, parked) as u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Cpu {
    rip: u64,
    rax: u64,
    rcx: u64,
    rsi: u64,
    rbp: u64,
    r8: u64,
    zero: bool,
    carry: bool,
    in_nmi: bool,
    nmis_to_come: u8,
    /// It has jumped.
    gone: bool,
}

/// The words of the mailbox that the code reads and writes, in the order of [`Word`].
type Memory = [u64; 5];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Command,
    ApicId,
    Vector,
    Count,
    Parked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    memory: Memory,
    cpus: [Cpu; 2],
    /// Four steps for each request: id, vector, command, wait for the acknowledgement.
    kernel: usize,
}

/// A request: which of the two CPUs, and what.
type Request = (usize, u16);

fn vector_of(request: usize) -> u64 {
    0x10_0000 + 0x1000 * request as u64
}

struct Code64 {
    at: HashMap<u64, Instruction>,
    announce: u64,
    nmi: u64,
}

fn code() -> Code64 {
    let page = park_page(&ParkArgs { cr3_4level: 0x1000, cr3_5level: 0x2000, mailbox: MAILBOX });
    let mut decoder = Decoder::with_ip(64, &page, 0, DecoderOptions::NONE);
    let mut list: Vec<Instruction> = Vec::new();
    let mut returns = 0;
    while returns < 2 {
        let i = decoder.decode();
        returns += u32::from(i.code() == Code::Iretq);
        list.push(i);
    }
    let apic_id = (offset_of!(ParkPage, epitaph) + 12) as u64;
    let announce = list
        .iter()
        .find(|i| {
            i.op0_kind() == OpKind::Memory && i.is_ip_rel_memory_operand() && i.ip_rel_memory_address() == apic_id
        })
        .expect("the id is noted down first")
        .ip();
    // The handler is what follows the jump to the vector.
    let leave = list.iter().find(|i| i.code() == Code::Jmp_rm64).expect("the jump");
    Code64 { announce, nmi: leave.next_ip(), at: list.into_iter().map(|i| (i.ip(), i)).collect() }
}

/// What a word in memory is.
enum Place {
    At(Word),
    MailboxAddress,
    Ignored,
}

impl State {
    fn start(code: &Code64, nmis: u8) -> State {
        let cpu = Cpu {
            rip: code.announce,
            rax: 0,
            rcx: 0,
            rsi: 0,
            rbp: 0,
            r8: 0,
            zero: false,
            carry: false,
            in_nmi: false,
            nmis_to_come: nmis,
            gone: false,
        };
        State { memory: [0; 5], cpus: [cpu; 2], kernel: 0 }
    }

    /// The kernel's next step, if it can take one.
    fn kernel(mut self, requests: &[Request]) -> Option<State> {
        let &(cpu, command) = requests.get(self.kernel / 4)?;
        let memory = &mut self.memory;
        match self.kernel % 4 {
            // Baton's rule: no CPU is asked that is not seen parked.
            0 if memory[Word::Parked as usize] >> IDS[cpu] & 1 == 0 => return None,
            0 => memory[Word::ApicId as usize] = IDS[cpu].into(),
            1 => memory[Word::Vector as usize] = vector_of(self.kernel / 4),
            2 => memory[Word::Command as usize] = command.into(),
            _ if memory[Word::Command as usize] != 0 => return None,
            _ => {}
        }
        self.kernel += 1;
        Some(self)
    }

    /// An NMI strikes a CPU, if one may.
    fn nmi(mut self, code: &Code64, which: usize) -> Option<State> {
        let cpu = &mut self.cpus[which];
        if cpu.in_nmi || cpu.gone || cpu.nmis_to_come == 0 {
            return None;
        }
        cpu.nmis_to_come -= 1;
        cpu.in_nmi = true;
        cpu.rip = code.nmi;
        Some(self)
    }

    /// A CPU's next instruction.
    fn step(mut self, code: &Code64, which: usize) -> Option<State> {
        if self.cpus[which].gone {
            return None;
        }
        let i = &code.at[&self.cpus[which].rip];
        let State { memory, cpus, .. } = &mut self;
        let cpu = &mut cpus[which];
        cpu.rip = i.next_ip();

        let get = |cpu: &Cpu, register: Register| match register.full_register() {
            Register::RAX => cpu.rax,
            Register::RCX => cpu.rcx,
            Register::RSI => cpu.rsi,
            Register::RBP => cpu.rbp,
            Register::RDI => IDS[which].into(),
            Register::R8 => cpu.r8,
            other => panic!("{:#x} reads {other:?}", i.ip()),
        };
        let set = |cpu: &mut Cpu, register: Register, value: u64| match register.full_register() {
            Register::RAX => cpu.rax = value,
            Register::RCX => cpu.rcx = value,
            Register::RSI => cpu.rsi = value,
            Register::RBP => cpu.rbp = value,
            Register::R8 => cpu.r8 = value,
            Register::RSP => {}
            other => panic!("{:#x} writes {other:?}", i.ip()),
        };
        let place = |cpu: &Cpu| {
            if i.is_ip_rel_memory_operand() {
                let mailbox = offset_of!(ParkPage, args.mailbox) as u64;
                return match i.ip_rel_memory_address() {
                    at if at == mailbox => Place::MailboxAddress,
                    _ => Place::Ignored,
                };
            }
            assert_eq!(get(cpu, i.memory_base()), MAILBOX, "{:#x}", i.ip());
            match i.memory_displacement64() {
                COMMAND => Place::At(Word::Command),
                APIC_ID => Place::At(Word::ApicId),
                VECTOR => Place::At(Word::Vector),
                COUNT => Place::At(Word::Count),
                PARKED => Place::At(Word::Parked),
                NMIS => Place::Ignored,
                other => panic!("{:#x} refers to {other:#x} of the mailbox", i.ip()),
            }
        };
        macro_rules! word {
            () => {
                match place(cpu) {
                    Place::At(word) => &mut memory[word as usize],
                    _ => panic!("{:#x}: not a word of the mailbox", i.ip()),
                }
            };
        }
        match i.mnemonic() {
            Mnemonic::Pause => {}
            Mnemonic::Mov | Mnemonic::Movzx if i.op0_kind() == OpKind::Memory => {
                assert!(matches!(place(cpu), Place::Ignored), "{:#x} writes the mailbox", i.ip());
            }
            Mnemonic::Mov | Mnemonic::Movzx => {
                let value = match place(cpu) {
                    Place::At(word) => memory[word as usize],
                    Place::MailboxAddress => MAILBOX,
                    Place::Ignored => panic!("{:#x} reads what is not modelled", i.ip()),
                };
                set(cpu, i.op0_register(), value);
            }
            Mnemonic::Lea => {}
            Mnemonic::Xor => {
                assert_eq!(i.op0_register(), i.op1_register());
                set(cpu, i.op0_register(), 0);
            }
            Mnemonic::Test => cpu.zero = get(cpu, i.op0_register()) & get(cpu, i.op1_register()) == 0,
            Mnemonic::Cmp => {
                let left = match i.op0_kind() {
                    OpKind::Memory => *word!(),
                    _ => get(cpu, i.op0_register()),
                };
                let right = match i.op1_kind() {
                    OpKind::Register => get(cpu, i.op1_register()),
                    _ => i.immediate(1),
                };
                (cpu.zero, cpu.carry) = (left == right, left < right);
            }
            Mnemonic::Je if !cpu.zero => {}
            Mnemonic::Jne if cpu.zero => {}
            Mnemonic::Jae if cpu.carry => {}
            Mnemonic::Jb if !cpu.carry => {}
            Mnemonic::Je | Mnemonic::Jne | Mnemonic::Jae | Mnemonic::Jb => cpu.rip = i.near_branch_target(),
            Mnemonic::Jmp if i.op0_kind() == OpKind::Register => {
                assert_eq!(i.op0_register(), Register::R8);
                cpu.gone = true;
            }
            Mnemonic::Jmp => cpu.rip = i.near_branch_target(),
            Mnemonic::Bts | Mnemonic::Btr => {
                assert!(i.has_lock_prefix(), "{:#x}", i.ip());
                let bit = 1 << get(cpu, i.op1_register());
                let word = word!();
                cpu.carry = *word & bit != 0;
                match i.mnemonic() {
                    Mnemonic::Bts => *word |= bit,
                    _ => *word &= !bit,
                }
            }
            Mnemonic::Inc | Mnemonic::Dec => {
                assert!(i.has_lock_prefix(), "{:#x}", i.ip());
                if let Place::At(word) = place(cpu) {
                    let word = &mut memory[word as usize];
                    *word = match i.mnemonic() {
                        Mnemonic::Inc => word.wrapping_add(1),
                        _ => word.wrapping_sub(1),
                    };
                }
            }
            Mnemonic::Cmpxchg => {
                assert!(i.has_lock_prefix(), "{:#x}", i.ip());
                let new = get(cpu, i.op1_register());
                let word = word!();
                let old = *word;
                cpu.zero = old == cpu.rax;
                match cpu.zero {
                    true => *word = new,
                    false => cpu.rax = old,
                }
            }
            Mnemonic::Xchg => {
                let register = if i.op0_kind() == OpKind::Register { i.op0_register() } else { i.op1_register() };
                let mine = get(cpu, register);
                let old = std::mem::replace(word!(), mine);
                set(cpu, register, old);
            }
            Mnemonic::Iretq => {
                // park_ready: what it does up to the announcement leaves these registers as anything.
                cpu.in_nmi = false;
                cpu.rip = code.announce;
                (cpu.rax, cpu.rcx, cpu.rsi) = (0, 0, 0);
            }
            other => panic!("{:#x}: {other:?} is not modelled", i.ip()),
        }
        Some(self)
    }

    /// What must hold in every state.
    fn check(&self, requests: &[Request]) {
        for (which, cpu) in self.cpus.iter().enumerate().filter(|(_, cpu)| cpu.gone) {
            let asked = requests
                .iter()
                .position(|&request| request == (which, mailbox_command::WAKEUP))
                .unwrap_or_else(|| panic!("CPU {which} has gone and nobody asked it to"));
            assert!(self.kernel > 4 * asked + 2, "CPU {which} went before the command was written: {self:?}");
            assert_eq!(cpu.r8, vector_of(asked), "CPU {which} went to another vector");
            assert_eq!(
                self.memory[Word::Parked as usize] >> IDS[which] & 1,
                0,
                "CPU {which} has gone but counts as parked"
            );
        }
    }

    /// Nothing is left to do: all answered, who was woken is gone, who was not is parked.
    fn finished(&self, requests: &[Request]) -> bool {
        self.kernel == 4 * requests.len()
            && (0..2).all(|which| {
                let woken = requests.contains(&(which, mailbox_command::WAKEUP));
                self.cpus[which].gone == woken && (self.memory[Word::Parked as usize] >> IDS[which] & 1 == 0) == woken
            })
    }
}

/// Walks every state; gives back how many there are.
fn explore(requests: &[Request], nmis: u8) -> usize {
    let code = code();
    let start = State::start(&code, nmis);
    let mut index = HashMap::from([(start, 0usize)]);
    let mut states = vec![start];
    let mut before: Vec<Vec<usize>> = vec![Vec::new()];
    let mut next = 0;
    while next < states.len() {
        let state = states[next];
        state.check(requests);
        let followers = [
            state.kernel(requests),
            state.step(&code, 0),
            state.step(&code, 1),
            state.nmi(&code, 0),
            state.nmi(&code, 1),
        ];
        for follower in followers.into_iter().flatten() {
            let at = *index.entry(follower).or_insert_with(|| {
                states.push(follower);
                before.push(Vec::new());
                states.len() - 1
            });
            before[at].push(next);
        }
        next += 1;
    }
    // Nothing is ever lost for good: from every state an end can be reached.
    let mut good: Vec<bool> = states.iter().map(|state| state.finished(requests)).collect();
    let mut work: Vec<usize> = (0..states.len()).filter(|&at| good[at]).collect();
    assert!(!work.is_empty(), "there is no way to the end");
    while let Some(at) = work.pop() {
        for &from in &before[at] {
            if !std::mem::replace(&mut good[from], true) {
                work.push(from);
            }
        }
    }
    if let Some(stuck) = good.iter().position(|&good| !good) {
        panic!("no way on from {:?}", states[stuck]);
    }
    if nmis == 0 {
        for state in states.iter().filter(|state| state.finished(requests)) {
            let waiting = state.cpus.iter().filter(|cpu| !cpu.gone).count();
            assert_eq!(state.memory[Word::Count as usize], waiting as u64, "the count is exact without NMIs");
        }
    }
    states.len()
}

const TEST: u16 = mailbox_command::TEST;
const WAKEUP: u16 = mailbox_command::WAKEUP;

#[test]
fn requests_to_two_cpus_are_answered_once_each_and_by_the_right_one() {
    for requests in [
        &[(0, WAKEUP), (1, WAKEUP)][..],
        &[(0, TEST), (1, WAKEUP), (0, WAKEUP)],
        &[(1, WAKEUP), (0, TEST), (0, TEST)],
        &[(0, TEST), (1, TEST), (0, TEST), (1, WAKEUP)],
    ] {
        let states = explore(requests, 0);
        println!("{requests:?}: {states} states");
    }
}

#[test]
fn an_nmi_anywhere_loses_no_request() {
    for requests in [&[(0, WAKEUP)][..], &[(0, TEST), (0, WAKEUP)], &[(0, WAKEUP), (1, WAKEUP)]] {
        let states = explore(requests, 1);
        println!("{requests:?}: {states} states");
    }
}
