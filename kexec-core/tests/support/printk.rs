//! A kernel's memory with a log in it, written by the rules of printk's writer (kernel/printk/printk_ringbuffer.c) and not by
//! those of the reader under test.
#![allow(dead_code, reason = "the tests use one part of it, the fuzz targets another")]

use std::collections::BTreeMap;

use kexec_core::klog::PhysicalMemory;
use kexec_core::memory_map::Range;

const PAGE: u64 = 4096;
const ID_MASK: u64 = (1 << 62) - 1;
const RESERVED: u64 = 0;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;
const REUSABLE: u64 = 3;
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Where what is, from the start of the memory. The image has the first part, the rest is reached by the direct map.
const ROOT: u64 = 0x1000;
const LOWER_ROOT: u64 = 0x2000;
const DIRECT_PDPT: u64 = 0x3000;
const DIRECT_PD: u64 = 0x4000;
const POINTER: u64 = 0x5_018;
const HEAD: u64 = 0x5_ff8;
const VMCOREINFO: u64 = 0x7000;
const ARRAYS: u64 = 0x8000;

/// What differs from kernel to kernel.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Where its memory begins; whole 2 MiB.
    pub start: u64,
    /// By how many 2 MiB the image is moved.
    pub kaslr: u64,
    /// Where the direct map begins: this many GiB above its lowest place.
    pub direct_gib: u64,
    /// Five levels of page tables.
    pub five_levels: bool,
    /// It has moved its log out of its image.
    pub moved: bool,
    /// With CONFIG_PRINTK_EXECUTION_CTX.
    pub callers: bool,
    /// Descriptors, as a power of 2.
    pub count_bits: u32,
}

/// One kernel's memory.
pub struct Printk {
    shape: Shape,
    pub ram: Vec<u8>,
    head_id: u64,
    tail_id: u64,
    head_lpos: u64,
    tail_lpos: u64,
    texts: BTreeMap<u64, String>,
}

impl PhysicalMemory for Printk {
    fn ranges(&self) -> Vec<Range> {
        vec![Range::with_len(self.shape.start, self.ram.len() as u64).unwrap()]
    }

    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let at = address.checked_sub(self.shape.start).and_then(|at| usize::try_from(at).ok());
        let part = at.and_then(|at| self.ram.get(at..)?.get(..into.len()));
        part.map(|part| into.copy_from_slice(part)).is_some()
    }
}

impl Printk {
    /// A kernel that has said nothing yet.
    pub fn new(shape: Shape) -> Printk {
        let mut kernel = Printk {
            shape,
            ram: vec![0; 0x2_0000],
            head_id: 0,
            tail_id: 0,
            head_lpos: 0,
            tail_lpos: 0,
            texts: BTreeMap::new(),
        };
        let count = kernel.count();
        (kernel.head_id, kernel.tail_id) = ((!count) & ID_MASK, (!count) & ID_MASK);
        (kernel.head_lpos, kernel.tail_lpos) = (kernel.size().wrapping_neg(), kernel.size().wrapping_neg());
        let last = kernel.desc(count - 1);
        kernel.put(last, REUSABLE << 62 | kernel.head_id);
        kernel.put(last + 8, 1);
        kernel.put(last + 16, 1);
        let first = kernel.info(0);
        kernel.put(first, count.wrapping_neg());
        kernel.put(POINTER, kernel.image(HEAD));
        kernel.write_head();
        kernel.map();
        kernel
    }

    fn count(&self) -> u64 {
        1 << self.shape.count_bits
    }

    fn size(&self) -> u64 {
        1 << (self.shape.count_bits + 5)
    }

    fn info_size(&self) -> u64 {
        if self.shape.callers { 112 } else { 88 }
    }

    fn desc(&self, id: u64) -> u64 {
        ARRAYS + (id & (self.count() - 1)) * 24
    }

    fn info(&self, id: u64) -> u64 {
        ARRAYS + self.count() * 24 + (id & (self.count() - 1)) * self.info_size()
    }

    fn data(&self, lpos: u64) -> u64 {
        ARRAYS + self.count() * (24 + self.info_size()) + (lpos & (self.size() - 1))
    }

    /// What the image calls a place.
    fn image(&self, at: u64) -> u64 {
        KERNEL_MAP + self.shape.kaslr * (2 << 20) + at
    }

    fn page_offset(&self) -> u64 {
        let lowest: u64 = if self.shape.five_levels { 0xff11_0000_0000_0000 } else { 0xffff_8880_0000_0000 };
        lowest + (self.shape.direct_gib << 30)
    }

    /// What the kernel calls a place in the log's arrays.
    fn array(&self, at: u64) -> u64 {
        if self.shape.moved { self.page_offset() + self.shape.start + at } else { self.image(at) }
    }

    pub fn put(&mut self, at: u64, word: u64) {
        self.ram[at as usize..][..8].copy_from_slice(&word.to_le_bytes());
    }

    pub fn get(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.ram[at as usize..][..8].try_into().unwrap())
    }

    fn write_head(&mut self) {
        let (bits, base) = (self.shape.count_bits, self.array(0));
        let words = [
            u64::from(bits),
            base + self.desc(0),
            base + self.info(0),
            self.head_id,
            self.tail_id,
            0,
            u64::from(bits + 5),
            base + self.data(0),
            self.head_lpos,
            self.tail_lpos,
            0,
        ];
        for (n, word) in words.into_iter().enumerate() {
            self.put(HEAD + 8 * n as u64, word);
        }
    }

    /// The direct map: one 2 MiB page for all of this memory.
    fn map(&mut self) {
        let at = self.page_offset() + self.shape.start;
        let index = |level: u32| 8 * ((at >> (12 + 9 * level)) & 0x1ff);
        let table = |page: u64| (self.shape.start + page) | 0x63;
        let leaf = self.shape.start | 0xe3;
        let (pgd, pdpt, pd) = (index(3), index(2), index(1));
        let entries = [(DIRECT_PDPT + pdpt, table(DIRECT_PD)), (DIRECT_PD + pd, leaf)];
        let root = if self.shape.five_levels {
            vec![(ROOT + index(4), table(LOWER_ROOT)), (LOWER_ROOT + pgd, table(DIRECT_PDPT))]
        } else {
            vec![(ROOT + pgd, table(DIRECT_PDPT))]
        };
        for (at, entry) in entries.into_iter().chain(root) {
            self.put(at, entry);
        }
    }

    /// The kernel says what it is.
    pub fn say_vmcoreinfo(&mut self) {
        let phys_base = self.shape.start.wrapping_sub(self.shape.kaslr * (2 << 20)).cast_signed();
        let (info_size, dev_info) = if self.shape.callers { (112, 44) } else { (88, 24) };
        let text = format!(
            "OSRELEASE=7.3.4-test\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)={:x}\nSYMBOL(prb)={:x}\n\
             SIZE(printk_ringbuffer)=88\nOFFSET(printk_ringbuffer.desc_ring)=0\n\
             OFFSET(printk_ringbuffer.text_data_ring)=48\nOFFSET(prb_desc_ring.count_bits)=0\n\
             OFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\nOFFSET(prb_desc_ring.head_id)=24\n\
             OFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\nOFFSET(prb_desc.state_var)=0\n\
             OFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\nOFFSET(prb_data_blk_lpos.next)=8\n\
             SIZE(printk_info)={info_size}\nOFFSET(printk_info.seq)=0\nOFFSET(printk_info.ts_nsec)=8\n\
             OFFSET(printk_info.text_len)=16\nOFFSET(printk_info.caller_id)=20\n\
             OFFSET(printk_info.dev_info)={dev_info}\nOFFSET(dev_printk_info.subsystem)=0\n\
             LENGTH(printk_info_subsystem)=16\nOFFSET(dev_printk_info.device)=16\nLENGTH(printk_info_device)=48\n\
             OFFSET(prb_data_ring.size_bits)=0\nOFFSET(prb_data_ring.data)=8\nNUMBER(phys_base)={phys_base}\n\
             NUMBER(pgtable_l5_enabled)={}\nNUMBER(sme_mask)=0\n",
            self.image(ROOT),
            self.image(POINTER),
            u8::from(self.shape.five_levels),
        );
        self.put_vmcoreinfo(text.as_bytes());
    }

    /// Other text in that place.
    pub fn put_vmcoreinfo(&mut self, text: &[u8]) {
        let page = &mut self.ram[VMCOREINFO as usize..][..PAGE as usize];
        page.fill(0);
        let len = text.len().min(page.len());
        page[..len].copy_from_slice(&text[..len]);
    }

    /// A message that is complete.
    pub fn say(&mut self, text: &str, level: u8, facility: u8) {
        self.write(text, level, facility, FINALIZED);
    }

    /// A message that may be continued.
    pub fn begin(&mut self, text: &str) {
        self.write(text, 6, 0, COMMITTED);
    }

    /// A message whose writer never came back.
    pub fn die_while_saying(&mut self, text: &str) {
        self.write(text, 6, 0, RESERVED);
    }

    fn make_reusable(&mut self, id: u64) {
        let at = self.desc(id);
        let state = self.get(at);
        // The first tail of all is no record, and is reusable already.
        if state & ID_MASK == id && state >> 62 != REUSABLE {
            self.put(at, REUSABLE << 62 | id);
            let seq = self.get(self.info(id));
            self.texts.remove(&seq);
        }
    }

    fn push_data_tail(&mut self, until: u64) {
        while until.wrapping_sub(self.tail_lpos) > self.size() {
            let id = self.get(self.data(self.tail_lpos)) & ID_MASK;
            self.make_reusable(id);
            self.tail_lpos = self.get(self.desc(id) + 16);
        }
    }

    fn write(&mut self, text: &str, level: u8, facility: u8, state: u64) {
        let id = (self.head_id + 1) & ID_MASK;
        if (id.wrapping_sub(self.count()) & ID_MASK) == self.tail_id {
            let oldest = self.desc(self.tail_id);
            let (begin, next) = (self.get(oldest + 8), self.get(oldest + 16));
            self.make_reusable(self.tail_id);
            if begin & 1 == 0 && begin == self.tail_lpos {
                self.tail_lpos = next;
            }
            self.tail_id = (self.tail_id + 1) & ID_MASK;
        }
        self.head_id = id;
        let (desc, info) = (self.desc(id), self.info(id));
        self.put(desc, RESERVED << 62 | id);
        let (old, index) = (self.get(info), id & (self.count() - 1));
        let seq = if old == 0 && index != 0 { index } else { old.wrapping_add(self.count()) };
        let (mut begin, mut next) = (3, 3);
        if !text.is_empty() {
            let block = (8 + text.len() as u64).next_multiple_of(8);
            begin = self.head_lpos;
            next = begin.wrapping_add(block);
            let (bits, mut at) = (self.shape.count_bits + 5, begin);
            if begin >> bits != next.wrapping_sub(1) >> bits {
                at = (next.wrapping_sub(1) >> bits) << bits;
                next = at.wrapping_add(block);
            }
            self.push_data_tail(next);
            self.head_lpos = next;
            for at in [begin, at] {
                let at = self.data(at);
                self.put(at, id);
            }
            let at = self.data(at) as usize + 8;
            self.ram[at..][..text.len()].copy_from_slice(text.as_bytes());
        }
        self.put(info, seq);
        self.put(info + 8, seq * 1_000_000);
        let len = text.len() as u64;
        self.put(info + 16, len | u64::from(facility) << 16 | u64::from(level) << 29 | 0x8000_0001 << 32);
        self.put(desc + 8, begin);
        self.put(desc + 16, next);
        self.put(desc, state << 62 | id);
        if state != RESERVED {
            self.texts.insert(seq, text.to_owned());
        }
        self.write_head();
    }

    /// What the ring still has.
    pub fn texts(&self) -> Vec<(u64, String)> {
        self.texts.iter().map(|(seq, text)| (*seq, text.clone())).collect()
    }
}
