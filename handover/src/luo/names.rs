//! The names that formats have in the kernel for which they are written. A newer tree names the parts too, of the same bytes.

use crate::kho::Unspoken;
use crate::kho::abi::{Expected, one};

/// What we speak of the orchestrator's own format (`LUO_ABI_COMPATIBLE`), oldest first.
pub const LUO: &[&str] = &["luo-v5", "luo-v5;block-v1"];
/// What we speak of memfds in it (`MEMFD_LUO_FH_COMPATIBLE`), oldest first.
pub const MEMFD: &[&str] = &["memfd-v2", "memfd-v2;vmalloc-v1"];

/// The names by which a kernel knows the two formats. It compares them byte by byte: a file of another name it cannot
/// restore, and at another name of the orchestrator's format it *panics*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// One of [`LUO`].
    pub luo: &'static str,
    /// One of [`MEMFD`].
    pub memfd: &'static str,
}

/// The names without parts, of Linux 7.3.
impl Default for Names {
    fn default() -> Names {
        Names { luo: LUO[0], memfd: MEMFD[0] }
    }
}

impl Names {
    /// What to write for a kernel that expects this; nothing for one without orchestrator, or without memfds in it.
    ///
    /// # Errors
    /// It has them in versions that we do not speak: nothing may be written, and what services left in sessions would not arrive.
    pub fn of(expected: &Expected) -> Result<Option<Names>, Unspoken> {
        let luo = one("the Live Update Orchestrator", &expected.luo)?;
        let memfd = one("the Live Update Orchestrator's memfd", &expected.memfd)?;
        let (Some(luo), Some(memfd)) = (luo, memfd) else { return Ok(None) };
        if expected.spoken()?.is_none() {
            return Ok(None);
        }
        let luo = spoken(LUO, luo).ok_or_else(|| unspoken("the Live Update Orchestrator", luo, LUO))?;
        let memfd =
            spoken(MEMFD, memfd).ok_or_else(|| unspoken("the Live Update Orchestrator's memfd", memfd, MEMFD))?;
        Ok(Some(Names { luo, memfd }))
    }
}

/// This name, if it is among those that are spoken.
pub(super) fn spoken(names: &[&'static str], found: &str) -> Option<&'static str> {
    names.iter().copied().find(|name| *name == found)
}

fn unspoken(format: &'static str, found: &str, names: &[&'static str]) -> Unspoken {
    Unspoken::new(format, found, names.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kernel: &[u8]) -> Result<Option<Names>, Unspoken> {
        Names::of(&Expected::of_kernel(kernel))
    }

    #[test]
    fn a_kernel_gets_the_names_that_it_expects_or_none() {
        let of_7_3 = of(b"kho-v4\0luo-v5\0memfd-v2\0").unwrap();
        assert_eq!(of_7_3, Some(Names::default()));
        let newer = of(b"kho-v4;radix-v1;vmalloc-v1\0luo-v5;block-v1\0memfd-v2;vmalloc-v1\0").unwrap();
        assert_eq!(newer, Some(Names { luo: "luo-v5;block-v1", memfd: "memfd-v2;vmalloc-v1" }));
        assert_eq!(of(b"kho-v4\0"), Ok(None));
        assert_eq!(of(b"kho-v4\0luo-v5\0"), Ok(None));
        let parts = |kernel: &[u8]| of(kernel).unwrap_err().parts;
        assert_eq!(parts(b"kho-v4\0luo-v6\0memfd-v2\0"), ["luo-v6"]);
        assert_eq!(parts(b"kho-v4\0luo-v5;block-v2\0memfd-v2\0"), ["block-v2"]);
        assert_eq!(parts(b"kho-v4\0luo-v5\0memfd-v2;vmalloc-v3\0"), ["vmalloc-v3"]);
        assert_eq!(parts(b"kho-v4\0luo-v5\0luo-v6\0memfd-v2\0"), ["luo-v5 and luo-v6"]);
        assert_eq!(parts(b"kho-v9\0luo-v5\0memfd-v2\0"), ["kho-v9"]);
    }
}
