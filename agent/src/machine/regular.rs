//! Files that somebody named: they may be anything, and none of it may hang the daemon or fill its memory.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Reads a regular file of at most `most` bytes. A FIFO, a device, a folder is refused at once: it is opened without waiting for anybody
/// (`O_NONBLOCK`), and nothing is read from it.
///
/// # Errors
/// What the kernel says, or what the file is instead.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let refuse = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let meta = file.metadata()?;
    let kind = meta.file_type();
    if !kind.is_file() {
        let what = match () {
            () if kind.is_dir() => "a folder",
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_socket() => "a socket",
            () => "a device",
        };
        return refuse(format!("it is {what}, not a file"));
    }
    let size = meta.len();
    let too_large = |size: u64| format!("{} MiB is too large, at most {} MiB", size >> 20, most >> 20);
    if size > most {
        return refuse(too_large(size));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // It may grow meanwhile, and files of /proc have no size.
    file.by_ref().take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return refuse(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::write(at("file"), b"content").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        std::fs::File::create(at("sparse")).unwrap().set_len(1 << 40).unwrap();
        let refused = |path: &Path| read(path, 100).unwrap_err().to_string();
        assert_eq!(refused(&at("fifo")), "it is a FIFO, not a file");
        assert_eq!(refused(folder.path()), "it is a folder, not a file");
        assert_eq!(refused(Path::new("/dev/zero")), "it is a device, not a file");
        assert!(refused(&at("dangling")).contains("No such file"));
        assert!(read(&at("socket"), 100).is_err());
        assert!(refused(&at("sparse")).contains("1048576 MiB is too large"));
        assert_eq!(read(&at("link"), 7).unwrap(), b"content");
        assert!(read(&at("file"), 6).is_err());
        drop(socket);
    }
}
