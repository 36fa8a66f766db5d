//! Which versions of the formats there are, and which of them a kernel expects.
//!
//! The names come from the kernels' *defines*. The comments beside them lag behind: Linux 7.3's says "kho-v3" above the
//! define that says "kho-v4" (`include/linux/kho/abi/kexec_handover.h`).

use std::collections::BTreeSet;

use memchr::memmem;
use thiserror::Error;

/// A version of KHO that we speak.
///
/// Newer trees name the parts of which a format is made, behind its own name and separated by semicolons, so that each part has a version
/// of its own. A kernel compares the whole name, so what is written for it has to bear exactly the name that it expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Abi {
    /// "kho-v4": one radix tree whose keys hold page and order; blobs with their size.
    V4,
    /// "kho-v4;radix-v1": the same bytes.
    V4Radix,
    /// "kho-v4;radix-v1;vmalloc-v1": the same bytes.
    V4RadixVmalloc,
}

/// Every version that we speak, oldest first. One with another form is a module beside [`super::v4`] and a line here.
pub const SPOKEN: &[Abi] = &[Abi::V4, Abi::V4Radix, Abi::V4RadixVmalloc];

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
            Abi::V4Radix => "kho-v4;radix-v1",
            Abi::V4RadixVmalloc => "kho-v4;radix-v1;vmalloc-v1",
        }
    }

    /// Which version this string names, if we speak it.
    pub fn from_compatible(compatible: &str) -> Option<Abi> {
        SPOKEN.iter().copied().find(|abi| abi.compatible() == compatible)
    }

    /// Which version this string names.
    ///
    /// # Errors
    /// We do not speak it: which part of it is the reason.
    pub fn named(compatible: &str) -> Result<Abi, Unspoken> {
        let spoken = SPOKEN.iter().map(|abi| abi.compatible());
        Abi::from_compatible(compatible).ok_or_else(|| Unspoken::new("kexec handover", compatible, spoken))
    }
}

/// A kernel expects a format in a version that this Baton does not speak: nothing of that format can be handed to it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{format} is expected as {found}: {} is not spoken; this baton speaks {spoken}", parts.join(", "))]
pub struct Unspoken {
    /// Of what.
    pub format: &'static str,
    /// The whole name.
    pub found: String,
    /// The parts of the name that are not spoken; the whole name if each part is, and not in this combination.
    pub parts: Vec<String>,
    /// The names that are.
    pub spoken: String,
}

impl Unspoken {
    pub(crate) fn new<'a>(
        format: &'static str,
        found: &str,
        spoken: impl Iterator<Item = &'a str> + Clone,
    ) -> Unspoken {
        let known: BTreeSet<&str> = spoken.clone().flat_map(|name| name.split(';')).collect();
        let mut parts: Vec<String> = found.split(';').filter(|part| !known.contains(part)).map(String::from).collect();
        if parts.is_empty() {
            parts.push(found.to_owned());
        }
        Unspoken { format, found: found.to_owned(), parts, spoken: spoken.collect::<Vec<_>>().join(", ") }
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

    /// The version to write for this kernel; nothing if it has no KHO.
    ///
    /// # Errors
    /// It has one that we do not speak, or names several and does not say which counts.
    pub fn spoken(&self) -> Result<Option<Abi>, Unspoken> {
        one("kexec handover", &self.kho)?.map(Abi::named).transpose()
    }

    /// The same, where it does not matter why there is none.
    pub fn abi(&self) -> Option<Abi> {
        self.spoken().ok().flatten()
    }
}

/// The one name of a format; nothing if there is none.
pub(crate) fn one<'a>(format: &'static str, names: &'a BTreeSet<String>) -> Result<Option<&'a str>, Unspoken> {
    if names.len() > 1 {
        let all = names.iter().map(String::as_str).collect::<Vec<_>>().join(" and ");
        return Err(Unspoken { format, found: all.clone(), parts: vec![all], spoken: "one version at a time".into() });
    }
    Ok(names.first().map(String::as_str))
}

/// Strings of `prefix` and a number, ended by a zero. Between number and zero may be the names of parts, behind a semicolon, or other words
/// behind a dash (patches that were never released had "luo-v4-block-v1"): such a name must not pass for that of a kernel without the
/// format.
fn versions(bytes: &[u8], prefix: &str) -> BTreeSet<String> {
    /// The longest name that a field of the format holds (`LIVEUPDATE_HNDL_COMPAT_LENGTH`), and more than the names of today.
    const LONGEST: usize = 48;
    memmem::find_iter(bytes, prefix)
        .filter_map(|at| {
            let rest = &bytes[at + prefix.len()..];
            let name = &rest[..rest.iter().take(LONGEST).position(|byte| *byte == 0)?];
            let number = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let tail = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._;".contains(byte);
            let good = number > 0 && number <= 4 && (number == name.len() || b"-;".contains(&name[number]));
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
    fn a_name_of_parts_is_spoken_or_says_which_part_is_not() {
        let of = |image: &[u8]| Expected::of_kernel(image).spoken();
        assert_eq!(of(b"..\0kho-v4;radix-v1;vmalloc-v1\0.."), Ok(Some(Abi::V4RadixVmalloc)));
        assert_eq!(of(b"kho-v4;radix-v1\0"), Ok(Some(Abi::V4Radix)));
        assert_eq!(of(b"no such format"), Ok(None));
        let parts = |image: &[u8]| of(image).unwrap_err().parts;
        assert_eq!(parts(b"kho-v4;radix-v2;vmalloc-v1\0"), ["radix-v2"]);
        assert_eq!(parts(b"kho-v5;block-v9;radix-v1\0"), ["kho-v5", "block-v9"]);
        assert_eq!(parts(b"kho-v4;vmalloc-v1\0"), ["kho-v4;vmalloc-v1"]);
        assert_eq!(parts(b"kho-v4\0kho-v5\0"), ["kho-v4 and kho-v5"]);
        assert_eq!(
            of(b"kho-v4;radix-v2\0").unwrap_err().to_string(),
            "kexec handover is expected as kho-v4;radix-v2: radix-v2 is not spoken; this baton speaks kho-v4, kho-v4;radix-v1, \
             kho-v4;radix-v1;vmalloc-v1"
        );
    }

    #[test]
    fn every_spoken_version_has_one_name() {
        for abi in SPOKEN {
            assert_eq!(Abi::from_compatible(abi.compatible()), Some(*abi));
            let base = abi.compatible().split(';').next();
            assert!(KNOWN.iter().any(|(name, _)| Some(*name) == base));
        }
        assert_eq!(Abi::from_compatible("kho-v3"), None);
    }
}
