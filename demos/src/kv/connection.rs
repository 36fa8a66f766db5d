//! One client: its socket, what it sent that is not yet executed, and what it is owed.
//!
//! Memory is bounded: the input by one request and one read, the output by [`OUTPUT_PAUSE`] and one reply. A client that does not read
//! its replies is not read from either.

use std::io::{self, Read, Write};

use handover::arena::Store;
use mio::net::TcpStream;

use super::commands::{After, Facts, execute};
use super::resp::{Limits, Parser, Reply};

/// Bytes owed from which on no further request of this client is executed.
pub const OUTPUT_PAUSE: usize = 256 << 10;
/// A buffer that grew beyond this is given back once empty.
const KEEP: usize = 64 << 10;
/// The first byte of a note: grows with every change that an older reader would misread.
const NOTE_VERSION: u8 = 1;

/// Where a connection stands after some work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Waits for the socket.
    Idle,
    /// Has more to do at once.
    More,
    /// To be dropped.
    Done,
}

/// One client.
#[derive(Debug)]
pub struct Connection {
    /// Its socket.
    pub socket: TcpStream,
    parser: Parser,
    input: Vec<u8>,
    /// Requests before this offset are executed.
    taken: usize,
    output: Vec<u8>,
    /// Bytes before this offset are sent.
    sent: usize,
    readable: bool,
    closing: bool,
    peer_closed: bool,
}

impl Connection {
    /// A client that has just been accepted.
    #[must_use]
    pub fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            parser: Parser::default(),
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
            sent: 0,
            readable: true,
            closing: false,
            peer_closed: false,
        }
    }

    /// What is known of it beside its socket, between two requests: what it sent and is not executed, and what it is owed.
    #[must_use]
    pub fn note(&self) -> Vec<u8> {
        let (input, output) = (&self.input[self.taken..], &self.output[self.sent..]);
        let flags = u8::from(self.closing) | u8::from(self.peer_closed) << 1;
        let mut note = vec![NOTE_VERSION, flags];
        note.extend_from_slice(&(input.len() as u64).to_le_bytes());
        note.extend_from_slice(input);
        note.extend_from_slice(output);
        note
    }

    /// A client that was served on the kernel before, with the [`Connection::note`] of there.
    ///
    /// # Errors
    /// The note is none of this version.
    pub fn resume(socket: TcpStream, note: &[u8]) -> io::Result<Self> {
        let none = || io::Error::new(io::ErrorKind::InvalidData, format!("{} bytes are no client's note", note.len()));
        let Some((&[NOTE_VERSION, flags, ref len @ ..], rest)) = note.split_first_chunk::<10>() else {
            return Err(none());
        };
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| none())?;
        let (input, output) = rest.split_at_checked(len).ok_or_else(none)?;
        let mut client = Self::new(socket);
        (client.input, client.output) = (input.to_vec(), output.to_vec());
        (client.closing, client.peer_closed) = (flags & 1 != 0, flags & 2 != 0);
        Ok(client)
    }

    /// The poll says that there is something to read (or an end).
    pub fn mark_readable(&mut self) {
        self.readable = true;
    }

    /// Sends what is owed, reads once, executes up to `budget` requests, sends their replies. Never blocks, and returns at a
    /// request boundary.
    pub fn work(
        &mut self,
        store: &mut Store<'_>,
        facts: &Facts,
        limits: &Limits,
        scratch: &mut [u8],
        budget: &mut usize,
    ) -> Progress {
        match self.try_work(store, facts, limits, scratch, budget) {
            Ok(progress) => progress,
            Err(_) => Progress::Done, // reset by the peer; what it was owed is lost with it
        }
    }

    fn try_work(
        &mut self,
        store: &mut Store<'_>,
        facts: &Facts,
        limits: &Limits,
        scratch: &mut [u8],
        budget: &mut usize,
    ) -> io::Result<Progress> {
        if !self.flush()? {
            return Ok(Progress::Idle);
        }
        if self.readable && !self.closing && self.input.len() < limits.request + limits.line {
            match self.socket.read(scratch) {
                Ok(0) => (self.readable, self.peer_closed) = (false, true),
                Ok(len) => self.input.extend_from_slice(&scratch[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let starved = self.execute(store, facts, limits, budget);
        let flushed = self.flush()?;
        if flushed && (self.closing || (self.peer_closed && starved)) {
            return Ok(Progress::Done);
        }
        Ok(if flushed && (self.readable || !starved) { Progress::More } else { Progress::Idle })
    }

    /// Executes what lies in the input. True when it holds no further whole request.
    fn execute(&mut self, store: &mut Store<'_>, facts: &Facts, limits: &Limits, budget: &mut usize) -> bool {
        let mut starved = false;
        while !self.closing && *budget > 0 && self.output.len() < OUTPUT_PAUSE {
            let input = &self.input[self.taken..];
            match self.parser.parse(input, limits) {
                Ok(Some(len)) => {
                    *budget -= 1;
                    self.closing = execute(store, facts, input, &self.parser.args, &mut self.output) == After::Close;
                    self.taken += len;
                }
                Ok(None) => {
                    starved = true;
                    break;
                }
                Err(error) => {
                    self.output.error(&format!("ERR {error}"));
                    self.closing = true;
                }
            }
        }
        self.input.drain(..self.taken);
        self.taken = 0;
        if self.input.is_empty() && self.input.capacity() > KEEP {
            self.input = Vec::new();
        }
        starved
    }

    /// True when nothing is owed any more.
    fn flush(&mut self) -> io::Result<bool> {
        while self.sent < self.output.len() {
            match self.socket.write(&self.output[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        self.output.clear();
        if self.output.capacity() > KEEP {
            self.output = Vec::new();
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_tells_all_that_is_between_two_requests() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut client = Connection::new(socket());
        client.input = b"done*1\r\n$4\r\nPI".to_vec();
        client.taken = 4;
        client.output = b"+OK\r\n+OK\r\n".to_vec();
        client.sent = 5;
        client.peer_closed = true;
        let again = Connection::resume(socket(), &client.note()).unwrap();
        assert_eq!((again.input.as_slice(), again.taken), (&b"*1\r\n$4\r\nPI"[..], 0));
        assert_eq!((again.output.as_slice(), again.sent), (&b"+OK\r\n"[..], 0));
        assert_eq!((again.closing, again.peer_closed, again.readable), (false, true, true));
        for none in
            [&b""[..], &[2; 20], &[1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1], &[1, 0, 255, 255, 255, 255, 255, 255, 255, 255]]
        {
            assert!(Connection::resume(socket(), none).is_err(), "{none:?}");
        }
    }
}
