//! `baton-init`: process 1 of an initramfs that `baton mkinitrd` made.
//!
//! ```text
//! mount /proc /sys /dev /run ─► load modules ─► lo up ─► batond ─ READY=1 ─► services, programs ─► reap for ever
//!                                    signal: halt, power off, restart ─► SIGTERM to everybody ─► sync ─► reboot(2)
//! ```
//! It knows no roles: batond finds out by the command line whether this kernel is a successor. Its own messages go to
//! /dev/kmsg, because a successor's terminal has no interrupt (see DESIGN.md, traps).

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kexec_core::cmdline::control_block_of;
use kexec_core::cmdline::words::Line;
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, wait, waitpid};
use nix::unistd::{Pid, User, pause};
use tokio::signal::unix::{SignalKind, signal};

use crate::daemon::config::Config;
use crate::machine::net::Netlink;
use crate::services::access;
use crate::userland::modules::name_of;

/// Where the module loader looks for the list that `baton mkinitrd` wrote: one path a line, and its options, in the order to load.
pub const MODULE_LIST: &str = "/etc/baton/modules.RELEASE";
/// Where batond says that it is ready (sd_notify(3)).
const NOTIFY_SOCKET: &str = "/run/baton/init.notify";
/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h: the kernel unpacks the file itself.
const COMPRESSED: ModuleInitFlags = ModuleInitFlags::from_bits_retain(4);
/// How long batond may take to be ready before everything else is started without it. (It ends sooner where it cannot begin, and
/// then nothing says READY.)
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

/// How long programs may take to end before they are killed, when the machine ends.
const ENDING_PATIENCE: Duration = Duration::from_secs(10);
/// Set when the machine ends: how, and whom to tell when the last program has ended.
static ENDING: OnceLock<mpsc::Sender<()>> = OnceLock::new();

/// Brings user space up and never returns, but for an error that leaves nothing to run.
pub fn run() -> Result<()> {
    mount_all()?;
    obey_signals()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    say(&format!("baton-init on {release}"));
    load_modules(release)?;
    Netlink::open()?.up("lo")?;

    let config_path = Path::new(crate::daemon::config::DEFAULT_PATH);
    let config = Config::load(config_path)?;
    let mut children = HashMap::new();
    start_agent(&mut children)?;
    for service in &config.service {
        let launcher = ["/usr/sbin/baton", "run", &service.name, "--"].map(str::to_owned);
        let launcher: &[String] = if service.fd_store { &launcher } else { &[] };
        let exec = [launcher, &service.exec].concat();
        match service.user.as_deref().map(as_user).transpose() {
            Ok(user) => start(&service.name, &exec, &[], user, &mut children)?,
            // Without it the update is undone, which says who is missing; this machine must not end for it.
            Err(error) => say(&format!("baton-init: {}: {error:#}", service.name)),
        }
    }
    for program in &config.program {
        start(&program.name, &program.exec, &[], None, &mut children)?;
    }
    reap(&children)
}

/// Says something where it is seen on every kernel: in the kernel's log.
pub fn say(text: &str) {
    say_as(NOTICE, text);
}

/// Levels of syslog(2).
const ERROR: u8 = 3;
const NOTICE: u8 = 5;

fn say_as(level: u8, text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one record; nothing useful can be done when there is no log.
        let _ = log.write_all(format!("<{level}>{text}\n").as_bytes());
    }
}

/// Ends the machine: process 1 cannot go on. The reason is in the kernel's log.
pub fn give_up(error: &anyhow::Error) -> ! {
    say_as(ERROR, &format!("baton-init: {error:#}"));
    nix::unistd::sync();
    // A successor's module keeps the machine of its incumbent from ending with it; without the module nothing would.
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let alone = control_block_of(&cmdline).is_some() && !Path::new("/proc/multikernel").exists();
    end(if alone { RebootMode::RB_HALT_SYSTEM } else { RebootMode::RB_POWER_OFF })
}

fn end(how: RebootMode) -> ! {
    match reboot(how) {
        Ok(never) => match never {},
        Err(_) => std::process::exit(1),
    }
}

/// As BusyBox's init: SIGUSR1 halts the machine, SIGUSR2 powers it off, SIGTERM restarts it, each after the programs have ended in
/// order. So `halt`, `poweroff` and `reboot` work, and batond when the power button is pressed.
fn obey_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listening = || -> Result<_> {
        let _entered = runtime.enter();
        let [halt, power_off, restart] =
            [SignalKind::user_defined1(), SignalKind::user_defined2(), SignalKind::terminate()].map(signal);
        Ok((halt?, power_off?, restart?))
    };
    let (mut halt, mut power_off, mut restart) = listening().context("cannot wait for signals")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let how = runtime.block_on(async {
            tokio::select! {
                _ = halt.recv() => RebootMode::RB_HALT_SYSTEM,
                _ = power_off.recv() => RebootMode::RB_POWER_OFF,
                _ = restart.recv() => RebootMode::RB_AUTOBOOT,
            }
        });
        say(&format!("baton-init: the machine ends: {how:?}"));
        let (sender, ended) = mpsc::channel();
        // It is set only here, and the machine ends only once: that it is set already cannot be.
        let _ = ENDING.set(sender);
        // Everybody but process 1. There may be nobody left.
        let everybody = Pid::from_raw(-1);
        let _ = kill(everybody, Signal::SIGTERM);
        // Where no child is left already, no SIGCHLD will come that could end the wait.
        let none_left = waitpid(None, Some(WaitPidFlag::WNOHANG)) == Err(Errno::ECHILD);
        if !none_left && ended.recv_timeout(ENDING_PATIENCE).is_err() {
            say(&format!("baton-init: not everybody ended in {ENDING_PATIENCE:?}: the rest is killed"));
            let _ = kill(everybody, Signal::SIGKILL);
        }
        nix::unistd::sync();
        end(how)
    })?;
    Ok(())
}

fn mount_all() -> Result<()> {
    let table = [
        ("proc", "/proc", "proc"),
        ("sysfs", "/sys", "sysfs"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("tmpfs", "/run", "tmpfs"),
        ("devpts", "/dev/pts", "devpts"),
        ("debugfs", "/sys/kernel/debug", "debugfs"),
    ];
    for (source, target, kind) in table {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {target}"))?;
    }
    fs::create_dir_all("/run/baton")?;
    // Only programs of the fd store need it, and their start says so: a kernel without cgroups does for everything else.
    if let Err(error) = mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), None::<&str>) {
        say(&format!("baton-init: no cgroups: {error}"));
    }
    Ok(())
}

fn load_modules(release: &str) -> Result<()> {
    let list = PathBuf::from(MODULE_LIST.replace("RELEASE", release));
    let Ok(text) = fs::read_to_string(&list) else {
        say(&format!("no {}: no modules are loaded", list.display()));
        return Ok(());
    };
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (path, options) = line.split_once(' ').unwrap_or((line, ""));
        let file = File::open(path).with_context(|| format!("cannot open module {path}"))?;
        let options = format!("{options} {}", options_of(&cmdline, &name_of(path)));
        // What `baton mkinitrd` packs is unpacked already. Others may have packed this initrd.
        let flags = if path.ends_with(".ko") { ModuleInitFlags::empty() } else { COMPRESSED };
        match finit_module(&file, &CString::new(options.trim())?, flags) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => bail!("cannot load module {path}: {errno}"),
        }
    }
    Ok(())
}

/// What the kernel's command line says for a module that is not built in (`module.parameter=value`): whoever loads it passes it on.
fn options_of(cmdline: &str, module: &str) -> String {
    let line = Line::parse(cmdline);
    let own = line.words.iter().filter_map(|word| {
        let (name, parameter) = word.param.split_once('.')?;
        (name.replace('-', "_") == module).then(|| match word.value {
            Some(value) if value.contains(char::is_whitespace) => format!("{parameter}=\"{value}\""),
            Some(value) => format!("{parameter}={value}"),
            None => parameter.to_owned(),
        })
    });
    own.collect::<Vec<_>>().join(" ")
}

fn start_agent(children: &mut HashMap<i32, String>) -> Result<()> {
    let ready = UnixDatagram::bind(NOTIFY_SOCKET)?;
    start("batond", &["/usr/sbin/batond".to_owned()], &[("NOTIFY_SOCKET", NOTIFY_SOCKET)], None, children)?;
    ready.set_read_timeout(Some(AGENT_PATIENCE))?;
    let mut buffer = [0u8; 512];
    loop {
        match ready.recv(&mut buffer) {
            Ok(n) if buffer[..n].split(|b| *b == b'\n').any(|l| l == b"READY=1") => return Ok(()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                say(&format!(
                    "baton-init: batond is not ready after {AGENT_PATIENCE:?}: everything else is started without it"
                ));
                return Ok(());
            }
            Err(error) => return Err(error).context("cannot hear from batond"),
        }
    }
}

/// A user and the group to run with: that of batond's socket, else the user's own.
fn as_user(user: &str) -> Result<(u32, u32)> {
    let uid = access::uid_of(user).with_context(|| format!("there is no user {user} here"))?;
    let own_group = || User::from_uid(uid.into()).ok().flatten().map(|user| user.gid.as_raw());
    Ok((uid, access::group().or_else(own_group).unwrap_or(uid)))
}

fn start(
    name: &str,
    exec: &[String],
    env: &[(&str, &str)],
    user: Option<(u32, u32)>,
    children: &mut HashMap<i32, String>,
) -> Result<()> {
    let (program, arguments) = exec.split_first().context("nothing to run")?;
    let log =
        || -> Stdio { OpenOptions::new().write(true).open("/dev/kmsg").map_or_else(|_| Stdio::null(), Stdio::from) };
    let mut command = Command::new(program);
    if let Some((uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    let child: Child = command
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(log())
        .stderr(log())
        .spawn()
        .with_context(|| format!("cannot start {name} ({program})"))?;
    children.insert(child.id().cast_signed(), name.to_owned());
    Ok(())
}

fn reap(children: &HashMap<i32, String>) -> Result<()> {
    loop {
        let status = match wait() {
            Err(Errno::EINTR) => continue,
            // The last program has ended. The machine does not, unless it was told to: its kernel serves files, packets, and whoever
            // logs in next.
            Err(Errno::ECHILD) => {
                match ENDING.get() {
                    // Whoever waits for this ends the machine; or it ends already.
                    Some(ending) => drop(ending.send(())),
                    None => say("baton-init: no program is left"),
                }
                loop {
                    pause();
                }
            }
            status => status?,
        };
        let Some(pid) = status.pid() else { continue };
        if let Some(name) = children.get(&pid.as_raw()) {
            let end = match status {
                WaitStatus::Exited(_, code) => format!("ended with code {code}"),
                WaitStatus::Signaled(_, signal, _) => format!("was killed by {signal}"),
                _ => continue,
            };
            say(&format!("baton-init: {name} (pid {pid}) {end}"));
        }
    }
}
