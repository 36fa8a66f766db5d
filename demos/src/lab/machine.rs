//! A machine: a QEMU process inside an [`Inside`], its serial logs, and its end.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cache;
use super::error::{Doing, LabError, Result};
use super::guest::Guest;
use super::hardware::Hardware;
use super::inside::{Door, Inside};
use super::net::{self, NICS, Nic};
use super::qmp::Qmp;
use super::serial::{NotSeen, Patience, Serial};
use super::tree::Tree;

/// Logs of this many machines are kept.
const RUNS_KEPT: usize = 30;
const PORTS: [&str; 2] = ["serial0", "serial1"];
const PID_FILE: &str = "qemu.pid";

/// A file that a machine boots from.
#[derive(Clone, Debug)]
pub enum BootFile {
    /// One that has a name.
    Named(PathBuf),
    /// One that was made for machines. It has no name, so nothing is left of it, however we end.
    Made(Arc<File>),
}

impl From<PathBuf> for BootFile {
    fn from(path: PathBuf) -> Self {
        Self::Named(path)
    }
}

impl From<File> for BootFile {
    fn from(file: File) -> Self {
        Self::Made(Arc::new(file))
    }
}

impl BootFile {
    /// A path at which this process can read it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Named(path) => path.clone(),
            Self::Made(file) => PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
        }
    }
}

/// QEMU's accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Emulation, one host thread a CPU.
    Tcg,
    /// The host's virtualisation.
    Kvm,
}

impl Accelerator {
    /// As QEMU wants to hear it.
    #[must_use]
    pub fn argument(self) -> &'static str {
        match self {
            Self::Tcg => "tcg,thread=multi",
            Self::Kvm => "kvm",
        }
    }

    /// As reports say it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }

    /// The CPU model that goes with it.
    #[must_use]
    pub fn cpu(self) -> &'static str {
        match self {
            Self::Tcg => "EPYC",
            Self::Kvm => "host",
        }
    }

    /// The one that reports call so.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Tcg, Self::Kvm].into_iter().find(|a| a.name() == name)
    }
}

/// What machine to make.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Virtual CPUs, 1 to 8.
    pub vcpus: u8,
    /// How they are arranged, as QEMU's `-smp` wants it behind their number: `sockets=1,cores=2,threads=2`. Empty: each is a socket.
    pub smp: String,
    /// Memory.
    pub memory_mib: u32,
    /// Kernel image.
    pub kernel: BootFile,
    /// Its initrd.
    pub initrd: BootFile,
    /// Its command line.
    pub cmdline: String,
    /// How many of the two NICs it has.
    pub nics: u8,
    /// QEMU's CPU model.
    pub cpu: String,
    /// What else it has.
    pub hardware: Hardware,
    /// How it is run.
    pub accelerator: Accelerator,
    /// Whether a reboot starts it again (with the same kernel and initrd) or ends it.
    pub reboots: bool,
    /// More words for QEMU's command line.
    pub extra: Vec<String>,
}

impl MachineSpec {
    /// Four CPUs, 2 GiB, two NICs, emulated.
    #[must_use]
    pub fn new(kernel: impl Into<BootFile>, initrd: impl Into<BootFile>) -> Self {
        Self {
            vcpus: 4,
            smp: String::new(),
            memory_mib: 2048,
            kernel: kernel.into(),
            initrd: initrd.into(),
            cmdline: "console=ttyS0 panic=-1".into(),
            nics: 2,
            cpu: Accelerator::Tcg.cpu().into(),
            hardware: Hardware::default(),
            accelerator: Accelerator::Tcg,
            reboots: false,
            extra: Vec::new(),
        }
    }

    /// Has it run by this accelerator, with the CPU model that goes with it.
    pub fn run_by(&mut self, accelerator: Accelerator) {
        self.accelerator = accelerator;
        self.cpu = accelerator.cpu().into();
    }

    fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(LabError::Refused { who: "the lab".into(), why });
        if !(1..=8).contains(&self.vcpus) {
            return refuse(format!("a machine has 1 to 8 CPUs, not {}", self.vcpus));
        }
        if usize::from(self.nics) > NICS.len() {
            return refuse(format!("a machine has at most {} NICs, not {}", NICS.len(), self.nics));
        }
        self.hardware.check(self.vcpus)
    }

    fn nics(&self) -> &'static [Nic] {
        &NICS[..usize::from(self.nics)]
    }

    /// QEMU's arguments. Kernel, initrd and sockets are in the run's folder, which QEMU sees as `/mnt`.
    fn arguments(&self) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |line: &str| words.extend(line.split(' ').map(str::to_owned));
        add("-nodefaults -no-user-config -display none -M q35 -S");
        let smp = if self.smp.is_empty() { String::new() } else { format!(",{}", self.smp) };
        add(&format!("-cpu {} -smp {}{smp} -m {}", self.cpu, self.vcpus, self.memory_mib));
        add(&format!("-accel {}", self.accelerator.argument()));
        add("-kernel /mnt/kernel -initrd /mnt/initrd");
        add("-chardev stdio,id=qmp,signal=off -qmp chardev:qmp");
        for port in PORTS {
            add(&format!("-chardev socket,id={port},path=/mnt/{port}.sock,server=on,wait=off -serial chardev:{port}"));
        }
        self.hardware.first(self.vcpus, self.memory_mib).iter().for_each(|word| add(word));
        for nic in self.nics() {
            let Nic { tap, mac, .. } = nic;
            let (port, place) = self.hardware.plug(nic);
            if let Some(port) = port {
                add(&format!("-device {port}"));
            }
            add(&format!("-netdev tap,id={tap},ifname={tap},script=no,downscript=no"));
            add(&format!("-device virtio-net-pci,netdev={tap},mac={mac},{place},disable-legacy=on,romfile="));
        }
        self.hardware.devices().iter().for_each(|word| add(word));
        if !self.reboots {
            add("-no-reboot");
        }
        words.extend(["-append".to_owned(), self.cmdline.clone()]);
        words.extend(self.extra.iter().cloned());
        words
    }
}

/// A running machine; dropped, it is gone, with its network.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    qmp: Qmp,
    serials: Vec<Serial>,
    run: Run,
    started: Instant,
    door: Door,
    // Last: QEMU must be gone before its namespaces go.
    inside: Inside,
}

impl Machine {
    /// Starts a machine with a network of its own.
    pub fn start(tree: &Tree, spec: &MachineSpec) -> Result<Self> {
        spec.check()?;
        let run = Run::begin()?;
        let folder = run.folder.as_path();
        link_or_copy(&spec.kernel.path(), &folder.join("kernel"))?;
        link_or_copy(&spec.initrd.path(), &folder.join("initrd"))?;
        spec.hardware.lay_out(folder)?;
        let (inside, door) = Inside::with_own_network(tree, folder)?;
        net::lay(&inside, spec.nics())?;

        let log_path = folder.join("qemu.log");
        let log = File::create(&log_path).doing(format_args!("creating {}", log_path.display()))?;
        let mut command: Command = inside.command("qemu-system-x86_64");
        // What is written to a disk lands in a file without a name in the run's folder.
        command.env("TMPDIR", "/mnt");
        command.args(spec.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut qemu = inside.spawn(command)?;
        let (Some(to), Some(from)) = (qemu.stdin.take(), qemu.stdout.take()) else {
            unreachable!("both were asked for as pipes");
        };
        // Paused until somebody listens on every port: no byte of a boot is lost.
        let controlled = Qmp::greet(to, from).and_then(|qmp| Ok((qmp, follow_ports(folder)?)));
        let (mut qmp, serials) = match controlled {
            Ok(both) => both,
            Err(why) => {
                let _ = qemu.kill();
                let status = qemu.wait().doing("waiting for QEMU")?;
                let said = fs::read_to_string(&log_path).unwrap_or_default();
                return Err(LabError::Program { program: "QEMU".into(), status, output: format!("{why}\n{said}") });
            }
        };
        qmp.execute("cont", Value::Null)?;
        fs::write(folder.join(PID_FILE), qemu.id().to_string()).doing("noting QEMU's process id")?;
        Ok(Self { qemu, qmp, serials, run, started: Instant::now(), door, inside })
    }

    /// Port 0 or 1.
    #[must_use]
    pub fn serial(&self, port: usize) -> &Serial {
        &self.serials[port]
    }

    /// Where its logs are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.run.folder
    }

    /// When its CPUs began to run.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Its network, and a place for client programs.
    #[must_use]
    pub fn inside(&self) -> &Inside {
        &self.inside
    }

    /// QEMU's control connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// QEMU's process id on the host.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// Waits for a text on a port, from a position on; the position behind it.
    pub fn wait_for(&self, port: usize, wanted: &str, from: usize, patience: Patience) -> Result<usize> {
        let began = Instant::now();
        self.serials[port].wait_for(wanted, from, patience).map_err(|why| match why {
            NotSeen::TimedOut => self.deadline(&format!("{wanted:?} on serial port {port}"), began.elapsed()),
            NotSeen::Closed => self.gone(&format!("waiting for {wanted:?} on serial port {port}")),
        })
    }

    /// The error for something that did not happen in time, with what the machine said last.
    #[must_use]
    pub fn deadline(&self, what: &str, waited: Duration) -> LabError {
        LabError::Deadline { what: what.into(), waited, logs: self.run.folder.clone(), tail: self.logs(40) }
    }

    fn gone(&self, doing: &str) -> LabError {
        LabError::MachineGone {
            doing: doing.into(),
            status: "QEMU has ended".into(),
            logs: self.run.folder.clone(),
            tail: self.logs(40),
        }
    }

    /// The ends of both serial logs and of QEMU's own, for a failure's message.
    #[must_use]
    pub fn logs(&self, lines: usize) -> String {
        let mut text = String::new();
        for (port, serial) in self.serials.iter().enumerate() {
            text += &format!("--- serial port {port}\n{}\n", serial.tail(lines));
        }
        let own = fs::read_to_string(self.run.folder.join("qemu.log")).unwrap_or_default();
        let own: Vec<_> = own.lines().filter(|l| !l.contains("TCG doesn't support requested feature")).collect();
        if !own.is_empty() {
            text += &format!("--- QEMU\n{}\n", own.join("\n"));
        }
        text
    }

    /// Waits until QEMU ends by itself (a guest that powers off, or reboots without leave to).
    pub fn wait_end(&mut self, patience: Patience) -> Result<()> {
        let began = Instant::now();
        match self.serials[0].wait_closed(patience) {
            Ok(()) => self.qemu.wait().map(drop).doing("waiting for QEMU"),
            Err(_) => Err(self.deadline("the machine's end", began.elapsed())),
        }
    }

    /// The kernel behind one of the machine's management addresses.
    #[must_use]
    pub fn guest(&self, address: Ipv4Addr) -> Guest {
        Guest::new(self.door.clone(), address)
    }

    /// The way into its network, for clients.
    #[must_use]
    pub fn door(&self) -> &Door {
        &self.door
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The newest machine that runs now, whichever lab started it: its logs and the way into its network.
pub fn running() -> Result<Option<(PathBuf, Door)>> {
    let runs = cache::root()?.join("runs");
    if !runs.exists() {
        return Ok(None);
    }
    for folder in all_runs(&runs)?.into_iter().rev() {
        let Ok(pid) = fs::read_to_string(folder.join(PID_FILE)) else { continue };
        // The file of a lab that was killed outlives its machine, and the number may be somebody else's by now.
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if let (true, Ok(pid)) = (name.starts_with("qemu-system"), pid.parse()) {
            return Ok(Some((folder, Door::of_process(pid)?)));
        }
    }
    Ok(None)
}

fn follow_ports(folder: &Path) -> Result<Vec<Serial>> {
    // A socket's path has 108 bytes at most, a cache folder's name may have more: go through the folder's descriptor.
    let dir = File::open(folder).doing(format_args!("opening {}", folder.display()))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    PORTS
        .iter()
        .map(|port| {
            let stream =
                UnixStream::connect(short.join(format!("{port}.sock"))).doing(format_args!("connecting to {port}"))?;
            Serial::follow(stream, &folder.join(format!("{port}.log")))
        })
        .collect()
}

/// A machine's folder below `…/baton/runs`: logs, which stay, and what QEMU needs, which goes.
#[derive(Debug)]
struct Run {
    folder: PathBuf,
}

impl Run {
    /// A new folder, named so that the newest sorts last and its lab can be told from the dead. The oldest make way.
    fn begin() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let runs = cache::root()?.join("runs");
        fs::create_dir_all(&runs).doing(format_args!("creating {}", runs.display()))?;
        let mut old = all_runs(&runs)?;
        for left_behind in old.iter().filter(|folder| !has_living_lab(folder)) {
            sweep(left_behind);
        }
        old.truncate(old.len().saturating_sub(RUNS_KEPT - 1));
        for stale in old.iter().filter(|folder| !has_living_lab(folder)) {
            // Another lab may remove the same one at the same time.
            let _ = fs::remove_dir_all(stale);
        }
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = runs.join(format!("{millis}-{}-{number}", std::process::id()));
        fs::create_dir(&folder).doing(format_args!("creating {}", folder.display()))?;
        Ok(Self { folder })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        sweep(&self.folder);
    }
}

/// Oldest first.
fn all_runs(runs: &Path) -> Result<Vec<PathBuf>> {
    let listing = fs::read_dir(runs).doing(format_args!("listing {}", runs.display()))?;
    let mut folders: Vec<_> = listing.filter_map(|e| e.ok().map(|e| e.path())).collect();
    folders.sort();
    Ok(folders)
}

fn has_living_lab(folder: &Path) -> bool {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    name.split('-').nth(1).is_some_and(|pid| Path::new("/proc").join(pid).exists())
}

/// Removes all but the logs.
fn sweep(folder: &Path) {
    let Ok(listing) = fs::read_dir(folder) else { return };
    for path in listing.filter_map(|e| e.ok().map(|e| e.path())) {
        if path.extension().is_none_or(|e| e != "log") {
            // Another lab may sweep at the same time.
            let _ = fs::remove_file(path);
        }
    }
}

/// Another name for a file, or a copy of it where that cannot be had.
pub(super) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop)).doing(format_args!(
        "copying {} to {}",
        from.display(),
        to.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_machines_are_refused() {
        let spec =
            |vcpus, nics| MachineSpec { vcpus, nics, ..MachineSpec::new(PathBuf::from("k"), PathBuf::from("i")) };
        assert!(spec(4, 2).check().is_ok());
        assert!(spec(0, 2).check().unwrap_err().to_string().contains("1 to 8 CPUs, not 0"));
        assert!(spec(9, 2).check().is_err());
        assert!(spec(2, 3).check().is_err());
    }

    #[test]
    fn arguments_keep_a_command_line_in_one_word() {
        let mut spec = MachineSpec::new(PathBuf::from("k"), PathBuf::from("i"));
        spec.cmdline = "console=ttyS0 quiet".into();
        let words = spec.arguments();
        assert_eq!(
            words.iter().position(|w| w == "-append").map(|at| words[at + 1].as_str()),
            Some("console=ttyS0 quiet")
        );
        assert!(words.iter().any(|w| w.contains("mac=52:54:00:77:00:0c") && w.contains("addr=0x4")));
        assert!(words.contains(&"-no-reboot".to_owned()));
    }

    #[test]
    fn nics_behind_root_ports_keep_their_hardware_addresses() {
        let mut spec = MachineSpec::new(PathBuf::from("k"), PathBuf::from("i"));
        spec.smp = "sockets=1,cores=2,threads=2".into();
        spec.hardware.root_ports = true;
        let words = spec.arguments();
        assert!(words.contains(&"4,sockets=1,cores=2,threads=2".to_owned()));
        let at = |wanted: &str| words.iter().position(|word| word.contains(wanted)).unwrap();
        assert!(at("pcie-root-port,id=port-tap1") < at("mac=52:54:00:77:00:0c,bus=port-tap1"));
    }
}
