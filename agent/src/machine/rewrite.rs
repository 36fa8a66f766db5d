//! Files of ours that are replaced whole or not at all: a reader, or a batond that comes after this one, never finds half of one.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use tempfile::NamedTempFile;

/// Replaces the file by this value as JSON, for root's eyes alone; makes its folder if there is none.
pub fn rewrite(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    // Others may enter it: sockets that are for them lie beside such files.
    fs::create_dir_all(folder)?;
    let mut fresh = NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut fresh, value)?;
    fresh.persist(path)?;
    Ok(())
}
