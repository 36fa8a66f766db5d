//! An initramfs as a value: paths to contents, written as a `newc` archive (Documentation/driver-api/early-userspace/
//! buffer-format.rst). The same input gives the same bytes: sorted by path, no times, owner root.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

enum Entry {
    Folder,
    File { mode: u32, content: Vec<u8> },
    Symlink { target: String },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// The tree to be.
#[derive(Default)]
pub struct Initrd {
    entries: BTreeMap<String, Entry>,
}

impl Initrd {
    /// An empty tree.
    pub fn new() -> Initrd {
        Initrd::default()
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        let mut parent = Path::new(path);
        while let Some(up) = parent.parent().filter(|up| !up.as_os_str().is_empty()) {
            self.entries.entry(up.to_string_lossy().into_owned()).or_insert(Entry::Folder);
            parent = up;
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// A folder; parents of anything come by themselves.
    pub fn folder(&mut self, path: &str) {
        if !self.entries.contains_key(path.trim_matches('/')) {
            self.insert(path, Entry::Folder);
        }
    }

    /// A file with the given permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.insert(path, Entry::File { mode, content });
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        let target = target.to_owned();
        self.insert(path, Entry::Symlink { target });
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.insert(path, Entry::CharDevice { mode, major, minor });
    }

    /// Whether there is something at `path`.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_matches('/'))
    }

    /// Copies a file, link or folder of this machine to the same path. What is not one of these is left out.
    pub fn copy(&mut self, path: &Path) -> Result<()> {
        self.copy_from(path, &path.to_string_lossy())
    }

    /// Copies a file, link or folder of this machine to `at`.
    pub fn copy_from(&mut self, path: &Path, at: &str) -> Result<()> {
        let read = || format!("cannot read {} for the initrd", path.display());
        let meta = fs::symlink_metadata(path).with_context(read)?;
        let kind = meta.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(path).with_context(read)?;
            self.symlink(at, &target.to_string_lossy());
        } else if kind.is_dir() {
            self.folder(at);
            let mut names: Vec<_> = fs::read_dir(path)
                .with_context(read)?
                .map(|entry| entry.map(|e| e.file_name()))
                .collect::<io::Result<_>>()
                .with_context(read)?;
            names.sort();
            for name in names {
                let inner = format!("{}/{}", at.trim_end_matches('/'), name.to_string_lossy());
                self.copy_from(&path.join(&name), &inner)?;
            }
        } else if kind.is_file() {
            let content = fs::read(path).with_context(read)?;
            self.file(at, meta.permissions().mode() & 0o7777, content);
        } else if kind.is_char_device() {
            let (major, minor) = (libc::major(meta.rdev()) as u32, libc::minor(meta.rdev()) as u32);
            self.char_device(at, meta.permissions().mode() & 0o7777, major, minor);
        }
        Ok(())
    }

    /// Copies a program and, when it is dynamic, its loader and libraries (as the loader itself lists them).
    pub fn program(&mut self, path: &Path) -> Result<()> {
        let real = fs::canonicalize(path).with_context(|| format!("there is no program {}", path.display()))?;
        let content = fs::read(&real)?;
        let loader = interpreter(&content);
        let mode = fs::metadata(&real)?.permissions().mode() & 0o7777;
        self.file(&path.to_string_lossy(), mode, content);
        let Some(loader) = loader else { return Ok(()) };
        let listed = std::process::Command::new(&loader)
            .arg("--list")
            .arg(&real)
            .output()
            .with_context(|| format!("cannot run {}", loader.display()))?;
        if !listed.status.success() {
            bail!(
                "{} cannot list the libraries of {}: {}",
                loader.display(),
                path.display(),
                String::from_utf8_lossy(&listed.stderr).trim()
            );
        }
        self.library(&loader)?;
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            let file = line.split_whitespace().find(|word| word.starts_with('/'));
            if let Some(file) = file {
                self.library(Path::new(file))?;
            }
        }
        Ok(())
    }

    fn library(&mut self, path: &Path) -> Result<()> {
        let at = path.to_string_lossy();
        if self.has(&at) {
            return Ok(());
        }
        let content = fs::read(path).with_context(|| format!("cannot read library {}", path.display()))?;
        self.file(&at, 0o755, content);
        Ok(())
    }

    /// Writes the archive.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        for (number, (path, entry)) in (1u32..).zip(&self.entries) {
            let builder = cpio::newc::Builder::new(path).ino(number).nlink(1);
            let (builder, content): (_, &[u8]) = match entry {
                Entry::Folder => (builder.mode(S_IFDIR | 0o755).nlink(2), &[]),
                Entry::File { mode, content } => (builder.mode(S_IFREG | mode), content),
                Entry::Symlink { target } => (builder.mode(S_IFLNK | 0o777), target.as_bytes()),
                Entry::CharDevice { mode, major, minor } => {
                    (builder.mode(S_IFCHR | mode).rdev_major(*major).rdev_minor(*minor), &[])
                }
            };
            let size = u32::try_from(content.len()).map_err(|_| {
                let text = format!("{path} has {} bytes; newc holds 4 GiB at most", content.len());
                io::Error::new(io::ErrorKind::InvalidInput, text)
            })?;
            let mut writer = builder.write(&mut to, size);
            writer.write_all(content)?;
            writer.finish()?;
        }
        cpio::newc::trailer(&mut to)?;
        Ok(())
    }

    /// The archive as bytes, padded to four so that another may follow.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Ok(bytes)
    }
}

/// The dynamic loader that an ELF program asks for (PT_INTERP), or nothing for a static one.
fn interpreter(elf: &[u8]) -> Option<PathBuf> {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| {
        let bytes = elf.get(at..at.checked_add(8)?)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    // Only what this machine can run: ELF, 64 bit.
    if elf.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (table, entry, count) = (long(0x20)?, half(0x36)?, half(0x38)?);
    (0..count).find_map(|n| {
        let at = table.checked_add(usize::from(n) * usize::from(entry))?;
        if at.checked_add(0x28)? > elf.len() || word(at)? != PT_INTERP {
            return None;
        }
        let (offset, size) = (long(at + 0x08)?, long(at + 0x20)?);
        let name = elf.get(offset..offset.checked_add(size)?)?;
        let name = name.split(|byte| *byte == 0).next()?;
        Some(PathBuf::from(String::from_utf8_lossy(name).into_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_bytes_with_parents_first() {
        let build = |flip: bool| {
            let mut tree = Initrd::new();
            if flip {
                tree.symlink("/etc/z", "y");
            }
            tree.file("/usr/sbin/thing", 0o755, *b"content");
            tree.char_device("/dev/console", 0o600, 5, 1);
            tree.symlink("/etc/z", "y");
            tree.bytes().unwrap()
        };
        let bytes = build(false);
        assert_eq!(bytes, build(true));
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("usr\0") < at("usr/sbin\0") && at("usr/sbin\0") < at("usr/sbin/thing\0"));
        assert!(text.contains("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn a_dynamic_program_brings_its_loader_and_libraries() {
        let program = Path::new("/bin/sh");
        let mut tree = Initrd::new();
        tree.program(program).unwrap();
        let elf = fs::read(fs::canonicalize(program).unwrap()).unwrap();
        let loader = interpreter(&elf).expect("the shell of a Debian machine is dynamic");
        assert!(tree.has(&loader.to_string_lossy()));
        assert!(tree.entries.keys().any(|path| path.contains("libc.so")));
    }

    #[test]
    fn no_bytes_confuse_the_elf_reader() {
        assert_eq!(interpreter(b""), None);
        assert_eq!(interpreter(b"\x7fELF\x02"), None);
        let mut lying = vec![0xffu8; 200];
        lying[..5].copy_from_slice(b"\x7fELF\x02");
        assert_eq!(interpreter(&lying), None);
    }
}
