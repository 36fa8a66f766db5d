//! The frame around every payload: 32 bytes that can be read without knowing the body. Two lines in a hexdump.
//!
//! A reader learns from it, in this order: is this ours (`magic`), may I read on (`format`), is it whole (`length`,
//! `crc`), what is it (`kind`, `version`). The CRC is checked before anything is decoded. It finds accidents, not
//! attackers.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of every frame.
pub const MAGIC: [u8; 8] = *b"BATONMSG";
/// Version of this header.
pub const FORMAT: u16 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 32;
/// Longest frame, header included: the control block's piece for the record. A limit on everything.
pub const FRAME_LIMIT: usize = crate::control_block::HANDOVER.size as usize;

/// The header as bytes, all of it little-endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`FORMAT`].
    pub format: U16,
    /// What the payload is: a [`Kind`], or one that this program does not know.
    pub kind: U16,
    /// Version of the payload, per kind.
    pub version: U32,
    /// Bytes of header and payload.
    pub length: U64,
    /// CRC-32 of header and payload, with this field zero.
    pub crc: U32,
    /// Zero; ignored when read.
    pub reserved: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_LEN);

/// The kinds of payload there are. A number is never used for another thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// [`crate::handover_record`].
    HandoverRecord = 1,
    /// [`crate::message`], from the incumbent.
    ToSuccessor = 2,
    /// [`crate::message`], from the successor.
    ToIncumbent = 3,
    /// [`crate::connection`], in a table of them.
    Connection = 4,
    /// [`crate::platform`]; carried.
    Platform = FIRST_CARRIED_KIND,
}

/// Kinds from here on are never a record or a message of their own: they stand in a record
/// ([`crate::handover_record::HandoverRecord::carried`]), and whoever does not know one hands it on as it is.
pub const FIRST_CARRIED_KIND: u16 = 16;

/// A frame that is whole, with a payload that nobody has decoded yet. An unknown kind can be carried on as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the payload is.
    pub kind: u16,
    /// Its version.
    pub version: u32,
    /// Its bytes.
    pub payload: &'a [u8],
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer bytes than a header.
    #[error("{have} bytes are too few for a frame's header of {HEADER_LEN}")]
    TooShort {
        /// Bytes there are.
        have: u64,
    },
    /// Something else.
    #[error("no frame here: magic is {found:#018x}")]
    Magic {
        /// What stands where the magic belongs, little-endian.
        found: u64,
    },
    /// A header that we cannot read.
    #[error("frame format {found}, this program reads format {FORMAT}")]
    Format {
        /// The format found.
        found: u16,
    },
    /// The length contradicts the bytes or the limit.
    #[error("the frame says it has {length} bytes; {have} are there, {limit} are allowed")]
    Length {
        /// What the header says.
        length: u64,
        /// Bytes there are.
        have: u64,
        /// Most that is accepted.
        limit: u64,
    },
    /// The bytes were changed, or never completely written.
    #[error("the frame's CRC is {found:#010x}, its header says {stored:#010x}")]
    Crc {
        /// CRC of the bytes.
        found: u32,
        /// CRC in the header.
        stored: u32,
    },
}

impl Header {
    /// CRC of a frame with this header.
    fn crc_with(&self, payload: &[u8]) -> u32 {
        let zeroed = Header { crc: 0.into(), ..*self };
        let mut crc = crc32fast::Hasher::new();
        crc.update(zeroed.as_bytes());
        crc.update(payload);
        crc.finalize()
    }
}

impl<'a> Frame<'a> {
    /// Bytes of the frame at the start of `bytes`, known from its header alone: how much has to be copied out of
    /// shared memory before [`Frame::read`].
    ///
    /// # Errors
    /// If this is no header, or the length is beyond [`FRAME_LIMIT`].
    pub fn length(bytes: &[u8]) -> Result<usize, HeaderError> {
        let have = bytes.len() as u64;
        let (header, _) = Header::read_from_prefix(bytes).map_err(|_| HeaderError::TooShort { have })?;
        if header.magic != MAGIC {
            return Err(HeaderError::Magic { found: u64::from_le_bytes(header.magic) });
        }
        if header.format.get() != FORMAT {
            return Err(HeaderError::Format { found: header.format.get() });
        }
        let length = header.length.get();
        if !(HEADER_LEN as u64..=FRAME_LIMIT as u64).contains(&length) {
            return Err(HeaderError::Length { length, have, limit: FRAME_LIMIT as u64 });
        }
        Ok(length as usize)
    }

    /// Reads the frame at the start of `bytes`; what follows it is ignored (the record's piece of memory is larger).
    ///
    /// # Errors
    /// If it is not a whole, unchanged frame.
    pub fn read(bytes: &'a [u8]) -> Result<Frame<'a>, HeaderError> {
        let length = Frame::length(bytes)?;
        let Some(frame) = bytes.get(..length) else {
            return Err(HeaderError::Length {
                length: length as u64,
                have: bytes.len() as u64,
                limit: FRAME_LIMIT as u64,
            });
        };
        let (header, payload) =
            Header::read_from_prefix(frame).map_err(|_| HeaderError::TooShort { have: bytes.len() as u64 })?;
        let (found, stored) = (header.crc_with(payload), header.crc.get());
        if found != stored {
            return Err(HeaderError::Crc { found, stored });
        }
        Ok(Frame { kind: header.kind.get(), version: header.version.get(), payload })
    }

    /// The frame's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut header = Header {
            magic: MAGIC,
            format: FORMAT.into(),
            kind: self.kind.into(),
            version: self.version.into(),
            length: ((HEADER_LEN + self.payload.len()) as u64).into(),
            crc: 0.into(),
            reserved: 0.into(),
        };
        header.crc = header.crc_with(self.payload).into();
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload.len());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(self.payload);
        bytes
    }
}
