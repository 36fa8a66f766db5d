//! The Live Update Orchestrator of a kernel that has one, as its programs see it: sessions and files that a predecessor handed over
//! (Documentation/userspace-api/liveupdate.rst).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use crate::machine::sys;

/// The device; one program at a time may have it open (EBUSY).
pub const DEVICE: &str = "/dev/liveupdate";
/// Bits of a word of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
const PAGE: u64 = 4096;

/// Keeps all others from the kernel's sessions while the file is open; nothing where there is no orchestrator. The kernel reads all that it was
/// handed over at the first opening (`luo_session_deserialize`), so this is also its word on it.
pub fn hold() -> Result<Option<File>> {
    match File::options().read(true).write(true).open(DEVICE) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("the kernel's sessions cannot be had: {DEVICE}")),
    }
}

/// A session that was handed over, with its files.
#[derive(Debug)]
pub struct Session(OwnedFd);

impl Session {
    /// The session of this name. It can be had once.
    ///
    /// # Errors
    /// No orchestrator here, or no such session (ENOENT).
    pub fn retrieve(name: &str) -> io::Result<Session> {
        let device = File::options().read(true).write(true).open(DEVICE)?;
        sys::liveupdate::retrieve_session(&device, name).map(Session)
    }

    /// A file of the session, on the pages that it had in the predecessor.
    ///
    /// # Errors
    /// No file has this token (ENOENT), or the kernel cannot restore it.
    pub fn file(&self, token: u64) -> io::Result<File> {
        sys::liveupdate::retrieve_file(&self.0, token).map(File::from)
    }

    /// Nothing more is wanted of it; files that were retrieved live on.
    ///
    /// # Errors
    /// A file was not retrieved.
    pub fn finish(self) -> io::Result<()> {
        sys::liveupdate::finish(&self.0)
    }
}

/// What a file in memory holds, and the physical addresses of its pages.
///
/// # Errors
/// It cannot be mapped, or `/proc/self/pagemap` not be read (CAP_SYS_ADMIN).
pub fn look(file: &File) -> io::Result<(Vec<u8>, Vec<u64>)> {
    let seen = sys::Seen::map(file)?;
    let bytes = seen.bytes();
    let pagemap = File::open("/proc/self/pagemap")?;
    let first = seen.address() as u64 / PAGE;
    let address = |page: u64| {
        let mut word = [0; 8];
        pagemap.read_exact_at(&mut word, page * 8)?;
        match u64::from_le_bytes(word) {
            word if word & PRESENT != 0 => Ok((word & FRAME) * PAGE),
            word => Err(io::Error::other(format!("page {page:#x} is not there: pagemap has {word:#x}"))),
        }
    };
    let pages = (first..first + (bytes.len() as u64).div_ceil(PAGE)).map(address).collect::<io::Result<_>>()?;
    Ok((bytes, pages))
}
