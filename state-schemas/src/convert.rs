//! From any version's bytes to the newest type, and back to a version that the other side reads.
//!
//! There is one version of each kind so far, so that nothing is converted yet; the functions stand where a conversion
//! will. To add version N+1 of a kind:
//!
//! 1. Copy the subject's file to `vN+1/`, change it, say in its first line why; `vN/` is not touched.
//! 2. Point `latest.rs` at it.
//! 3. Write `N -> N+1` (what is new gets a value that says "unknown") and `N+1 -> N` (what cannot be said is refused)
//!    here, and add their arms to `from_frame` and `to_frame`.
//! 4. Add golden bytes under `golden/vN+1/`; those of `golden/vN/` must still read, to the same meaning.

use thiserror::Error;

use crate::checked::Received;
use crate::codec::{self, CodecError};
use crate::header::{Frame, HeaderError, Kind};
use crate::latest::handover_record::HandoverRecord;
use crate::latest::message::{ToIncumbent, ToSuccessor};

/// Why a frame did not give a value, or a value no frame.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PayloadError {
    /// No whole frame.
    #[error("no frame")]
    Header(#[from] HeaderError),
    /// Another kind of payload than was expected.
    #[error("payload of kind {found}, expected is {expected:?}")]
    Kind {
        /// Kind in the header.
        found: u16,
        /// Kind expected.
        expected: Kind,
    },
    /// A version that this program does not know.
    #[error("{kind:?} of version {found}, this program knows 1 to {newest}")]
    Version {
        /// The kind.
        kind: Kind,
        /// Version in the header, or asked for.
        found: u32,
        /// Newest version known.
        newest: u32,
    },
    /// The payload itself.
    #[error("payload refused")]
    Codec(#[from] CodecError),
}

/// Something that crosses in a frame of its own.
pub trait Payload: Sized {
    /// Its kind.
    const KIND: Kind;
    /// Its newest version.
    const VERSION: u32;

    /// The frame, in a version that the reader knows.
    ///
    /// # Errors
    /// If there is no such version, or the value is too long for a frame.
    fn to_frame(&self, version: u32) -> Result<Vec<u8>, PayloadError>;

    /// Reads a frame of any version that this program knows.
    ///
    /// # Errors
    /// If it is no whole frame, of another kind, of an unknown version, or no such value.
    fn from_frame(bytes: &[u8]) -> Result<Received<Self>, PayloadError>;
}

macro_rules! first_version {
    ($type:ty, $kind:expr) => {
        impl Payload for $type {
            const KIND: Kind = $kind;
            const VERSION: u32 = 1;

            fn to_frame(&self, version: u32) -> Result<Vec<u8>, PayloadError> {
                match version {
                    1 => Ok(write(Self::KIND, version, &codec::encode(self)?)),
                    found => Err(unknown::<Self>(found)),
                }
            }

            fn from_frame(bytes: &[u8]) -> Result<Received<Self>, PayloadError> {
                let frame = expect::<Self>(bytes)?;
                match frame.version {
                    1 => Ok(Received::new(codec::decode(frame.payload)?)),
                    found => Err(unknown::<Self>(found)),
                }
            }
        }
    };
}

first_version!(HandoverRecord, Kind::HandoverRecord);
first_version!(ToSuccessor, Kind::ToSuccessor);
first_version!(ToIncumbent, Kind::ToIncumbent);

fn write(kind: Kind, version: u32, payload: &[u8]) -> Vec<u8> {
    Frame { kind: kind as u16, version, payload }.to_bytes()
}

fn expect<T: Payload>(bytes: &[u8]) -> Result<Frame<'_>, PayloadError> {
    let frame = Frame::read(bytes)?;
    if frame.kind != T::KIND as u16 {
        return Err(PayloadError::Kind { found: frame.kind, expected: T::KIND });
    }
    Ok(frame)
}

fn unknown<T: Payload>(found: u32) -> PayloadError {
    PayloadError::Version { kind: T::KIND, found, newest: T::VERSION }
}
