//! The log of another kernel, read out of its memory.
//!
//! Out of real kernels' memory: `klog/*.zst` are pages of stock Debian kernels, dumped by QEMU and reduced by
//! `examples/klog.rs`; KASLR was on. Out of memory that a writer of our own filled, for what a boot does not show. Out of
//! memory that is broken in every way.

#[path = "support/printk.rs"]
mod printk;

use kexec_core::klog::{Caller, FoundBy, KernelLog, LogTail, NoLog, PhysicalMemory};
use kexec_core::layout::PAGE;
use kexec_core::memory_map::Range;
use printk::{Printk, Shape};
use proptest::collection::vec;
use proptest::prelude::*;

const MARK: &str = "baton.update=00112233445566778899aabbccddeeff";

/// Some pages of a machine's memory; the others are zero.
struct Pages {
    size: u64,
    places: Vec<u64>,
    bytes: Vec<u8>,
}

impl Pages {
    /// As `examples/klog.rs --keep` writes them: size of the memory, number of pages, where they are, the pages.
    fn of(file: &[u8]) -> Pages {
        let mut bytes = Vec::new();
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(file).unwrap();
        std::io::Read::read_to_end(&mut decoder, &mut bytes).unwrap();
        let word = |n: usize| u64::from_le_bytes(bytes[8 * n..][..8].try_into().unwrap());
        let count = word(1) as usize;
        let places = (0..count).map(|n| word(2 + n)).collect();
        Pages { size: word(0), places, bytes: bytes.split_off(8 * (2 + count)) }
    }
}

impl PhysicalMemory for Pages {
    fn ranges(&self) -> Vec<Range> {
        vec![Range::new(0, self.size)]
    }

    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        if address.checked_add(into.len() as u64).is_none_or(|end| end > self.size) {
            return false;
        }
        into.fill(0);
        let end = address + into.len() as u64;
        let first = self.places.partition_point(|place| place + PAGE <= address);
        for (n, place) in self.places.iter().enumerate().skip(first).take_while(|(_, place)| **place < end) {
            let part = Range::new(*place, place + PAGE).intersect(Range::new(address, end));
            let from = n * PAGE as usize + (part.start() - place) as usize;
            into[(part.start() - address) as usize..][..part.len() as usize]
                .copy_from_slice(&self.bytes[from..][..part.len() as usize]);
        }
        true
    }
}

struct Real {
    file: &'static [u8],
    found_by: FoundBy,
    release: Option<&'static str>,
    records: usize,
    told: &'static str,
}

const REAL: [Real; 4] = [
    Real {
        file: include_bytes!("klog/panic_6.12.zst"),
        found_by: FoundBy::Vmcoreinfo,
        release: Some("6.12.117+deb13-cloud-amd64"),
        records: 338,
        told: "its kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0), in mount_root_generic+0x1ce/0x270",
    },
    // -cpu max: five levels of page tables.
    Real {
        file: include_bytes!("klog/panic_7.3_five_levels.zst"),
        found_by: FoundBy::Vmcoreinfo,
        release: Some("7.3.4+deb13-cloud-amd64"),
        records: 362,
        told: "its kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0), in mount_root_generic+0x228/0x3a0",
    },
    // Stopped before they said where their log is; the first had moved it already (log_buf_len=1M).
    Real {
        file: include_bytes!("klog/early_6.12_long_log.zst"),
        found_by: FoundBy::Search,
        release: None,
        records: 143,
        told: "its last message: pid_max: default: 32768 minimum: 301",
    },
    Real {
        file: include_bytes!("klog/early_7.3.zst"),
        found_by: FoundBy::Search,
        release: None,
        records: 131,
        told: "its last message: Spectre V2 : Spectre v2 / SpectreRSB: Filling RSB on context switch and VMEXIT",
    },
];

#[test]
fn real_kernels_are_read_from_their_first_message_to_their_last() {
    for real in &REAL {
        let memory = Pages::of(real.file);
        let log = KernelLog::find(&memory, Some(MARK)).unwrap();
        assert_eq!((log.found_by(), log.release()), (real.found_by, real.release));
        let records = log.read(&memory, None, usize::MAX);
        assert!(records[0].text.starts_with("Linux version "), "{}", records[0]);
        assert!(records.iter().map(|record| record.seq).eq(0..real.records as u64), "{} records", records.len());
        // Seconds, from the first message on. (Not in order: clocks change early in a boot.)
        assert_eq!(records[0].ts_ns, 0);
        assert!(records.iter().all(|record| record.ts_ns < 10_000_000_000));
        assert!(records.iter().all(|record| record.is_kernels() && record.level < 8));
        assert_eq!(records[0].caller, Caller::Thread(0));
        let tail = LogTail::of(&records, 30);
        assert_eq!(tail.to_string(), real.told);
        assert_eq!(tail.lines.len(), 30);
        // What comes after a record, and the last few.
        let middle = records.len() as u64 / 2;
        assert_eq!(log.read(&memory, Some(middle), usize::MAX), records[middle as usize + 1..]);
        assert_eq!(log.read(&memory, None, 7), records[records.len() - 7..]);
        // It is no other kernel's; and any kernel's, when nobody asks whose it is.
        assert_eq!(KernelLog::find(&memory, Some("baton.update=00")), Err(NoLog::Stale));
        assert_eq!(KernelLog::find(&memory, None), Ok(log));
    }
}

/// Devices are named in 6.12 and 7.3, whose structures differ.
#[test]
fn devices_are_named() {
    for real in &REAL[..2] {
        let memory = Pages::of(real.file);
        let records = KernelLog::find(&memory, None).unwrap().read(&memory, None, usize::MAX);
        let bus = records.iter().find(|record| record.text.starts_with("pci_bus 0000:00: root bus resource")).unwrap();
        let named = (bus.subsystem.as_deref(), bus.device.as_deref());
        assert_eq!(named, (Some("pci_bus"), Some("+pci_bus:0000:00")));
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    (1u64..1 << 18, 1u64..400, 0u64..3000, any::<[bool; 3]>(), 3u32..=7).prop_map(
        |(start, kaslr, direct_gib, [five_levels, moved, callers], count_bits)| Shape {
            start: start << 21,
            kaslr,
            direct_gib,
            five_levels,
            moved,
            callers,
            count_bits,
        },
    )
}

fn messages() -> impl Strategy<Value = Vec<String>> {
    let text = prop_oneof![4 => "[a-z ]{1,30}", 1 => "[a-z\n]{0,80}", 1 => Just(String::new())];
    vec(text, 1..300)
}

fn read(memory: &dyn PhysicalMemory) -> Vec<(u64, String)> {
    let log = KernelLog::find(memory, None).unwrap();
    log.read(memory, None, usize::MAX).into_iter().map(|record| (record.seq, record.text)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Both ways, each layout, and a ring that has gone round many times.
    #[test]
    fn what_was_written_is_read(shape in shapes(), messages in messages(), told in any::<bool>()) {
        let mut kernel = Printk::new(shape);
        if told {
            kernel.say_vmcoreinfo();
        }
        // No record may be longer than a quarter of the ring.
        let longest = (8usize << shape.count_bits) - 8;
        for message in &messages {
            kernel.say(&message[..message.len().min(longest)], 6, 0);
        }
        prop_assert_eq!(read(&kernel), kernel.texts());
        // One that can be continued is there, one that is being written is not.
        kernel.begin("begun");
        prop_assert_eq!(read(&kernel), kernel.texts());
        kernel.die_while_saying("dead");
        let texts = read(&kernel);
        prop_assert_eq!(&texts, &kernel.texts());
        prop_assert_eq!(&texts.last().unwrap().1, "begun");
    }

    /// Whatever other kernels write: an end, and no more text than a ring has.
    #[test]
    fn broken_memory_breaks_nothing(
        shape in shapes(),
        told in any::<bool>(),
        broken in vec((0u64..0x2000, prop_oneof![any::<u64>(), Just(u64::MAX), 0u64..64, (0u64..64).prop_map(|bit| 1 << bit)]), 1..40),
    ) {
        let mut kernel = Printk::new(shape);
        if told {
            kernel.say_vmcoreinfo();
        }
        for n in 0..40 {
            kernel.say(&format!("message {n}"), 6, 0);
        }
        for (place, value) in broken {
            // Among what is looked at: tables, the head, what the kernel says, the arrays.
            kernel.put(0x1000 + 8 * (place % 0x1e00), value);
        }
        if let Ok(log) = KernelLog::find(&kernel, None) {
            let records = log.read(&kernel, None, usize::MAX);
            let text: usize = records.iter().map(|record| record.text.len()).sum();
            // Each byte becomes at most four characters.
            prop_assert!(text <= 4 * kernel.ram.len());
            prop_assert!(records.iter().all(|record| record.text.chars().all(|c| c == '\n' || c == '\t' || !c.is_control())));
            let _ = LogTail::of(&records, 30).to_string();
        }
    }
}

const SHAPE: Shape = Shape {
    start: 0x4000_0000,
    kaslr: 5,
    direct_gib: 7,
    five_levels: false,
    moved: false,
    callers: false,
    count_bits: 6,
};

#[test]
fn facility_and_level_say_who_speaks() {
    let mut kernel = Printk::new(SHAPE);
    kernel.say_vmcoreinfo();
    kernel.say("Kernel panic - not syncing: says a program", 0, 1);
    kernel.say("says the kernel", 3, 0);
    let records = KernelLog::find(&kernel, None).unwrap().read(&kernel, None, usize::MAX);
    let who: Vec<_> = records.iter().map(|record| (record.level, record.facility, record.caller)).collect();
    assert_eq!(who, [(0, 1, Caller::Cpu(1)), (3, 0, Caller::Cpu(1))]);
    let tail = LogTail::of(&records, 30);
    assert_eq!(tail.to_string(), "its last error: says the kernel");
}

/// Two kernels were put in one memory, one after the other.
#[test]
fn the_mark_tells_the_kernel_that_is_meant_from_one_that_was_there_before() {
    struct Both<'a>(&'a Printk, &'a Printk);
    impl PhysicalMemory for Both<'_> {
        fn ranges(&self) -> Vec<Range> {
            [self.0.ranges(), self.1.ranges()].concat()
        }
        fn read(&self, address: u64, into: &mut [u8]) -> bool {
            self.0.read(address, into) || self.1.read(address, into)
        }
    }
    for told in [true, false] {
        let kernel = |start, mark: &str, count: usize| {
            let mut kernel = Printk::new(Shape { start, ..SHAPE });
            if told {
                kernel.say_vmcoreinfo();
            }
            kernel.say("Linux version", 5, 0);
            kernel.say(&format!("Command line: {mark} quiet"), 6, 0);
            for n in 0..count {
                kernel.say(&format!("{mark} {n}"), 6, 0);
            }
            kernel
        };
        let (before, meant) = (kernel(0x4000_0000, "b=1", 9), kernel(0x5000_0000, "b=2", 3));
        let both = Both(&before, &meant);
        let log = KernelLog::find(&both, Some("b=2")).unwrap();
        assert_eq!(log.read(&both, None, 1)[0].text, "b=2 2");
        assert_eq!(KernelLog::find(&both, Some("b=")), Err(NoLog::Stale));
        // One that has said little yet may be the one that is meant; one whose command line is another's is not.
        let mut silent = Printk::new(Shape { start: 0x6000_0000, ..SHAPE });
        silent.say("Linux version", 5, 0);
        let both = Both(&before, &silent);
        let log = KernelLog::find(&both, Some("b=2")).unwrap();
        assert_eq!(log.read(&both, None, 9).len(), 1);
    }
}

#[test]
fn memory_without_a_kernel_has_no_log() {
    let mut kernel = Printk::new(SHAPE);
    assert_eq!(KernelLog::find(&kernel, None), Err(NoLog::None));
    kernel.ram.fill(0xff);
    assert_eq!(KernelLog::find(&kernel, None), Err(NoLog::None));
    // Full of what looks like a ring and is none.
    for (at, word) in (0..0x2_0000 / 88).flat_map(|n| {
        let at = 88 * n;
        let array = 0xffff_ffff_8000_0000 + 8 * n;
        [
            (at, 12),
            (at + 8, array),
            (at + 16, array),
            (at + 24, 5),
            (at + 32, 4),
            (at + 40, 0),
            (at + 48, 17),
            (at + 56, array),
        ]
        .into_iter()
        .chain([(at + 64, 99), (at + 72, 98), (at + 80, 0)])
    }) {
        kernel.put(at, word);
    }
    assert_eq!(KernelLog::find(&kernel, None), Err(NoLog::None));
}

/// What the fuzz target begins with leads past the first checks.
#[test]
fn the_corpus_leads_to_a_log() {
    let [_, start, kaslr, text @ ..] = include_bytes!("../fuzz/corpus/klog/vmcoreinfo");
    let (start, kaslr) = (u64::from(*start) << 21, u64::from(*kaslr));
    let mut kernel = Printk::new(Shape {
        start,
        kaslr,
        direct_gib: kaslr,
        five_levels: true,
        moved: true,
        callers: true,
        count_bits: 5,
    });
    kernel.say("hello", 6, 0);
    kernel.put_vmcoreinfo(text);
    let log = KernelLog::find(&kernel, None).unwrap();
    assert_eq!((log.found_by(), log.release()), (FoundBy::Vmcoreinfo, Some("7.3.4-test")));
    assert_eq!(read(&kernel), [(0, "hello".to_owned())]);
}
