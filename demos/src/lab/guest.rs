//! Speaking with a kernel in a machine, through the `labd` that runs on it: commands and files.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockRef, TcpKeepalive};

use super::error::{Doing, LabError, Result};
use super::inside::Door;
use super::wire::{self, Exit, FRAME_LIMIT, Kind, Request};

/// How long a guest may be silent on a connection before it is given up, beyond what the command itself may take.
const SILENCE: Duration = Duration::from_secs(60);
/// A kernel that is gone (rebooted, or its machine ended) answers no probe or answers with a reset. One that is only stopped for an
/// update, or starved by emulation, has half a minute.
const ALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(5)).with_interval(Duration::from_secs(2)).with_retries(12);
/// A command's time, unless the caller says otherwise.
const COMMAND_TIME: Duration = Duration::from_secs(120);

/// The kernel behind a management address.
#[derive(Clone, Debug)]
pub struct Guest {
    door: Door,
    address: SocketAddr,
}

/// How a command ended, and what it printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// Its end.
    pub exit: Exit,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Ran {
    /// Whether it exited with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.exit.code == Some(0)
    }

    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// One of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A command to be run in a guest.
#[derive(Clone, Debug)]
pub struct GuestCommand {
    guest: Guest,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    stdin: Vec<u8>,
    timeout: Duration,
}

/// The guest's clock beside ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// What its TSC read.
    pub tsc: u64,
    /// When, by our clock.
    pub at: Instant,
    /// How far the two may be apart.
    pub within: Duration,
}

/// How often a clock is asked; the quickest answer counts.
const CLOCK_READINGS: usize = 20;

/// A command under way. Dropped, it is killed, if its kernel is still there to do it.
#[derive(Debug)]
pub struct Begun {
    _stream: TcpStream,
}

impl Guest {
    /// The guest behind an address of the lab's network.
    #[must_use]
    pub fn new(door: Door, address: Ipv4Addr) -> Self {
        Self { door, address: SocketAddr::from((address, wire::PORT)) }
    }

    /// Waits until its `labd` answers. Nothing announces that (a successor has no console), so this tries until it succeeds.
    pub fn wait_ready(&self, patience: Duration) -> Result<()> {
        const PAUSE: Duration = Duration::from_millis(50);
        let began = Instant::now();
        loop {
            let left = patience.saturating_sub(began.elapsed());
            match self.connect(left.clamp(PAUSE, Duration::from_secs(1))) {
                Ok(_) => return Ok(()),
                Err(why) if left.is_zero() => {
                    return Err(why).doing(format_args!(
                        "waiting {:.0} s for labd at {}",
                        patience.as_secs_f64(),
                        self.address
                    ));
                }
                Err(_) => thread::sleep(PAUSE.min(left)),
            }
        }
    }

    /// Runs a command to its end; its output, whatever its exit code.
    pub fn run<S: AsRef<str>>(&self, argv: &[S]) -> Result<Ran> {
        self.command(argv).run()
    }

    /// Runs a command that must succeed; its standard output as text.
    pub fn check<S: AsRef<str>>(&self, argv: &[S]) -> Result<String> {
        self.command(argv).check()
    }

    /// A command, to be given more than arguments.
    #[must_use]
    pub fn command<S: AsRef<str>>(&self, argv: &[S]) -> GuestCommand {
        GuestCommand {
            guest: self.clone(),
            argv: argv.iter().map(|a| a.as_ref().to_owned()).collect(),
            env: Vec::new(),
            stdin: Vec::new(),
            timeout: COMMAND_TIME,
        }
    }

    /// Fetches a file.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        let request = Request::Get { path: path.to_owned() };
        self.ask(&request, &[], COMMAND_TIME, |kind, bytes| {
            if kind == Kind::Data {
                content.extend_from_slice(bytes);
            }
        })?;
        Ok(content)
    }

    /// Stores a file.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let request = Request::Put { path: path.to_owned(), mode };
        self.ask(&request, content, COMMAND_TIME, |_, _| {}).map(drop)
    }

    /// Reads its TSC. Of several answers the one that was quickest on its way counts: it was read in the middle of that way, give or take
    /// half of it.
    pub fn clock(&self) -> Result<Clock> {
        let speaking = format!("asking labd at {} for its clock", self.address);
        let mut stream = self.connect(SILENCE).doing(&speaking)?;
        stream.set_read_timeout(Some(SILENCE)).doing(&speaking)?;
        wire::send_json(&mut stream, Kind::Request, &Request::Clock).doing(&speaking)?;
        let mut reading = || {
            let asked = Instant::now();
            wire::send(&mut stream, Kind::Data, &[]).doing(&speaking)?;
            let (_, bytes) = wire::receive(&mut stream).doing(&speaking)?;
            let within = asked.elapsed() / 2;
            let tsc = bytes.try_into().map(u64::from_le_bytes).map_err(|bytes: Vec<u8>| LabError::Reply {
                from: format!("labd at {}", self.address),
                problem: format!("a clock has 8 bytes, not {}: {}", bytes.len(), bytes.escape_ascii()),
            })?;
            Ok(Clock { tsc, at: asked + within, within })
        };
        let mut best: Clock = reading()?;
        for _ in 1..CLOCK_READINGS {
            let next = reading()?;
            if next.within < best.within {
                best = next;
            }
        }
        wire::send(&mut stream, Kind::End, &[]).doing(&speaking)?;
        Ok(best)
    }

    /// A connection on which a request can be made by hand. It notices by itself when the kernel at the other end is gone.
    pub fn connect(&self, patience: Duration) -> io::Result<TcpStream> {
        let stream = self.door.connect(self.address, patience)?;
        SockRef::from(&stream).set_tcp_keepalive(&ALIVE)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn ask(
        &self,
        request: &Request,
        input: &[u8],
        timeout: Duration,
        mut each: impl FnMut(Kind, &[u8]),
    ) -> Result<Exit> {
        let speaking = format!("speaking with labd at {}", self.address);
        let mut stream = self.connect(SILENCE).doing(&speaking)?;
        stream.set_read_timeout(Some(timeout + SILENCE)).doing(&speaking)?;
        wire::send_json(&mut stream, Kind::Request, request).doing(&speaking)?;
        // Beside reading: a command that prints while it reads would block both ends otherwise.
        let mut sender = stream.try_clone().doing(&speaking)?;
        thread::scope(|scope| {
            scope.spawn(move || {
                // A command may end without reading its input; how it ended is told by the reply.
                let _ = send_input(&mut sender, input);
            });
            let last = loop {
                match wire::receive(&mut stream) {
                    Ok((Kind::Exit, bytes)) => break wire::parse_json(&bytes).doing(&speaking),
                    Ok((Kind::Failed, bytes)) => {
                        let why = String::from_utf8_lossy(&bytes).into_owned();
                        break Err(LabError::Refused { who: format!("labd at {}", self.address), why });
                    }
                    Ok((kind, bytes)) => each(kind, &bytes),
                    Err(why) => break Err(why).doing(&speaking),
                }
            };
            // The sender may still be busy with input that nobody wants any more; a dead connection is shut down already.
            let _ = stream.shutdown(Shutdown::Both);
            last
        })
    }
}

fn send_input(to: &mut impl Write, input: &[u8]) -> io::Result<()> {
    for part in input.chunks(FRAME_LIMIT) {
        wire::send(to, Kind::Data, part)?;
    }
    wire::send(to, Kind::End, &[])
}

impl GuestCommand {
    /// Adds to its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Its standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// When to kill it.
    #[must_use]
    pub fn timeout(mut self, time: Duration) -> Self {
        self.timeout = time;
        self
    }

    /// Runs it to its end.
    pub fn run(&self) -> Result<Ran> {
        let mut ran = Ran::default();
        ran.exit = self.stream(|stream, bytes| match stream {
            Stream::Out => ran.stdout.extend_from_slice(bytes),
            Stream::Err => ran.stderr.extend_from_slice(bytes),
        })?;
        Ok(ran)
    }

    /// Has it begun, and does not wait for its end: for a command that takes its own kernel away.
    pub fn begin(&self) -> Result<Begun> {
        let speaking = format!("speaking with labd at {}", self.guest.address);
        let mut stream = self.guest.connect(SILENCE).doing(&speaking)?;
        wire::send_json(&mut stream, Kind::Request, &self.request()).doing(&speaking)?;
        send_input(&mut stream, &self.stdin).doing(&speaking)?;
        Ok(Begun { _stream: stream })
    }

    fn request(&self) -> Request {
        Request::Run {
            argv: self.argv.clone(),
            env: self.env.clone(),
            timeout_ms: Some(u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX)),
            terminal: None,
        }
    }

    /// Runs it and insists on exit code 0; its standard output as text.
    pub fn check(&self) -> Result<String> {
        let ran = self.run()?;
        if ran.success() {
            return Ok(ran.text());
        }
        let why = format!("{} {}", ran.text().trim(), String::from_utf8_lossy(&ran.stderr).trim());
        let who = format!("`{}` in the guest at {}", self.argv.join(" "), self.guest.address.ip());
        Err(LabError::Refused { who, why: format!("{:?}: {}", ran.exit, why.trim()) })
    }

    /// Runs it and hands over its output as it comes.
    pub fn stream(&self, mut each: impl FnMut(Stream, &[u8])) -> Result<Exit> {
        self.guest.ask(&self.request(), &self.stdin, self.timeout, |kind, bytes| match kind {
            Kind::Out => each(Stream::Out, bytes),
            Kind::Err => each(Stream::Err, bytes),
            _ => {}
        })
    }
}
