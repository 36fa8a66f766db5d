//! `labd`: runs in a lab's machine, in every kernel of it, and does what the lab asks over TCP: run commands, send and store files (see
//! `demos::lab::wire`). For the lab's closed network only: it asks nobody who they are.

use std::fs::{self, File};
use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use agent::machine::liveupdate;
use demos::keeper::{self, Retrieved};
use demos::lab::wire::{self, Exit, Kind, Request};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Input for a command that is held here while the command does not read it.
const INPUT_HELD: usize = 1 << 20;
/// How long the lab may take to hang up once it has its answer.
const LINGER: Duration = Duration::from_secs(10);
/// Bytes read at once.
const PIECE: usize = 64 << 10;
/// Enough pieces to empty the largest pipe that an unprivileged program can have.
const DRAIN_READS: usize = 16;

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => listen(),
        ["keep", mib] => keeper::keep(mib.parse().map_err(io::Error::other)?),
        ["kept"] => {
            println!("{}", serde_json::to_string(&keeper::ask()?)?);
            Ok(())
        }
        ["wall"] => {
            let moment = agent::machine::clock::Moment::now().map_err(io::Error::other)?;
            println!("{} {}", moment.tsc, moment.unix_ns);
            Ok(())
        }
        ["luo", session, token] => luo(session, token.parse().map_err(io::Error::other)?),
        _ => Err(io::Error::new(
            ErrorKind::InvalidInput,
            "usage: labd | labd keep MIB | labd kept | labd luo SESSION TOKEN | labd wall",
        )),
    }
}

/// Retrieves a memfd that was handed over, and tells what is in it and where its pages are.
fn luo(session: &str, token: u64) -> io::Result<()> {
    let session = liveupdate::Session::retrieve(session)?;
    let (bytes, pages) = liveupdate::look(&session.file(token)?)?;
    session.finish()?;
    println!("{}", serde_json::to_string(&Retrieved { bytes, pages })?);
    Ok(())
}

fn listen() -> io::Result<()> {
    // Every address, also those that this kernel gets only later.
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, wire::PORT))?;
    println!("labd: listening on port {}", wire::PORT);
    for stream in listener.incoming() {
        // A client that went away between its SYN and now is no reason to end.
        let Ok(stream) = stream else { continue };
        thread::spawn(move || serve(stream));
    }
    Ok(())
}

fn serve(mut stream: TcpStream) {
    if let Err(why) = answer(&mut stream) {
        // Whoever is gone does not read it.
        let _ = wire::send(&mut stream, Kind::Failed, why.to_string().as_bytes());
    }
    // Closing while input is still unread would reset the connection and take the last frames with it.
    let hung_up = stream.shutdown(Shutdown::Write).and_then(|()| stream.set_read_timeout(Some(LINGER)));
    let mut rest = [0; PIECE];
    while hung_up.is_ok() && matches!(stream.read(&mut rest), Ok(1..)) {}
}

fn answer(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (kind, bytes) = wire::receive(stream)?;
    if kind != Kind::Request {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a request was expected, not {kind:?}")));
    }
    let exit = match wire::parse_json(&bytes)? {
        Request::Get { path } => get(stream, &path)?,
        Request::Put { path, mode } => put(stream, &path, mode)?,
        Request::Clock => clock(stream)?,
        Request::Run { argv, env, timeout_ms, terminal } => {
            let name = argv.join(" ");
            let running = start(&argv, env, terminal).map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
            let deadline = timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
            relay(stream, running, deadline)?
        }
    };
    wire::send_json(stream, Kind::Exit, &exit)
}

fn get(stream: &mut TcpStream, path: &str) -> io::Result<Exit> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Exit { code: Some(0), ..Exit::default() }),
            read => wire::send(stream, Kind::Data, &buffer[..read])?,
        }
    }
}

fn put(stream: &mut TcpStream, path: &str, mode: u32) -> io::Result<Exit> {
    let fresh = PathBuf::from(format!("{path}.labd-{}", stream.peer_addr()?.port()));
    let stored = (|| {
        let mut file = File::options().create(true).truncate(true).write(true).mode(mode).open(&fresh)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        while let (Kind::Data, bytes) = wire::receive(stream)? {
            file.write_all(&bytes)?;
        }
        fs::rename(&fresh, path)
    })();
    if stored.is_err() {
        // It may not even exist.
        let _ = fs::remove_file(&fresh);
    }
    stored.map(|()| Exit { code: Some(0), ..Exit::default() })
}

fn clock(stream: &mut TcpStream) -> io::Result<Exit> {
    while let (Kind::Data, _) = wire::receive(stream)? {
        wire::send(stream, Kind::Data, &agent::update::timeline::tsc().to_le_bytes())?;
    }
    Ok(Exit { code: Some(0), ..Exit::default() })
}

/// A command under way.
struct Running {
    /// Its process group, for the time-out.
    group: Pid,
    input: Input,
    outputs: Vec<(Kind, File)>,
    /// Closed when it has ended.
    end: PipeReader,
    waiter: JoinHandle<io::Result<ExitStatus>>,
}

fn start(argv: &[String], env: Vec<(String, String)>, terminal: Option<(u16, u16)>) -> io::Result<Running> {
    let (program, arguments) =
        argv.split_first().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "no program"))?;
    let (mut child, input, outputs) = match terminal {
        Some(size) => on_terminal(program, arguments, env, size)?,
        None => on_pipes(program, arguments, env)?,
    };
    for fd in input.iter().chain(outputs.iter().map(|(_, fd)| fd)) {
        let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    let group = Pid::from_raw(child.id().cast_signed());
    let (end, told) = io::pipe()?;
    let waiter = thread::spawn(move || {
        let status = child.wait();
        drop(told);
        status
    });
    let outputs = outputs.into_iter().map(|(kind, fd)| (kind, File::from(fd))).collect();
    Ok(Running { group, input: Input { pipe: input.map(File::from), ..Input::default() }, outputs, end, waiter })
}

type Started = (Child, Option<OwnedFd>, Vec<(Kind, OwnedFd)>);

fn on_pipes(program: &str, arguments: &[String], env: Vec<(String, String)>) -> io::Result<Started> {
    let mut command = Command::new(program);
    command.args(arguments).envs(env).process_group(0);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let input = child.stdin.take().map(OwnedFd::from);
    let out = child.stdout.take().map(|pipe| (Kind::Out, OwnedFd::from(pipe)));
    let err = child.stderr.take().map(|pipe| (Kind::Err, OwnedFd::from(pipe)));
    Ok((child, input, out.into_iter().chain(err).collect()))
}

/// A command on a pseudo-terminal. BusyBox's `setsid -c` makes it the controlling one, and the command the leader of its group.
fn on_terminal(
    program: &str,
    arguments: &[String],
    env: Vec<(String, String)>,
    size: (u16, u16),
) -> io::Result<Started> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave =
        File::options().read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits()).open(ptsname_r(&master)?)?;
    let (rows, columns) = (size.0.to_string(), size.1.to_string());
    Command::new("stty").args(["rows", &rows, "cols", &columns]).stdin(slave.try_clone()?).status()?;
    let mut command = Command::new("setsid");
    command.args(["-c", program]).args(arguments).envs(env);
    let child = command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave).spawn()?;
    let reader = master.as_fd().try_clone_to_owned()?;
    let writer = master.as_fd().try_clone_to_owned()?;
    Ok((child, Some(writer), vec![(Kind::Out, reader)]))
}

/// Carries input and output until the command ends. What it left in its pipes by then is still sent; what its children print later is
/// not: a daemon that a command starts does not keep the request open.
fn relay(stream: &mut TcpStream, mut running: Running, deadline: Option<Instant>) -> io::Result<Exit> {
    let mut received = Vec::new();
    let mut timed_out = false;
    loop {
        let happened = wait(stream, &running, deadline.filter(|_| !timed_out))?;
        if happened == Happened::default() {
            timed_out = deadline.is_some_and(|at| Instant::now() >= at);
            if timed_out {
                kill(running.group);
            }
            continue;
        }
        if happened.stream && !take_input(stream, &mut received, &mut running.input)? {
            kill(running.group);
            // Nobody is there to hear how it ended, but it must be waited for.
            let _ = running.waiter.join();
            return Err(ErrorKind::ConnectionAborted.into());
        }
        running.input.give();
        for (kind, output) in std::mem::take(&mut running.outputs) {
            if forward(stream, kind, &output, 1)? {
                running.outputs.push((kind, output));
            }
        }
        if happened.end {
            break;
        }
    }
    let status = running.waiter.join().map_err(|_| io::Error::other("the waiting thread panicked"))??;
    for (kind, output) in &running.outputs {
        forward(stream, *kind, output, DRAIN_READS)?;
    }
    Ok(Exit { code: status.code(), signal: status.signal(), timed_out })
}

fn kill(group: Pid) {
    // It may have ended by itself in this moment.
    let _ = killpg(group, Signal::SIGKILL);
}

/// Which ends have something to say; nothing at all after a time-out.
#[derive(Default, PartialEq, Eq)]
struct Happened {
    end: bool,
    stream: bool,
    pipes: bool,
}

fn wait(stream: &TcpStream, running: &Running, deadline: Option<Instant>) -> io::Result<Happened> {
    // Not read while the command does not keep up: TCP tells the sender.
    let stream_flags = if running.input.held.len() < INPUT_HELD { PollFlags::POLLIN } else { PollFlags::empty() };
    let mut fds = vec![PollFd::new(running.end.as_fd(), PollFlags::POLLIN), PollFd::new(stream.as_fd(), stream_flags)];
    if let Some(pipe) = running.input.pipe.as_ref().filter(|_| !running.input.held.is_empty()) {
        fds.push(PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
    }
    fds.extend(running.outputs.iter().map(|(_, output)| PollFd::new(output.as_fd(), PollFlags::POLLIN)));
    let timeout = deadline.map_or(PollTimeout::NONE, |at| {
        // Rounded up: woken a little late is woken once.
        let left = at.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
        i32::try_from(left).ok().and_then(|ms| PollTimeout::try_from(ms).ok()).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut fds, timeout) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(Happened::default()),
        Err(e) => return Err(e.into()),
    }
    let mut flags = fds.iter().map(|fd| fd.any().unwrap_or(false));
    let (end, stream) = (flags.next() == Some(true), flags.next() == Some(true));
    Ok(Happened { end, stream, pipes: flags.any(|flag| flag) })
}

/// Reads what the lab sent; false when it has hung up.
fn take_input(stream: &mut TcpStream, received: &mut Vec<u8>, input: &mut Input) -> io::Result<bool> {
    let mut buffer = [0; PIECE];
    match stream.read(&mut buffer) {
        Ok(0) | Err(_) => return Ok(false),
        Ok(read) => received.extend_from_slice(&buffer[..read]),
    }
    while let Some((kind, bytes)) = wire::take(received)? {
        match kind {
            Kind::Data => input.held.extend_from_slice(&bytes),
            Kind::End => input.complete = true,
            other => return Err(io::Error::new(ErrorKind::InvalidData, format!("{other:?} is no input"))),
        }
    }
    Ok(true)
}

/// Sends what a command printed, in at most so many pieces; false when there will be no more.
fn forward(stream: &mut TcpStream, kind: Kind, mut output: &File, pieces: usize) -> io::Result<bool> {
    let mut buffer = [0; PIECE];
    for _ in 0..pieces {
        match output.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(read) => wire::send(stream, kind, &buffer[..read])?,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(true),
            // A terminal that nobody has open any more says EIO.
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

/// A command's input on its way.
#[derive(Default)]
struct Input {
    /// None once it is closed.
    pipe: Option<File>,
    held: Vec<u8>,
    complete: bool,
}

impl Input {
    /// Writes what the command takes now; closes its end after the last byte.
    fn give(&mut self) {
        let Some(pipe) = &mut self.pipe else {
            self.held.clear();
            return;
        };
        match pipe.write(&self.held) {
            Ok(written) => drop(self.held.drain(..written)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            // The command does not want to read it.
            Err(_) => self.pipe = None,
        }
        if self.held.is_empty() && self.complete {
            self.pipe = None;
        }
    }
}
