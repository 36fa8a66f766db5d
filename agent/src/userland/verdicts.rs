//! What was found of kernels when they came, kept for whoever asks later (`baton kernels`): a file of ours that outlives programs, so it
//! carries a version, and one that cannot be read costs the verdicts and nothing else.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::machine::rewrite;

/// Where they are kept.
pub const STORE: &str = "/var/lib/baton/kernels.json";
/// Raise when an older program could misread a newer file.
const VERSION: u32 = 1;

/// What refuses a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which check.
    pub check: String,
    /// Why.
    pub cause: String,
    /// The name by which the operator may accept it; nothing where nobody can.
    pub accept: Option<String>,
}

/// What `baton check` said of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The file.
    pub image: PathBuf,
    /// By these it is seen whether it is still the same one: bytes, and the second in which it was changed last (Unix time).
    pub size: u64,
    /// See [`Verdict::size`].
    pub modified_s: i64,
    /// The kernel that ran then: to another one, other words of the command line are handed down.
    pub checked_on: String,
    /// All that refuses it, in the order of the checks. None: the update would be started.
    pub refusals: Vec<Refusal>,
}

#[derive(Serialize, Deserialize)]
struct File {
    schema_version: u32,
    verdicts: Vec<Verdict>,
}

/// Bytes and last change of an image.
pub fn stamp(image: &Path) -> io::Result<(u64, i64)> {
    let found = fs::metadata(image)?;
    Ok((found.len(), found.mtime()))
}

impl Verdict {
    /// Whether it is of this file as it is now, found by the kernel that runs now.
    pub fn holds(&self, image: &Path, running: &str) -> bool {
        self.image == image
            && self.checked_on == running
            && stamp(image).is_ok_and(|stamp| stamp == (self.size, self.modified_s))
    }

    /// For people, in one line.
    pub fn summary(&self) -> String {
        match self.refusals.as_slice() {
            [] => "check accepts it".to_owned(),
            [first, rest @ ..] => {
                let more = if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
                format!("check refuses it: {}: {}{more}", first.check, first.cause)
            }
        }
    }
}

/// Those that are kept. A file of a later version, or a broken one, has none.
pub fn read(store: &Path) -> Vec<Verdict> {
    let parsed = fs::read(store).ok().and_then(|bytes| serde_json::from_slice::<File>(&bytes).ok());
    parsed.filter(|file| file.schema_version == VERSION).map(|file| file.verdicts).unwrap_or_default()
}

/// Keeps these, in the place of older ones of the same images; what is known of images that are gone is forgotten.
pub fn keep(store: &Path, fresh: Vec<Verdict>) -> io::Result<()> {
    let mut verdicts = read(store);
    verdicts.retain(|old| old.image.exists() && fresh.iter().all(|new| new.image != old.image));
    verdicts.extend(fresh);
    verdicts.sort_by(|one, other| one.image.cmp(&other.image));
    rewrite::rewrite(store, &File { schema_version: VERSION, verdicts })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = r#"{"schema_version":1,"verdicts":[{"image":"/boot/vmlinuz-7","size":3,"modified_s":5,"checked_on":"6.12","refusals":[{"check":"mounts","cause":"/ does not cross","accept":null}]}]}"#;

    #[test]
    fn old_bytes_still_read_and_others_are_no_verdicts() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("kernels.json");
        fs::write(&store, GOLDEN).unwrap();
        let verdicts = read(&store);
        assert_eq!(verdicts[0].refusals[0].cause, "/ does not cross");
        assert_eq!(serde_json::to_string(&File { schema_version: 1, verdicts }).unwrap(), GOLDEN);
        for bad in [GOLDEN.replace("\"schema_version\":1", "\"schema_version\":2"), "{".into(), String::new()] {
            fs::write(&store, bad).unwrap();
            assert_eq!(read(&store), []);
        }
        assert_eq!(read(&folder.path().join("none")), []);
    }

    #[test]
    fn a_verdict_is_of_one_file_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("lib/kernels.json");
        let image = |name: &str| folder.path().join(name);
        let verdict = |name: &str, refusals: Vec<Refusal>| {
            fs::write(image(name), name).unwrap();
            let (size, modified_s) = stamp(&image(name)).unwrap();
            Verdict { image: image(name), size, modified_s, checked_on: "6.12".into(), refusals }
        };
        keep(&store, vec![verdict("vmlinuz-b", vec![]), verdict("vmlinuz-a", vec![])]).unwrap();
        let refusal = Refusal { check: "image".into(), cause: "no bzImage".into(), accept: None };
        keep(&store, vec![verdict("vmlinuz-b", vec![refusal.clone(), refusal])]).unwrap();
        let kept = read(&store);
        assert_eq!(
            kept.iter().map(Verdict::summary).collect::<Vec<_>>(),
            ["check accepts it", "check refuses it: image: no bzImage (and 1 more)"]
        );
        assert!(kept[0].holds(&image("vmlinuz-a"), "6.12") && !kept[0].holds(&image("vmlinuz-a"), "7.3"));
        assert!(!kept[0].holds(&image("vmlinuz-b"), "6.12"));
        fs::write(image("vmlinuz-a"), "longer than before").unwrap();
        assert!(!kept[0].holds(&image("vmlinuz-a"), "6.12"), "the file has changed");
        fs::remove_file(image("vmlinuz-b")).unwrap();
        keep(&store, Vec::new()).unwrap();
        assert_eq!(read(&store).len(), 1, "what is gone is forgotten");
    }
}
