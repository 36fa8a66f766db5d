//! RESP over one blocking connection: requests out, replies in. The server is measured, not trusted: lengths are bounded.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::kv::resp::{Reply as _, number};

/// The longest bulk reply that is accepted.
const MAX_BULK: i64 = 64 << 20;
/// The most replies in one array.
const MAX_ARRAY: i64 = 1 << 20;
const MAX_LINE: u64 = 64 << 10;
const MAX_DEPTH: usize = 4;

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Status(String),
    /// `-ERR ...`
    Error(String),
    /// `:1`
    Integer(i64),
    /// A string of bytes, or nil.
    Bulk(Option<Vec<u8>>),
    /// Several.
    Array(Vec<Reply>),
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    socket: BufReader<TcpStream>,
    output: Vec<u8>,
}

impl Client {
    /// Connects; `timeout` holds for that and for each wait on the socket.
    ///
    /// # Errors
    /// As connect(2), or the time-out.
    pub fn connect(target: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let socket = TcpStream::connect_timeout(&target, timeout)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(timeout))?;
        socket.set_write_timeout(Some(timeout))?;
        Ok(Self { socket: BufReader::new(socket), output: Vec::new() })
    }

    /// Adds a request to those that [`Client::send`] sends.
    pub fn queue(&mut self, request: &[&[u8]]) {
        self.output.array(request.len());
        for arg in request {
            self.output.bulk(arg);
        }
    }

    /// Sends what was queued.
    ///
    /// # Errors
    /// The socket's; some of it may have gone out.
    pub fn send(&mut self) -> io::Result<()> {
        let sent = self.socket.get_mut().write_all(&self.output);
        self.output.clear();
        sent
    }

    /// The next reply.
    ///
    /// # Errors
    /// The socket's, or something that is no reply.
    pub fn receive(&mut self) -> io::Result<Reply> {
        self.reply(0)
    }

    /// One request, one reply.
    ///
    /// # Errors
    /// As [`Client::send`] and [`Client::receive`].
    pub fn ask(&mut self, request: &[&[u8]]) -> io::Result<Reply> {
        self.queue(request);
        self.send()?;
        self.receive()
    }

    fn reply(&mut self, depth: usize) -> io::Result<Reply> {
        let mut line = Vec::new();
        (&mut self.socket).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(line) = line.strip_suffix(b"\r\n") else { return Err(no_reply(&line)) };
        let (kind, rest) = line.split_first().ok_or_else(|| no_reply(line))?;
        let length = |most| number(rest).filter(|n| (-1..=most).contains(n)).ok_or_else(|| no_reply(line));
        let text = || String::from_utf8_lossy(rest).into_owned();
        match kind {
            b'+' => Ok(Reply::Status(text())),
            b'-' => Ok(Reply::Error(text())),
            b':' => Ok(Reply::Integer(number(rest).ok_or_else(|| no_reply(line))?)),
            b'$' => match usize::try_from(length(MAX_BULK)?) {
                Err(_) => Ok(Reply::Bulk(None)),
                Ok(len) => {
                    let mut bulk = vec![0; len + 2];
                    self.socket.read_exact(&mut bulk)?;
                    if bulk.split_off(len) != b"\r\n" {
                        return Err(no_reply(line));
                    }
                    Ok(Reply::Bulk(Some(bulk)))
                }
            },
            b'*' if depth < MAX_DEPTH => {
                let len = length(MAX_ARRAY)?.max(0);
                Ok(Reply::Array((0..len).map(|_| self.reply(depth + 1)).collect::<io::Result<_>>()?))
            }
            _ => Err(no_reply(line)),
        }
    }
}

fn no_reply(line: &[u8]) -> io::Error {
    let words = format!("{:?} is no RESP reply", String::from_utf8_lossy(&line[..line.len().min(80)]));
    io::Error::new(io::ErrorKind::InvalidData, words)
}
