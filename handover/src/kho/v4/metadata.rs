//! The blob `kexec-metadata`: which kernel was here before, and how many (`include/linux/kho/abi/kexec_metadata.h`).

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::kho::error::ReadError;

/// `KHO_METADATA_NODE_NAME`
pub const NAME: &str = "kexec-metadata";
/// `KHO_KEXEC_METADATA_VERSION`
pub const VERSION: u32 = 1;

/// `struct kho_kexec_metadata`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    version: U32,
    previous_release: [u8; 65],
    kexec_count: U32,
}

const _: () = assert!(size_of::<Raw>() == 73);

/// What a kernel is told of its predecessor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Its release, as in `uname -r`.
    pub previous_release: String,
    /// How many times a kernel has followed another since the machine was switched on.
    pub kexec_count: u32,
}

impl Metadata {
    /// As the kernel reads it. A longer release is cut, as `strscpy` does.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut previous_release = [0; 65];
        let name = self.previous_release.as_bytes();
        let len = name.len().min(64);
        previous_release[..len].copy_from_slice(&name[..len]);
        Raw { version: VERSION.into(), previous_release, kexec_count: self.kexec_count.into() }.as_bytes().to_vec()
    }

    /// From a blob; longer ones are allowed, as the kernel allows them.
    ///
    /// # Errors
    /// Too short, another version, or no text.
    pub fn from_bytes(blob: &[u8]) -> Result<Metadata, ReadError> {
        let (raw, _) = Raw::ref_from_prefix(blob).map_err(|_| ReadError::Mismatch {
            what: "bytes of kexec-metadata",
            found: blob.len() as u64,
            stated: size_of::<Raw>() as u64,
        })?;
        if raw.version.get() != VERSION {
            return Err(ReadError::Value { what: "version of kexec-metadata", value: raw.version.get().into() });
        }
        let previous_release = super::text("previous release in kexec-metadata", &raw.previous_release)?;
        Ok(Metadata { previous_release, kexec_count: raw.kexec_count.get() })
    }
}
