//! A package as a folder: what will lie on the machine, and `DEBIAN` with what dpkg must know of it (deb(5), deb-control(5)).

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::{Compression, GzBuilder};
use tempfile::TempDir;

use crate::lab::error::{Doing, Result};
use crate::lab::host;

/// A package that is being laid out.
#[derive(Debug)]
pub struct Tree {
    folder: TempDir,
    file_name: String,
    control: String,
    conffiles: Vec<String>,
    /// Paths of all files, without the leading slash.
    files: BTreeSet<String>,
}

impl Tree {
    /// An empty one.
    pub fn new(name: &str, version: &str, architecture: &str) -> Result<Self> {
        let folder = tempfile::tempdir().doing("making a folder for a package")?;
        // Folders of temporary files are their owner's; the root of a package is not.
        set_mode(folder.path(), 0o755)?;
        let file_name = format!("{name}_{version}_{architecture}.deb");
        let (control, conffiles, files) = (String::new(), Vec::new(), BTreeSet::new());
        Ok(Self { folder, file_name, control, conffiles, files })
    }

    /// The fields of its control file, but for the size; each with its line's end.
    pub fn control(&mut self, fields: &str) {
        fields.clone_into(&mut self.control);
    }

    fn place(&self, path: &str) -> Result<PathBuf> {
        let mut folder = self.folder.path().to_owned();
        let relative = Path::new(path.trim_start_matches('/'));
        for part in relative.parent().into_iter().flatten() {
            folder.push(part);
            if !folder.is_dir() {
                fs::create_dir(&folder).doing(format_args!("creating {}", folder.display()))?;
                set_mode(&folder, 0o755)?;
            }
        }
        Ok(self.folder.path().join(relative))
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.write(path, mode, content)?;
        self.files.insert(path.trim_start_matches('/').to_owned());
        Ok(())
    }

    /// Adds a file that the machine's owner may change.
    pub fn conffile(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.conffiles.push(path.to_owned());
        self.file(path, mode, content)
    }

    /// Adds a compressed file, which holds neither time nor name (`gzip -9n`).
    pub fn gzip(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let mut packer = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
        let packed = packer.write_all(content).and_then(|()| packer.finish());
        self.file(path, 0o644, &packed.doing(format_args!("compressing {path}"))?)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let place = self.place(path)?;
        symlink(target, &place).doing(format_args!("linking {}", place.display()))
    }

    /// Adds a script of dpkg's (`postinst` …).
    pub fn script(&mut self, name: &str, content: &str) -> Result<()> {
        self.write(&format!("/DEBIAN/{name}"), 0o755, content.as_bytes())
    }

    fn write(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let place = self.place(path)?;
        fs::write(&place, content).doing(format_args!("writing {}", place.display()))?;
        set_mode(&place, mode)
    }

    /// Packs it into a folder; all of it belongs to root, and nothing is younger than `unix` (seconds).
    pub fn pack(self, output: &Path, unix: u64) -> Result<PathBuf> {
        let mut bytes = 0;
        for path in &self.files {
            let place = self.folder.path().join(path);
            bytes += fs::symlink_metadata(&place).doing(format_args!("looking at {}", place.display()))?.size();
        }
        let size = bytes.div_ceil(1024);
        self.write("/DEBIAN/control", 0o644, format!("{}Installed-Size: {size}\n", self.control).as_bytes())?;
        if !self.conffiles.is_empty() {
            self.write("/DEBIAN/conffiles", 0o644, (self.conffiles.join("\n") + "\n").as_bytes())?;
        }
        let mut md5sum = Command::new("md5sum");
        let sums = host::run("md5sum", md5sum.current_dir(self.folder.path()).arg("--").args(&self.files))?;
        self.write("/DEBIAN/md5sums", 0o644, &sums.stdout)?;
        let to = output.join(&self.file_name);
        let mut pack = Command::new("dpkg-deb");
        pack.env("SOURCE_DATE_EPOCH", unix.to_string()).args(["--root-owner-group", "-Zxz", "--build"]);
        host::run("dpkg-deb", pack.arg(self.folder.path()).arg(&to))?;
        Ok(to)
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .doing(format_args!("setting the permissions of {}", path.display()))
}
