//! The rehearsal: before the service says that it is ready, it serves a few clients of its own over loopback, from a store of its own.
//!
//! What runs for the first time runs slowly: pages of the program are read from its file, caches and branch predictors know nothing, sockets
//! are set up, and an emulated CPU translates each piece of code that it has not met yet. In a successor the first time would be the end of
//! the blackout, with clients waiting: there the first answer came 30 to 84 ms after the first request (emulation), most of which this saves.
//! Nothing of the real store, or of the real sockets, is touched.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use handover::arena::Store;

use super::server::Server;

/// How often everything is done: the second time finds out whether the first was enough.
const ROUNDS: usize = 3;
/// Memory of the store.
const MEMORY: usize = 1 << 20;
/// Turns that one exchange may take; some find nothing, because loopback is not instant.
const TURNS: usize = 1000;
/// How long a turn waits for something to do.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a client says: one command of each kind that changes a different structure. The last one's answer ends the exchange.
const COMMANDS: &[u8] =
    b"SET a 1\r\nGET a\r\nINCR a\r\nLPUSH l x y\r\nLPOP l\r\nSADD s x\r\nMSET b 2 c 3\r\nDEL a b c l s\r\nPING\r\n";
const LAST_ANSWER: &[u8] = b"+PONG\r\n";

/// Serves them.
///
/// # Errors
/// Loopback does not work, or an answer does not come.
pub fn rehearse() -> io::Result<()> {
    let mut memory = vec![0; MEMORY];
    let mut store = Store::create(&mut memory, "rehearsal", 0, 0).map_err(io::Error::other)?;
    let mut server = Server::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), ROUNDS)?;
    server.begin(0)?;
    let address = server.address()?;
    let mut turn = || server.turn(&mut store, Some(PATIENCE)).map(drop);
    for _ in 0..ROUNDS {
        let prober = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        prober.connect(address)?;
        prober.set_nonblocking(true)?;
        prober.send(b"PING rehearsal")?;
        let mut answer = [0; 64];
        answered(&mut turn, || Ok(prober.recv(&mut answer)? > 0))?;

        let mut client = TcpStream::connect(address)?;
        client.set_nonblocking(true)?;
        client.write_all(COMMANDS)?;
        let mut answers = Vec::new();
        answered(&mut turn, || {
            let mut some = [0; 512];
            let len = client.read(&mut some)?;
            answers.extend_from_slice(&some[..len]);
            Ok(len == 0 || answers.ends_with(LAST_ANSWER))
        })?;
        if !answers.ends_with(LAST_ANSWER) {
            return Err(io::Error::other(format!(
                "the rehearsal's client heard {:?}",
                answers.escape_ascii().to_string()
            )));
        }
    }
    Ok(())
}

/// Takes turns until the client has its answer.
fn answered(turn: &mut impl FnMut() -> io::Result<()>, mut heard: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    for _ in 0..TURNS {
        match heard() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        turn()?;
    }
    Err(io::Error::new(ErrorKind::TimedOut, format!("no answer after {TURNS} turns")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_ends_well() {
        super::rehearse().unwrap();
    }
}
