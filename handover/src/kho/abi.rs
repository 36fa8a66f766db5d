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

/// Strings of `prefix` and a number, ended by a zero.
fn versions(bytes: &[u8], prefix: &str) -> BTreeSet<String> {
    const DIGITS: usize = 4;
    memmem::find_iter(bytes, prefix)
        .filter_map(|at| {
            let number = &bytes[at + prefix.len()..];
            let len = number.iter().take(DIGITS + 1).position(|byte| !byte.is_ascii_digit())?;
            let ends = len > 0 && number[len] == 0;
            ends.then(|| format!("{prefix}{}", String::from_utf8_lossy(&number[..len])))
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
        assert_eq!(Expected::of_kernel(b"kho-v4\0kho-v5\0").abi(), None);
        assert_eq!(Expected::of_kernel(b"a kernel without it").abi(), None);
    }

    #[test]
    fn every_spoken_version_has_one_name() {
        for abi in SPOKEN {
            assert_eq!(Abi::from_compatible(abi.compatible()), Some(*abi));
        }
        assert_eq!(Abi::from_compatible("kho-v3"), None);
    }
}
