//! printk's ring (kernel/printk/printk_ringbuffer.c), read by the rules of its own readers.
//!
//! ```text
//! descriptors  [state and id | begin, next] … one for each record; id modulo their number is the index
//! infos        [number, time, length, …]    … of the same index
//! data         … id text │ id text …          at position `begin` modulo the size; a record that would pass the end is
//!                                              at the start instead, with only its id before the end
//! ```
//! A record is good when its descriptor is committed or finalized, has the expected id, has it still after everything was
//! copied, and its data begins with that id. A record that is being written, or is overwritten meanwhile, is left out.

use super::address::{AddressSpace, is_kernels};
use super::memory::PhysicalMemory;
use super::record::{Caller, Record, escaped};

/// The two highest bits of a descriptor's state word: what can be done with it. The others: its id.
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;
/// Both positions of a record without text.
const EMPTY_LINE: u64 = 3;
/// Every position of real data is a multiple of this.
const DATA_ALIGN: u64 = 8;
/// No ring has more descriptors, or more data (`LOG_BUF_LEN_MAX` is 2 GiB, a descriptor for 32 bytes).
const MAX_COUNT_BITS: u32 = 26;
const MAX_SIZE_BITS: u32 = 31;
/// At most so many bytes of text are read at once, whatever a ring claims.
const MAX_TEXT: u64 = 64 << 20;

/// Where its fields are, as offsets in its structures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) ring_size: u64,
    pub(super) count_bits: u64,
    pub(super) descs: u64,
    pub(super) infos: u64,
    pub(super) head_id: u64,
    pub(super) tail_id: u64,
    pub(super) size_bits: u64,
    pub(super) data: u64,
    pub(super) desc_size: u64,
    pub(super) state: u64,
    pub(super) begin: u64,
    pub(super) next: u64,
    pub(super) info_size: u64,
    pub(super) seq: u64,
    pub(super) time: u64,
    pub(super) text_len: u64,
    pub(super) caller: u64,
    /// Offset and length.
    pub(super) subsystem: Option<(u64, u64)>,
    /// Offset and length.
    pub(super) device: Option<(u64, u64)>,
}

impl Layout {
    /// Whether each field lies in its structure, and no structure is longer than a page.
    pub(super) fn is_possible(&self) -> bool {
        let within = |size: u64, fields: &[(u64, u64)]| {
            size <= 4096 && fields.iter().all(|(at, len)| at.checked_add(*len).is_some_and(|end| end <= size))
        };
        let ring = [self.descs, self.infos, self.head_id, self.tail_id, self.data].map(|at| (at, 8));
        let names: Vec<_> = self.subsystem.into_iter().chain(self.device).collect();
        within(self.ring_size, &ring)
            && within(self.ring_size, &[(self.count_bits, 4), (self.size_bits, 4)])
            && within(self.desc_size, &[(self.state, 8), (self.begin, 8), (self.next, 8)])
            // Facility, and flags with the level, are the two bytes behind the length, ever since there is this ring.
            && within(self.info_size, &[(self.seq, 8), (self.time, 8), (self.text_len, 4), (self.caller, 4)])
            && within(self.info_size, &names)
    }
}

/// Where a ring is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) space: AddressSpace,
    pub(super) layout: Layout,
    /// Physical address of its `struct printk_ringbuffer`.
    pub(super) head: u64,
}

/// A ring as it is now.
pub(super) struct Ring<'a> {
    memory: &'a dyn PhysicalMemory,
    place: &'a Place,
    count_bits: u32,
    size_bits: u32,
    descs: u64,
    infos: u64,
    data: u64,
    head: u64,
    tail: u64,
}

fn u64_at(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u32_at(bytes: &[u8], at: u64) -> Option<u32> {
    let at = usize::try_from(at).ok()?;
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// A descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Desc {
    state: u64,
    begin: u64,
    next: u64,
}

impl<'a> Ring<'a> {
    /// Reads its head; nothing when it is no ring, or its arrays are not in this memory.
    pub(super) fn at(memory: &'a dyn PhysicalMemory, place: &'a Place) -> Option<Ring<'a>> {
        let Place { space, layout, head } = place;
        layout.is_possible().then_some(())?;
        let mut bytes = vec![0; usize::try_from(layout.ring_size).ok()?];
        memory.read(*head, &mut bytes).then_some(())?;
        let ring = Ring {
            memory,
            place,
            count_bits: u32_at(&bytes, layout.count_bits)?,
            size_bits: u32_at(&bytes, layout.size_bits)?,
            descs: u64_at(&bytes, layout.descs)?,
            infos: u64_at(&bytes, layout.infos)?,
            data: u64_at(&bytes, layout.data)?,
            head: u64_at(&bytes, layout.head_id)? & ID_MASK,
            tail: u64_at(&bytes, layout.tail_id)? & ID_MASK,
        };
        let sizes = (1..=MAX_COUNT_BITS).contains(&ring.count_bits) && (4..=MAX_SIZE_BITS).contains(&ring.size_bits);
        let arrays = || {
            [
                (ring.descs, layout.desc_size << ring.count_bits),
                (ring.infos, layout.info_size << ring.count_bits),
                (ring.data, 1 << ring.size_bits),
            ]
            .into_iter()
            .all(|(at, len)| is_kernels(at) && space.holds(memory, at, len))
        };
        (sizes && arrays()).then_some(ring)
    }

    /// Both ends are descriptors that the ring knows: only a real ring that is where it should be passes this.
    pub(super) fn is_sound(&self) -> bool {
        let known = |id: u64| self.desc(id).is_some_and(|desc| desc.state & ID_MASK == id);
        // The newest may be on its way: then the one before it is there.
        known(self.tail) && (known(self.head) || known(self.head.wrapping_sub(1) & ID_MASK))
    }

    /// The last `most` records newer than number `after`, oldest first.
    pub(super) fn newest(&self, after: Option<u64>, most: usize) -> Vec<Record> {
        let mut records: Vec<Record> = self
            .take_while_room(self.ids().rev())
            .take_while(|record| after.is_none_or(|after| record.seq > after))
            .take(most)
            .collect();
        records.reverse();
        records
    }

    /// The first `most` records.
    pub(super) fn oldest(&self, most: usize) -> Vec<Record> {
        self.take_while_room(self.ids()).take(most).collect()
    }

    /// Every id from the tail to the head; never more than there are descriptors.
    fn ids(&self) -> impl DoubleEndedIterator<Item = u64> + use<> {
        let tail = self.tail;
        let between = self.head.wrapping_sub(tail) & ID_MASK;
        let count = between.min((1 << self.count_bits) - 1);
        // From the head back: if head and tail contradict each other, the newest is what counts.
        let first = if between == count { tail } else { self.head.wrapping_sub(count) & ID_MASK };
        (0..=count).map(move |n| first.wrapping_add(n) & ID_MASK)
    }

    /// The good records among these, until their text is more than the data ring can hold: each record's text lies there, so
    /// more would be a ring that refers to the same text again and again.
    fn take_while_room(&self, ids: impl Iterator<Item = u64>) -> impl Iterator<Item = Record> {
        let mut room = MAX_TEXT.min(1 << self.size_bits);
        ids.filter_map(|id| self.record(id)).map_while(move |(record, len)| {
            room = room.checked_sub(len)?;
            Some(record)
        })
    }

    fn mask(&self) -> u64 {
        (1 << self.count_bits) - 1
    }

    fn desc(&self, id: u64) -> Option<Desc> {
        let layout = &self.place.layout;
        let mut desc = vec![0; usize::try_from(layout.desc_size).ok()?];
        let at = self.descs.checked_add((id & self.mask()) * layout.desc_size)?;
        self.place.space.read(self.memory, at, &mut desc).then_some(())?;
        Some(Desc {
            state: u64_at(&desc, layout.state)?,
            begin: u64_at(&desc, layout.begin)?,
            next: u64_at(&desc, layout.next)?,
        })
    }

    /// A record, and how many bytes its text has in the ring.
    fn record(&self, id: u64) -> Option<(Record, u64)> {
        let layout = &self.place.layout;
        let desc = self.desc(id)?;
        let readable = matches!(desc.state >> STATE_SHIFT, COMMITTED | FINALIZED);
        (readable && desc.state & ID_MASK == id).then_some(())?;
        let mut info = vec![0; usize::try_from(layout.info_size).ok()?];
        let at = self.infos.checked_add((id & self.mask()) * layout.info_size)?;
        self.place.space.read(self.memory, at, &mut info).then_some(())?;
        let seq = u64_at(&info, layout.seq)?;
        // A record's number and its place in the array go together.
        (seq & self.mask() == id & self.mask()).then_some(())?;
        let [len_low, len_high, facility, flags] = u32_at(&info, layout.text_len)?.to_le_bytes();
        let text = self.text(id, &desc, u16::from_le_bytes([len_low, len_high]))?;
        let name = |field: Option<(u64, u64)>| {
            let (at, len) = field?;
            let bytes = info.get(at as usize..)?.get(..len as usize)?;
            let name = bytes.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())?;
            Some(escaped(name))
        };
        let record = Record {
            seq,
            ts_ns: u64_at(&info, layout.time)?,
            level: flags >> 5,
            facility,
            caller: Caller::of(u32_at(&info, layout.caller)?),
            text: escaped(&text),
            subsystem: name(layout.subsystem),
            device: name(layout.device),
        };
        // Still the same: so what was copied belongs together.
        (self.desc(id)? == desc).then_some((record, text.len() as u64))
    }

    /// The text of a record; nothing when it is lost or contradicts itself.
    fn text(&self, id: u64, desc: &Desc, len: u16) -> Option<Vec<u8>> {
        let Desc { begin, next, .. } = *desc;
        if begin & 1 == 1 && next & 1 == 1 {
            return (begin == EMPTY_LINE && next == EMPTY_LINE).then(Vec::new);
        }
        let size = 1u64 << self.size_bits;
        let wrap = |position: u64| position >> self.size_bits;
        let aligned = begin.is_multiple_of(DATA_ALIGN) && next.is_multiple_of(DATA_ALIGN);
        let last = next.wrapping_sub(1);
        let (at, block) = if wrap(begin) == wrap(last) {
            (begin & (size - 1), next.wrapping_sub(begin))
        } else if wrap(begin.wrapping_add(size)) == wrap(last) {
            (0, next & (size - 1))
        } else {
            return None;
        };
        let room = block.checked_sub(8).filter(|room| *room > 0)?;
        (aligned && at.checked_add(block)? <= size).then_some(())?;
        let mut owner = [0; 8];
        let at = self.data.checked_add(at)?;
        self.place.space.read(self.memory, at, &mut owner).then_some(())?;
        (u64::from_le_bytes(owner) & ID_MASK == id).then_some(())?;
        let mut text = vec![0; usize::try_from(room.min(len.into())).ok()?];
        self.place.space.read(self.memory, at.checked_add(8)?, &mut text).then_some(text)
    }
}
