//! A table of connections as bytes: one after the other, each a frame ([`crate::v1::connection::Connection`]) and the bytes that
//! it counts. It is written while nobody serves, carried in pieces ([`crate::message::ToSuccessor::Connections`]), and hostile
//! when it is read.

use thiserror::Error;

use crate::convert::{Payload, PayloadError};
use crate::header::{Frame, HeaderError};
use crate::latest::connection::{Connection, ConnectionError, Lengths};
use crate::latest::message::TABLE_LIMIT;

/// Most connections in it.
pub const COUNT_LIMIT: usize = 16_384;

/// What follows a connection's frame.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bytes {
    /// What the service says of it.
    pub note: Vec<u8>,
    /// Received, and not read yet.
    pub received: Vec<u8>,
    /// Sent, and not acknowledged.
    pub unacknowledged: Vec<u8>,
    /// Not sent yet.
    pub unsent: Vec<u8>,
}

impl Bytes {
    fn parts(&self) -> [&[u8]; 4] {
        [&self.note, &self.received, &self.unacknowledged, &self.unsent]
    }

    /// How many there are; nothing where a number has no room for them.
    pub fn lengths(&self) -> Option<Lengths> {
        let [note, received, unacknowledged, unsent] = self.parts().map(|part| u32::try_from(part.len()).ok());
        Some(Lengths { note: note?, received: received?, unacknowledged: unacknowledged?, unsent: unsent? })
    }

    fn crc(&self) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        self.parts().into_iter().for_each(|part| crc.update(part));
        crc.finalize()
    }
}

/// Why a table is not believed, or cannot be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TableError {
    /// The frame of a connection.
    #[error("connection {index}")]
    Frame {
        /// Which one, from 0.
        index: usize,
        /// Why.
        #[source]
        source: PayloadError,
    },
    /// What stands in it.
    #[error("connection {index}")]
    Connection {
        /// Which one, from 0.
        index: usize,
        /// Why.
        #[source]
        source: ConnectionError,
    },
    /// Bytes that are not there.
    #[error("connection {index} has {counted} bytes, and {have} follow it")]
    Short {
        /// Which one, from 0.
        index: usize,
        /// What it says.
        counted: u64,
        /// What there is.
        have: u64,
    },
    /// Bytes that were changed.
    #[error("the bytes of connection {index} have CRC {found:#010x}, its frame says {stored:#010x}")]
    Crc {
        /// Which one, from 0.
        index: usize,
        /// CRC of the bytes.
        found: u32,
        /// CRC in the frame.
        stored: u32,
    },
    /// Too much of it.
    #[error("{what}: {value}, at most {limit} are allowed")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much there would be.
        value: u64,
        /// Most allowed.
        limit: u64,
    },
}

/// Writes a connection behind what `table` holds; its lengths and CRC are those of `bytes`, whatever `connection` says.
///
/// # Errors
/// A connection that no reader would take, or more than a table may hold. `table` is then as it was.
pub fn append(table: &mut Vec<u8>, index: usize, mut connection: Connection, bytes: &Bytes) -> Result<(), TableError> {
    use crate::checked::Check;
    let too_long = || TableError::TooMuch { what: "bytes of a queue", value: u64::MAX, limit: u32::MAX.into() };
    connection.lengths = bytes.lengths().ok_or_else(too_long)?;
    connection.bytes_crc = bytes.crc();
    connection.check(&()).map_err(|source| TableError::Connection { index, source })?;
    let frame = connection.to_frame(Connection::VERSION).map_err(|source| TableError::Frame { index, source })?;
    let len = table.len() as u64 + frame.len() as u64 + connection.lengths.total();
    few("bytes of a table", len, TABLE_LIMIT)?;
    few("connections", index as u64 + 1, COUNT_LIMIT as u64)?;
    table.extend_from_slice(&frame);
    bytes.parts().into_iter().for_each(|part| table.extend_from_slice(part));
    Ok(())
}

/// Reads a whole table.
///
/// # Errors
/// The first thing in it that is not as it must be.
pub fn read(mut table: &[u8]) -> Result<Vec<(Connection, Bytes)>, TableError> {
    few("bytes of a table", table.len() as u64, TABLE_LIMIT)?;
    let mut all = Vec::new();
    while !table.is_empty() {
        let index = all.len();
        few("connections", index as u64 + 1, COUNT_LIMIT as u64)?;
        let frame = |source| TableError::Frame { index, source };
        let end = Frame::length(table).map_err(|source| frame(source.into()))?;
        let connection = Connection::from_frame(table).map_err(frame)?;
        let connection = connection.check(&()).map_err(|source| TableError::Connection { index, source })?;
        // A frame that was read is whole.
        table = table.get(end..).ok_or_else(|| frame(short(end, table.len()).into()))?;
        let lengths = connection.lengths;
        let (counted, have) = (lengths.total(), table.len() as u64);
        if counted > have {
            return Err(TableError::Short { index, counted, have });
        }
        let mut next = |len: u32| {
            let (part, rest) = table.split_at(len as usize);
            table = rest;
            part.to_vec()
        };
        let bytes = Bytes {
            note: next(lengths.note),
            received: next(lengths.received),
            unacknowledged: next(lengths.unacknowledged),
            unsent: next(lengths.unsent),
        };
        let (found, stored) = (bytes.crc(), connection.bytes_crc);
        if found != stored {
            return Err(TableError::Crc { index, found, stored });
        }
        all.push((connection, bytes));
    }
    Ok(all)
}

fn short(length: usize, have: usize) -> HeaderError {
    HeaderError::Length { length: length as u64, have: have as u64, limit: crate::header::FRAME_LIMIT as u64 }
}

fn few(what: &'static str, value: u64, limit: u64) -> Result<(), TableError> {
    if value <= limit { Ok(()) } else { Err(TableError::TooMuch { what, value, limit }) }
}
