//! [`Store`]: strings, lists and sets under byte-string keys, all of it in one arena.
//!
//! It is what a service keeps across an update: the incumbent's program seals it, the successor's attaches to the same
//! bytes and unseals them for its own epoch.
//!
//! ```
//! use handover::arena::Store;
//! let mut memory = vec![0; 1 << 20];                      // the agent's SDK maps an arena instead
//! let mut store = Store::create(&mut memory, "kv", 7, 42)?;
//! store.set(b"greeting", b"hello")?;
//! store.seal(7)?;                                         // the incumbent's last word
//!
//! let mut store = Store::attach(&mut memory)?;            // O(1), whatever is in it
//! assert!(store.set(b"greeting", b"too early").is_err());
//! store.unseal(8)?;                                       // the successor's first
//! assert_eq!(store.get(b"greeting")?, Some(&b"hello"[..]));
//! # Ok::<(), handover::arena::StoreError>(())
//! ```
//!
//! The rules of Redis hold: a list or set that becomes empty is gone; a key holds one type, and an operation of
//! another type is refused; `set` replaces anything. Each operation happens wholly or not at all, also when the
//! arena is full.

use thiserror::Error;

use state_schemas::arena::{VERSION, at};

use super::error::{ArenaError, IsCorrupt, corrupt};
use super::list::End;
use super::map::{Cursor, Entry};
use super::memory::{Arena, Birth, SealReceipt, Usage};

/// Schema kind of a store, in the arena's header: "KVST".
pub const SCHEMA_KIND: u32 = u32::from_le_bytes(*b"KVST");
/// Its version.
pub const SCHEMA_VERSION: u32 = 1;

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A byte string.
    String = 1,
    /// A list of byte strings.
    List = 2,
    /// A set of byte strings.
    Set = 3,
}

impl Kind {
    fn of(word: u32) -> Option<Kind> {
        [Kind::String, Kind::List, Kind::Set].into_iter().find(|&kind| kind as u32 == word)
    }
}

/// Why a store refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The arena refused: full, sealed, another's, or corrupt.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The key holds another type.
    #[error("the key holds a {found:?}, the operation is for a {wanted:?}")]
    WrongType {
        /// What it holds.
        found: Kind,
        /// What the operation is for.
        wanted: Kind,
    },
    /// `incr` of something that is no 64-bit number in decimal.
    #[error("value is not an integer or out of range")]
    NotAnInteger,
    /// `incr` beyond 64 bits.
    #[error("adding {by} to {value} overflows")]
    Overflow {
        /// The number there is.
        value: i64,
        /// What was to be added.
        by: i64,
    },
}

impl IsCorrupt for StoreError {
    fn is_corrupt(&self) -> bool {
        matches!(self, StoreError::Arena(error) if error.is_corrupt())
    }
}

type Result<T> = std::result::Result<T, StoreError>;

/// A key-value store in an arena.
#[derive(Debug)]
pub struct Store<'m> {
    arena: Arena<'m>,
}

impl<'m> Store<'m> {
    /// Makes an empty store of all of `memory`. `seed` is a random number (see [`Birth::seed`]).
    ///
    /// # Errors
    /// If the memory is too small or the name is not allowed.
    pub fn create(memory: &'m mut [u8], name: &str, epoch: u64, seed: u64) -> Result<Store<'m>> {
        let birth = Birth { name, schema_kind: SCHEMA_KIND, schema_version: SCHEMA_VERSION, epoch, seed };
        Store::born(memory, birth, VERSION)
    }

    pub(super) fn born(memory: &'m mut [u8], birth: Birth<'_>, version: u32) -> Result<Store<'m>> {
        let mut arena = Arena::begin(memory, birth, version)?;
        arena.change(new_root)?;
        arena.show();
        Ok(Store { arena })
    }

    /// Attaches to a store that is there, in O(1). It may be read at once, unless its owner was stopped within a change
    /// ([`Store::is_torn`]); [`Store::unseal`] or [`Store::reclaim`] comes before writing.
    ///
    /// # Errors
    /// Whatever is wrong with the arena's header, another kind of content, or no root.
    pub fn attach(memory: &'m mut [u8]) -> Result<Store<'m>> {
        let arena = Arena::attach(memory, SCHEMA_KIND, SCHEMA_VERSION)?;
        if arena.is_torn() {
            return Ok(Store { arena });
        }
        let root = arena.root();
        if root == 0 {
            return Ok(corrupt("a store has a root", at::ROOT)?);
        }
        arena.map_len(root)?;
        Ok(Store { arena })
    }

    /// Ends the right to write; takes the same time for any amount of data. Reading stays allowed.
    ///
    /// # Errors
    /// If `epoch` does not own the arena, or it is sealed already.
    pub fn seal(&mut self, epoch: u64) -> Result<SealReceipt> {
        Ok(self.arena.seal(epoch)?)
    }

    /// Begins the right to write, for `epoch`.
    ///
    /// # Errors
    /// If a newer epoch owns the arena: then this program's kernel was succeeded, and it must not answer.
    pub fn unseal(&mut self, epoch: u64) -> Result<()> {
        Ok(self.arena.unseal(epoch)?)
    }

    /// The same, where the owner may have been stopped before it could seal ([`Arena::reclaim`]).
    ///
    /// # Errors
    /// If a newer epoch owns the arena; corruption.
    pub fn reclaim(&mut self, epoch: u64) -> Result<()> {
        Ok(self.arena.reclaim(epoch)?)
    }

    /// Makes all of the memory the store's, when it was given more since it was made; constant time.
    ///
    /// # Errors
    /// If `epoch` does not own the arena, or it is sealed.
    pub fn take_all(&mut self, epoch: u64) -> Result<Usage> {
        Ok(self.arena.take_all(epoch)?)
    }

    /// Nobody may write: it is sealed.
    pub fn is_sealed(&self) -> bool {
        self.arena.is_sealed()
    }

    /// Its owner was stopped within a change: whoever takes it over mends it, nobody reads it before.
    pub fn is_torn(&self) -> bool {
        self.arena.is_torn()
    }

    /// See [`Arena::forget`].
    #[doc(hidden)]
    pub fn forget(&mut self) {
        self.arena.forget();
    }

    /// Epoch that owns the store.
    pub fn epoch(&self) -> u64 {
        self.arena.epoch()
    }

    /// How full the arena is.
    pub fn usage(&self) -> Usage {
        self.arena.usage()
    }

    /// Number of keys.
    ///
    /// # Errors
    /// Corruption only, as of every reading operation below.
    pub fn len(&self) -> Result<u64> {
        Ok(self.arena.map_len(self.root()?)?)
    }

    /// No keys.
    ///
    /// # Errors
    /// Corruption.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The key is there.
    ///
    /// # Errors
    /// Corruption.
    pub fn exists(&self, key: &[u8]) -> Result<bool> {
        Ok(self.arena.map_get(self.root()?, key)?.is_some())
    }

    /// What the key holds.
    ///
    /// # Errors
    /// Corruption.
    pub fn kind(&self, key: &[u8]) -> Result<Option<Kind>> {
        match self.arena.map_get(self.root()?, key)? {
            None => Ok(None),
            Some(entry) => Ok(Some(self.kind_of(entry)?)),
        }
    }

    /// All keys, in the arena's own order.
    pub fn keys(&self) -> Members<'_> {
        // Of a torn arena, there is nothing at 0, and the first step says so.
        Members::of(&self.arena, Some(self.root().unwrap_or(0)))
    }

    /// The string.
    ///
    /// # Errors
    /// If the key holds something else; corruption.
    pub fn get(&self, key: &[u8]) -> Result<Option<&[u8]>> {
        match self.find(key, Kind::String)? {
            Some(value) => Ok(Some(self.arena.value(value)?)),
            None => Ok(None),
        }
    }

    /// Sets a string, whatever the key held.
    ///
    /// # Errors
    /// A full or sealed arena; corruption. As of every writing operation below.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let root = self.root()?;
        self.arena.change(|arena| set(arena, root, key, value))
    }

    /// Adds `by` to the number that the string spells; a missing key counts as 0. Returns the sum.
    ///
    /// # Errors
    /// If there is no number, or the sum does not fit; and those of [`Store::set`].
    pub fn incr(&mut self, key: &[u8], by: i64) -> Result<i64> {
        let value = match self.get(key)? {
            Some(text) => parse_i64(text).ok_or(StoreError::NotAnInteger)?,
            None => 0,
        };
        let sum = value.checked_add(by).ok_or(StoreError::Overflow { value, by })?;
        self.set(key, sum.to_string().as_bytes())?;
        Ok(sum)
    }

    /// Appends to the string and returns its new length; a missing key counts as empty.
    ///
    /// # Errors
    /// If the key holds something else; and those of [`Store::set`].
    pub fn append(&mut self, key: &[u8], tail: &[u8]) -> Result<u64> {
        let mut value = self.get(key)?.unwrap_or_default().to_vec();
        value.extend_from_slice(tail);
        self.set(key, &value)?;
        Ok(value.len() as u64)
    }

    /// Deletes a key; says whether it was there.
    ///
    /// # Errors
    /// A sealed arena; corruption.
    pub fn del(&mut self, key: &[u8]) -> Result<bool> {
        let root = self.root()?;
        self.arena.change(|arena| match arena.map_remove(root, key)? {
            Some((kind, value)) => {
                free_value(arena, kind, value)?;
                Ok(true)
            }
            None => Ok(false),
        })
    }

    /// Deletes everything, in constant time.
    ///
    /// # Errors
    /// A sealed arena.
    pub fn flush(&mut self) -> Result<()> {
        Ok(self.arena.change(Arena::clear_later)?)
    }

    /// Adds to the front of a list, and returns its new length.
    ///
    /// # Errors
    /// If the key holds something else; and those of [`Store::set`].
    pub fn lpush(&mut self, key: &[u8], item: &[u8]) -> Result<u64> {
        self.push(key, End::Front, item)
    }

    /// Adds to the back of a list, and returns its new length.
    ///
    /// # Errors
    /// Those of [`Store::lpush`].
    pub fn rpush(&mut self, key: &[u8], item: &[u8]) -> Result<u64> {
        self.push(key, End::Back, item)
    }

    /// Takes from the front of a list.
    ///
    /// # Errors
    /// Those of [`Store::lpush`], but for a full arena.
    pub fn lpop(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.pop(key, End::Front)
    }

    /// Takes from the back of a list.
    ///
    /// # Errors
    /// Those of [`Store::lpop`].
    pub fn rpop(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.pop(key, End::Back)
    }

    /// Length of a list, 0 if there is none.
    ///
    /// # Errors
    /// If the key holds something else; corruption.
    pub fn llen(&self, key: &[u8]) -> Result<u64> {
        match self.find(key, Kind::List)? {
            Some(list) => Ok(self.arena.list_len(list)?),
            None => Ok(0),
        }
    }

    /// The items from `start` to `stop`, both included; negative numbers count from the end (-1 is the last).
    ///
    /// # Errors
    /// If the key holds something else; corruption.
    pub fn lrange(&self, key: &[u8], start: i64, stop: i64) -> Result<Items<'_>> {
        let none = Items { arena: &self.arena, node: 0, left: 0 };
        let Some(list) = self.find(key, Kind::List)? else {
            return Ok(none);
        };
        let len = self.arena.list_len(list)?;
        let index = |i: i64| {
            if i < 0 { len.checked_sub(i.unsigned_abs()) } else { Some(i as u64) }
        };
        let start = index(start).unwrap_or(0);
        let Some(stop) = index(stop) else {
            return Ok(none);
        };
        let stop = stop.min(len.saturating_sub(1));
        if len == 0 || start > stop {
            return Ok(none);
        }
        Ok(Items { arena: &self.arena, node: self.arena.list_node(list, start)?, left: stop - start + 1 })
    }

    /// Adds to a set; says whether the member is new.
    ///
    /// # Errors
    /// If the key holds something else; and those of [`Store::set`].
    pub fn sadd(&mut self, key: &[u8], member: &[u8]) -> Result<bool> {
        let root = self.root()?;
        self.arena.change(|arena| {
            let set = container(arena, root, key, Kind::Set)?;
            Ok(arena.map_entry(set, member, 0)?.1)
        })
    }

    /// Takes a member out of a set; says whether it was there.
    ///
    /// # Errors
    /// If the key holds something else; a sealed arena; corruption.
    pub fn srem(&mut self, key: &[u8], member: &[u8]) -> Result<bool> {
        let root = self.root()?;
        let Some(set) = self.find(key, Kind::Set)? else {
            return Ok(false);
        };
        self.arena.change(|arena| {
            let removed = arena.map_remove(set, member)?.is_some();
            if arena.map_len(set)? == 0 {
                delete(arena, root, key)?;
            }
            Ok(removed)
        })
    }

    /// The member is in the set.
    ///
    /// # Errors
    /// If the key holds something else; corruption.
    pub fn sismember(&self, key: &[u8], member: &[u8]) -> Result<bool> {
        match self.find(key, Kind::Set)? {
            Some(set) => Ok(self.arena.map_get(set, member)?.is_some()),
            None => Ok(false),
        }
    }

    /// Takes any member out of a set.
    ///
    /// # Errors
    /// Those of [`Store::srem`].
    pub fn spop(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let Some(member) = self.smembers(key)?.next().transpose()? else {
            return Ok(None);
        };
        let member = member.to_vec();
        self.srem(key, &member)?;
        Ok(Some(member))
    }

    /// The members of a set, in the arena's own order.
    ///
    /// # Errors
    /// If the key holds something else; corruption.
    pub fn smembers(&self, key: &[u8]) -> Result<Members<'_>> {
        Ok(Members::of(&self.arena, self.find(key, Kind::Set)?))
    }

    /// Number of members of a set, 0 if there is none.
    ///
    /// # Errors
    /// If the key holds something else; corruption.
    pub fn scard(&self, key: &[u8]) -> Result<u64> {
        match self.find(key, Kind::Set)? {
            Some(set) => Ok(self.arena.map_len(set)?),
            None => Ok(0),
        }
    }

    fn root(&self) -> Result<u64> {
        self.arena.whole()?;
        Ok(self.arena.root())
    }

    #[cfg(test)]
    pub(super) fn tape(&mut self) -> &mut Vec<(u64, Vec<u8>)> {
        &mut self.arena.tape
    }

    pub(super) fn arena(&self) -> &Arena<'m> {
        &self.arena
    }

    fn kind_of(&self, entry: Entry) -> Result<Kind> {
        kind_of(&self.arena, entry)
    }

    /// Offset of what a key holds, if it is of this kind.
    fn find(&self, key: &[u8], wanted: Kind) -> Result<Option<u64>> {
        let Some(entry) = self.arena.map_get(self.root()?, key)? else {
            return Ok(None);
        };
        let found = self.kind_of(entry)?;
        if found != wanted {
            return Err(StoreError::WrongType { found, wanted });
        }
        match self.arena.entry_value(entry)? {
            0 => Ok(corrupt("a key has a value", at::ROOT)?),
            value => Ok(Some(value)),
        }
    }

    fn push(&mut self, key: &[u8], end: End, item: &[u8]) -> Result<u64> {
        let root = self.root()?;
        self.arena.change(|arena| {
            let list = container(arena, root, key, Kind::List)?;
            Ok(arena.list_push(list, end, item)?)
        })
    }

    fn pop(&mut self, key: &[u8], end: End) -> Result<Option<Vec<u8>>> {
        let root = self.root()?;
        let Some(list) = self.find(key, Kind::List)? else {
            return Ok(None);
        };
        self.arena.change(|arena| {
            let item = arena.list_pop(list, end)?;
            if arena.list_len(list)? == 0 {
                delete(arena, root, key)?;
            }
            Ok(item)
        })
    }
}

fn new_root(arena: &mut Arena<'_>) -> Result<()> {
    let root = arena.map_new()?;
    Ok(arena.put(at::ROOT, root)?)
}

fn kind_of(arena: &Arena<'_>, entry: Entry) -> Result<Kind> {
    match Kind::of(arena.entry_kind(entry)?) {
        Some(kind) => Ok(kind),
        None => Ok(corrupt("kind of a key's value", at::ROOT)?),
    }
}

fn set(arena: &mut Arena<'_>, root: u64, key: &[u8], value: &[u8]) -> Result<()> {
    let (entry, new) = arena.map_entry(root, key, Kind::String as u32)?;
    if new {
        let value = arena.value_new(value)?;
        return Ok(arena.entry_set(entry, Kind::String as u32, value)?);
    }
    let (kind, old) = (arena.entry_kind(entry)?, arena.entry_value(entry)?);
    if kind == Kind::String as u32 {
        let now = arena.value_replace(old, value)?;
        return Ok(arena.entry_set(entry, kind, now)?);
    }
    let now = arena.value_new(value)?;
    arena.entry_set(entry, Kind::String as u32, now)?;
    Ok(free_value(arena, kind, old)?)
}

/// The list or set that a key holds, made if there is none.
fn container(arena: &mut Arena<'_>, root: u64, key: &[u8], wanted: Kind) -> Result<u64> {
    let (entry, new) = arena.map_entry(root, key, wanted as u32)?;
    if !new {
        let found = kind_of(arena, entry)?;
        if found != wanted {
            return Err(StoreError::WrongType { found, wanted });
        }
        return match arena.entry_value(entry)? {
            0 => Ok(corrupt("a key has a value", at::ROOT)?),
            value => Ok(value),
        };
    }
    let made = match wanted {
        Kind::Set => arena.map_new()?,
        Kind::List | Kind::String => arena.list_new()?,
    };
    arena.entry_set(entry, wanted as u32, made)?;
    Ok(made)
}

fn delete(arena: &mut Arena<'_>, root: u64, key: &[u8]) -> std::result::Result<(), ArenaError> {
    match arena.map_remove(root, key)? {
        Some((kind, value)) => free_value(arena, kind, value),
        None => Ok(()),
    }
}

fn free_value(arena: &mut Arena<'_>, kind: u32, value: u64) -> std::result::Result<(), ArenaError> {
    match Kind::of(kind) {
        Some(Kind::String) => arena.free(value),
        Some(Kind::List) => arena.free_list_later(value),
        Some(Kind::Set) => arena.free_map_later(value),
        None => corrupt("kind of a key's value", value),
    }
}

/// What Redis takes for an integer: decimal, no leading zeros, no plus sign, no spaces.
fn parse_i64(text: &[u8]) -> Option<i64> {
    let number: i64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    (number.to_string().as_bytes() == text).then_some(number)
}

/// Items of a list, in order. Its length is known ([`ExactSizeIterator`]); corruption ends it early, with an error.
#[derive(Debug)]
pub struct Items<'a> {
    arena: &'a Arena<'a>,
    node: u64,
    left: u64,
}

impl<'a> Iterator for Items<'a> {
    type Item = Result<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let step = || {
            if self.node == 0 {
                return corrupt("a list is shorter than its length", at::ROOT);
            }
            Ok((self.arena.node_item(self.node)?, self.arena.node_next(self.node)?))
        };
        match step() {
            Ok((item, next)) => {
                self.node = next;
                Some(Ok(item))
            }
            Err(error) => {
                self.left = 0;
                Some(Err(error.into()))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

impl ExactSizeIterator for Items<'_> {}

/// Members of a set, or keys of a store. Its length is known; corruption ends it early, with an error.
#[derive(Debug)]
pub struct Members<'a> {
    arena: &'a Arena<'a>,
    map: u64,
    cursor: Cursor,
    left: u64,
}

impl<'a> Members<'a> {
    fn of(arena: &'a Arena<'_>, map: Option<u64>) -> Members<'a> {
        Members {
            arena,
            map: map.unwrap_or(0),
            cursor: Cursor::default(),
            // An unreadable length shows as corruption at the first step.
            left: map.map_or(0, |map| arena.map_len(map).unwrap_or(1).min(arena.usage().length)),
        }
    }
}

impl<'a> Iterator for Members<'a> {
    type Item = Result<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let step = || match self.arena.map_next(self.map, self.cursor)? {
            Some(cursor) => match cursor.entry {
                Some(entry) => Ok((cursor, self.arena.entry_key(entry)?)),
                None => corrupt("a cursor is at an entry", self.map),
            },
            None => corrupt("a map is shorter than its count", self.map),
        };
        match step() {
            Ok((cursor, key)) => {
                self.cursor = cursor;
                Some(Ok(key))
            }
            Err(error) => {
                self.left = 0;
                Some(Err(error.into()))
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

impl ExactSizeIterator for Members<'_> {}
