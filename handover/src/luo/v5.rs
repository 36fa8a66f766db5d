//! "luo-v5", as in Linux 7.3, and "luo-v5;block-v1" of newer trees, whose bytes differ in the name alone: `include/linux/kho/abi/luo.h` and `block.h`.

use std::collections::HashSet;

use state_schemas::checked::Received;
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::LuoError;
use super::memfd_v2::is_ours;
use super::model::{File, Flb, HANDLER_NAME, Orchestration, Session};
use super::names::{LUO, MEMFD, Names, spoken};
use crate::kho::v4::text;
use crate::kho::{Incoming, Limits, Memory, Outgoing, PAGE, ReadError};

/// `LUO_KHO_ENTRY_NAME`
pub const BLOB: &str = "LUO";
/// `KHO_MAX_BLOCKS`: a kernel that finds more in one list takes it for a corrupt one.
pub const MAX_BLOCKS: usize = 10_000;

/// `struct luo_ser` behind its name, whose field ends at a multiple of 8 bytes (`LUO_ABI_COMPAT_LEN`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLuo {
    liveupdate_num: U64,
    sessions_pa: U64,
    flbs_pa: U64,
}

/// `struct luo_session_ser` with its `struct luo_file_set_ser`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSession {
    name: [u8; 64],
    files: U64,
    count: U64,
}

/// `struct luo_file_ser`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFile {
    compatible: [u8; 48],
    data: U64,
    token: U64,
}

/// `struct luo_flb_ser`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFlb {
    name: [u8; 48],
    data: U64,
    count: U64,
}

/// `struct kho_block_header_ser`; `struct luo_flb_header_ser` has the same form, with `pgcnt` for `next`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBlock {
    next: U64,
    count: U64,
}

const _: () = assert!(size_of::<RawLuo>() == 24);
const _: () = assert!(size_of::<RawSession>() == 80);
const _: () = assert!(size_of::<RawFile>() == 64);
const _: () = assert!(size_of::<RawFlb>() == 64);
const _: () = assert!(size_of::<RawBlock>() == 16);

/// Bytes of the field that this name has at the beginning of `struct luo_ser`: with its zero, up to a multiple of 8.
const fn name_field(name: &str) -> usize {
    (name.len() + 1).next_multiple_of(8)
}

/// Entries of a block.
const fn per_block(entry: usize) -> usize {
    (PAGE as usize - size_of::<RawBlock>()) / entry
}

/// A text and zeros; it is known to fit.
fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    field[..text.len()].copy_from_slice(text.as_bytes());
    field
}

impl Orchestration {
    /// Puts everything into a handover. The files' own data are there already.
    ///
    /// # Errors
    /// Something that no kernel would give back, or the pool is full.
    pub fn write(&self, out: &mut Outgoing) -> Result<(), LuoError> {
        self.consistent()?;
        let mut sessions = Vec::with_capacity(self.sessions.len());
        for session in &self.sessions {
            let files: Vec<RawFile> = session
                .files
                .iter()
                .map(|file| RawFile {
                    compatible: field(if is_ours(&file.compatible) { self.names.memfd } else { &file.compatible }),
                    data: file.data.into(),
                    token: file.token.into(),
                })
                .collect();
            let head = write_blocks(out, "files of one session", &files)?;
            let count = files.len() as u64;
            sessions.push(RawSession { name: field(&session.name), files: head.into(), count: count.into() });
        }
        let ser = RawLuo {
            liveupdate_num: self.update.into(),
            sessions_pa: write_blocks(out, "sessions", &sessions)?.into(),
            flbs_pa: self.write_flbs(out)?.into(),
        };
        let mut blob = self.names.luo.as_bytes().to_vec();
        blob.resize(name_field(self.names.luo), 0);
        blob.extend(ser.as_bytes());
        out.subtree(BLOB, &blob)?;
        Ok(())
    }

    /// All FLBs lie in one page (`LUO_FLB_PGCNT`). Without any there is no page, and its address is 0 (`luo_flb_setup_incoming`).
    fn write_flbs(&self, out: &mut Outgoing) -> Result<u64, LuoError> {
        let (count, limit) = (self.flbs.len() as u64, per_block(size_of::<RawFlb>()) as u64);
        if count > limit {
            return Err(LuoError::TooMany { what: "FLBs", count, limit });
        }
        if count == 0 {
            return Ok(0);
        }
        let mut page = RawBlock { next: 1.into(), count: count.into() }.as_bytes().to_vec();
        for flb in &self.flbs {
            let raw = RawFlb { name: field(&flb.name), data: flb.data.into(), count: flb.count.into() };
            page.extend(raw.as_bytes());
        }
        page.resize(PAGE as usize, 0);
        Ok(out.folio("FLBs", &page)?)
    }

    /// Reads what a handover carries; `None` if there is nothing.
    ///
    /// # Errors
    /// Another version, or structures that lead out of preserved pages, or into themselves, or exceed a limit.
    pub fn read(
        memory: &impl Memory,
        incoming: &Incoming,
        limits: &Limits,
    ) -> Result<Option<Received<Orchestration>>, ReadError> {
        let Some(blob) = incoming.blob(memory, BLOB, limits)? else { return Ok(None) };
        let (name, ser) = header(&blob)?;
        let mut reader = Reader { memory, incoming, limits, seen: HashSet::new() };
        let mut sessions = Vec::new();
        for raw in reader.blocks::<RawSession>("a block of sessions", ser.sessions_pa.get())? {
            let files = reader.blocks::<RawFile>("a block of files", raw.files.get())?;
            if files.len() as u64 != raw.count.get() {
                let (found, stated) = (files.len() as u64, raw.count.get());
                return Err(ReadError::Mismatch { what: "files of a session", found, stated });
            }
            let file = |raw: RawFile| {
                let compatible = text("a handler's name", &raw.compatible)?;
                Ok(File { token: raw.token.get(), compatible, data: raw.data.get() })
            };
            let files = files.into_iter().map(file).collect::<Result<_, ReadError>>()?;
            sessions.push(Session { name: text("a session's name", &raw.name)?, files });
        }
        let flbs = reader.flbs(ser.flbs_pa.get())?;
        let mut files = sessions.iter().flat_map(|session: &Session| &session.files);
        let memfd = files.find_map(|file| spoken(MEMFD, &file.compatible)).unwrap_or(Names::default().memfd);
        let names = Names { luo: name, memfd };
        Ok(Some(Received::new(Orchestration { update: ser.liveupdate_num.get(), sessions, flbs, names })))
    }
}

/// The name at the beginning of the blob, and what follows it.
fn header(blob: &[u8]) -> Result<(&'static str, RawLuo), ReadError> {
    let text = blob.split(|byte| *byte == 0).next().unwrap_or_default();
    let found = String::from_utf8_lossy(&text[..text.len().min(HANDLER_NAME)]).into_owned();
    let Some(name) = spoken(LUO, &found) else {
        return Err(ReadError::Version { found, spoken: LUO.join(", ") });
    };
    let at = name_field(name);
    let short = || ReadError::Mismatch {
        what: "bytes of the orchestrator's blob",
        found: blob.len() as u64,
        stated: (at + size_of::<RawLuo>()) as u64,
    };
    let (field, rest) = blob.split_at_checked(at).ok_or_else(short)?;
    let (ser, _) = RawLuo::read_from_prefix(rest).map_err(|_| short())?;
    match field[name.len()..].iter().all(|byte| *byte == 0) {
        true => Ok((name, ser)),
        false => Err(ReadError::Text { what: "the orchestrator's version", bytes: field.to_vec() }),
    }
}

/// Last block first, since each names the next. 0 for nothing.
fn write_blocks<T: IntoBytes + Immutable>(
    out: &mut Outgoing,
    what: &'static str,
    entries: &[T],
) -> Result<u64, LuoError> {
    let blocks = entries.chunks(per_block(size_of::<T>()));
    let (count, limit) = (blocks.len() as u64, MAX_BLOCKS as u64);
    if count > limit {
        return Err(LuoError::TooMany {
            what,
            count: entries.len() as u64,
            limit: limit * per_block(size_of::<T>()) as u64,
        });
    }
    let mut next = 0;
    for block in blocks.rev() {
        let mut page = RawBlock { next: u64::into(next), count: (block.len() as u64).into() }.as_bytes().to_vec();
        page.extend(block.as_bytes());
        page.resize(PAGE as usize, 0);
        next = out.folio(what, &page)?;
    }
    Ok(next)
}

/// Follows addresses, each once, and only into preserved pages.
struct Reader<'a, M> {
    memory: &'a M,
    incoming: &'a Incoming,
    limits: &'a Limits,
    /// Of all lists together: many short lists cost no more than one long one.
    seen: HashSet<u64>,
}

impl<M: Memory> Reader<'_, M> {
    /// The content of a block's page.
    fn page(&mut self, what: &'static str, at: u64) -> Result<Vec<u8>, ReadError> {
        if self.incoming.folio_at(at).is_none() {
            return Err(ReadError::NotKept { what, at });
        }
        if !self.seen.insert(at) {
            return Err(ReadError::Cycle { what, at });
        }
        if self.seen.len() > self.limits.blocks {
            let limit = self.limits.blocks as u64;
            return Err(ReadError::TooMany { what: "blocks of the orchestrator", count: limit + 1, limit });
        }
        let mut page = vec![0; PAGE as usize];
        self.memory.read(at, &mut page).map_err(|missing| ReadError::Memory { what, missing })?;
        Ok(page)
    }

    fn blocks<T: FromBytes + Immutable + Copy>(&mut self, what: &'static str, head: u64) -> Result<Vec<T>, ReadError> {
        let mut entries = Vec::new();
        let mut next = head;
        while next != 0 {
            let page = self.page(what, next)?;
            let header = split(&page, &mut entries, "entries of a block", 1)?;
            next = header.next.get();
        }
        Ok(entries)
    }

    fn flbs(&mut self, at: u64) -> Result<Vec<Flb>, ReadError> {
        if at == 0 {
            return Ok(Vec::new());
        }
        let page = self.page("the page of FLBs", at)?;
        let mut raw: Vec<RawFlb> = Vec::new();
        split(&page, &mut raw, "FLBs", 0)?;
        let flb = |raw: RawFlb| {
            Ok(Flb { name: text("an FLB's name", &raw.name)?, data: raw.data.get(), count: raw.count.get() })
        };
        raw.into_iter().map(flb).collect()
    }
}

/// Entries of one page, behind its header.
fn split<T: FromBytes + Immutable + Copy>(
    page: &[u8],
    into: &mut Vec<T>,
    what: &'static str,
    least: u64,
) -> Result<RawBlock, ReadError> {
    let (header, rest) = RawBlock::read_from_prefix(page).expect("a page is longer than a header");
    let (count, most) = (header.count.get(), per_block(size_of::<T>()) as u64);
    if count < least || count > most {
        return Err(ReadError::Value { what, value: count });
    }
    let size = size_of::<T>();
    into.extend(rest[..count as usize * size].chunks_exact(size).filter_map(|entry| T::read_from_bytes(entry).ok()));
    Ok(header)
}
