//! Initial RAM disks: newc archives whose bytes depend on their content alone (sorted names, no times, no owners).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cpio::newc;

use super::error::{Doing, LabError, Result};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Directory,
    Bytes(Vec<u8>),
    Copied(PathBuf),
    Symlink(String),
    CharacterDevice { major: u32, minor: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    permissions: u32,
    content: Content,
}

/// An archive being put together. Paths are absolute as the guest sees them; missing parents are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Initrd {
    /// By name without the leading slash: a parent sorts before what is in it, as the kernel's unpacker needs it.
    nodes: BTreeMap<String, Node>,
}

impl Initrd {
    /// An archive with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder.
    pub fn directory(&mut self, path: &str, permissions: u32) -> &mut Self {
        self.insert(path, permissions, Content::Directory)
    }

    /// A file with this content.
    pub fn file(&mut self, path: &str, permissions: u32, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(path, permissions, Content::Bytes(bytes.into()))
    }

    /// A copy of a host's file, read when the archive is written; its execute permission is kept.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<&mut Self> {
        let meta = from.metadata().doing(format_args!("looking at {}", from.display()))?;
        let permissions = if meta.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
        Ok(self.insert(path, permissions, Content::Copied(from.to_owned())))
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.insert(path, 0o777, Content::Symlink(target.to_owned()))
    }

    /// A character device.
    pub fn character_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) -> &mut Self {
        self.insert(path, permissions, Content::CharacterDevice { major, minor })
    }

    fn insert(&mut self, path: &str, permissions: u32, content: Content) -> &mut Self {
        let name = path.trim_matches('/').to_owned();
        let mut parent = name.as_str();
        while let Some((up, _)) = parent.rsplit_once('/') {
            self.nodes.entry(up.to_owned()).or_insert(Node { permissions: 0o755, content: Content::Directory });
            parent = up;
        }
        self.nodes.insert(name, Node { permissions, content });
        self
    }

    /// Writes the archive.
    pub fn write(&self, mut out: impl Write) -> Result<()> {
        for ((name, node), inode) in self.nodes.iter().zip(1u32..) {
            out = write_node(out, name, node, inode).doing(format_args!("writing {name} to an initrd"))?;
        }
        newc::trailer(out).and_then(|mut out| out.flush()).doing("ending an initrd")
    }

    /// Writes the archive to a file.
    pub fn write_to(&self, path: &Path) -> Result<()> {
        let file = File::create(path).doing(format_args!("creating {}", path.display()))?;
        self.write(BufWriter::with_capacity(1 << 20, file))
    }
}

fn write_node<W: Write>(out: W, name: &str, node: &Node, inode: u32) -> io::Result<W> {
    let entry = |kind: u32| newc::Builder::new(name).ino(inode).mode(kind | node.permissions).nlink(1).mtime(0);
    let whole = |builder: newc::Builder, bytes: &[u8], out: W| {
        let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut writer = builder.write(out, size);
        writer.write_all(bytes)?;
        writer.finish()
    };
    match &node.content {
        Content::Directory => whole(entry(DIRECTORY).nlink(2), &[], out),
        Content::Bytes(bytes) => whole(entry(REGULAR), bytes, out),
        Content::Symlink(target) => whole(entry(SYMLINK), target.as_bytes(), out),
        Content::CharacterDevice { major, minor } => {
            whole(entry(CHARACTER_DEVICE).rdev_major(*major).rdev_minor(*minor), &[], out)
        }
        Content::Copied(from) => {
            let mut source = File::open(from)?;
            let size = u32::try_from(source.metadata()?.len()).map_err(io::Error::other)?;
            let mut writer = entry(REGULAR).write(out, size);
            io::copy(&mut source, &mut writer)?;
            writer.finish()
        }
    }
}

/// The content of a kernel module file, decompressed.
pub fn module_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut raw = Vec::new();
    File::open(path).and_then(|mut f| f.read_to_end(&mut raw)).doing(format_args!("reading {}", path.display()))?;
    if path.extension().is_none_or(|e| e != "xz") {
        return Ok(raw);
    }
    let mut plain = Vec::new();
    lzma_rs::xz_decompress(&mut raw.as_slice(), &mut plain).map_err(|e| LabError::Reply {
        from: path.display().to_string(),
        problem: format!("no xz that reads: {e:?}"),
    })?;
    Ok(plain)
}

/// A module and what it needs, in the order in which they must be loaded, as paths below the modules' folder. Empty for a module that is
/// built in.
pub fn modules_for(folder: &Path, name: &str) -> Result<Vec<String>> {
    let read = |file: &str| {
        std::fs::read_to_string(folder.join(file)).doing(format_args!("reading {}", folder.join(file).display()))
    };
    let built_in = read("modules.builtin")?;
    let is_it = |path: &str| {
        path.rsplit('/').next().and_then(|f| f.split(".ko").next()).is_some_and(|stem| stem.replace('-', "_") == name)
    };
    if built_in.lines().any(is_it) {
        return Ok(Vec::new());
    }
    let dependencies = read("modules.dep")?;
    let found = dependencies.lines().filter_map(|l| l.split_once(':')).find(|(module, _)| is_it(module));
    let (module, needs) = found.ok_or_else(|| LabError::Refused {
        who: folder.display().to_string(),
        why: format!("module {name} is neither there nor built in"),
    })?;
    // depmod lists the direct user first and the deepest dependency last.
    Ok(needs.split_whitespace().rev().chain([module]).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(initrd: &Initrd) -> Vec<u8> {
        let mut bytes = Vec::new();
        initrd.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn bytes_depend_on_content_alone() {
        let dir = tempfile::tempdir().unwrap();
        let host_file = dir.path().join("f");
        std::fs::write(&host_file, "host").unwrap();
        let mut one = Initrd::new();
        one.file("/etc/b", 0o644, "b").directory("/tmp", 0o1777).copy("/x", &host_file).unwrap().symlink("/a", "etc/b");
        std::fs::write(&host_file, "host").unwrap();
        let mut two = Initrd::new();
        two.symlink("/a", "etc/b").copy("/x", &host_file).unwrap().directory("/tmp", 0o1777).file("etc/b", 0o644, "b");
        assert_eq!(written(&one), written(&two));
    }

    #[test]
    fn reads_back_with_parents_first() {
        let mut initrd = Initrd::new();
        initrd
            .file("/usr/sbin/prog", 0o755, "12345")
            .character_device("/dev/console", 0o600, 5, 1)
            .symlink("/init", "usr/sbin/prog");
        let bytes = written(&initrd);
        let mut rest = bytes.as_slice();
        let mut seen = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let device = (reader.entry().rdev_major(), reader.entry().rdev_minor());
            assert_eq!(reader.entry().mtime(), 0);
            let mut body = String::new();
            reader.read_to_string(&mut body).unwrap();
            rest = reader.finish().unwrap();
            seen.push((name, mode, device, body));
        }
        let expected = [
            ("dev", 0o040_755, (0, 0), ""),
            ("dev/console", 0o020_600, (5, 1), ""),
            ("init", 0o120_777, (0, 0), "usr/sbin/prog"),
            ("usr", 0o040_755, (0, 0), ""),
            ("usr/sbin", 0o040_755, (0, 0), ""),
            ("usr/sbin/prog", 0o100_755, (0, 0), "12345"),
        ];
        assert_eq!(seen, expected.map(|(n, m, d, b)| (n.to_owned(), m, d, b.to_owned())));
    }

    #[test]
    fn module_order_is_dependencies_first() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("modules.builtin"), "kernel/drivers/virtio/virtio-pci.ko\n").unwrap();
        let dep = "kernel/failover.ko.xz:\nkernel/net_failover.ko.xz: kernel/failover.ko.xz\n\
                   kernel/virtio_net.ko.xz: kernel/net_failover.ko.xz kernel/failover.ko.xz\n";
        std::fs::write(dir.path().join("modules.dep"), dep).unwrap();
        let order = modules_for(dir.path(), "virtio_net").unwrap();
        assert_eq!(order, ["kernel/failover.ko.xz", "kernel/net_failover.ko.xz", "kernel/virtio_net.ko.xz"]);
        assert!(modules_for(dir.path(), "virtio_pci").unwrap().is_empty());
        assert!(modules_for(dir.path(), "nothing").is_err());
    }
}
