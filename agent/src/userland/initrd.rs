//! An initramfs as a value: paths to contents, written as a `newc` archive (Documentation/driver-api/early-userspace/
//! buffer-format.rst). The same input gives the same bytes: sorted by path, no times.
//!
//! Nothing is ever written through a symbolic link as the name has it: on a machine with merged `/usr`, `lib` is a link, and a folder `lib`
//! in a later archive takes the link's place, with all that was reached by it. So a path goes where the links lead that the tree has,
//! or that are in the initrd before it ([`Initrd::behind`]).

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

/// Links that are followed before it is a circle.
const MOST_LINKS: usize = 40;

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Folder,
    File { content: Vec<u8> },
    Symlink { target: String },
    CharDevice { major: u32, minor: u32 },
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    /// Permission bits.
    mode: u32,
    /// User and group.
    owner: (u32, u32),
    kind: Kind,
}

impl Entry {
    fn of_root(mode: u32, kind: Kind) -> Entry {
        Entry { mode, owner: (0, 0), kind }
    }

    /// A folder that comes by itself.
    fn parent() -> Entry {
        Entry::of_root(0o755, Kind::Folder)
    }
}

/// The tree to be.
#[derive(Default)]
pub struct Initrd {
    entries: BTreeMap<String, Entry>,
    /// Links of the archives before it, and their targets.
    before: BTreeMap<String, String>,
}

impl Initrd {
    /// An empty tree.
    pub fn new() -> Initrd {
        Initrd::default()
    }

    /// An empty tree, to be unpacked over another one with these links.
    pub fn behind(links: BTreeMap<String, String>) -> Initrd {
        Initrd { before: links, ..Initrd::default() }
    }

    /// Where `path` is: its folders as the links have it, its last name as it stands.
    fn place_of(&self, path: &str) -> String {
        let mut place = String::new();
        let mut rest: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut followed = 0;
        while let Some(name) = rest.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    place.truncate(place.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let here = if place.is_empty() { name } else { format!("{place}/{name}") };
            let target = match self.entries.get(&here) {
                Some(Entry { kind: Kind::Symlink { target }, .. }) => Some(target),
                Some(_) => None,
                None => self.before.get(&here),
            };
            match target {
                Some(target) if !rest.is_empty() && followed < MOST_LINKS => {
                    followed += 1;
                    if target.starts_with('/') {
                        place.clear();
                    }
                    rest.extend(target.split('/').rev().map(str::to_owned));
                }
                _ => place = here,
            }
        }
        place
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let place = self.place_of(path);
        if place.is_empty() {
            return;
        }
        let mut parent = Path::new(&place);
        while let Some(up) = parent.parent().filter(|up| !up.as_os_str().is_empty()) {
            self.entries.entry(up.to_string_lossy().into_owned()).or_insert_with(Entry::parent);
            parent = up;
        }
        self.entries.insert(place, entry);
    }

    /// A folder; parents of anything come by themselves.
    pub fn folder(&mut self, path: &str) {
        self.folder_as(path, Entry::parent());
    }

    fn folder_as(&mut self, path: &str, entry: Entry) {
        // A folder that is reached by a link is there.
        let place = self.place_of(&format!("{path}/."));
        if !place.is_empty() && !self.entries.contains_key(&place) {
            self.insert(&place, entry);
        }
    }

    /// A file with the given permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.insert(path, Entry::of_root(mode, Kind::File { content }));
    }

    /// A symbolic link. What the tree has below that path already goes where the link leads.
    pub fn symlink(&mut self, path: &str, target: &str) {
        let place = self.place_of(path);
        let below = format!("{place}/");
        let moved: Vec<String> = self.entries.keys().filter(|path| path.starts_with(&below)).cloned().collect();
        let moved: Vec<_> = moved.into_iter().filter_map(|path| self.entries.remove_entry(&path)).collect();
        let target = target.to_owned();
        self.insert(&place, Entry::of_root(0o777, Kind::Symlink { target }));
        for (path, entry) in moved {
            if !self.has(&path) {
                self.insert(&path, entry);
            }
        }
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.insert(path, Entry::of_root(mode, Kind::CharDevice { major, minor }));
    }

    /// Whether there is something at `path`.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(&self.place_of(path))
    }

    /// Copies a file, link or folder of this machine to the same path, with its owner and permissions. A link is copied as a link, and what
    /// it leads to is copied, too; for links inside of a folder only if that is a file. What is none of these is left out.
    pub fn copy(&mut self, path: &Path) -> Result<()> {
        let mut path = path.to_owned();
        for _ in 0..MOST_LINKS {
            self.copy_from(&path, &path.to_string_lossy())?;
            match link_target(&path) {
                Some(target) => path = target,
                None => return Ok(()),
            }
        }
        bail!("{} is in a circle of links", path.display())
    }

    /// Copies a file, link or folder of this machine to `at`.
    pub fn copy_from(&mut self, path: &Path, at: &str) -> Result<()> {
        let read = || format!("cannot read {} for the initrd", path.display());
        let meta = fs::symlink_metadata(path).with_context(read)?;
        let kind = meta.file_type();
        let entry = |kind| Entry { mode: meta.permissions().mode() & 0o7777, owner: (meta.uid(), meta.gid()), kind };
        if kind.is_symlink() {
            let target = fs::read_link(path).with_context(read)?;
            self.symlink(at, &target.to_string_lossy());
        } else if kind.is_dir() {
            self.folder_as(at, entry(Kind::Folder));
            let mut names: Vec<_> = fs::read_dir(path)
                .with_context(read)?
                .map(|entry| entry.map(|e| e.file_name()))
                .collect::<io::Result<_>>()
                .with_context(read)?;
            names.sort();
            for name in names {
                let inner = format!("{}/{}", at.trim_end_matches('/'), name.to_string_lossy());
                let from = path.join(&name);
                self.copy_from(&from, &inner)?;
                // A link to a file that lies elsewhere (/etc/alternatives) would lead nowhere.
                if let Some(target) = link_target(&from)
                    && fs::metadata(&target).is_ok_and(|meta| meta.is_file())
                    && !self.has(&target.to_string_lossy())
                {
                    self.copy(&target)?;
                }
            }
        } else if kind.is_file() {
            let content = fs::read(path).with_context(read)?;
            self.insert(at, entry(Kind::File { content }));
        } else if kind.is_char_device() {
            let (major, minor) = (libc::major(meta.rdev()) as u32, libc::minor(meta.rdev()) as u32);
            self.insert(at, entry(Kind::CharDevice { major, minor }));
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
                self.opened_later(Path::new(file))?;
            }
        }
        // Where libraries are that lie in none of the loader's own folders.
        let cache = Path::new("/etc/ld.so.cache");
        if cache.exists() && !self.has("/etc/ld.so.cache") {
            self.copy(cache)?;
        }
        Ok(())
    }

    /// Beside the C library: what it opens by name when it needs it, and no program says so (threads that end, names of users and hosts).
    fn opened_later(&mut self, library: &Path) -> Result<()> {
        const LATER: [&str; 6] = [
            "libgcc_s.so.1",
            "libnss_files.so.2",
            "libnss_dns.so.2",
            "libnss_compat.so.2",
            "libresolv.so.2",
            "libidn2.so.0",
        ];
        if library.file_name().is_none_or(|name| name != "libc.so.6") {
            return Ok(());
        }
        for name in LATER {
            let beside = library.with_file_name(name);
            if beside.exists() {
                self.library(&beside)?;
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
            let Entry { mode, owner: (user, group), kind } = entry;
            let builder = builder.uid(*user).gid(*group);
            let (builder, content): (_, &[u8]) = match kind {
                Kind::Folder => (builder.mode(S_IFDIR | mode).nlink(2), &[]),
                Kind::File { content } => (builder.mode(S_IFREG | mode), content),
                Kind::Symlink { target } => (builder.mode(S_IFLNK | mode), target.as_bytes()),
                Kind::CharDevice { major, minor } => {
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

/// Where a link of this machine leads, one step.
fn link_target(path: &Path) -> Option<PathBuf> {
    let target = fs::read_link(path).ok()?;
    Some(path.parent()?.join(target))
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

    fn paths(tree: &Initrd) -> Vec<&str> {
        tree.entries.keys().map(String::as_str).collect()
    }

    #[test]
    fn nothing_is_written_below_a_link() {
        let mut tree = Initrd::new();
        tree.file("/lib/modules/a.ko", 0o644, *b"early");
        tree.symlink("/lib", "usr/lib");
        tree.symlink("/lib64", "/usr/lib64");
        tree.file("/lib/modules/b.ko", 0o644, *b"late");
        tree.file("/lib64/ld.so", 0o755, *b"");
        tree.folder("/lib");
        tree.folder("/lib/modules/");
        assert_eq!(
            paths(&tree),
            [
                "lib",
                "lib64",
                "usr",
                "usr/lib",
                "usr/lib/modules",
                "usr/lib/modules/a.ko",
                "usr/lib/modules/b.ko",
                "usr/lib64",
                "usr/lib64/ld.so"
            ]
        );
        assert!(tree.has("/lib/modules/b.ko") && matches!(tree.entries["lib"].kind, Kind::Symlink { .. }));
    }

    /// The operator's initrd of a machine with merged /usr: a folder `lib` in ours would take the link's place.
    #[test]
    fn links_of_the_archives_before_are_followed() {
        let links = BTreeMap::from([
            ("lib".to_owned(), "usr/lib".to_owned()),
            ("sbin".to_owned(), "usr/../usr/bin".to_owned()),
        ]);
        let mut tree = Initrd::behind(links);
        tree.file("/lib/modules/a.ko", 0o644, *b"");
        tree.file("/sbin/init", 0o755, *b"");
        assert_eq!(
            paths(&tree),
            ["usr", "usr/bin", "usr/bin/init", "usr/lib", "usr/lib/modules", "usr/lib/modules/a.ko"]
        );
        // Links in a circle end somewhere.
        let mut tree =
            Initrd::behind(BTreeMap::from([("a".to_owned(), "b".to_owned()), ("b".to_owned(), "a".to_owned())]));
        tree.file("/a/file", 0o644, *b"");
        assert!(paths(&tree).iter().any(|path| path.ends_with("file")));
    }

    #[test]
    fn owners_modes_and_what_links_lead_to_are_copied() {
        let machine = tempfile::tempdir().unwrap();
        let at = |name: &str| machine.path().join(name);
        fs::create_dir_all(at("usr/lib/deep")).unwrap();
        fs::write(at("usr/lib/deep/a"), "content").unwrap();
        fs::write(at("elsewhere"), "x").unwrap();
        fs::set_permissions(at("usr/lib/deep"), fs::Permissions::from_mode(0o1770)).unwrap();
        std::os::unix::fs::symlink("usr/lib", at("lib")).unwrap();
        std::os::unix::fs::symlink("../../elsewhere", at("usr/lib/link")).unwrap();
        std::os::unix::fs::symlink("/nowhere", at("usr/lib/dangling")).unwrap();
        let mut tree = Initrd::new();
        tree.copy(&at("lib")).unwrap();
        let place = |name: &str| at(name).to_string_lossy().trim_matches('/').to_owned();
        let deep = &tree.entries[&place("usr/lib/deep")];
        let owner = fs::metadata(at("usr")).unwrap();
        assert_eq!((deep.mode, deep.owner), (0o1770, (owner.uid(), owner.gid())));
        assert!(matches!(&tree.entries[&place("lib")].kind, Kind::Symlink { target } if target == "usr/lib"));
        for there in ["lib/deep/a", "usr/lib/link", "usr/lib/dangling", "elsewhere"] {
            assert!(tree.has(&at(there).to_string_lossy()), "{there}");
        }
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
        // No program names it, and a thread that is ended needs it.
        assert!(tree.entries.keys().any(|path| path.contains("libgcc_s.so.1")));
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
