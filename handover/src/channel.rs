//! The channel: two rings in the control block, one in each direction, each with one writer and one reader.
//!
//! ```text
//! ring    0x000 head (writer's)   0x080 tail (reader's)   0x100 data, 64 KiB
//! record  length u32   crc u32   position u64   bytes, padded to 8
//! ```
//! `head` and `tail` count bytes since the beginning and never wrap; they lie in cache lines of their own. A record's
//! position is the count at its first byte: it is the sequence number, by which a record from an earlier round of the
//! ring, or one that was skipped, cannot pass for the next. The CRC covers length, position and bytes.
//!
//! The other side may write anything at any time. So each side keeps its own count to itself and only publishes it;
//! what is read is copied out before it is checked; every bound is checked before the arithmetic. A ring that has
//! lied once is not read again: all later answers are the same error.
//!
//! What this is not: a wait. Nothing here blocks; the doorbell says when to look.

use state_schemas::checked::Check;
use state_schemas::control_block::{Piece, RING_TO_INCUMBENT, RING_TO_SUCCESSOR};
use state_schemas::message::MessageError;
use state_schemas::shared::SharedMemory;
use state_schemas::{Payload, PayloadError};
use thiserror::Error;

const HEAD_AT: u64 = 0;
const TAIL_AT: u64 = 0x80;
const DATA_AT: u64 = 0x100;
/// Bytes of a ring's data.
const DATA: u64 = 64 << 10;
const RECORD_HEAD: u64 = 16;
/// Longest message, in bytes; a quarter of the ring.
pub const MESSAGE_LIMIT: u64 = DATA / 4;

const _: () = assert!(DATA.is_power_of_two());
const _: () = assert!(DATA_AT + DATA <= RING_TO_SUCCESSOR.size);
const _: () = assert!(DATA_AT + DATA <= RING_TO_INCUMBENT.size);
const _: () = assert!(RING_TO_SUCCESSOR.offset.is_multiple_of(128));

/// Which end of the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Writes the ring to the successor.
    Incumbent,
    /// Writes the ring to the incumbent.
    Successor,
}

/// Why a message could not be sent or taken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The memory is no control block.
    #[error("a channel lies in a control block of {need:#x} bytes, this memory has {have:#x}")]
    TooSmall {
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// The message is longer than any message may be.
    #[error("message of {len} bytes, at most {MESSAGE_LIMIT} are allowed")]
    TooLong {
        /// Its length.
        len: u64,
    },
    /// The other side has not taken what was sent before.
    #[error("no room for {need} bytes: {free} are free until the other side reads")]
    Full {
        /// Bytes needed.
        need: u64,
        /// Bytes free.
        free: u64,
    },
    /// The other side's words contradict themselves.
    #[error("the other side broke the ring: {0}")]
    Broken(#[from] Broken),
    /// A message that does not decode.
    #[error("a message does not decode")]
    Payload(#[from] PayloadError),
    /// A message out of bounds.
    #[error("a message is out of bounds")]
    Message(#[from] MessageError),
}

/// How the other side broke a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Broken {
    /// Its count cannot be, given ours.
    #[error("head {head:#x} and tail {tail:#x} are no ring of {DATA:#x} bytes")]
    Counts {
        /// The writer's count.
        head: u64,
        /// The reader's count.
        tail: u64,
    },
    /// A record does not fit in what was written, or is too long.
    #[error("record of {len} bytes at {position:#x}, {available} were written")]
    Length {
        /// Length in the record.
        len: u32,
        /// Where it stands.
        position: u64,
        /// Bytes written from there on.
        available: u64,
    },
    /// A record belongs elsewhere.
    #[error("record {found:#x} stands in the place of {expected:#x}")]
    Position {
        /// Position in the record.
        found: u64,
        /// Position where it was read.
        expected: u64,
    },
    /// A record was changed.
    #[error("record at {position:#x} has CRC {found:#010x}, it says {stored:#010x}")]
    Crc {
        /// Where it stands.
        position: u64,
        /// CRC of what was read.
        found: u32,
        /// CRC in the record.
        stored: u32,
    },
}

/// One end of the channel.
#[derive(Debug)]
pub struct Channel<M> {
    memory: M,
    out: Ring,
    sent: u64,
    inn: Ring,
    taken: u64,
    broken: Option<Broken>,
}

/// Where a ring lies.
#[derive(Debug, Clone, Copy)]
struct Ring {
    base: u64,
}

impl Ring {
    fn of(piece: Piece) -> Ring {
        Ring { base: piece.offset }
    }
    fn head(self) -> u64 {
        self.base + HEAD_AT
    }
    fn tail(self) -> u64 {
        self.base + TAIL_AT
    }
    /// Splits a run of bytes where the data area ends: offset in memory of the first part, and its length.
    fn split(self, position: u64, len: u64) -> (u64, usize) {
        let at = position % DATA;
        (self.base + DATA_AT + at, (DATA - at).min(len) as usize)
    }
    fn write(self, memory: &impl SharedMemory, position: u64, bytes: &[u8]) {
        let (at, first) = self.split(position, bytes.len() as u64);
        memory.write(at, &bytes[..first]);
        if first < bytes.len() {
            memory.write(self.base + DATA_AT, &bytes[first..]);
        }
    }
    fn read(self, memory: &impl SharedMemory, position: u64, into: &mut [u8]) {
        let (at, first) = self.split(position, into.len() as u64);
        memory.read(at, &mut into[..first]);
        if first < into.len() {
            memory.read(self.base + DATA_AT, &mut into[first..]);
        }
    }
}

/// Bytes of a record with `len` bytes in it.
fn record_len(len: u64) -> u64 {
    RECORD_HEAD + len.next_multiple_of(8)
}

fn crc_of(len: u32, position: u64, bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&len.to_le_bytes());
    crc.update(&position.to_le_bytes());
    crc.update(bytes);
    crc.finalize()
}

impl<M: SharedMemory> Channel<M> {
    /// Empties both rings. Only the incumbent may, before the successor starts.
    ///
    /// # Errors
    /// If `memory` is smaller than a control block's rings.
    pub fn reset(memory: &M) -> Result<(), ChannelError> {
        enough(memory)?;
        for ring in [Ring::of(RING_TO_SUCCESSOR), Ring::of(RING_TO_INCUMBENT)] {
            memory.store(ring.head(), 0);
            memory.store(ring.tail(), 0);
        }
        Ok(())
    }

    /// Takes one end, where it was left: at the beginning, or wherever this side's counts say.
    ///
    /// # Errors
    /// If `memory` is smaller than a control block's rings.
    pub fn attach(memory: M, side: Side) -> Result<Channel<M>, ChannelError> {
        enough(&memory)?;
        let (out, inn) = match side {
            Side::Incumbent => (RING_TO_SUCCESSOR, RING_TO_INCUMBENT),
            Side::Successor => (RING_TO_INCUMBENT, RING_TO_SUCCESSOR),
        };
        let (out, inn) = (Ring::of(out), Ring::of(inn));
        let (sent, taken) = (memory.load(out.head()), memory.load(inn.tail()));
        Ok(Channel { memory, out, sent, inn, taken, broken: None })
    }

    /// Sends a message, in the oldest version that can say it: the other side may be older. It can be taken as soon as this returns;
    /// ring the doorbell then.
    ///
    /// # Errors
    /// If there is no room now, the message is too long, or the other side broke the ring.
    pub fn send<T: Payload>(&mut self, message: &T) -> Result<(), ChannelError> {
        self.send_bytes(&message.to_frame(message.least_version())?)
    }

    /// Takes the next message, if there is one.
    ///
    /// # Errors
    /// If it does not decode, is out of bounds (it is taken then, and the next may follow), or the other side broke
    /// the ring (nothing follows).
    pub fn receive<T>(&mut self) -> Result<Option<T>, ChannelError>
    where
        T: Payload + Check<Against = (), Error = MessageError>,
    {
        match self.receive_bytes()? {
            Some(bytes) => Ok(Some(T::from_frame(&bytes)?.check(&())?)),
            None => Ok(None),
        }
    }

    /// Something is there to be received (or to be refused).
    pub fn has_message(&self) -> bool {
        self.broken.is_some() || self.memory.load(self.inn.head()) != self.taken
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Those of [`Channel::send`].
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        let len = match u32::try_from(bytes.len()) {
            Ok(len) if u64::from(len) <= MESSAGE_LIMIT => len,
            _ => {
                return Err(ChannelError::TooLong { len: bytes.len() as u64 });
            }
        };
        self.intact()?;
        let tail = self.memory.load(self.out.tail());
        let free = DATA - self.between(self.sent, tail)?;
        let need = record_len(len.into());
        if need > free {
            return Err(ChannelError::Full { need, free });
        }
        let mut head = [0; RECORD_HEAD as usize];
        head[..4].copy_from_slice(&len.to_le_bytes());
        head[4..8].copy_from_slice(&crc_of(len, self.sent, bytes).to_le_bytes());
        head[8..].copy_from_slice(&self.sent.to_le_bytes());
        self.out.write(&self.memory, self.sent, &head);
        self.out.write(&self.memory, self.sent.wrapping_add(RECORD_HEAD), bytes);
        self.sent = self.sent.wrapping_add(need);
        // Release: whoever sees the new head sees the record.
        self.memory.store(self.out.head(), self.sent);
        Ok(())
    }

    /// Takes the bytes of the next message.
    ///
    /// # Errors
    /// If the other side broke the ring.
    pub fn receive_bytes(&mut self) -> Result<Option<Vec<u8>>, ChannelError> {
        self.intact()?;
        let head = self.memory.load(self.inn.head());
        let available = self.between(head, self.taken)?;
        if available == 0 {
            return Ok(None);
        }
        let position = self.taken;
        let mut record = [0; RECORD_HEAD as usize];
        if available >= RECORD_HEAD {
            self.inn.read(&self.memory, position, &mut record);
        }
        let word = |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let (len, stored) = (word(0), word(4));
        let found = u64::from(word(8)) | u64::from(word(12)) << 32;
        let whole = record_len(len.into());
        if u64::from(len) > MESSAGE_LIMIT || whole > available {
            return Err(self.lied(Broken::Length { len, position, available }));
        }
        if found != position {
            return Err(self.lied(Broken::Position { found, expected: position }));
        }
        let mut bytes = vec![0; len as usize];
        self.inn.read(&self.memory, position.wrapping_add(RECORD_HEAD), &mut bytes);
        let found = crc_of(len, position, &bytes);
        if found != stored {
            return Err(self.lied(Broken::Crc { position, found, stored }));
        }
        self.taken = self.taken.wrapping_add(whole);
        // Release: the writer reuses the place only after we have copied from it.
        self.memory.store(self.inn.tail(), self.taken);
        Ok(Some(bytes))
    }

    /// Bytes between two counts, one of which the other side wrote.
    fn between(&mut self, head: u64, tail: u64) -> Result<u64, ChannelError> {
        let between = head.wrapping_sub(tail);
        if between > DATA || !between.is_multiple_of(8) {
            return Err(self.lied(Broken::Counts { head, tail }));
        }
        Ok(between)
    }

    fn lied(&mut self, how: Broken) -> ChannelError {
        self.broken = Some(how);
        how.into()
    }

    fn intact(&self) -> Result<(), ChannelError> {
        match self.broken {
            Some(how) => Err(how.into()),
            None => Ok(()),
        }
    }
}

fn enough(memory: &impl SharedMemory) -> Result<(), ChannelError> {
    let need = RING_TO_INCUMBENT.end().max(RING_TO_SUCCESSOR.end());
    let have = memory.size();
    if have < need {
        return Err(ChannelError::TooSmall { have, need });
    }
    Ok(())
}
