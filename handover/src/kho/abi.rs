//! Which versions of the formats there are, and which of them a kernel expects.
//!
//! The names come from the kernels' *defines*. The comments beside them lag behind: Linux 7.3's says "kho-v3" above the
//! define that says "kho-v4" (`include/linux/kho/abi/kexec_handover.h`).

use std::collections::BTreeSet;

use memchr::memmem;

/// A version of KHO that we speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Abi {
    /// "kho-v4": one radix tree whose keys hold page and order; blobs with their size.
    V4,
}

/// Every version that we speak, oldest first. The next one is a module beside [`super::v4`] and a line here.
pub const SPOKEN: &[Abi] = &[Abi::V4];

/// Every version that is known to exist, oldest first, and what sets it apart. What upstream says of none of them is
/// how long it will be read.
pub const KNOWN: &[(&str, &str)] = &[
    (
        "kho-v1",
        "the first, of Linux 6.16: pages in chunks of bitmaps, blobs are device trees named by the property fdt",
    ),
    ("kho-v2", "the tree of preserved pages; blobs of any kind, by the property preserved-data"),
    ("kho-v3", "blobs have a size, by the property blob-size"),
    ("kho-v4", "Linux 7.2 and 7.3: lists of LUO are blocks"),
];

impl Abi {
    /// The `compatible` string of the root node.
    pub const fn compatible(self) -> &'static str {
        match self {
            Abi::V4 => super::v4::COMPATIBLE,
        }
    }

    /// Which version this string names, if we speak it.
    pub fn from_compatible(compatible: &str) -> Option<Abi> {
        SPOKEN.iter().copied().find(|abi| abi.compatible() == compatible)
    }
}

/// What a kernel image says about the formats that it expects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// "kho-v…"
    pub kho: BTreeSet<String>,
    /// "luo-v…"
    pub luo: BTreeSet<String>,
    /// "memfd-v…"
    pub memfd: BTreeSet<String>,
}

impl Expected {
    /// Looks into a kernel that has been decompressed. A kernel compares `compatible` with a string constant, so that
    /// its image holds the string, ended by a zero.
    pub fn of_kernel(vmlinux: &[u8]) -> Expected {
        Expected {
            kho: versions(vmlinux, "kho-v"),
            luo: versions(vmlinux, "luo-v"),
            memfd: versions(vmlinux, "memfd-v"),
        }
    }

    /// The version to write for this kernel. `None`: it has no KHO, or only one that we do not speak, or names several
    /// and does not say which counts.
    pub fn abi(&self) -> Option<Abi> {
        match self.kho.iter().map(|name| Abi::from_compatible(name)).collect::<Vec<_>>()[..] {
            [only] => only,
            _ => None,
        }
    }
}

/// Strings of `prefix` and a number, ended by a zero. Between number and zero may be more, behind a dash: patches that
/// were never released had "luo-v4-block-v1", and such a name must not pass for that of a kernel without the format.
fn versions(bytes: &[u8], prefix: &str) -> BTreeSet<String> {
    const LONGEST: usize = 32;
    memmem::find_iter(bytes, prefix)
        .filter_map(|at| {
            let rest = &bytes[at + prefix.len()..];
            let name = &rest[..rest.iter().take(LONGEST).position(|byte| *byte == 0)?];
            let number = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let tail = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
            let good = number > 0 && number <= 4 && (number == name.len() || name[number] == b'-');
            (good && name.iter().all(tail)).then(|| format!("{prefix}{}", String::from_utf8_lossy(name)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_names_what_it_expects() {
        let image = b"\x7fELF kho-v4\0 kho-vmalloc kho-v4x\0 kho-v\0 luo-v5\0memfd-v2\0 kho-v12345\0 kho-v4";
        let expected = Expected::of_kernel(image);
        assert_eq!(expected.kho, BTreeSet::from(["kho-v4".to_owned()]));
        assert_eq!(expected.luo, BTreeSet::from(["luo-v5".to_owned()]));
        assert_eq!(expected.memfd, BTreeSet::from(["memfd-v2".to_owned()]));
        assert_eq!(expected.abi(), Some(Abi::V4));
        assert_eq!(Expected::of_kernel(b"kho-v5\0").abi(), None);
        assert_eq!(Expected::of_kernel(b"kho-v4-block-v1\0").kho, BTreeSet::from(["kho-v4-block-v1".to_owned()]));
        assert_eq!(Expected::of_kernel(b"kho-v4\0kho-v5\0").abi(), None);
        assert_eq!(Expected::of_kernel(b"a kernel without it").abi(), None);
    }

    #[test]
    fn every_spoken_version_has_one_name() {
        for abi in SPOKEN {
            assert_eq!(Abi::from_compatible(abi.compatible()), Some(*abi));
            assert!(KNOWN.iter().any(|(name, _)| *name == abi.compatible()));
        }
        assert_eq!(Abi::from_compatible("kho-v3"), None);
    }
}
