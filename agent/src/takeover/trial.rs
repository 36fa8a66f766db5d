//! The candidate's side of a trial: what its agent says of the kernel it runs on, and the operator's commands.
//!
//! It only looks. What it found is judged by the incumbent (`update::trial::judge`), to whom all of it is hearsay.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kexec_core::device::{Access, Device};
use kexec_core::klog::record::escaped;
use kexec_core::memory_map::Range;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use state_schemas::arena::{ArenaHeader, HEADER_LEN};
use state_schemas::latest::message::{Attached, Counted, Ending, Examination, LiveUpdate, Text};
use state_schemas::shared::SharedMemory;

use crate::daemon::control::ServiceStatus;
use crate::daemon::kernel::Kernel;
use crate::machine::clock::Moment;
use crate::takeover::birth::{Birth, range};
use crate::userland::init::MODULE_LIST;
use crate::userland::modules::name_of;

/// So much of the end of what a command writes is kept, in bytes; what crosses is less.
const TAIL: usize = 900;
/// Where a command is looked for.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Looks at this kernel.
pub fn examine(kernel: &Kernel, birth: &Birth, device: &Device, sessions: bool) -> Result<Examination> {
    let statuses = kernel.services.status();
    let attached = birth.record.services.iter().map(|service| {
        let ranges = service.arenas.iter().filter_map(|id| birth.record.arenas.iter().find(|arena| arena.id == *id));
        let ranges: Vec<Range> = ranges.flat_map(|arena| arena.ranges.iter().map(|piece| range(*piece))).collect();
        let (mapped, trouble) = match attach(device, &ranges, service.schema_kind) {
            Ok(mapped) => (mapped, String::new()),
            Err(error) => (0, format!("{error:#}")),
        };
        let status = statuses.iter().find(|status| status.name == service.name);
        let of = |field: fn(&ServiceStatus) -> u32| status.map_or(0, field);
        Attached {
            name: service.name.clone().into(),
            state: status.map_or("absent".to_owned(), |status| status.state.to_string()).into(),
            schema_kind: of(|status| status.schema_kind),
            schema_version: of(|status| status.schema_version),
            mapped,
            trouble: trouble.into(),
        }
    });
    let services = attached.collect();
    let taint = fs::read_to_string("/proc/sys/kernel/tainted").context("cannot read the taint of this kernel")?;
    let now = Moment::now()?;
    Ok(Examination {
        cpus: device.cpus()?.into_iter().filter(|cpu| cpu.online).map(|cpu| cpu.apic_id).collect(),
        tsc: now.tsc,
        unix_ns: now.unix_ns,
        taint: taint.trim().parse().with_context(|| format!("the taint of this kernel reads {taint:?}"))?,
        services,
        modules: modules(kernel.release()),
        functions: functions(),
        live_update: if sessions { LiveUpdate::Opened } else { LiveUpdate::Absent },
    })
}

/// Maps an arena for reading only, every piece of it, and looks at its header: the incumbent's service writes it at the same time, so
/// only what never changes is compared. Gives the bytes that were mapped.
fn attach(device: &Device, ranges: &[Range], kind: u32) -> Result<u64> {
    let mut mapped = 0;
    for (n, piece) in ranges.iter().enumerate() {
        let memory = device.map(*piece, Access::ReadOnly).with_context(|| format!("{piece} cannot be mapped"))?;
        if n == 0 {
            let mut page = vec![0; usize::try_from(HEADER_LEN)?];
            anyhow::ensure!(memory.size() >= HEADER_LEN, "its first piece has {} bytes", memory.size());
            memory.read(0, &mut page);
            let header = ArenaHeader::read(&page)?;
            let header = header.alleged();
            let all: u64 = ranges.iter().map(|range| range.len()).sum();
            header.check_identity(all)?;
            anyhow::ensure!(
                header.schema_kind.get() == kind,
                "its header says kind {}, the record kind {kind}",
                header.schema_kind
            );
        }
        mapped += piece.len();
    }
    Ok(mapped)
}

/// The modules of the initrd's list, as far as `/proc/modules` or `/sys/module` know them.
fn modules(release: &str) -> Counted {
    let list = fs::read_to_string(MODULE_LIST.replace("RELEASE", release)).unwrap_or_default();
    let loaded = |name: &str| Path::new("/sys/module").join(name).exists();
    counted(list.lines().filter_map(|line| line.split_whitespace().next()).map(|path| {
        let name = name_of(path);
        (!loaded(&name)).then_some(name)
    }))
}

/// PCI functions that this kernel sees, bridges apart: it sees what it was given.
fn functions() -> Counted {
    let root = Path::new("/sys/bus/pci/devices");
    let found = fs::read_dir(root).into_iter().flatten().flatten();
    // Class 0x06: bridges, which need no driver.
    let devices = found.filter(|entry| {
        !fs::read_to_string(entry.path().join("class")).is_ok_and(|class| class.trim().starts_with("0x06"))
    });
    counted(devices.map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        (!entry.path().join("driver").exists()).then_some(name)
    }))
}

fn counted(all: impl Iterator<Item = Option<String>>) -> Counted {
    let all: Vec<Option<String>> = all.collect();
    let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
    Counted { count, wrong: all.into_iter().flatten().map(Text::from).collect() }
}

/// How a command ended, the end of what it wrote, and how long it took.
pub struct Ran {
    /// How.
    pub ending: Ending,
    /// Standard output and error, as they came; nothing in it commands a terminal.
    pub output: Text,
    /// In milliseconds.
    pub took_ms: u32,
}

/// Has a shell run a command, for as long as it may; then it is killed, with all of its process group.
pub fn run(command: &str, limit: Duration) -> Ran {
    let began = Instant::now();
    let (ending, output) = match run_by("/bin/sh", command, limit) {
        Ok(ran) => ran,
        Err(error) => (Ending::NotStarted { cause: format!("{error:#}").into() }, Vec::new()),
    };
    let took_ms = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
    Ran { ending, output: tail_of(&output), took_ms }
}

/// Cut at the front, where a text of its own accord would be cut at the end.
fn tail_of(output: &[u8]) -> Text {
    let text = escaped(output);
    Text::from(text[text.ceil_char_boundary(text.len().saturating_sub(TAIL))..].to_owned())
}

fn run_by(shell: &str, command: &str, limit: Duration) -> Result<(Ending, Vec<u8>)> {
    let (reader, writer) = io::pipe().context("no pipe")?;
    let both = writer.try_clone().context("no pipe")?;
    let mut child = Command::new(shell)
        .args(["-c", command])
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(both)
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {shell}"))?;
    let group = Pid::from_raw(child.id().cast_signed());
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("cannot read without waiting")?;
    let over = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
    let told = over.clone();
    let waiter = std::thread::Builder::new().name("check".into()).spawn(move || {
        let ended = child.wait();
        // It cannot fail: the count is far from its end.
        let _ = told.write(1);
        ended
    })?;
    let mut output = Tail { bytes: Vec::new(), reader };
    let until = Instant::now() + limit;
    let in_time = output.follow(&over, until)?;
    // Also what it has left behind in its group. (There may be nobody.)
    let _ = killpg(group, Signal::SIGKILL);
    let status =
        waiter.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("its end is unknown")?;
    // What is in the pipe by now; whoever has left the group and writes on is not waited for.
    output.take()?;
    let ending = if in_time { ending_of(status) } else { Ending::TimedOut };
    Ok((ending, output.bytes))
}

fn ending_of(status: ExitStatus) -> Ending {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Exited { code: code.cast_unsigned() },
        (None, signal) => Ending::Killed { signal: signal.unwrap_or(0).cast_unsigned() },
    }
}

/// The end of what comes out of a pipe, whatever comes: no more than twice [`TAIL`] is kept.
struct Tail {
    bytes: Vec<u8>,
    reader: io::PipeReader,
}

impl Tail {
    /// Reads until the process is over; says whether that was in time.
    fn follow(&mut self, over: &EventFd, until: Instant) -> Result<bool> {
        let mut open = true;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = vec![PollFd::new(over.as_fd(), PollFlags::POLLIN)];
            // A pipe without a writer is always ready.
            if open {
                fds.push(PollFd::new(self.reader.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot wait for it"),
            }
            let ended = fds[0].any().unwrap_or(false);
            drop(fds);
            if ended {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            open = open && self.take()?;
        }
    }

    /// What is there, at most a pipe full of it; says whether more may come.
    fn take(&mut self) -> Result<bool> {
        let mut buffer = [0; 4096];
        for _ in 0..64 {
            match self.reader.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(len) => self.keep(&buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read what it writes"),
            }
        }
        Ok(true)
    }

    fn keep(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
        if self.bytes.len() > 2 * TAIL {
            self.bytes.drain(..self.bytes.len() - TAIL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn ran(command: &str, limit: Duration) -> (Ending, String) {
        let Ran { ending, output, .. } = run(command, limit);
        (ending, output.as_str().to_owned())
    }

    #[test]
    fn each_way_to_end_is_told() {
        assert_eq!(ran("echo yes; echo no >&2", LONG), (Ending::Exited { code: 0 }, "yes\nno\n".into()));
        assert_eq!(ran("exit 3", LONG).0, Ending::Exited { code: 3 });
        assert_eq!(ran("no-such-command-at-all 2>/dev/null", LONG).0, Ending::Exited { code: 127 });
        assert_eq!(ran("kill -9 $$", LONG).0, Ending::Killed { signal: 9 });
        let (ending, output) = ran("echo begun; sleep 1000", Duration::from_millis(500));
        assert_eq!((ending, output.as_str()), (Ending::TimedOut, "begun\n"));
    }

    /// One that leaves a child behind with its output, or floods, is over when it ends; what it wrote last is kept.
    #[test]
    fn what_it_leaves_behind_is_not_waited_for() {
        let (ending, output) = ran("sleep 1000 & echo over", LONG);
        assert_eq!((ending, output.as_str()), (Ending::Exited { code: 0 }, "over\n"));
        let (ending, output) = ran("exec 2>&-; setsid sleep 3 & echo over", LONG);
        assert_eq!((ending, output.as_str()), (Ending::Exited { code: 0 }, "over\n"));
        let (ending, output) = ran("head -c 3000000 /dev/zero; printf '\\033[31mend'", LONG);
        assert_eq!(ending, Ending::Exited { code: 0 });
        assert!(output.ends_with("\\0\\u{1b}[31mend") && output.len() <= TAIL, "{} {output:?}", output.len());
        let (ending, _) = ran("exec >&- 2>&-; sleep 1000", Duration::from_millis(300));
        assert_eq!(ending, Ending::TimedOut);
    }

    #[test]
    fn without_a_shell_nothing_runs() {
        let error = run_by("/no/such/shell", "true", LONG).unwrap_err();
        assert!(format!("{error:#}").contains("cannot run /no/such/shell"));
    }
}
