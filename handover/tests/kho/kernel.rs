//! The kernel's way of reading, step by step as `kernel/liveupdate/kexec_handover.c` of Linux 7.3 goes, and with none
//! of our code: FDT by plain tokens as in libfdt, the tree by recursion over tables. It trusts what it reads, as the
//! kernel does.

use std::collections::BTreeMap;

use handover::kho::{Memory, Segments};

pub struct Kernel<'a>(pub &'a Segments);

impl Kernel<'_> {
    fn bytes(&self, phys: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read(phys, &mut bytes).unwrap_or_else(|error| panic!("{error}"));
        bytes
    }

    pub fn u64(&self, phys: u64) -> u64 {
        let bytes = self.bytes(phys, 8);
        bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }

    fn be32(&self, phys: u64) -> u64 {
        self.bytes(phys, 4).iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }

    fn string(&self, mut phys: u64) -> String {
        let mut text = String::new();
        loop {
            match self.bytes(phys, 1)[0] {
                0 => return text,
                byte => text.push(char::from(byte)),
            }
            phys += 1;
        }
    }

    /// Every property of the FDT by node name and property name.
    pub fn fdt(&self, fdt: u64) -> BTreeMap<(String, String), Vec<u8>> {
        assert_eq!(self.be32(fdt), 0xd00d_feed, "fdt_check_header: magic");
        assert!(self.be32(fdt + 4) <= 4096, "more than the page that the kernel maps");
        assert_eq!((self.be32(fdt + 20), self.be32(fdt + 24)), (17, 16), "version and last compatible version");
        let (mut at, strings) = (fdt + self.be32(fdt + 8), fdt + self.be32(fdt + 12));
        let mut found = BTreeMap::new();
        let mut path = Vec::new();
        loop {
            let token = self.be32(at);
            at += 4;
            match token {
                1 => {
                    let name = self.string(at);
                    at += (name.len() as u64 + 1).next_multiple_of(4);
                    path.push(name);
                }
                2 => drop(path.pop().expect("FDT_END_NODE without a node")),
                3 => {
                    let (len, name) = (self.be32(at), self.string(strings + self.be32(at + 4)));
                    let node = path.last().expect("a property outside of nodes").clone();
                    found.insert((node, name), self.bytes(at + 8, len as usize));
                    at += 8 + len.next_multiple_of(4);
                }
                4 => {}
                9 => break,
                other => panic!("FDT token {other}"),
            }
        }
        assert!(path.is_empty());
        found
    }

    /// `kho_retrieve_subtree`.
    pub fn subtree(&self, fdt: u64, name: &str) -> Option<Vec<u8>> {
        let found = self.fdt(fdt);
        let number = |property: &str| {
            let value = found.get(&(name.to_owned(), property.to_owned()))?;
            assert_eq!(value.len(), 8, "{name}: {property}");
            Some(value.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
        };
        Some(self.bytes(number("preserved-data")?, usize::try_from(number("blob-size")?).unwrap()))
    }

    /// `kho_mem_retrieve`: every preserved page with its order.
    pub fn preserved(&self, fdt: u64) -> Vec<(u64, u32)> {
        let found = self.fdt(fdt);
        assert_eq!(found[&(String::new(), "compatible".to_owned())], b"kho-v4\0");
        let root = &found[&(String::new(), "preserved-memory-map".to_owned())];
        let root = root.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let mut keys = Vec::new();
        self.walk(root, 5, 0, &mut keys);
        keys.into_iter().map(decode).collect()
    }

    /// `__kho_radix_walk_tree` and `kho_radix_walk_leaf`.
    fn walk(&self, node: u64, level: u32, start: u64, keys: &mut Vec<u64>) {
        assert_eq!(node % 4096, 0);
        for i in 0..512u64 {
            let entry = self.u64(node + 8 * i);
            if entry == 0 {
                continue;
            }
            let key = start | i << ((level - 1) * 9 + 15);
            if level > 1 {
                self.walk(entry, level - 1, key, keys);
                continue;
            }
            for (byte, bits) in self.bytes(entry, 4096).into_iter().enumerate() {
                keys.extend((0..8).filter(|bit| bits >> bit & 1 == 1).map(|bit| key | (byte as u64 * 8 + bit)));
            }
        }
    }

    /// `struct kho_scratch[]`.
    pub fn scratch(&self, list: u64, len: u64) -> Vec<(u64, u64)> {
        (0..len / 16).map(|i| (self.u64(list + 16 * i), self.u64(list + 16 * i + 8))).collect()
    }

    /// `kho_restore_vmalloc`: the content of the area whose descriptor lies at this address. Says which pages it takes.
    pub fn vmalloc(&self, descriptor: u64, taken: &mut Vec<u64>) -> Vec<u8> {
        let words = self.u64(descriptor + 8);
        let (total, order) = (words & 0xffff_ffff, words >> 48);
        assert_eq!((words >> 32 & 0xffff, order), (1, 0), "what vcalloc gives: VM_ALLOC, single pages");
        let mut content = Vec::new();
        let mut chunk = self.u64(descriptor);
        while chunk != 0 {
            for i in 1..512 {
                let page = self.u64(chunk + 8 * i);
                if page == 0 {
                    break;
                }
                taken.push(page);
                content.extend(self.bytes(page, 4096));
            }
            taken.push(chunk);
            chunk = self.u64(chunk);
        }
        assert_eq!(content.len() as u64, total * 4096);
        content
    }
}

/// `kho_decode_radix_key`.
fn decode(key: u64) -> (u64, u32) {
    let fls = 64 - key.leading_zeros();
    let order = 64 - (12 + fls - 1);
    (key << (12 + order), order)
}
