//! Finds QEMU and runs one firmware image to its end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::lab_tree::lab_tree;
use crate::script::PASSED;

/// Far beyond what any run takes (0.1-0.5 s alone, seconds on a busy host): a machine that is still there hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// The shape of a machine.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub cpu: &'static str,
    pub cpus: u32,
    pub mib: u32,
    /// More of QEMU's arguments; `-smp` among them replaces ours.
    pub more: &'static [&'static str],
    /// Commands for QEMU's monitor: one for each [`SIGNAL`] bytes that the image writes, when it has written them.
    pub monitor: &'static [&'static str],
}

/// So many bytes of output let the monitor have its next command.
pub const SIGNAL: usize = 8;

impl Default for Machine {
    fn default() -> Machine {
        Machine { cpu: "EPYC", cpus: 1, mib: 16, more: &[], monitor: &[] }
    }
}

/// `BATON_QEMU`, or the lab's.
fn command() -> Vec<String> {
    if let Some(words) = std::env::var_os("BATON_QEMU") {
        let words = words.into_string().expect("BATON_QEMU is text");
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        assert!(!words.is_empty(), "BATON_QEMU is set but empty");
        return words;
    }
    let tree = lab_tree();
    vec![
        "chroot".into(),
        tree.into_os_string().into_string().expect("the lab's path is text"),
        "qemu-system-x86_64".into(),
    ]
}

/// Runs the image until it ends the machine with [`PASSED`]; gives back what it wrote to the debug console.
///
/// # Panics
/// If it ends otherwise: another code, a reset (that is what a CPU's shutdown becomes), or not at all.
pub fn run(image: &[u8], machine: Machine) -> Vec<u8> {
    let command = command();
    // In a chroot only the tree's own files can be named, so the image has to be there.
    let root = match command[0].rsplit('/').next() {
        Some("chroot") => Path::new(&command[1]),
        _ => Path::new("/"),
    };
    let folder = if root == Path::new("/") { std::env::temp_dir() } else { root.join("tmp") };
    let mut file = tempfile::Builder::new()
        .prefix("baton-trampoline-")
        .tempfile_in(&folder)
        .unwrap_or_else(|e| panic!("no temporary file in {}: {e}", folder.display()));
    file.write_all(image).expect("the image is written");
    let inside = |path: &Path| Path::new("/").join(path.strip_prefix(root).expect("made under root"));
    let seen = inside(file.path());
    let sockets = tempfile::tempdir_in(&folder).expect("a folder for the monitor's socket");
    let socket = sockets.path().join("monitor");

    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", machine.cpu])
        .args(["-smp", &machine.cpus.to_string()])
        .args(["-m", &machine.mib.to_string()])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .args(["-debugcon", "stdio"])
        .args(["-monitor", &format!("unix:{},server=on,wait=off", inside(&socket).display())])
        .args(machine.more)
        .arg("-bios")
        .arg(&seen)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{} does not start: {e}", command.join(" ")));
    let reader = |mut pipe: Box<dyn Read + Send>, length: Arc<AtomicUsize>| {
        std::thread::spawn(move || {
            let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
            loop {
                match pipe.read(&mut piece)? {
                    0 => return std::io::Result::Ok(bytes),
                    len => bytes.extend_from_slice(&piece[..len]),
                }
                length.store(bytes.len(), Ordering::Release);
            }
        })
    };
    let written = Arc::new(AtomicUsize::new(0));
    let out = reader(Box::new(child.stdout.take().expect("piped")), written.clone());
    let err = reader(Box::new(child.stderr.take().expect("piped")), Arc::default());

    let started = Instant::now();
    let mut commands = machine.monitor.iter().zip(1..);
    let mut next = commands.next();
    let mut monitor: Option<UnixStream> = None;
    let status = loop {
        if let Some((command, signals)) = next
            && written.load(Ordering::Acquire) >= signals * SIGNAL
        {
            let to = monitor.get_or_insert_with(|| UnixStream::connect(&socket).expect("QEMU's monitor listens"));
            writeln!(to, "{command}").expect("QEMU's monitor listens");
            next = commands.next();
        }
        match child.try_wait().expect("QEMU is our child") {
            Some(status) => break Some(status),
            None if started.elapsed() > LIMIT => {
                child.kill().expect("QEMU is our child");
                child.wait().expect("QEMU is our child");
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let out = out.join().expect("reader").expect("stdout of QEMU");
    let err = err.join().expect("reader").expect("stderr of QEMU");
    let passed = (PASSED * 2 + 1) as i32;
    match status.map(|status| status.code()) {
        Some(Some(code)) if code == passed => out,
        Some(Some(0)) => panic!("a CPU of {machine:?} shut down (triple fault)"),
        Some(code) => panic!("{machine:?} ended with {code:?}: {}", String::from_utf8_lossy(&err)),
        None => panic!("{machine:?} still ran after {LIMIT:?}; it had written {out:x?}"),
    }
}

/// Takes a value off the front of a run's output.
pub fn take<T: zerocopy::FromBytes>(out: &mut &[u8]) -> T {
    let (value, rest) = T::read_from_prefix(out)
        .unwrap_or_else(|_| panic!("the run's output ends {} bytes before its time", size_of::<T>() - out.len()));
    *out = rest;
    value
}
