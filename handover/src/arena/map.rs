//! A hash map from byte strings to a word, by linear hashing: it grows and shrinks one bucket at a time and never
//! rehashes all.
//!
//! ```text
//! map      count   buckets   segment[0] ... segment[31]
//! segment  buckets, a word each: the first entry.  Sizes 8, 8, 16, 32, 64 ...: each doubles the whole
//! entry    next   hash   kind << 32 | key length   value   key bytes
//! ```
//!
//! With `low` the largest power of two not above `buckets`, a hash belongs to bucket `hash % 2·low` if there is one of
//! that number, else to `hash % low`. Adding bucket `n` splits bucket `n - low`, nothing else; taking it away joins them again. A segment's words are
//! written when their bucket is split off, so that allocating one does not mean clearing it: a service with a
//! million keys has no pause at any insert.

use super::error::{ArenaError, corrupt};
use super::hash::hash;
use super::memory::Arena;
use state_schemas::arena::at;

const COUNT: u64 = 0;
const BUCKETS: u64 = 8;
const SEGMENTS: u64 = 16;
const SEGMENT_COUNT: u32 = 32;
const MAP_BYTES: u64 = SEGMENTS + 8 * SEGMENT_COUNT as u64;
/// Buckets of the first segment, and of an empty map.
const FIRST: u64 = 8;

/// A bucket with a longer chain is not split: what is written has to be saved. Chains are as short as a map has buckets for its
/// keys; longer than a few entries only where there was no room for a segment for long.
const SPLIT: u64 = 64;

/// A map that has more buckets than this for each of its keys gives up so many with each key that is taken away.
const SHRINK: u64 = 4;

const NEXT: u64 = 0;
const HASH: u64 = 8;
const META: u64 = 16;
const VALUE: u64 = 24;
const ENTRY_HEAD: u64 = 32;

/// An entry's offset; where its value and key are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

/// A place in the walk through a map. It only ever moves on, so that a walk ends even if the chains lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The entry it is at; `None` before the first.
    pub(super) entry: Option<Entry>,
    next_bucket: u64,
}

/// Where the search for a key ended.
enum Found {
    /// At an entry, which the word at `link` points to.
    Here { link: u64, entry: u64 },
    /// At the end of the chain of this bucket word.
    Nowhere { bucket: u64 },
}

/// Segment and index in it of a bucket.
fn locate(bucket: u64) -> (u32, u64) {
    if bucket < FIRST {
        (0, bucket)
    } else {
        let log = 63 - (bucket / FIRST).leading_zeros();
        (log + 1, bucket - (FIRST << log))
    }
}

/// Buckets of a segment.
fn segment_len(segment: u32) -> u64 {
    if segment == 0 { FIRST } else { FIRST << (segment - 1) }
}

/// Largest power of two not above `n`, which is not 0.
fn low(n: u64) -> u64 {
    1 << (63 - n.leading_zeros())
}

impl Arena<'_> {
    /// An empty map.
    pub(super) fn map_new(&mut self) -> Result<u64, ArenaError> {
        let map = self.alloc(MAP_BYTES)?;
        let segment = self.alloc(8 * FIRST)?;
        for word in (0..MAP_BYTES).step_by(8) {
            self.fresh_word(map + word, 0)?;
        }
        for bucket in 0..FIRST {
            self.fresh_word(segment + 8 * bucket, 0)?;
        }
        self.fresh_word(map + BUCKETS, FIRST)?;
        self.fresh_word(map + SEGMENTS, segment)?;
        Ok(map)
    }

    /// How many keys there are.
    pub(super) fn map_len(&self, map: u64) -> Result<u64, ArenaError> {
        self.word(map + COUNT)
    }

    /// The entry of a key.
    pub(super) fn map_get(&self, map: u64, key: &[u8]) -> Result<Option<Entry>, ArenaError> {
        match self.map_find(map, key, self.map_hash(key))? {
            Found::Here { entry, .. } => Ok(Some(Entry(entry))),
            Found::Nowhere { .. } => Ok(None),
        }
    }

    /// Adds a key, or gives the entry there is. The flag says whether it is new; a new one has the value 0.
    pub(super) fn map_entry(&mut self, map: u64, key: &[u8], kind: u32) -> Result<(Entry, bool), ArenaError> {
        let hash = self.map_hash(key);
        let bucket = match self.map_find(map, key, hash)? {
            Found::Here { entry, .. } => return Ok((Entry(entry), false)),
            Found::Nowhere { bucket } => bucket,
        };
        let len = key.len() as u64;
        if len > u64::from(u32::MAX) {
            return Err(ArenaError::OutOfMemory { asked: len, free: self.usage().free, length: self.length() });
        }
        let entry = self.alloc(ENTRY_HEAD + len)?;
        let first = self.word(bucket)?;
        self.fresh_word(entry + NEXT, first)?;
        self.fresh_word(entry + HASH, hash)?;
        self.fresh_word(entry + META, u64::from(kind) << 32 | len)?;
        self.fresh_word(entry + VALUE, 0)?;
        self.fresh_bytes(entry + ENTRY_HEAD, key)?;
        self.set_word(bucket, entry)?;
        let count = self.map_len(map)?.saturating_add(1);
        self.set_word(map + COUNT, count)?;
        if count > self.word(map + BUCKETS)? {
            self.map_grow(map)?;
        }
        Ok((Entry(entry), true))
    }

    /// Takes a key away and returns its kind and value, which are the caller's to free.
    pub(super) fn map_remove(&mut self, map: u64, key: &[u8]) -> Result<Option<(u32, u64)>, ArenaError> {
        let Found::Here { link, entry } = self.map_find(map, key, self.map_hash(key))? else {
            return Ok(None);
        };
        let count = self.map_len(map)?;
        if count == 0 {
            return corrupt("an empty map has entries", map + COUNT);
        }
        let result = (self.entry_kind(Entry(entry))?, self.entry_value(Entry(entry))?);
        let next = self.offset(entry + NEXT)?;
        self.set_word(link, next)?;
        self.set_word(map + COUNT, count - 1)?;
        self.free(entry)?;
        for _ in 0..SHRINK {
            if (count - 1).saturating_mul(SHRINK) >= self.word(map + BUCKETS)? {
                break;
            }
            self.map_shrink(map)?;
        }
        Ok(Some(result))
    }

    /// The kind of the value, a number of the owner's choice.
    pub(super) fn entry_kind(&self, entry: Entry) -> Result<u32, ArenaError> {
        Ok((self.word(entry.0 + META)? >> 32) as u32)
    }

    /// The value.
    pub(super) fn entry_value(&self, entry: Entry) -> Result<u64, ArenaError> {
        self.offset(entry.0 + VALUE)
    }

    /// The key.
    pub(super) fn entry_key(&self, entry: Entry) -> Result<&[u8], ArenaError> {
        let len = self.word(entry.0 + META)? & u64::from(u32::MAX);
        self.bytes(entry.0 + ENTRY_HEAD, len)
    }

    /// Sets kind and value; the old value is the caller's to free.
    pub(super) fn entry_set(&mut self, entry: Entry, kind: u32, value: u64) -> Result<(), ArenaError> {
        let before = self.word(entry.0 + META)?;
        let meta = u64::from(kind) << 32 | before & u64::from(u32::MAX);
        if meta != before {
            self.set_word(entry.0 + META, meta)?;
        }
        if self.word(entry.0 + VALUE)? != value {
            self.set_word(entry.0 + VALUE, value)?;
        }
        Ok(())
    }

    /// Moves on to the next entry; `None` at the end. The order is the arena's own.
    pub(super) fn map_next(&self, map: u64, from: Cursor) -> Result<Option<Cursor>, ArenaError> {
        let buckets = self.map_buckets(map)?;
        if let Some(Entry(entry)) = from.entry {
            let next = self.offset(entry + NEXT)?;
            if next != 0 {
                return Ok(Some(Cursor { entry: Some(Entry(next)), ..from }));
            }
        }
        for bucket in from.next_bucket..buckets {
            let entry = self.offset(self.bucket_at(map, bucket)?)?;
            if entry != 0 {
                return Ok(Some(Cursor { entry: Some(Entry(entry)), next_bucket: bucket + 1 }));
            }
        }
        Ok(None)
    }

    /// Frees one block of a map that nothing refers to any more, and whose values are no blocks; says whether it was the last.
    pub(super) fn map_free_step(&mut self, map: u64) -> Result<bool, ArenaError> {
        if self.word(map + BUCKETS)? != 0 {
            // The count is not needed any more: it is the bucket that was come to.
            let buckets = self.map_buckets(map)?;
            let from = self.word(map + COUNT)?;
            for bucket in from..buckets {
                let at = self.bucket_at(map, bucket)?;
                let entry = self.offset(at)?;
                if entry != 0 {
                    // A freed block is not an entry: a cycle ends in an error at its second visit.
                    let next = self.offset(entry + NEXT)?;
                    self.set_word(at, next)?;
                    self.set_word(map + COUNT, bucket)?;
                    self.free(entry)?;
                    return Ok(false);
                }
            }
            self.set_word(map + BUCKETS, 0)?;
        }
        for segment in 0..u64::from(SEGMENT_COUNT) {
            let word_at = map + SEGMENTS + 8 * segment;
            let at = self.offset(word_at)?;
            if at != 0 {
                self.set_word(word_at, 0)?;
                self.free(at)?;
                return Ok(false);
            }
        }
        self.free(map)?;
        Ok(true)
    }

    /// For [`Arena::map_free_step`]: the steps begin with the first bucket.
    pub(super) fn map_free_begin(&mut self, map: u64) -> Result<(), ArenaError> {
        self.set_word(map + COUNT, 0)
    }

    fn map_hash(&self, key: &[u8]) -> u64 {
        hash(self.get(at::SEED), key)
    }

    fn map_buckets(&self, map: u64) -> Result<u64, ArenaError> {
        let buckets = self.word(map + BUCKETS)?;
        if buckets < FIRST || buckets > self.length() / 8 {
            return corrupt("number of buckets", map + BUCKETS);
        }
        Ok(buckets)
    }

    fn bucket_of(&self, hash: u64, buckets: u64) -> u64 {
        let low = low(buckets);
        let bucket = hash & (2 * low - 1);
        if bucket < buckets { bucket } else { bucket - low }
    }

    /// Offset of a bucket's word.
    fn bucket_at(&self, map: u64, bucket: u64) -> Result<u64, ArenaError> {
        let (segment, index) = locate(bucket);
        if segment >= SEGMENT_COUNT {
            return corrupt("number of buckets", map + BUCKETS);
        }
        let at = self.offset(map + SEGMENTS + 8 * u64::from(segment))?;
        Ok(at + 8 * index)
    }

    fn map_find(&self, map: u64, key: &[u8], hash: u64) -> Result<Found, ArenaError> {
        let bucket = self.bucket_at(map, self.bucket_of(hash, self.map_buckets(map)?))?;
        let mut link = bucket;
        // No chain is longer than the map: what goes on is a cycle.
        let mut left = self.map_len(map)?.min(self.length() / ENTRY_HEAD);
        loop {
            let entry = self.offset(link)?;
            if entry == 0 {
                return Ok(Found::Nowhere { bucket });
            }
            if left == 0 {
                return corrupt("a chain is longer than its map", link);
            }
            left -= 1;
            if self.word(entry + HASH)? == hash && self.entry_key(Entry(entry))? == key {
                return Ok(Found::Here { link, entry });
            }
            link = entry + NEXT;
        }
    }

    /// Adds one bucket, if there is room for it: without it chains get longer, nothing breaks.
    fn map_grow(&mut self, map: u64) -> Result<(), ArenaError> {
        let new = self.map_buckets(map)?;
        let (segment, index) = locate(new);
        let half = low(new);
        let old_at = self.bucket_at(map, new - half)?;
        if segment >= SEGMENT_COUNT || !self.chain_is_short(old_at)? {
            return Ok(());
        }
        if index == 0 {
            let at = match self.alloc(8 * segment_len(segment)) {
                Ok(at) => at,
                Err(ArenaError::OutOfMemory { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            self.set_word(map + SEGMENTS + 8 * u64::from(segment), at)?;
        }
        let new_at = self.bucket_at(map, new)?;
        let mut entry = self.offset(old_at)?;
        let mut left = self.map_len(map)?;
        let (mut stay, mut go) = (0, 0);
        while entry != 0 {
            if left == 0 {
                return corrupt("a chain is longer than its map", old_at);
            }
            left -= 1;
            let next = self.offset(entry + NEXT)?;
            let chain = if self.word(entry + HASH)? & (2 * half - 1) == new { &mut go } else { &mut stay };
            let before = std::mem::replace(chain, entry);
            if next != before {
                self.set_word(entry + NEXT, before)?;
            }
            entry = next;
        }
        self.set_word(old_at, stay)?;
        self.set_word(new_at, go)?;
        self.set_word(map + BUCKETS, new + 1)
    }

    fn chain_is_short(&self, bucket_at: u64) -> Result<bool, ArenaError> {
        let mut entry = self.offset(bucket_at)?;
        for _ in 0..SPLIT {
            if entry == 0 {
                return Ok(true);
            }
            entry = self.offset(entry + NEXT)?;
        }
        Ok(false)
    }

    /// Takes the last bucket away: its chain goes in front of that which it was once split from.
    fn map_shrink(&mut self, map: u64) -> Result<(), ArenaError> {
        let last = self.map_buckets(map)? - 1;
        if last < FIRST {
            return Ok(());
        }
        let last_at = self.bucket_at(map, last)?;
        let into_at = self.bucket_at(map, last - low(last))?;
        let chain = self.offset(last_at)?;
        if chain != 0 {
            let mut tail = chain;
            let mut left = self.map_len(map)?;
            loop {
                let next = self.offset(tail + NEXT)?;
                if next == 0 {
                    break;
                }
                if left == 0 {
                    return corrupt("a chain is longer than its map", last_at);
                }
                left -= 1;
                tail = next;
            }
            let rest = self.offset(into_at)?;
            self.set_word(tail + NEXT, rest)?;
            self.set_word(into_at, chain)?;
        }
        self.set_word(map + BUCKETS, last)?;
        let (segment, index) = locate(last);
        if index == 0 {
            let word_at = map + SEGMENTS + 8 * u64::from(segment);
            let at = self.offset(word_at)?;
            self.set_word(word_at, 0)?;
            self.free(at)?;
        }
        Ok(())
    }

    /// For `verify`: walks the map, gives each of its blocks to `seen` and each entry's kind and value to `value`.
    pub(super) fn map_check<S: FnMut(u64) -> Result<(), ArenaError>>(
        &self,
        map: u64,
        seen: &mut S,
        value: &mut dyn FnMut(&mut S, u32, u64) -> Result<(), ArenaError>,
    ) -> Result<(), ArenaError> {
        if self.capacity(map)? < MAP_BYTES {
            return corrupt("a map's head is larger than its block", map);
        }
        seen(map)?;
        let buckets = self.map_buckets(map)?;
        for segment in 0..=locate(buckets - 1).0 {
            if segment >= SEGMENT_COUNT {
                return corrupt("number of buckets", map + BUCKETS);
            }
            let word_at = map + SEGMENTS + 8 * u64::from(segment);
            let at = self.offset(word_at)?;
            if self.capacity(at)? < 8 * segment_len(segment) {
                return corrupt("a segment is larger than its block", at);
            }
            seen(at)?;
        }
        let mut count = 0;
        for bucket in 0..buckets {
            let mut entry = self.offset(self.bucket_at(map, bucket)?)?;
            while entry != 0 {
                seen(entry)?;
                let key = self.entry_key(Entry(entry))?;
                if key.len() as u64 > self.capacity(entry)?.saturating_sub(ENTRY_HEAD) {
                    return corrupt("key is longer than its block", entry);
                }
                let hash = self.word(entry + HASH)?;
                if hash != self.map_hash(key) || self.bucket_of(hash, buckets) != bucket {
                    return corrupt("hash of a key", entry + HASH);
                }
                value(seen, self.entry_kind(Entry(entry))?, self.entry_value(Entry(entry))?)?;
                entry = self.offset(entry + NEXT)?;
                count += 1;
            }
        }
        if count != self.map_len(map)? {
            return corrupt("number of keys", map + COUNT);
        }
        Ok(())
    }
}
