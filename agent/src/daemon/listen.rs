//! Sockets that others find by their path. The control socket, which `batond` binds first, is what tells two daemons from
//! each other ([`crate::daemon`]); what a dead one has left at any other path is replaced.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result};

/// Listens at a path, for whom `mode` lets in.
pub fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    bind(path, mode, |path| UnixListener::bind(path))
}

/// Binds any socket at a path.
pub fn bind<S>(path: &Path, mode: u32, bind: impl FnOnce(&Path) -> io::Result<S>) -> Result<S> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let socket = bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(socket)
}
