//! The only place that knows bincode.
//!
//! `legacy` is fixed-width little-endian: every number stands in a hexdump as it is, and other libraries write the same
//! bytes (wincode does), which is the way out should bincode, which is no longer maintained, have to go. The limit
//! stops a hostile count before it becomes an allocation; bincode accepts trailing bytes, we do not.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::header::{FRAME_LIMIT, HEADER_LEN};

/// Longest payload.
pub(crate) const PAYLOAD_LIMIT: usize = FRAME_LIMIT - HEADER_LEN;

/// Why a payload could not be encoded or decoded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CodecError {
    /// bincode refused to write it.
    #[error("cannot encode")]
    Encode(#[source] bincode::error::EncodeError),
    /// It became too long.
    #[error("payload of {len} bytes, at most {PAYLOAD_LIMIT} are allowed")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// The bytes are no such value.
    #[error("cannot decode a payload of {len} bytes")]
    Decode {
        /// Their number.
        len: usize,
        /// What bincode says.
        #[source]
        source: bincode::error::DecodeError,
    },
    /// There are more bytes than the value has.
    #[error("the value ends at byte {consumed} of {len}")]
    Trailing {
        /// Bytes that were decoded.
        consumed: usize,
        /// Bytes there are.
        len: usize,
    },
}

pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, bincode::config::legacy()).map_err(CodecError::Encode)?;
    if bytes.len() > PAYLOAD_LIMIT {
        return Err(CodecError::TooLong { len: bytes.len() });
    }
    Ok(bytes)
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let config = bincode::config::legacy().with_limit::<PAYLOAD_LIMIT>();
    let (value, consumed) = bincode::serde::decode_from_slice(bytes, config)
        .map_err(|source| CodecError::Decode { len: bytes.len(), source })?;
    if consumed != bytes.len() {
        return Err(CodecError::Trailing { consumed, len: bytes.len() });
    }
    Ok(value)
}
