//! What a kernel says of its own structures, for whoever reads its dump
//! (Documentation/admin-guide/kdump/vmcoreinfo.rst): lines of `KEY(name)=value` on a page of its own.

use super::address::{AddressSpace, KERNEL_MAP, Tables};
use super::memory::{PhysicalMemory, bytes, pages};
use super::record::escaped;
use super::ring::{self, Layout};
use crate::layout::PAGE;

/// Its first line begins with this.
const FIRST_KEY: &[u8; 10] = b"OSRELEASE=";

/// The lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vmcoreinfo {
    text: String,
}

impl Vmcoreinfo {
    /// All pages that look like it. More than one where an earlier kernel has left its own.
    pub(super) fn all_in(memory: &dyn PhysicalMemory) -> impl Iterator<Item = Vmcoreinfo> {
        pages(memory).filter_map(|page| {
            (bytes(memory, page)? == *FIRST_KEY).then_some(())?;
            Self::of_page(&bytes(memory, page)?)
        })
    }

    /// Out of one page; nothing when it is something else.
    fn of_page(page: &[u8; PAGE as usize]) -> Option<Vmcoreinfo> {
        let text = page.split(|byte| *byte == 0).next()?;
        let text = str::from_utf8(text).ok()?.to_owned();
        text.starts_with("OSRELEASE=").then_some(Vmcoreinfo { text })
    }

    /// What a key says. A key that comes twice has its first value.
    fn value(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.value(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// Written with `%ld`: what is above the half is negative.
    fn number(&self, name: &str) -> Option<u64> {
        self.value(&format!("NUMBER({name})"))?.parse::<i64>().ok().map(i64::cast_unsigned)
    }

    fn length(&self, kind: &str, name: &str) -> Option<u64> {
        // No structure of printk is longer than a page, and no sum of two such lengths overflows.
        self.value(&format!("{kind}({name})"))?.parse().ok().filter(|length| *length <= PAGE)
    }

    /// The kernel's release, as can be printed.
    pub(super) fn release(&self) -> Option<String> {
        self.value("OSRELEASE").map(|release| escaped(release.as_bytes()))
    }

    fn address_space(&self) -> Option<AddressSpace> {
        let phys_base = self.number("phys_base")?;
        let levels = if self.number("pgtable_l5_enabled")? == 0 { 4 } else { 5 };
        let mask = self.number("sme_mask").unwrap_or(0);
        let root = self.symbol("swapper_pg_dir")?.checked_sub(KERNEL_MAP)?.wrapping_add(phys_base);
        Some(AddressSpace { phys_base, tables: Some(Tables { root, levels, mask }), direct: None })
    }

    fn layout(&self) -> Option<Layout> {
        let size = |name: &str| self.length("SIZE", name);
        let offset = |name: &str| self.length("OFFSET", name);
        let (desc_ring, data_ring) =
            (offset("printk_ringbuffer.desc_ring")?, offset("printk_ringbuffer.text_data_ring")?);
        let (lpos, dev_info) = (offset("prb_desc.text_blk_lpos")?, offset("printk_info.dev_info"));
        let name = |field: &str| {
            let at = dev_info? + offset(&format!("dev_printk_info.{field}"))?;
            Some((at, self.length("LENGTH", &format!("printk_info_{field}"))?))
        };
        let layout = Layout {
            ring_size: size("printk_ringbuffer")?,
            count_bits: desc_ring + offset("prb_desc_ring.count_bits")?,
            descs: desc_ring + offset("prb_desc_ring.descs")?,
            infos: desc_ring + offset("prb_desc_ring.infos")?,
            head_id: desc_ring + offset("prb_desc_ring.head_id")?,
            tail_id: desc_ring + offset("prb_desc_ring.tail_id")?,
            size_bits: data_ring + offset("prb_data_ring.size_bits")?,
            data: data_ring + offset("prb_data_ring.data")?,
            desc_size: size("prb_desc")?,
            state: offset("prb_desc.state_var")?,
            begin: lpos + offset("prb_data_blk_lpos.begin")?,
            next: lpos + offset("prb_data_blk_lpos.next")?,
            info_size: size("printk_info")?,
            seq: offset("printk_info.seq")?,
            time: offset("printk_info.ts_nsec")?,
            text_len: offset("printk_info.text_len")?,
            caller: offset("printk_info.caller_id")?,
            subsystem: name("subsystem"),
            device: name("device"),
        };
        layout.is_possible().then_some(layout)
    }

    /// Where the log is.
    pub(super) fn ring(&self, memory: &dyn PhysicalMemory) -> Option<ring::Place> {
        let (space, layout) = (self.address_space()?, self.layout()?);
        let mut pointer = [0; 8];
        space.read(memory, self.symbol("prb")?, &mut pointer).then_some(())?;
        let head = space.physical(memory, u64::from_le_bytes(pointer))?;
        Some(ring::Place { space, layout, head })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<Vmcoreinfo> {
        let mut page = [0; PAGE as usize];
        page[..text.len()].copy_from_slice(text.as_bytes());
        Vmcoreinfo::of_page(&page)
    }

    #[test]
    fn each_kind_of_value_is_read_as_it_was_written() {
        let info = of("OSRELEASE=6.12\nSYMBOL(prb)=ffffffff9765c040\nNUMBER(phys_base)=-245366784\n\
             OFFSET(prb_desc.state_var)=8\nSIZE(prb_desc)=5000\nSYMBOL(prb)=1\nSYMBOL(bad)=xyz\n")
        .unwrap();
        assert_eq!(info.release().as_deref(), Some("6.12"));
        assert_eq!(info.symbol("prb"), Some(0xffff_ffff_9765_c040));
        assert_eq!(info.number("phys_base"), Some(0xffff_ffff_f160_0000));
        assert_eq!(info.length("OFFSET", "prb_desc.state_var"), Some(8));
        assert_eq!(info.length("SIZE", "prb_desc"), None);
        assert_eq!(info.symbol("bad"), None);
        assert_eq!(info.symbol("pr"), None);
        assert_eq!(info.layout(), None);
        assert_eq!(of("OSRELEASE"), None);
        assert_eq!(of("OSRELEASE=\x1b[2J\n").unwrap().release().as_deref(), Some("\\u{1b}[2J"));
    }
}
