//! `stranger UID[:GID] VERB…`: a program that knows how services speak with `batond`, and is none of the machine's: another user, or a service
//! that does what services should not. It says on stdout, a line each, what it was given and told.
//!
//! | verb | what it does |
//! |---|---|
//! | `hello NAME KIB` | asks for the arena of that name; overwrites it if it gets one |
//! | `mute NAME` | serves, and never answers the freeze |
//! | `serve NAME` | serves, freezes and goes on as it is told |
//! | `fork NAME` | serves; then the process that was known leaves, and its child goes on with arena and connection |
//! | `latecomers PREFIX COUNT` | as many services, one behind the other, each of which serves if it is told to |
//! | `crowd COUNT` | opens as many connections and says nothing on any |
//! | `knock` | tries every socket of `/run/baton` |

use std::io::{Write, stdout};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use baton_sdk::client::{Client, Order};
use baton_sdk::mapping::Arena;
use baton_sdk::protocol::{DEFAULT_SOCKET, Hello};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

/// What lies in its arenas: nothing that anybody knows.
const KIND: u32 = u32::from_le_bytes(*b"strg");
/// How long it waits for a place when the socket's queue is full: connect(2) of a Unix socket waits as long as it likes.
const CROWD_PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (uid, verb) = words.split_first().context("which user?")?;
    let (uid, gid) = uid.split_once(':').unwrap_or((uid, uid));
    become_user(uid.parse()?, gid.parse()?)?;
    match verb {
        ["hello", name, kib] => hello(name, kib.parse()?),
        ["mute", name] => mute(name),
        ["serve", name] => {
            let (agent, arena) = connect(name, 4)?;
            serve(name, agent, arena)
        }
        ["fork", name] => fork(name),
        ["latecomers", prefix, count] => latecomers(prefix, count.parse()?),
        ["crowd", count] => crowd(count.parse()?),
        ["knock"] => knock(),
        _ => bail!("see the source for what can be asked"),
    }
}

fn become_user(uid: u32, gid: u32) -> Result<()> {
    if uid != 0 {
        setgroups(&[])?;
        setgid(Gid::from_raw(gid))?;
        setuid(Uid::from_raw(uid))?;
    }
    Ok(())
}

fn say(text: &str) {
    // Whoever does not read any more has seen enough.
    let _ = writeln!(stdout(), "{text}").and_then(|()| stdout().flush());
}

fn connect(name: &str, kib: u64) -> Result<(Client, Arena)> {
    let (agent, arena) = Client::connect(DEFAULT_SOCKET.as_ref(), Hello::new(name, KIND, 1, kib << 10))?;
    say(&format!("{name}: given {} bytes", arena.len()));
    Ok((agent, arena))
}

fn hello(name: &str, kib: u64) -> Result<()> {
    let (mut agent, mut arena) = match connect(name, kib) {
        Ok(given) => given,
        Err(why) => {
            say(&format!("{name}: refused: {why:#}"));
            return Ok(());
        }
    };
    agent.ready()?;
    if let Some(Order::Serve(held)) = agent.wait(Some(Duration::from_secs(20)))? {
        arena.memory(&held).fill(0xee);
        say(&format!("{name}: overwritten"));
    }
    Ok(())
}

fn mute(name: &str) -> Result<()> {
    let (mut agent, _arena) = match connect(name, 4) {
        Ok(given) => given,
        Err(why) => {
            say(&format!("{name}: refused: {why:#}"));
            return Ok(());
        }
    };
    agent.ready()?;
    while let Some(order) = agent.wait(None)? {
        match order {
            Order::Serve(held) => {
                agent.activated(&held, 0, 0)?;
                say(&format!("{name}: serves"));
            }
            Order::Stop => break,
            Order::StandBy | Order::Freeze { .. } | Order::AgentIsBack => {}
        }
    }
    Ok(())
}

fn serve(name: &str, mut agent: Client, mut arena: Arena) -> Result<()> {
    agent.ready()?;
    let mut serving = None;
    while let Some(order) = agent.wait(None)? {
        match order {
            Order::StandBy => say(&format!("{name}: stands by")),
            Order::Serve(held) => {
                let count = &mut arena.memory(&held)[0];
                *count = count.wrapping_add(1);
                agent.activated(&held, 1, 0)?;
                say(&format!("{name}: serves in epoch {}", held.epoch));
                serving = Some(held);
            }
            Order::Freeze { .. } => {
                agent.frozen(serving.take().context("told to freeze while silent")?, 1, 0)?;
                say(&format!("{name}: frozen"));
            }
            Order::AgentIsBack => say(&format!("{name}: taken on")),
            Order::Stop => break,
        }
    }
    Ok(())
}

fn fork(name: &str) -> Result<()> {
    let (mut agent, arena) = connect(name, 4)?;
    agent.ready()?;
    let Some(Order::Serve(held)) = agent.wait(Some(Duration::from_secs(60)))? else {
        bail!("{name}: not told to serve")
    };
    agent.activated(&held, 1, 0)?;
    say(&format!("{name}: serves in epoch {}", held.epoch));
    // SAFETY:
    // 1. This program has one thread, so the child has no lock that nobody releases.
    #[expect(unsafe_code, reason = "there is no other way to become two processes")]
    let child = unsafe { nix::unistd::fork() }?;
    if child.is_parent() {
        say(&format!("{name}: its first process leaves"));
        return Ok(());
    }
    // The child has the arena mapped, and goes on with it for as long as it is let.
    let _keeps = (held, arena);
    loop {
        match agent.wait(None)? {
            Some(Order::Stop) | None => return Ok(()),
            Some(order) => say(&format!("{name}: its child hears {order:?}")),
        }
    }
}

fn latecomers(prefix: &str, count: u32) -> Result<()> {
    for number in 0..count {
        let name = format!("{prefix}-{number}");
        // A thread each: they live side by side as services do, and one that has to wait for its arena holds up no other.
        std::thread::spawn(move || {
            say(&format!("{name}: asks"));
            let ended = match connect(&name, 4) {
                Ok((agent, arena)) => serve(&name, agent, arena),
                Err(why) => return say(&format!("{name}: refused: {why:#}")),
            };
            if let Err(why) = ended {
                say(&format!("{name}: {why:#}"));
            }
        });
        std::thread::sleep(Duration::from_millis(50));
    }
    loop {
        std::thread::park();
    }
}

fn crowd(count: u32) -> Result<()> {
    let (done, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..count {
            // The receiver leaves when nothing comes any more.
            if done.send(UnixStream::connect(DEFAULT_SOCKET)).is_err() {
                return;
            }
        }
    });
    let mut held = Vec::new();
    let mut last = "all asked".to_owned();
    for _ in 0..count {
        match heard.recv_timeout(CROWD_PATIENCE) {
            Ok(Ok(stream)) => held.push(stream),
            Ok(Err(why)) => last = why.to_string(),
            Err(_) => {
                last = "no more are let in".to_owned();
                break;
            }
        }
    }
    say(&format!("crowd: {} connections of {count}; {last}", held.len()));
    loop {
        std::thread::park();
    }
}

fn knock() -> Result<()> {
    for entry in std::fs::read_dir("/run/baton").context("listing /run/baton")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "sock") {
            say(&format!("{}: {}", path.display(), knock_at(&path)));
        }
    }
    Ok(())
}

fn knock_at(path: &Path) -> String {
    match UnixStream::connect(path) {
        Ok(_) => "opens".to_owned(),
        Err(why) => format!("refused: {why}"),
    }
}
