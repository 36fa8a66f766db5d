//! A person's way into a machine: a shell of the guest on the terminal from which the lab was started.

use std::io::{self, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::error::{Doing, LabError, Result};
use super::wire::{self, Exit, Kind, Request};

/// Runs a shell at the other end of a connection to `labd` until it ends. On a terminal it is an interactive one; from a file or a pipe it
/// reads commands.
pub fn attach(mut stream: TcpStream) -> Result<Exit> {
    let speaking = "speaking with labd";
    let terminal = (io::stdin().is_terminal() && io::stdout().is_terminal()).then(size);
    let term = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
    let env = [("TERM", term.as_str()), ("HOME", "/root"), ("PS1", "\\u@\\h (\\w)# ")];
    let request = Request::Run {
        argv: vec!["sh".into()],
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        timeout_ms: None,
        terminal,
    };
    wire::send_json(&mut stream, Kind::Request, &request).doing(speaking)?;
    let raw = terminal.map(|_| Raw::enter()).transpose()?;
    let mut sender = stream.try_clone().doing(speaking)?;
    // Not waited for: it sits in a read of the terminal that nothing ends but a key.
    std::thread::spawn(move || send_keys(&mut sender));
    let ended = relay(&mut stream);
    drop(raw);
    ended
}

fn relay(stream: &mut TcpStream) -> Result<Exit> {
    let printing = "printing what the guest says";
    loop {
        let (kind, bytes) = wire::receive(stream).doing("hearing from the guest (has its kernel gone?)")?;
        match kind {
            Kind::Out => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes).and_then(|()| out.flush()).doing(printing)?;
            }
            Kind::Err => io::stderr().write_all(&bytes).doing(printing)?,
            Kind::Exit => return wire::parse_json(&bytes).doing("reading how the shell ended"),
            _ => {
                let why = String::from_utf8_lossy(&bytes).into_owned();
                return Err(LabError::Refused { who: "labd".into(), why });
            }
        }
    }
}

fn send_keys(to: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match io::stdin().read(&mut buffer)? {
            0 => return wire::send(to, Kind::End, &[]),
            read => wire::send(to, Kind::Data, &buffer[..read])?,
        }
    }
}

/// Rows and columns of our terminal.
fn size() -> (u16, u16) {
    const USUAL: (u16, u16) = (24, 80);
    let asked = Command::new("stty").arg("size").stdin(Stdio::inherit()).output();
    let Ok(answer) = asked else { return USUAL };
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(rows), Some(columns)) if rows > 0 && columns > 0 => (rows, columns),
        _ => USUAL,
    }
}

/// Our terminal passes every key on, ^C too, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).doing("asking the terminal for its settings")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).doing("setting the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Without a terminal there is nothing to restore.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
