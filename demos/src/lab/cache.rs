//! Where the lab keeps what it built, and the rules by which several users share it:
//! - a thing is built beside its place under a name that carries the builder's pid, flushed, and renamed into place: whoever sees it sees
//!   it whole;
//! - one builder at a time, by a file lock that the host's kernel drops when the builder dies;
//! - what a dead builder left is removed by the next one, under that lock.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::error::{Doing, LabError, Result};
use super::progress::Task;

/// `$XDG_CACHE_HOME/baton`, or `~/.cache/baton`.
pub fn root() -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")))
        .ok_or_else(|| {
            LabError::Prerequisite("neither XDG_CACHE_HOME nor HOME is set: the lab has no place for its tree".into())
        })?;
    Ok(base.join("baton"))
}

/// An exclusive lock on a folder's builders, or a shared one of its users. Dropped with the value, and by the kernel with the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the exclusive lock; says so when it has to wait.
    pub fn exclusive(path: &Path, task: &Task) -> Result<Self> {
        let file = Self::open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                task.step("waiting for another set-up to end");
                file.lock().doing(format_args!("locking {}", path.display()))?;
            }
            Err(TryLockError::Error(e)) => return Err(e).doing(format_args!("locking {}", path.display())),
        }
        Ok(Self { _file: file })
    }

    /// The exclusive lock, or `None` when somebody holds it in any way.
    pub fn try_exclusive(path: &Path) -> Result<Option<Self>> {
        let file = Self::open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e).doing(format_args!("locking {}", path.display())),
        }
    }

    /// The shared lock of a user; waits while somebody removes what it protects.
    pub fn shared(path: &Path) -> Result<Self> {
        let file = Self::open(path)?;
        file.lock_shared().doing(format_args!("locking {}", path.display()))?;
        Ok(Self { _file: file })
    }

    fn open(path: &Path) -> Result<File> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).doing(format_args!("creating {}", parent.display()))?;
        }
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(path)
            .doing(format_args!("opening {}", path.display()))
    }
}

/// A folder under construction beside its final place; removed unless published.
#[derive(Debug)]
pub struct Construction {
    scratch: PathBuf,
    place: PathBuf,
    published: bool,
}

const MARK: &str = ".building-";

impl Construction {
    /// Begins to build `place`. The caller holds the builders' lock, so other scratch folders of the same parent belong to the dead.
    pub fn begin(place: &Path) -> Result<Self> {
        let parent = place.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).doing(format_args!("creating {}", parent.display()))?;
        for entry in fs::read_dir(parent).doing(format_args!("listing {}", parent.display()))? {
            let entry = entry.doing(format_args!("listing {}", parent.display()))?;
            if entry.file_name().to_string_lossy().contains(MARK) {
                fs::remove_dir_all(entry.path())
                    .doing(format_args!("removing {}, left by an interrupted build", entry.path().display()))?;
            }
        }
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let scratch = parent.join(format!("{name}{MARK}{}", std::process::id()));
        fs::create_dir(&scratch).doing(format_args!("creating {}", scratch.display()))?;
        Ok(Self { scratch, place: place.to_owned(), published: false })
    }

    /// Where to build.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.scratch
    }

    /// Flushes the folder to disk and renames it into place; an older one there makes way.
    pub fn publish(mut self) -> Result<()> {
        let folder = File::open(&self.scratch).doing(format_args!("opening {}", self.scratch.display()))?;
        nix::unistd::syncfs(&folder).doing(format_args!("flushing {}", self.scratch.display()))?;
        if self.place.exists() {
            let old = self.place.with_file_name(format!("old{MARK}{}", std::process::id()));
            fs::rename(&self.place, &old).doing(format_args!("moving {} away", self.place.display()))?;
            fs::remove_dir_all(&old).doing(format_args!("removing {}", old.display()))?;
        }
        fs::rename(&self.scratch, &self.place).doing(format_args!(
            "renaming {} to {}",
            self.scratch.display(),
            self.place.display()
        ))?;
        self.published = true;
        if let Some(parent) = self.place.parent() {
            File::open(parent).and_then(|d| d.sync_all()).doing(format_args!("flushing {}", parent.display()))?;
        }
        Ok(())
    }
}

impl Drop for Construction {
    fn drop(&mut self) {
        if !self.published {
            // A failure here leaves what the next builder removes.
            let _ = fs::remove_dir_all(&self.scratch);
        }
    }
}

/// Points `link` at `target` in one step: whoever follows it finds the old or the new.
pub fn replace_symlink(link: &Path, target: &Path) -> Result<()> {
    let fresh = link.with_file_name(format!("link{MARK}{}", std::process::id()));
    let _ = fs::remove_file(&fresh);
    std::os::unix::fs::symlink(target, &fresh).doing(format_args!("linking {}", fresh.display()))?;
    fs::rename(&fresh, link).doing(format_args!("linking {}", link.display()))
}

/// FNV-1a over parts, each ended by its length so that `["ab","c"]` differs from `["a","bc"]`. Names cache entries: stable across releases
/// of Rust, no protection against somebody who wants a collision in their own cache.
#[derive(Clone, Copy, Debug)]
pub struct Key(u64);

impl Default for Key {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Key {
    /// Adds one part.
    #[must_use]
    pub fn with(mut self, part: &[u8]) -> Self {
        for byte in part.iter().chain(&(part.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self
    }

    /// Sixteen hexadecimal digits.
    #[must_use]
    pub fn name(self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_tells_where_parts_end() {
        let key = |parts: &[&str]| parts.iter().fold(Key::default(), |k, p| k.with(p.as_bytes())).name();
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
        assert_eq!(key(&[]).len(), 16);
    }

    #[test]
    fn unpublished_construction_leaves_nothing_and_published_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("thing");
        let leftover = dir.path().join("thing.building-1");
        fs::create_dir(&leftover).unwrap();
        drop(Construction::begin(&place).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the dead builder's and our scratch are gone");

        for content in ["first", "second"] {
            let c = Construction::begin(&place).unwrap();
            fs::write(c.path().join("f"), content).unwrap();
            c.publish().unwrap();
            assert_eq!(fs::read_to_string(place.join("f")).unwrap(), content);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn shared_users_keep_the_exclusive_one_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let users = (Lock::shared(&path).unwrap(), Lock::shared(&path).unwrap());
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(users);
        assert!(Lock::try_exclusive(&path).unwrap().is_some());
    }
}
