//! What the lab and `labd` say to each other: frames of a kind byte, a length (u32, little-endian) and that many bytes.
//!
//! ```text
//! lab  → labd   Request (JSON), then Data... End for what the request reads (a command's input, a file to store)
//! labd → lab    Out, Err (a command's output), Data (a file, a clock), then exactly one of Exit (JSON) or Failed (text)
//! ```
//! A connection carries one request. Closing it early kills the command.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Where `labd` listens.
pub const PORT: u16 = 7777;
/// No frame is longer: neither side lets the other make it allocate more.
pub const FRAME_LIMIT: usize = 1 << 20;
const HEADER: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The request.
    Request = b'Q',
    /// Bytes of input or of a file.
    Data = b'D',
    /// No more input.
    End = b'.',
    /// A command's standard output.
    Out = b'O',
    /// A command's standard error.
    Err = b'E',
    /// The request's end.
    Exit = b'X',
    /// The request could not be carried out; the text says why.
    Failed = b'F',
}

impl Kind {
    fn from_byte(byte: u8) -> io::Result<Self> {
        [Self::Request, Self::Data, Self::End, Self::Out, Self::Err, Self::Exit, Self::Failed]
            .into_iter()
            .find(|k| *k as u8 == byte)
            .ok_or_else(|| bad(format!("there is no frame of kind {byte:#x}")))
    }
}

/// What the lab wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a program.
    Run {
        /// Program and arguments; without a slash it is looked for in `PATH`.
        argv: Vec<String>,
        /// Added to `labd`'s environment.
        env: Vec<(String, String)>,
        /// Killed, with its process group, after so long.
        timeout_ms: Option<u64>,
        /// Run on a terminal of this size (rows, columns).
        terminal: Option<(u16, u16)>,
    },
    /// Send a file.
    Get {
        /// Its path.
        path: String,
    },
    /// Store a file (beside its place first, then renamed).
    Put {
        /// Its path.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// Answer each Data frame at once with one that says what the TSC reads (u64, little-endian).
    Clock,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code of the command; 0 for a file that was sent or stored.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Whether that was the time-out's.
    pub timed_out: bool,
}

/// Writes one frame.
pub fn send(to: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= FRAME_LIMIT);
    let length = length.ok_or_else(|| bad(format!("a frame of {} bytes; the limit is {FRAME_LIMIT}", bytes.len())))?;
    let mut frame = Vec::with_capacity(HEADER + bytes.len());
    frame.push(kind as u8);
    frame.extend(length.to_le_bytes());
    frame.extend(bytes);
    to.write_all(&frame)
}

/// Writes one frame of JSON.
pub fn send_json(to: &mut impl Write, kind: Kind, value: &impl Serialize) -> io::Result<()> {
    send(to, kind, &serde_json::to_vec(value)?)
}

/// Reads one frame.
pub fn receive(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let (kind, length) = parse_header(header)?;
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok((kind, bytes))
}

/// Reads the value of a frame of JSON.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Takes the first whole frame off a buffer, if there is one: for readers that must not block.
pub fn take(buffer: &mut Vec<u8>) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let (kind, length) = parse_header(*header)?;
    if buffer.len() < HEADER + length {
        return Ok(None);
    }
    let bytes = buffer[HEADER..HEADER + length].to_vec();
    buffer.drain(..HEADER + length);
    Ok(Some((kind, bytes)))
}

fn parse_header(header: [u8; HEADER]) -> io::Result<(Kind, usize)> {
    let [kind, length @ ..] = header;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > FRAME_LIMIT {
        return Err(bad(format!("a frame of {length} bytes; the limit is {FRAME_LIMIT}")));
    }
    Ok((Kind::from_byte(kind)?, length))
}

fn bad(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8), cut in any::<prop::sample::Index>()) {
            let mut stream = Vec::new();
            for part in &parts {
                send(&mut stream, Kind::Data, part).unwrap();
            }
            let mut reader = stream.as_slice();
            for part in &parts {
                prop_assert_eq!(receive(&mut reader).unwrap(), (Kind::Data, part.clone()));
            }
            // The same in two pieces, cut anywhere.
            let (first, second) = stream.split_at(cut.index(stream.len() + 1));
            let mut buffer = first.to_vec();
            let mut seen = Vec::new();
            while let Some((_, bytes)) = take(&mut buffer).unwrap() {
                seen.push(bytes);
            }
            buffer.extend(second);
            while let Some((_, bytes)) = take(&mut buffer).unwrap() {
                seen.push(bytes);
            }
            prop_assert_eq!(seen, parts);
        }

        #[test]
        fn hostile_bytes_give_errors(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = receive(&mut bytes.as_slice());
            let _ = take(&mut bytes.clone());
        }
    }

    #[test]
    fn limits_hold_on_both_sides() {
        assert!(send(&mut Vec::new(), Kind::Data, &vec![0; FRAME_LIMIT + 1]).is_err());
        let huge = [b'D', 0xff, 0xff, 0xff, 0xff];
        assert!(receive(&mut huge.as_slice()).unwrap_err().to_string().contains("the limit is"));
        assert!(receive(&mut [b'?', 0, 0, 0, 0].as_slice()).unwrap_err().to_string().contains("0x3f"));
    }
}
