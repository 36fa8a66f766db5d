//! Part of the trial: the interface that is to take the service address is spoken to over the wire, from the one that has it now. An
//! interface without a cable, or in the wrong network, is found out while the incumbent serves, and not by the clients.
//!
//! Nothing needs to listen over there: a port that nobody has is refused by the kernel, and a refusal proves the way there and back, through
//! both drivers, as well as an answer. It also means that the successor's network code has run, and that both know each other's hardware
//! address, before the first client comes.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// The discard port (RFC 863): no service of ours, and harmless where somebody has one.
const PORT: u16 = 9;
/// How often it must have answered.
const TIMES: usize = 8;
/// How long one attempt may take. The first one waits for ARP.
const PATIENCE: Duration = Duration::from_secs(1);

/// Speaks to `address` until it has answered a few times.
///
/// # Errors
/// It did not answer before `until`.
pub fn check(address: Ipv4Addr, until: Instant) -> Result<()> {
    let there = SocketAddr::from((address, PORT));
    let (mut answered, mut last) = (0, None);
    while Instant::now() < until {
        match by_tcp(there) {
            Ok(()) => {
                answered += 1;
                // Refusals to datagrams are limited in rate, so that one may be missing.
                let _ = by_udp(there);
            }
            // One packet may be lost on any wire. Only silence to the end counts.
            Err(error) => last = Some(error),
        }
        if answered == TIMES {
            return Ok(());
        }
    }
    let why = last.map_or_else(|| "no time was left".to_owned(), |error| error.to_string());
    Err(anyhow!(
        "its interface ({address}) does not answer on the wire ({why}): is it connected to the service's network? Where the two interfaces \
         must not reach each other, set network.skip_reach_check = true"
    ))
}

fn by_tcp(there: SocketAddr) -> io::Result<()> {
    refused(TcpStream::connect_timeout(&there, PATIENCE).map(drop))
}

fn by_udp(there: SocketAddr) -> io::Result<()> {
    /// A refusal comes within a round trip, or not at all.
    const REFUSAL: Duration = Duration::from_millis(20);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(REFUSAL))?;
    socket.connect(there)?;
    socket.send(&[])?;
    refused(socket.recv(&mut [0; 1]).map(drop))
}

/// An answer is an answer.
fn refused(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() != ErrorKind::ConnectionRefused => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_an_answer() {
        check(Ipv4Addr::LOCALHOST, Instant::now() + PATIENCE).unwrap();
    }

    /// 192.0.2.0/24 is nobody's (RFC 5737); an address without a route fails at once, one with a default route in time.
    #[test]
    fn silence_is_told_with_its_address_and_what_to_do() {
        let error = check(Ipv4Addr::new(192, 0, 2, 1), Instant::now()).unwrap_err().to_string();
        assert!(error.contains("(192.0.2.1) does not answer on the wire (no time was left)"), "{error}");
        assert!(error.contains("network.skip_reach_check"), "{error}");
    }
}
