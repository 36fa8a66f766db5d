//! Which module files a name means, in which order they are loaded, and with which options: what `modprobe` would do, decided when the
//! initrd is made, because `baton-init` only loads files.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kexec_core::compression::Compression;

use crate::machine::regular;

/// Where modprobe.d(5) looks; a file hides those of its name in later folders.
const MODPROBE_D: [&str; 4] =
    ["/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d", "/usr/lib/modprobe.d"];
/// No module is larger, unpacked.
const MAX_MODULE: u64 = 256 << 20;
/// No configuration file or index is larger.
const MAX_TEXT: u64 = 64 << 20;
/// What a signed module ends with (`MODULE_SIG_STRING`).
const SIGNATURE: &[u8] = b"~Module signature appended~\n";

/// A module's name out of its file's.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// What depmod(8) wrote of one kernel's modules.
#[derive(Debug, Default)]
pub struct Index {
    /// Name to file, and the names of files to be loaded before, farthest first.
    files: BTreeMap<String, (String, Vec<String>)>,
    /// Built into the kernel: always there.
    builtin: BTreeSet<String>,
}

impl Index {
    /// Reads `modules.dep` (`file: dependency dependency`, nearest first) and `modules.builtin`.
    pub fn parse(dependencies: &str, builtin: &str) -> Index {
        let files = dependencies.lines().filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            let needs = needs.split_whitespace().rev().map(str::to_owned).collect();
            Some((name_of(file), (file.to_owned(), needs)))
        });
        Index { files: files.collect(), builtin: builtin.lines().map(name_of).collect() }
    }

    /// Of an installed kernel.
    pub fn read(root: &Path, release: &str) -> Result<Index> {
        let text = |name: &str| {
            regular::read(&root.join(name), MAX_TEXT).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        let dependencies = text("modules.dep")
            .with_context(|| format!("{} has no modules.dep; run `depmod {release}`", root.display()))?;
        Ok(Index::parse(&dependencies, &text("modules.builtin").unwrap_or_default()))
    }

    /// The files to load for these modules, in order, each once. What is built in needs none.
    pub fn files_for(&self, names: &[String], modprobe: &Modprobe, release: &str) -> Result<Vec<String>> {
        let mut ordered = Vec::new();
        let mut begun = BTreeSet::new();
        for name in names {
            if let Some(command) = modprobe.installs.get(&name.replace('-', "_")) {
                bail!(
                    "modprobe.d has `install {name} {command}`: Baton runs no such command; take {name} out of initrd.modules, or the line away"
                );
            }
            if !self.add(name, modprobe, &mut begun, &mut ordered) {
                bail!("kernel {release} has no module `{name}`");
            }
        }
        Ok(ordered)
    }

    /// `false`: there is no such module.
    fn add(&self, name: &str, modprobe: &Modprobe, begun: &mut BTreeSet<String>, ordered: &mut Vec<String>) -> bool {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || begun.contains(&name) {
            return true;
        }
        let Some((file, needs)) = self.files.get(&name) else { return false };
        begun.insert(name.clone());
        let soft = modprobe.soft.get(&name);
        // A soft dependency (modprobe.d(5)) that is not installed is left out, as modprobe does.
        for before in soft.iter().flat_map(|soft| &soft.before) {
            self.add(before, modprobe, begun, ordered);
        }
        for need in needs {
            self.add(&name_of(need), modprobe, begun, ordered);
        }
        ordered.push(file.clone());
        for after in soft.iter().flat_map(|soft| &soft.after) {
            self.add(after, modprobe, begun, ordered);
        }
        true
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Soft {
    before: Vec<String>,
    after: Vec<String>,
}

/// What modprobe.d(5) says, but for aliases and blacklists, which are for names that nobody wrote.
#[derive(Debug, Default)]
pub struct Modprobe {
    options: BTreeMap<String, String>,
    soft: BTreeMap<String, Soft>,
    installs: BTreeMap<String, String>,
}

impl Modprobe {
    /// Of this machine.
    pub fn read() -> Modprobe {
        let mut files: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
        for folder in MODPROBE_D {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().extension().is_some_and(|ending| ending == "conf") {
                    files.entry(entry.file_name()).or_insert_with(|| entry.path());
                }
            }
        }
        let mut modprobe = Modprobe::default();
        for path in files.values() {
            if let Ok(bytes) = regular::read(path, MAX_TEXT) {
                modprobe.add(&String::from_utf8_lossy(&bytes));
            }
        }
        modprobe
    }

    fn add(&mut self, text: &str) {
        // A backslash at its end joins a line with the next.
        for line in text.replace("\\\n", " ").lines().map(str::trim) {
            let mut words = line.splitn(3, char::is_whitespace);
            let (Some(command), Some(name)) = (words.next(), words.next()) else { continue };
            let (name, rest) = (name.replace('-', "_"), words.next().unwrap_or_default().trim().to_owned());
            match command {
                "options" => {
                    let options = self.options.entry(name).or_default();
                    *options = format!("{options} {rest}").trim().to_owned();
                }
                "install" => drop(self.installs.insert(name, rest)),
                "softdep" => {
                    let soft = self.soft.entry(name).or_default();
                    let mut before = true;
                    for word in rest.split_whitespace() {
                        match word {
                            "pre:" => before = true,
                            "post:" => before = false,
                            word if before => soft.before.push(word.to_owned()),
                            word => soft.after.push(word.to_owned()),
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// The options of a module.
    pub fn options(&self, name: &str) -> &str {
        self.options.get(name).map_or("", String::as_str)
    }
}

/// A module's content, unpacked where it was compressed: not every kernel can do that, and none can for gzip, xz and zstd alike.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let unreadable = || format!("cannot read module {}", path.display());
    let bytes = regular::read(path, MAX_MODULE).with_context(unreadable)?;
    let Some(compression) = Compression::of(&bytes) else { return Ok(bytes) };
    let mut rest = bytes.as_slice();
    let stream = compression.unpack(&mut rest).with_context(unreadable)?;
    let stream = stream.with_context(|| format!("{} is compressed with {}", path.display(), compression.name()))?;
    let mut unpacked = Vec::new();
    stream.take(MAX_MODULE + 1).read_to_end(&mut unpacked).with_context(unreadable)?;
    if unpacked.len() as u64 > MAX_MODULE {
        bail!("{} unpacks to more than {} MiB", path.display(), MAX_MODULE >> 20);
    }
    Ok(unpacked)
}

/// The kernel that a module was built for: the first word of its `vermagic`.
pub fn built_for(module: &[u8]) -> Option<String> {
    const KEY: &[u8] = b"\0vermagic=";
    let at = module.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let word = module[at..].split(|&byte| byte == 0 || byte == b' ').next()?;
    Some(String::from_utf8_lossy(word).into_owned())
}

/// Whether a module carries a signature. Whether the successor trusts its key, only the successor knows.
pub fn is_signed(module: &[u8]) -> bool {
    module.ends_with(SIGNATURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/net/core/failover.ko.xz:\n\
        kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz\n\
        kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz\n\
        kernel/lib/crc.ko:\n\
        kernel/drivers/char/hw_random/virtio-rng.ko.xz:\n";

    fn files(names: &[&str], modprobe: &str) -> Result<Vec<String>> {
        let mut read = Modprobe::default();
        read.add(modprobe);
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let index = Index::parse(DEPENDENCIES, "kernel/fs/ext4/ext4.ko\n");
        let files = index.files_for(&names, &read, "6.1")?;
        Ok(files.iter().map(|file| name_of(file)).collect())
    }

    #[test]
    fn dependencies_come_first_and_each_once() {
        let all = files(&["virtio_net", "net_failover", "virtio-rng"], "").unwrap();
        assert_eq!(all, ["failover", "net_failover", "virtio_net", "virtio_rng"]);
    }

    #[test]
    fn what_is_built_in_is_there() {
        assert_eq!(files(&["ext4", "virtio_rng"], "").unwrap(), ["virtio_rng"]);
        assert_eq!(files(&["virtio"], "").unwrap_err().to_string(), "kernel 6.1 has no module `virtio`");
    }

    #[test]
    fn soft_dependencies_and_options_are_kept() {
        let conf = "# x\nsoftdep virtio-rng pre: crc absent \\\n post: failover virtio_rng\noptions virtio_rng a=1\noptions virtio-rng b=\"2 3\"\nblacklist crc\n";
        assert_eq!(files(&["virtio_rng"], conf).unwrap(), ["crc", "virtio_rng", "failover"]);
        let mut modprobe = Modprobe::default();
        modprobe.add(conf);
        assert_eq!((modprobe.options("virtio_rng"), modprobe.options("crc")), ("a=1 b=\"2 3\"", ""));
        let install = files(&["crc"], "install crc /bin/false\n").unwrap_err().to_string();
        assert!(install.contains("`install crc /bin/false`"), "{install}");
    }

    #[test]
    fn a_module_says_what_it_was_built_for() {
        assert_eq!(built_for(b"\x7fELF\0name=baton\0vermagic=6.12.1-x SMP preempt \0").as_deref(), Some("6.12.1-x"));
        assert_eq!(built_for(b"no module"), None);
        assert!(is_signed(b"...~Module signature appended~\n") && !is_signed(b"..."));
    }

    #[test]
    fn a_compressed_module_is_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.ko.xz");
        std::fs::write(&path, include_bytes!("../../../kexec-core/tests/data/hello.xz")).unwrap();
        assert_eq!(read(&path).unwrap().len(), 28_000);
        std::fs::write(&path, b"\xfd7zXZ\0 damaged").unwrap();
        assert!(read(&path).is_err());
    }
}
