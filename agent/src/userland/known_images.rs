//! What was found in kernel images, remembered: to look into one, 60 MB are unpacked, which takes seconds where the machine is emulated, and
//! `baton check`, `baton handover check` and `baton upgrade` ask the same of the same image.
//!
//! An image is known by the SHA-256 of its compressed kernel: the build id is inside, and would cost what is to be saved; and a name can be
//! given to another file. What cannot be read, or is of another version, is forgotten: the image knows better.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kexec_core::image::{BzImage, KernelFacts, PayloadError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::machine::rewrite::rewrite;

/// Where it is remembered. Root's alone: it is trusted as the image would be.
pub const PATH: &str = "/var/cache/baton/images.json";
/// Grows when kernels are asked something else, or are judged otherwise.
const VERSION: u32 = 2;
/// Images remembered at most; then all are forgotten.
const MOST: usize = 64;
/// Largest file that is read.
const MAX_FILE: u64 = 64 << 10;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    version: u32,
    images: BTreeMap<String, KernelFacts>,
}

/// Looks into an image, unless that was done before.
pub fn facts(image: &BzImage<'_>) -> Result<KernelFacts, PayloadError> {
    facts_by(Path::new(PATH), image.payload(), || KernelFacts::of(image))
}

fn facts_by(
    path: &Path,
    payload: &[u8],
    look: impl FnOnce() -> Result<KernelFacts, PayloadError>,
) -> Result<KernelFacts, PayloadError> {
    let key: String = Sha256::digest(payload).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut known = read(path).unwrap_or(Known { version: VERSION, images: BTreeMap::new() });
    if let Some(facts) = known.images.get(&key) {
        return Ok(facts.clone());
    }
    let facts = look()?;
    if known.images.len() >= MOST {
        known.images.clear();
    }
    known.images.insert(key, facts.clone());
    // Two at a time: the last one's images are known, the other's will be asked again.
    if let Err(error) = rewrite(path, &known) {
        tracing::debug!("{} is not written: {error}", path.display());
    }
    Ok(facts)
}

fn read(path: &Path) -> Option<Known> {
    if fs::metadata(path).ok()?.len() > MAX_FILE {
        return None;
    }
    let known: Known = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (known.version == VERSION).then_some(known)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn found() -> KernelFacts {
        KernelFacts {
            mailbox_reset_vector: true,
            kho: Some("kho-v4".into()),
            luo: Some("luo-v5".into()),
            memfd: Some("memfd-v2".into()),
        }
    }

    #[test]
    fn an_image_is_looked_into_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep").join("images.json");
        let looks = Cell::new(0);
        let ask = |payload: &[u8]| {
            facts_by(&path, payload, || {
                looks.set(looks.get() + 1);
                Ok(found())
            })
        };
        assert_eq!((ask(b"one"), ask(b"one"), looks.get()), (Ok(found()), Ok(found()), 1));
        assert_eq!((ask(b"onf"), looks.get()), (Ok(found()), 2), "one bit makes it another image");
        for spoilt in ["", "{", r#"{"version":2,"images":{}}"#, &" ".repeat(MAX_FILE as usize + 1)] {
            fs::write(&path, spoilt).unwrap();
            let before = looks.get();
            assert_eq!((ask(b"one"), looks.get()), (Ok(found()), before + 1), "{spoilt:.20}");
        }
        for n in 0..2 * MOST {
            ask(&n.to_le_bytes()).unwrap();
        }
        assert!((1..=MOST).contains(&read(&path).unwrap().images.len()));
    }

    #[test]
    fn what_could_not_be_found_out_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images.json");
        let damaged = PayloadError::TooLarge { max: 1 };
        assert_eq!(facts_by(&path, b"one", || Err(damaged.clone())), Err(damaged));
        assert_eq!(facts_by(&path, b"one", || Ok(found())), Ok(found()));
    }

    /// Another release must read what this one writes.
    #[test]
    fn it_is_written_as_ever() {
        let images = BTreeMap::from([("ab".to_owned(), found())]);
        assert_eq!(
            serde_json::to_string(&Known { version: VERSION, images }).unwrap(),
            r#"{"version":2,"images":{"ab":{"mailbox_reset_vector":true,"kho":"kho-v4","luo":"luo-v5","memfd":"memfd-v2"}}}"#
        );
    }
}
