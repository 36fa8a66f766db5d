//! Which CPU may go, in which order the others follow, and how a parked one is woken. Choices are pure; waking writes
//! through [`SharedMemory`].

use std::fmt;
use std::mem::offset_of;

use serde::{Deserialize, Serialize};
use state_schemas::shared::SharedMemory;
use trampoline::{MAILBOX_APIC_IDS, Mailbox, mailbox_command};

/// What is known of one CPU of this kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFacts {
    /// Linux's number.
    pub cpu: u32,
    /// APIC id: the machine's name for it, the same in every kernel.
    pub apic_id: u32,
    /// It runs this kernel. One that does not, and that no other instance has, is offline on purpose (`nosmt`, `maxcpus=`, by hand, retired
    /// for errors): it goes over with the machine, because it must not wait in memory that is the successor's, but it stays offline
    /// there.
    pub online: bool,
    /// The firmware booted the machine on it (IA32_APIC_BASE.BSP). INIT would reset the machine, so it can be neither
    /// started by SIPI nor fenced; only the mailbox moves it.
    pub firmware_bsp: bool,
    /// It is the first thread of its core, as Linux counts: see [`is_first_thread`].
    pub first_thread: bool,
    /// isolcpus, nohz_full, an isolated cpuset: somebody counts on it.
    pub isolated: bool,
    /// Tasks are bound to it alone. The kernel moves them when it goes offline, so another CPU is preferred, and where there is none,
    /// that is said.
    pub pinned: bool,
    /// The instance that has it, if not this kernel.
    pub instance: Option<u32>,
}

/// Why a CPU cannot be the spare one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuRefusal {
    /// It is not there.
    #[error("CPU {cpu} does not exist: this machine has {}", list(.existing))]
    NotThere {
        /// Asked for.
        cpu: u32,
        /// What there is.
        existing: Vec<u32>,
    },
    /// It is the firmware's.
    #[error("CPU {cpu} booted the machine: it cannot be restarted without resetting everything, and moves last")]
    FirmwareBoot {
        /// Asked for.
        cpu: u32,
    },
    /// It is Linux's CPU 0.
    #[error("CPU {cpu} cannot be taken offline by Linux: it moves last, by a yield")]
    Boot {
        /// Asked for.
        cpu: u32,
    },
    /// Nothing would be left.
    #[error("CPU {cpu} is the last one online: a successor needs a second one to boot on")]
    Last {
        /// Asked for.
        cpu: u32,
    },
    /// Somebody else has it.
    #[error("CPU {cpu} belongs to instance {instance}")]
    Given {
        /// Asked for.
        cpu: u32,
        /// Who has it.
        instance: u32,
    },
    /// Isolated.
    #[error("CPU {cpu} is isolated for something else (isolcpus, nohz_full or a cpuset): name another one")]
    Isolated {
        /// Asked for.
        cpu: u32,
    },
    /// Nobody wants it to run.
    #[error("CPU {cpu} is offline, and stays so: name it to start the successor there, or bring another one online")]
    Offline {
        /// Which.
        cpu: u32,
    },
    /// The mailbox has no bit for it.
    #[error("CPU {cpu} has APIC id {apic_id:#x}: Baton can move CPUs with ids below {MAILBOX_APIC_IDS:#x}")]
    Unaddressable {
        /// Which.
        cpu: u32,
        /// Its id.
        apic_id: u32,
    },
    /// None will do.
    #[error("none of {} CPUs can be spared: {}", .reasons.len(), .reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoneLeft {
        /// Why not, each.
        reasons: Vec<CpuRefusal>,
    },
}

/// The CPU to boot a successor on: the wished one, or the best.
///
/// The best one is the first thread of its core: with `nosmt` no other may run, and its siblings stay what they are to the incumbent.
/// Then one to which no task is bound, then the highest number: interrupts and bound work gather at the low ones. One that is offline
/// is taken only by name.
pub fn choose_spare(cpus: &[CpuFacts], wish: Option<u32>) -> Result<CpuFacts, CpuRefusal> {
    if let Some(cpu) = wish {
        let facts = cpus
            .iter()
            .find(|f| f.cpu == cpu)
            .ok_or_else(|| CpuRefusal::NotThere { cpu, existing: cpus.iter().map(|f| f.cpu).collect() })?;
        return may_be_spare(facts, cpus).map(|()| *facts);
    }
    let mut reasons = Vec::new();
    let mut best: Option<&CpuFacts> = None;
    for facts in cpus {
        match may_be_spare(facts, cpus) {
            Ok(()) if !facts.online => reasons.push(CpuRefusal::Offline { cpu: facts.cpu }),
            Ok(()) => best = best.into_iter().chain([facts]).max_by_key(|f| (f.first_thread, !f.pinned, f.cpu)),
            Err(reason) => reasons.push(reason),
        }
    }
    best.copied().ok_or(CpuRefusal::NoneLeft { reasons })
}

fn may_be_spare(facts: &CpuFacts, all: &[CpuFacts]) -> Result<(), CpuRefusal> {
    let cpu = facts.cpu;
    let others_online = all.iter().any(|f| f.online && f.cpu != cpu);
    if let Some(instance) = facts.instance {
        return Err(CpuRefusal::Given { cpu, instance });
    }
    match facts {
        _ if !others_online => Err(CpuRefusal::Last { cpu }),
        CpuFacts { firmware_bsp: true, .. } => Err(CpuRefusal::FirmwareBoot { cpu }),
        CpuFacts { cpu: 0, .. } => Err(CpuRefusal::Boot { cpu }),
        CpuFacts { isolated: true, .. } => Err(CpuRefusal::Isolated { cpu }),
        _ => Ok(()),
    }
}

/// Refuses a machine with a CPU that cannot be moved: it would run on in memory that is the successor's.
pub fn all_can_move(cpus: &[CpuFacts]) -> Result<(), CpuRefusal> {
    let beyond = cpus.iter().find(|f| f.instance.is_none() && f.apic_id >= MAILBOX_APIC_IDS);
    beyond.map_or(Ok(()), |&CpuFacts { cpu, apic_id, .. }| Err(CpuRefusal::Unaddressable { cpu, apic_id }))
}

/// Whether a CPU is the first thread of its core, as Linux decides (`cpu_mark_primary_thread()`, arch/x86/kernel/cpu/topology.c): the
/// bits of its APIC id that tell threads of a core apart are all zero. `thread_bits` is their number (CPUID leaf 0xb or 0x1f, the shift of
/// the first level), 0 without hyperthreads.
pub fn is_first_thread(apic_id: u32, thread_bits: u32) -> bool {
    apic_id & 1u32.checked_shl(thread_bits).map_or(u32::MAX, |threads| threads - 1) == 0
}

/// The number in the successor of the CPU that is `cpu` here, when the successor boots on `spare` and gets the others in the order
/// `moves`: Linux counts from 0, its boot CPU first, then as the MADT lists them.
pub fn number_in_successor(spare: &CpuFacts, moves: &[(CpuFacts, Move)], cpu: u32) -> Option<u32> {
    let mut order = std::iter::once(spare).chain(moves.iter().map(|(facts, _)| facts));
    order.position(|facts| facts.cpu == cpu).map(|at| at as u32)
}

/// Where one CPU stands in the order of moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Move {
    /// Offline it, then park it (SIPI, or through the incumbent's own mailbox).
    Ordinary,
    /// The same, but through the mailbox only: see [`CpuFacts::firmware_bsp`].
    MailboxOnly,
    /// The incumbent's last: by a yield.
    Yield,
}

/// The order in which the CPUs left behind by the spare one go over.
///
/// Ordinary ones ascending; then the one that the firmware booted, as late as possible, because a fence must leave it
/// out (INIT resets the machine); Linux's CPU 0 last, because Linux cannot offline it. CPUs that are offline on purpose go too, and stay
/// offline ([`CpuFacts::online`]).
pub fn order_of_moves(cpus: &[CpuFacts], spare: u32) -> Vec<(CpuFacts, Move)> {
    let mut order: Vec<(CpuFacts, Move)> = cpus
        .iter()
        .filter(|f| f.cpu != spare && f.instance.is_none())
        .map(|f| {
            let how = match f {
                CpuFacts { cpu: 0, .. } => Move::Yield,
                CpuFacts { firmware_bsp: true, .. } => Move::MailboxOnly,
                _ => Move::Ordinary,
            };
            (*f, how)
        })
        .collect();
    order.sort_by_key(|(f, how)| (*how == Move::Yield, *how == Move::MailboxOnly, f.cpu));
    order
}

/// Parses the kernel's list format, "0-3,5" (`/sys/devices/system/cpu/{online,isolated,...}`).
pub fn parse_cpu_list(text: &str) -> Result<Vec<u32>, CpuListError> {
    /// More than any kernel is built for; a bound for hostile text.
    const MOST: u32 = 1 << 16;
    let bad = || CpuListError { text: text.trim().to_owned() };
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: u32 = first.parse().map_err(|_| bad())?;
        let last: u32 = last.parse().map_err(|_| bad())?;
        if first > last || last >= MOST {
            return Err(bad());
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// Not a list of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a list of CPUs such as 0-3,5")]
pub struct CpuListError {
    /// The text.
    pub text: String,
}

/// The same format, written: ascending numbers, runs as "first-last".
pub fn format_cpu_list(cpus: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let text = |&(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.iter().map(text).collect::<Vec<_>>().join(",")
}

fn list(cpus: &[u32]) -> String {
    cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// A wakeup mailbox, and who waits there. Used on the mailbox of a successor that CPUs are handed to (is it parked?),
/// and on the incumbent's own, when that is itself a successor (wake it from there).
///
/// One user at a time: the kernel that onlines a CPU writes the same words. The caller holds the lock under which this
/// kernel's CPUs are on- and offlined (one update at a time).
#[derive(Debug)]
pub struct ParkedCpus<'a, M: SharedMemory + ?Sized> {
    memory: &'a M,
    mailbox: u64,
}

/// Why a parked CPU could not be woken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WakeError {
    /// It is not there.
    #[error("APIC id {apic_id:#x} is not parked: it would be waited for without end")]
    NotParked {
        /// Which.
        apic_id: u32,
    },
    /// The mailbox is in use.
    #[error("the mailbox still holds command {command} for APIC id {apic_id:#x}")]
    Occupied {
        /// What.
        command: u16,
        /// For whom.
        apic_id: u32,
    },
    /// No answer.
    #[error("APIC id {apic_id:#x} did not answer in time; the request is withdrawn, and it is {}", if *.still_parked { "still parked" } else { "gone" })]
    Unanswered {
        /// Which.
        apic_id: u32,
        /// Whether its parked bit is still set.
        still_parked: bool,
    },
}

const COMMAND_AT: u64 = offset_of!(Mailbox, command) as u64;
const VECTOR_AT: u64 = offset_of!(Mailbox, wakeup_vector) as u64;
const COUNT_AT: u64 = offset_of!(Mailbox, parked_count) as u64;
const PARKED_AT: u64 = offset_of!(Mailbox, parked) as u64;

// Command, reserved half and APIC id are one word, so that they change in one store.
const _: () = assert!(offset_of!(Mailbox, command) == 0 && offset_of!(Mailbox, apic_id) == 4);
const _: () = assert!(PARKED_AT.is_multiple_of(8) && COUNT_AT.is_multiple_of(8) && VECTOR_AT.is_multiple_of(8));

impl<'a, M: SharedMemory + ?Sized> ParkedCpus<'a, M> {
    /// The mailbox page at this offset of the memory.
    pub fn new(memory: &'a M, mailbox: u64) -> ParkedCpus<'a, M> {
        ParkedCpus { memory, mailbox }
    }

    /// Whether this CPU waits there.
    pub fn is_parked(&self, apic_id: u32) -> bool {
        apic_id < MAILBOX_APIC_IDS && self.memory.load(self.word_of(apic_id)) & bit_of(apic_id) != 0
    }

    /// Everyone who waits there, ascending.
    pub fn all(&self) -> Vec<u32> {
        let words = MAILBOX_APIC_IDS / 64;
        (0..words)
            .flat_map(|word| {
                let bits = self.memory.load(self.mailbox + PARKED_AT + u64::from(word) * 8);
                (0..64).filter(move |bit| bits & 1 << bit != 0).map(move |bit| word * 64 + bit)
            })
            .collect()
    }

    /// Sends a parked CPU to `vector` (physical; the park page's identity map is in force there). Returns when it has
    /// taken the request. `wait` is called between looks: it pauses as it likes, and says whether to go on waiting.
    pub fn wake(&self, apic_id: u32, vector: u64, mut wait: impl FnMut() -> bool) -> Result<(), WakeError> {
        if !self.is_parked(apic_id) {
            return Err(WakeError::NotParked { apic_id });
        }
        let (command, holder) = self.request();
        if command != mailbox_command::NOOP {
            return Err(WakeError::Occupied { command, apic_id: holder });
        }
        self.memory.store(self.mailbox + VECTOR_AT, vector);
        self.memory.store(self.mailbox + COMMAND_AT, request_word(mailbox_command::WAKEUP, apic_id));
        while self.request().0 != mailbox_command::NOOP {
            if !wait() {
                self.memory.store(self.mailbox + COMMAND_AT, request_word(mailbox_command::NOOP, apic_id));
                return Err(WakeError::Unanswered { apic_id, still_parked: self.is_parked(apic_id) });
            }
        }
        Ok(())
    }

    /// After INIT was sent to a parked CPU: it waits no longer. Not atomic against a CPU that is just arriving, so only
    /// while none is on its way.
    pub fn forget(&self, apic_id: u32) {
        if !self.is_parked(apic_id) {
            return;
        }
        let at = self.word_of(apic_id);
        self.memory.store(at, self.memory.load(at) & !bit_of(apic_id));
        // The count is the low half of its word; the high half is the firmware's own count of NMIs.
        let word = self.memory.load(self.mailbox + COUNT_AT);
        let count = (word as u32).saturating_sub(1);
        self.memory.store(self.mailbox + COUNT_AT, word & !0xffff_ffff | u64::from(count));
    }

    fn request(&self) -> (u16, u32) {
        let word = self.memory.load(self.mailbox + COMMAND_AT);
        (word as u16, (word >> 32) as u32)
    }

    fn word_of(&self, apic_id: u32) -> u64 {
        self.mailbox + PARKED_AT + u64::from(apic_id / 64) * 8
    }
}

fn bit_of(apic_id: u32) -> u64 {
    1 << (apic_id % 64)
}

fn request_word(command: u16, apic_id: u32) -> u64 {
    u64::from(command) | u64::from(apic_id) << 32
}

impl fmt::Display for CpuFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPU {} (APIC id {:#x})", self.cpu, self.apic_id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use state_schemas::shared::Local;

    use super::*;

    fn cpu(cpu: u32) -> CpuFacts {
        CpuFacts {
            cpu,
            apic_id: cpu * 2,
            online: true,
            firmware_bsp: cpu == 0,
            first_thread: true,
            isolated: false,
            pinned: false,
            instance: None,
        }
    }

    #[test]
    fn the_highest_free_cpu_is_spared() {
        let mut cpus: Vec<_> = (0..4).map(cpu).collect();
        assert_eq!(choose_spare(&cpus, None).unwrap().cpu, 3);
        cpus[3].isolated = true;
        assert_eq!(choose_spare(&cpus, None).unwrap().cpu, 2);
        assert_eq!(choose_spare(&cpus, Some(1)).unwrap().cpu, 1);
        // A task is bound to it: only where there is no other.
        cpus[2].pinned = true;
        assert_eq!(choose_spare(&cpus, None).unwrap().cpu, 1);
        cpus[1].pinned = true;
        let spare = choose_spare(&cpus, None).unwrap();
        assert_eq!((spare.cpu, spare.pinned), (2, true));
    }

    #[test]
    fn what_is_offline_on_purpose_is_taken_by_name_only() {
        let mut cpus: Vec<_> = (0..4).map(cpu).collect();
        cpus[3].online = false;
        assert_eq!(choose_spare(&cpus, None).unwrap().cpu, 2);
        assert_eq!(choose_spare(&cpus, Some(3)).unwrap().cpu, 3);
        // It is moved, so that it does not wait in memory of which the incumbent is not the owner any more.
        let order: Vec<_> = order_of_moves(&cpus, 2).into_iter().map(|(f, _)| (f.cpu, f.online)).collect();
        assert_eq!(order, [(1, true), (3, false), (0, true)]);
        // maxcpus=2, one of the two is the boot CPU.
        cpus[1].isolated = true;
        cpus[2].online = false;
        let none = choose_spare(&cpus, None).unwrap_err().to_string();
        assert!(none.contains("CPU 2 is offline, and stays so: name it"), "{none}");
    }

    #[test]
    fn the_spare_one_is_the_first_thread_of_its_core() {
        // -smp 4,sockets=2,cores=1,threads=2: APIC ids 0 1 2 3. One socket of two cores: the same. Spread: 0 2 1 3, as many firmwares do.
        for ids in [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 0x10, 0x11]] {
            let cpus: Vec<_> = (0..4)
                .map(|n| CpuFacts {
                    apic_id: ids[n as usize],
                    first_thread: is_first_thread(ids[n as usize], 1),
                    ..cpu(n)
                })
                .collect();
            let spare = choose_spare(&cpus, None).unwrap();
            assert!(spare.apic_id.is_multiple_of(2) && spare.apic_id != 0, "{spare}");
            assert!(choose_spare(&cpus, Some(3)).is_ok(), "cpuhp.parallel=off lets a second thread boot");
        }
        // One core: there is no other first thread.
        let one_core = [cpu(0), CpuFacts { apic_id: 1, first_thread: false, ..cpu(1) }];
        assert_eq!(choose_spare(&one_core, None).unwrap().cpu, 1);
        // nosmt: second threads are offline, and stay so.
        let nosmt: Vec<_> =
            (0..4).map(|n| CpuFacts { online: n % 2 == 0, first_thread: n % 2 == 0, ..cpu(n) }).collect();
        assert_eq!(choose_spare(&nosmt, None).unwrap().cpu, 2);
    }

    #[test]
    fn first_threads() {
        assert!(is_first_thread(7, 0) && is_first_thread(6, 1) && !is_first_thread(7, 1));
        assert!(is_first_thread(8, 2) && !is_first_thread(10, 2));
        assert!(is_first_thread(0, 32) && !is_first_thread(1, 40));
    }

    #[test]
    fn four_thousand_cpus_with_holes_in_their_ids() {
        // Two threads a core, and ids that leave out every other core.
        let cpus: Vec<_> = (0..4096u32)
            .map(|n| {
                let apic_id = n / 2 * 4 + n % 2;
                CpuFacts { apic_id, first_thread: is_first_thread(apic_id, 1), ..cpu(n) }
            })
            .collect();
        all_can_move(&cpus).unwrap();
        let spare = choose_spare(&cpus, None).unwrap();
        assert_eq!(spare.cpu, 4094);
        let order = order_of_moves(&cpus, spare.cpu);
        assert_eq!((order.len(), order.last().unwrap().1), (4095, Move::Yield));
        assert_eq!(number_in_successor(&spare, &order, spare.cpu), Some(0));
        assert_eq!(number_in_successor(&spare, &order, 1), Some(1));
        assert_eq!(number_in_successor(&spare, &order, 0), Some(4095));
        assert_eq!(number_in_successor(&spare, &order, 4096), None);
        let beyond = CpuFacts { apic_id: MAILBOX_APIC_IDS, ..cpu(4096) };
        assert_eq!(all_can_move(&[beyond]), Err(CpuRefusal::Unaddressable { cpu: 4096, apic_id: MAILBOX_APIC_IDS }));
    }

    #[test]
    fn cpu_lists_are_written_as_they_are_read() {
        for (cpus, text) in [(vec![], ""), (vec![3], "3"), (vec![0, 1, 2, 5, 7, 8], "0-2,5,7-8")] {
            assert_eq!(format_cpu_list(&cpus), text);
            assert_eq!(parse_cpu_list(text).unwrap(), cpus);
        }
    }

    #[test]
    fn each_refusal_says_why() {
        let mut cpus: Vec<_> = (0..4).map(cpu).collect();
        cpus[2].instance = Some(7);
        cpus[3].isolated = true;
        let refused = |cpu| choose_spare(&cpus, Some(cpu)).unwrap_err().to_string();
        assert_eq!(refused(9), "CPU 9 does not exist: this machine has 0, 1, 2, 3");
        assert!(refused(0).contains("booted the machine"));
        assert_eq!(refused(2), "CPU 2 belongs to instance 7");
        assert!(refused(3).contains("isolated"));
        let last = choose_spare(&[cpu(1)], Some(1)).unwrap_err();
        assert_eq!(last, CpuRefusal::Last { cpu: 1 });
        let none = choose_spare(&[cpu(0)], None).unwrap_err();
        assert!(none.to_string().starts_with("none of 1 CPUs can be spared: CPU 0"), "{none}");
        // In a second update CPU 0 is not the firmware's, but Linux cannot offline it all the same.
        let second = [CpuFacts { firmware_bsp: false, ..cpu(0) }, cpu(1)];
        assert_eq!(choose_spare(&second, Some(0)), Err(CpuRefusal::Boot { cpu: 0 }));
    }

    #[test]
    fn order_of_a_second_update() {
        // Linux's CPU 0 runs on what was the spare core; the firmware's core came over as CPU 2.
        let mut cpus: Vec<_> = (0..4).map(cpu).collect();
        cpus[0].firmware_bsp = false;
        cpus[2].firmware_bsp = true;
        let order: Vec<_> = order_of_moves(&cpus, 3).into_iter().map(|(f, how)| (f.cpu, how)).collect();
        assert_eq!(order, [(1, Move::Ordinary), (2, Move::MailboxOnly), (0, Move::Yield)]);
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpu_list("0-2,5\n").unwrap(), [0, 1, 2, 5]);
        assert_eq!(parse_cpu_list("\n").unwrap(), [0u32; 0]);
        for bad in ["a", "3-1", "0-4294967295", "1-2-3", "-1"] {
            assert!(parse_cpu_list(bad).is_err(), "{bad}");
        }
    }

    fn page_with(parked: &[u32]) -> Local {
        let page = Local::new(4096);
        for &id in parked {
            let at = PARKED_AT + u64::from(id / 64) * 8;
            page.store(at, page.load(at) | 1 << (id % 64));
        }
        page.store(COUNT_AT, parked.len() as u64 | 5 << 32);
        page
    }

    #[test]
    fn a_parked_cpu_is_woken() {
        let page = page_with(&[2, 65]);
        let parked = ParkedCpus::new(&page, 0);
        assert_eq!(parked.all(), [2, 65]);
        let mut looks = 0;
        parked
            .wake(65, 0x9000, || {
                looks += 1;
                if looks == 3 {
                    assert_eq!((page.load(0), page.load(8)), (1 | 65 << 32, 0x9000));
                    page.store(0, 65 << 32);
                }
                looks < 10
            })
            .unwrap();
        assert_eq!(looks, 3);
    }

    #[test]
    fn who_is_not_parked_is_never_asked() {
        let page = page_with(&[2]);
        let parked = ParkedCpus::new(&page, 0);
        assert_eq!(parked.wake(3, 0x9000, || true), Err(WakeError::NotParked { apic_id: 3 }));
        assert_eq!(parked.wake(u32::MAX, 0x9000, || true), Err(WakeError::NotParked { apic_id: u32::MAX }));
        assert_eq!(page.load(0), 0);
    }

    #[test]
    fn silence_withdraws_the_request() {
        let page = page_with(&[2]);
        let error = ParkedCpus::new(&page, 0).wake(2, 0x9000, || false).unwrap_err();
        assert_eq!(error, WakeError::Unanswered { apic_id: 2, still_parked: true });
        assert_eq!(page.load(0) as u16, mailbox_command::NOOP);
        page.store(0, request_word(mailbox_command::WAKEUP, 9));
        let error = ParkedCpus::new(&page, 0).wake(2, 0x9000, || false).unwrap_err();
        assert_eq!(error, WakeError::Occupied { command: 1, apic_id: 9 });
    }

    #[test]
    fn a_fenced_cpu_is_forgotten() {
        let page = page_with(&[2, 3]);
        let parked = ParkedCpus::new(&page, 0);
        parked.forget(3);
        parked.forget(3);
        assert_eq!(parked.all(), [2]);
        assert_eq!(page.load(COUNT_AT), 1 | 5 << 32);
    }

    proptest! {
        #[test]
        fn the_spare_one_is_never_one_of_the_forbidden(
            states in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), prop::option::of(1u32..3)), 1..9),
            bsp in 0usize..9,
            wish in prop::option::of(0u32..10),
        ) {
            let cpus: Vec<_> = states.iter().enumerate().map(|(i, &(online, isolated, pinned, instance))| CpuFacts {
                online: online && instance.is_none(), isolated, pinned, instance, firmware_bsp: i == bsp, ..cpu(i as u32)
            }).collect();
            match choose_spare(&cpus, wish) {
                Ok(spare) => {
                    prop_assert!(spare.cpu != 0 && !spare.firmware_bsp && !spare.isolated);
                    prop_assert!(spare.online || wish.is_some());
                    prop_assert!(spare.instance.is_none() && wish.is_none_or(|w| w == spare.cpu));
                    prop_assert!(cpus.iter().any(|f| f.online && f.cpu != spare.cpu));
                    let order = order_of_moves(&cpus, spare.cpu);
                    let free = cpus.iter().filter(|f| f.instance.is_none()).count();
                    prop_assert_eq!(order.len() + 1, free);
                    if let Some((last, how)) = order.last() && cpus[0].instance.is_none() {
                        prop_assert_eq!((last.cpu, *how), (0, Move::Yield));
                    }
                }
                Err(CpuRefusal::NoneLeft { reasons }) => prop_assert_eq!(reasons.len(), cpus.len()),
                Err(_) => prop_assert!(wish.is_some()),
            }
        }
    }
}
