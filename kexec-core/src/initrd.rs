//! Initrds, walked as Linux will walk them (init/initramfs.c), before anything is touched: a successor whose kernel cannot unpack its
//! initrd panics, or comes up without half of its files, and all that the incumbent sees is that nobody answers.
//!
//! ```text
//! [cpio, plain] 0 0 [cpio, compressed] 0 0 0 … [cpio, ours] 0 [bootconfig] len sum "#BOOTCONFIG\n"
//! ```
//! Archives (`newc`) follow each other, each as it is or compressed, with zeros between; the later ones' files replace the earlier ones'. A
//! boot configuration, if there is one, is the very last.

mod archive;
mod bootconfig;

use std::collections::{BTreeMap, BTreeSet};

use crate::compression::Compression;
use archive::{Archive, Entries};
pub use bootconfig::{BootConfig, BootConfigError};

/// What is known of an initrd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initrd {
    /// Its parts, in order.
    pub parts: Vec<Part>,
    /// Every path in it but folders, without a leading `/` or `./`.
    pub paths: BTreeSet<String>,
    /// The symbolic links among them, and their targets.
    pub links: BTreeMap<String, String>,
    /// Bytes of all files, unpacked.
    pub unpacked: u64,
    /// The boot configuration at its end.
    pub boot_config: Option<BootConfig>,
}

/// One archive, or several of one compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where it begins.
    pub at: u64,
    /// How it is compressed.
    pub compression: Option<Compression>,
    /// How many files it has.
    pub files: u64,
}

/// What an initrd may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Files in all.
    pub files: u64,
    /// Bytes of all files, unpacked: they become memory of the successor.
    pub unpacked: u64,
}

/// Why a kernel could not unpack an initrd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitrdError {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// No archive begins here.
    #[error("at byte {at} there is no archive and nothing compressed, but {start}: {what}")]
    NotAnArchive {
        /// Where.
        at: u64,
        /// The first bytes there, in hex.
        start: String,
        /// What it looks like.
        what: &'static str,
    },
    /// Begun and not ended.
    #[error("the archive at byte {at} is cut off: {what}")]
    CutOff {
        /// Where the part begins.
        at: u64,
        /// What is incomplete.
        what: String,
    },
    /// Damaged.
    #[error("the archive at byte {at} is damaged: {what}")]
    Damaged {
        /// Where the part begins.
        at: u64,
        /// How.
        what: String,
    },
    /// A compression that we cannot unpack.
    #[error(
        "the part at byte {at} is compressed with {method}, which cannot be looked into: compress it with another (zstd, xz, gzip)"
    )]
    Unknown {
        /// Where.
        at: u64,
        /// Which.
        method: &'static str,
    },
    /// A compression that the successor cannot unpack.
    #[error("the part at byte {at} is compressed with {method}, which the successor's kernel was not built for (CONFIG_RD_{})", .method.to_uppercase())]
    Unsupported {
        /// Where.
        at: u64,
        /// Which.
        method: &'static str,
    },
    /// More than there is room for.
    #[error("it unpacks to more than {} MiB or {files} files", .unpacked >> 20)]
    TooLarge {
        /// Bytes that may be unpacked.
        unpacked: u64,
        /// Files that there may be.
        files: u64,
    },
    /// See there.
    #[error(transparent)]
    BootConfig(#[from] BootConfigError),
}

/// Walks an initrd. `supported` says what the successor's kernel can unpack.
///
/// Behind a part that is compressed with lzma nothing is looked at: where it ends is known to its unpacker only.
///
/// # Errors
/// What its kernel would complain of, and what it would not: a plain archive that is cut off is unpacked as far as it goes.
pub fn walk(bytes: &[u8], limits: Limits, supported: impl Fn(Compression) -> bool) -> Result<Initrd, InitrdError> {
    if bytes.is_empty() {
        return Err(InitrdError::Empty);
    }
    let boot_config = BootConfig::find(bytes)?;
    let archives = boot_config.as_ref().map_or(bytes, |found| &bytes[..found.at]);
    let mut entries = Entries::new(limits);
    let mut parts = Vec::new();
    let mut rest = archives;
    loop {
        rest = &rest[rest.iter().position(|&byte| byte != 0).unwrap_or(rest.len())..];
        let Some(&first) = rest.first() else { break };
        let at = archives.len() - rest.len();
        let (place, before) = (at as u64, entries.files);
        let compression = Compression::of(rest);
        match compression {
            _ if first == b'0' && at.is_multiple_of(4) => {
                let mut archive = Archive::new(rest, place, at);
                while archive.entry(&mut entries)? {}
                let len = archive.position() - at;
                rest = rest.get(len..).unwrap_or_default();
            }
            None => return Err(not_an_archive(place, rest)),
            Some(compression) => {
                let method = compression.name();
                if !supported(compression) {
                    return Err(InitrdError::Unsupported { at: place, method });
                }
                let damaged =
                    |error: std::io::Error| InitrdError::Damaged { at: place, what: format!("{method}: {error}") };
                let unpacked = compression.unpack(&mut rest).map_err(damaged)?;
                let mut unpacked = unpacked.ok_or(InitrdError::Unknown { at: place, method })?;
                let mut archive = Archive::new(&mut unpacked, place, 0);
                while archive.entry(&mut entries)? {}
                archive.end()?;
                drop(unpacked);
                if compression == Compression::Lzma {
                    rest = &[];
                }
            }
        }
        let compression = compression.filter(|_| first != b'0');
        parts.push(Part { at: place, compression, files: entries.files - before });
    }
    if parts.is_empty() {
        return Err(InitrdError::Empty);
    }
    Ok(Initrd { parts, paths: entries.paths, links: entries.links, unpacked: entries.unpacked, boot_config })
}

impl Initrd {
    /// Whether it has this path.
    pub fn has(&self, path: &str) -> bool {
        self.paths.contains(path.trim_start_matches('/'))
    }

    /// Whether it brings microcode, which the kernel loads into a CPU before anything else. On a core whose other thread runs another
    /// kernel that is not safe, and what the incumbent has loaded is there already.
    pub fn has_microcode(&self) -> bool {
        self.paths.iter().any(|path| path.starts_with("kernel/x86/microcode/"))
    }
}

/// One initrd out of the operator's and ours, which comes last, so that our files are those that count, but before a boot
/// configuration, which is only found at the very end. `given` must have been walked.
pub fn join(given: &[u8], walked: &Initrd, ours: &[u8]) -> Vec<u8> {
    let archives = walked.boot_config.as_ref().map_or(given.len(), |found| found.at);
    let mut joined = given[..archives].to_vec();
    // A plain archive begins on a multiple of four; and lz4 data end where no block follows: with a length of 0, four zeros.
    joined.resize((archives + 4).next_multiple_of(4), 0);
    joined.extend_from_slice(ours);
    if archives < given.len() {
        joined.resize(joined.len().next_multiple_of(4), 0);
        joined.extend_from_slice(&given[archives..]);
    }
    joined
}

fn not_an_archive(at: u64, rest: &[u8]) -> InitrdError {
    let start = rest.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    let what = match rest {
        [b'M', b'Z', ..] => "a kernel or a unified kernel image; name an initrd, for instance its section .initrd",
        [0x7f, b'E', b'L', b'F', ..] => "a program",
        [b'0', ..] => "an archive that does not begin on a multiple of four",
        [byte, ..] if byte.is_ascii_graphic() => "text?",
        _ => "no compression that Linux knows",
    };
    InitrdError::NotAnArchive { at, start, what }
}

#[cfg(test)]
mod tests;
