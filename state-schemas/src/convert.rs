//! From any version's bytes to the newest type, and back to a version that the other side reads.
//!
//! Whoever writes for another program asks first which versions it reads (`agent`: the successor's agent says so itself),
//! and writes the newest of them. To add version N+1 of a kind:
//!
//! 1. Write the types that change into `vN+1/`, and say in the first line of its `mod.rs` why; what does not change is used
//!    from `vN/`, which is not touched. The [`crate::checked::Check`] moves along: only the newest version is checked.
//! 2. Point `latest.rs` at it.
//! 3. Write `N -> N+1` (what is new gets a value that says "unknown") and `N+1 -> N` (what cannot be said is refused)
//!    here, and add their arms to `from_frame` and `to_frame`.
//! 4. Add golden bytes under `golden/vN+1/`; those of `golden/vN/` must still read, to the same meaning.

use thiserror::Error;

use crate::checked::Received;
use crate::codec::{self, CodecError};
use crate::header::{Frame, HeaderError, Kind};
use crate::latest::connection::Connection;
use crate::latest::handover_record::{HandoverRecord, Service};
use crate::latest::message::{ToIncumbent, ToSuccessor};
use crate::latest::platform::Platform;
use crate::v1;

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
    /// The reader's version has no words for something in the value.
    #[error("{kind:?} of version {to} cannot say {what}")]
    Down {
        /// The kind.
        kind: Kind,
        /// Version asked for.
        to: u32,
        /// What would be lost.
        what: String,
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

    /// The oldest version that has words for this value. What has a reader of unknown age is written in this one.
    fn least_version(&self) -> u32 {
        Self::VERSION
    }

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

/// Messages: version 2 has more words, and says the others as version 1 does.
macro_rules! words {
    ($type:ty, $kind:expr) => {
        impl Payload for $type {
            const KIND: Kind = $kind;
            const VERSION: u32 = 2;

            fn least_version(&self) -> u32 {
                self.since()
            }

            fn to_frame(&self, version: u32) -> Result<Vec<u8>, PayloadError> {
                match version {
                    1 | 2 if version >= self.since() => Ok(write(Self::KIND, version, &codec::encode(self)?)),
                    1 | 2 => Err(later(Self::KIND, version, self.since())),
                    found => Err(unknown::<Self>(found)),
                }
            }

            fn from_frame(bytes: &[u8]) -> Result<Received<Self>, PayloadError> {
                let frame = expect::<Self>(bytes)?;
                match frame.version {
                    version @ (1 | 2) => {
                        let word: Self = codec::decode(frame.payload)?;
                        match word.since() {
                            since if since > version => Err(later(Self::KIND, version, since)),
                            _ => Ok(Received::new(word)),
                        }
                    }
                    found => Err(unknown::<Self>(found)),
                }
            }
        }
    };
}

fn later(kind: Kind, to: u32, since: u32) -> PayloadError {
    PayloadError::Down { kind, to, what: format!("a word of version {since}") }
}

words!(ToSuccessor, Kind::ToSuccessor);
words!(ToIncumbent, Kind::ToIncumbent);
first_version!(Platform, Kind::Platform);
first_version!(Connection, Kind::Connection);

impl Payload for HandoverRecord {
    const KIND: Kind = Kind::HandoverRecord;
    const VERSION: u32 = 2;

    fn to_frame(&self, version: u32) -> Result<Vec<u8>, PayloadError> {
        let payload = match version {
            1 => codec::encode(&record_2_to_1(self.clone())?)?,
            2 => codec::encode(self)?,
            found => return Err(unknown::<Self>(found)),
        };
        Ok(write(Self::KIND, version, &payload))
    }

    fn from_frame(bytes: &[u8]) -> Result<Received<Self>, PayloadError> {
        let frame = expect::<Self>(bytes)?;
        match frame.version {
            1 => Ok(Received::new(record_1_to_2(codec::decode(frame.payload)?))),
            2 => Ok(Received::new(codec::decode(frame.payload)?)),
            found => Err(unknown::<Self>(found)),
        }
    }
}

/// A service of version 1 has one arena; files, KHO and foreign payloads there are none.
fn record_1_to_2(old: v1::record::HandoverRecord) -> HandoverRecord {
    let v1::record::HandoverRecord {
        update,
        hop,
        epoch,
        incumbent,
        clock,
        machine,
        grant,
        arenas,
        services,
        network,
        ecam,
        retired,
        journal,
    } = old;
    let services = services
        .into_iter()
        .map(|v1::record::Service { name, schema_kind, schema_version, arena, port }| Service {
            name,
            schema_kind,
            schema_version,
            arenas: vec![arena],
            port,
        })
        .collect();
    HandoverRecord {
        update,
        hop,
        epoch,
        incumbent,
        clock,
        machine,
        grant,
        arenas,
        services,
        files: Vec::new(),
        network,
        ecam,
        retired,
        journal,
        kho: None,
        carried: Vec::new(),
    }
}

/// Refuses what a reader of version 1 would lose: it uses as free memory whatever the record does not name.
fn record_2_to_1(new: HandoverRecord) -> Result<v1::record::HandoverRecord, PayloadError> {
    let HandoverRecord {
        update,
        hop,
        epoch,
        incumbent,
        clock,
        machine,
        grant,
        arenas,
        services,
        files,
        network,
        ecam,
        retired,
        journal,
        kho,
        carried,
    } = new;
    let cannot = |what| Err(PayloadError::Down { kind: Kind::HandoverRecord, to: 1, what });
    if !files.is_empty() {
        return cannot(format!("{} memory files", files.len()));
    }
    if kho.is_some() {
        return cannot("KHO structures".to_owned());
    }
    if !carried.is_empty() {
        return cannot(format!("{} payloads of a newer Baton", carried.len()));
    }
    let services = services.into_iter().map(|Service { name, schema_kind, schema_version, arenas, port }| {
        let [arena] = arenas[..] else {
            let what = format!("{} arenas of service {name} (it has room for exactly one)", arenas.len());
            return Err(PayloadError::Down { kind: Kind::HandoverRecord, to: 1, what });
        };
        Ok(v1::record::Service { name, schema_kind, schema_version, arena, port })
    });
    let services = services.collect::<Result<_, _>>()?;
    Ok(v1::record::HandoverRecord {
        update,
        hop,
        epoch,
        incumbent,
        clock,
        machine,
        grant,
        arenas,
        services,
        network,
        ecam,
        retired,
        journal,
    })
}

impl HandoverRecord {
    /// The payload of this kind among those that are carried; nothing where there is none that this program reads. Whole
    /// frames are there: the record was checked.
    pub fn carried_payload<T: Payload>(&self) -> Option<Received<T>> {
        self.carried.iter().find_map(|frame| T::from_frame(frame).ok())
    }

    /// Puts a payload among those that are carried, in place of the one of this kind, or takes that one out.
    ///
    /// # Errors
    /// Those of [`Payload::to_frame`].
    pub fn carry<T: Payload>(&mut self, payload: Option<&T>) -> Result<(), PayloadError> {
        let frame = payload.map(|payload| payload.to_frame(T::VERSION)).transpose()?;
        self.carried.retain(|other| T::from_frame(other).is_err());
        self.carried.extend(frame);
        Ok(())
    }
}

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
