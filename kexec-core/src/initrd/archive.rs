//! One archive in the format `newc` (Documentation/driver-api/early-userspace/buffer-format.rst), read from a stream.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::{InitrdError, Limits};

/// Length of an entry's header.
const HEADER: usize = 110;
/// `PATH_MAX`: Linux passes longer names over.
const LONGEST_NAME: usize = 4096;
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
/// A piece of what is passed over.
const PIECE: usize = 64 << 10;

/// What the archives of an initrd have in them, all together.
pub struct Entries {
    limits: Limits,
    pub files: u64,
    pub unpacked: u64,
    pub paths: BTreeSet<String>,
    pub links: BTreeMap<String, String>,
}

impl Entries {
    pub fn new(limits: Limits) -> Entries {
        Entries { limits, files: 0, unpacked: 0, paths: BTreeSet::new(), links: BTreeMap::new() }
    }

    fn add(&mut self, name: &[u8], mode: u32, body: u64) -> Result<String, InitrdError> {
        self.files += 1;
        self.unpacked = self.unpacked.saturating_add(body);
        let Limits { files, unpacked } = self.limits;
        if self.files > files || self.unpacked > unpacked {
            return Err(InitrdError::TooLarge { unpacked, files });
        }
        let name = String::from_utf8_lossy(name);
        let path = name.trim_start_matches("./").trim_matches('/').to_owned();
        // What stands in the place of another kind is removed first (`clean_path()`).
        self.links.remove(&path);
        match mode & S_IFMT {
            S_IFDIR => self.paths.remove(&path),
            _ => self.paths.insert(path.clone()),
        };
        Ok(path)
    }
}

/// A stream of entries.
pub struct Archive<R> {
    from: R,
    /// Where the part begins in the initrd.
    part: u64,
    /// Bytes read so far, from where alignment is counted.
    at: usize,
    /// One byte that was read ahead.
    next: Option<u8>,
    piece: Vec<u8>,
}

impl<R: Read> Archive<R> {
    /// `at`: what the first byte's place is for alignment.
    pub fn new(from: R, part: u64, at: usize) -> Archive<R> {
        Archive { from, part, at, next: None, piece: vec![0; PIECE] }
    }

    /// Where the next byte is.
    pub fn position(&self) -> usize {
        self.at - usize::from(self.next.is_some())
    }

    /// Reads the next entry, and the zeros behind it; `false` where none begins.
    pub fn entry(&mut self, entries: &mut Entries) -> Result<bool, InitrdError> {
        match self.peek()? {
            Some(b'0') => {}
            _ => return Ok(false),
        }
        if !self.position().is_multiple_of(4) {
            return Err(self.damaged(format!("an entry begins at byte {}, not on a multiple of four", self.position())));
        }
        let mut header = [0; HEADER];
        self.fill(&mut header, "an entry's header")?;
        match &header[..6] {
            b"070701" | b"070702" => {}
            b"070707" => return Err(self.damaged("it is in cpio's old format: make it with `cpio -H newc`".to_owned())),
            _ => return Err(self.damaged(format!("an entry begins with {}", header[..6].escape_ascii()))),
        }
        let mut fields = [0u32; 13];
        for (field, digits) in fields.iter_mut().zip(header[6..].chunks(8)) {
            let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
            *field = text
                .and_then(|text| u32::from_str_radix(text, 16).ok())
                .ok_or_else(|| self.damaged(format!("an entry's header has {}", digits.escape_ascii())))?;
        }
        let (mode, body, name_len) = (fields[1], fields[6], fields[11] as usize);
        if name_len == 0 || name_len > LONGEST_NAME {
            return Err(self.damaged(format!("a name of {name_len} bytes")));
        }
        let mut name = vec![0; name_len];
        self.fill(&mut name, "a name")?;
        if name.pop() != Some(0) {
            return Err(self.damaged(format!("the name {} does not end", name.escape_ascii())));
        }
        let shown = String::from_utf8_lossy(&name).into_owned();
        // At the very end the padding may be missing.
        let mut padding = [0; 3];
        self.some(&mut padding[..self.at.next_multiple_of(4) - self.at])?;
        if mode & S_IFMT == S_IFLNK && body as usize > LONGEST_NAME {
            return Err(self.damaged(format!("the link {shown} has a target of {body} bytes")));
        }
        let mut target = Vec::new();
        if mode & S_IFMT == S_IFLNK {
            target.resize(body as usize, 0);
            self.fill(&mut target, "a link")?;
        } else {
            self.pass(body as usize, &shown)?;
        }
        if name != b"TRAILER!!!" {
            let path = entries.add(&name, mode, if mode & S_IFMT == S_IFREG { body.into() } else { 0 })?;
            if mode & S_IFMT == S_IFLNK {
                entries.links.insert(path, String::from_utf8_lossy(&target).trim_end_matches('\0').to_owned());
            }
        }
        self.zeros()?;
        Ok(true)
    }

    /// Nothing may follow the entries of what was compressed together.
    pub fn end(&mut self) -> Result<(), InitrdError> {
        self.zeros()?;
        match self.peek()? {
            None => Ok(()),
            Some(byte) => Err(self.damaged(format!(
                "behind its entries there is garbage, from {byte:#04x} at byte {} on",
                self.position()
            ))),
        }
    }

    fn zeros(&mut self) -> Result<(), InitrdError> {
        while self.peek()? == Some(0) {
            self.next = None;
        }
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<u8>, InitrdError> {
        if self.next.is_none() {
            let mut byte = [0];
            let n = self.read(|from, _| from.read(&mut byte))?;
            self.next = (n == 1).then_some(byte[0]);
        }
        Ok(self.next)
    }

    fn fill(&mut self, into: &mut [u8], what: &str) -> Result<(), InitrdError> {
        match self.some(into)? == into.len() {
            true => Ok(()),
            false => Err(InitrdError::CutOff { at: self.part, what: format!("{what} is not whole") }),
        }
    }

    /// Fills `into` as far as there is something; how far.
    fn some(&mut self, into: &mut [u8]) -> Result<usize, InitrdError> {
        let mut filled = 0;
        if let (Some(byte), false) = (self.next, into.is_empty()) {
            (into[0], filled, self.next) = (byte, 1, None);
        }
        while filled < into.len() {
            let n = self.read(|from, _| from.read(&mut into[filled..]))?;
            if n == 0 {
                break;
            }
            filled += n;
        }
        Ok(filled)
    }

    /// Reads past `len` bytes.
    fn pass(&mut self, mut len: usize, name: &str) -> Result<(), InitrdError> {
        while len > 0 {
            let n = self.read(|from, piece| from.read(&mut piece[..len.min(PIECE)]))?;
            if n == 0 {
                return Err(InitrdError::CutOff { at: self.part, what: format!("{name} lacks {len} bytes") });
            }
            len -= n;
        }
        Ok(())
    }

    fn read(&mut self, read: impl FnOnce(&mut R, &mut [u8]) -> std::io::Result<usize>) -> Result<usize, InitrdError> {
        let n = read(&mut self.from, &mut self.piece).map_err(|error| self.damaged(error.to_string()))?;
        self.at += n;
        Ok(n)
    }

    fn damaged(&self, what: String) -> InitrdError {
        InitrdError::Damaged { at: self.part, what }
    }
}
