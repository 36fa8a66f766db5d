//! The stage of every story: a machine with a stock kernel, the demo service on it, and a lab's-eye view of both kernels.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use agent::daemon::config::{Config, Service, Update};
use agent::daemon::control::{ServiceState, Status};
use anyhow::{Context, Result, bail};

use crate::lab::guest::{GuestCommand, Ran, Stream};
use crate::lab::net::{NICS, SERVICE};
use crate::lab::serial::NotSeen;
use crate::lab::server::{self, Server};
use crate::lab::{Guest, Hardware, Kernel, Lab, Machine, MachineSpec, Patience, incumbent};

/// Where the demo service answers.
pub const SERVICE_PORT: u16 = 6379;

/// The service's address and port.
pub fn service() -> SocketAddr {
    SocketAddr::from((SERVICE, SERVICE_PORT))
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// How its agent makes updates.
    pub update: Update,
    /// What runs on it.
    pub services: Vec<Service>,
    /// Modules that its kernels load beside those that every machine of the lab needs.
    pub modules: Vec<String>,
    /// Modules that only the incumbent loads: for what it has and a successor does not get.
    pub incumbent_modules: Vec<String>,
    /// How many of the two NICs it has.
    pub nics: u8,
    /// QEMU's CPU model, if not the one that goes with the accelerator.
    pub cpu: Option<String>,
    /// How the CPUs are arranged, as QEMU's `-smp` wants it behind their number: `sockets=1,cores=2,threads=2`. Empty: each is a socket.
    pub smp: String,
    /// What else it has.
    pub hardware: Hardware,
    /// More words for the incumbent's command line.
    pub cmdline: String,
    /// More words for each successor's. Of a word that is given twice the kernel takes the last.
    pub successor_cmdline: String,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            vcpus: 4,
            memory_mib: 3072,
            update: Update::default(),
            services: vec![incumbent::demo_service()],
            cmdline: String::new(),
            successor_cmdline: String::new(),
            modules: Vec::new(),
            incumbent_modules: Vec::new(),
            nics: 2,
            cpu: None,
            smp: String::new(),
            hardware: Hardware::default(),
        }
    }
}

impl Shape {
    /// Makes a machine's hardware of this shape.
    pub fn apply(&self, spec: &mut MachineSpec) {
        spec.vcpus = self.vcpus;
        spec.smp.clone_from(&self.smp);
        spec.memory_mib = self.memory_mib;
        spec.nics = self.nics;
        spec.hardware = self.hardware.clone();
        if let Some(cpu) = &self.cpu {
            spec.cpu.clone_from(cpu);
        }
    }
}

/// The configuration of the lab's machines.
pub fn config(shape: &Shape) -> Config {
    let mut config = incumbent::configuration();
    config.service = shape.services.clone();
    config.network.nic.truncate(shape.nics.into());
    config.initrd.modules.extend(shape.modules.clone());
    config.update = shape.update.clone();
    config
}

/// A machine that runs, and which of its NICs (and serial ports) the serving kernel has.
pub struct Stage {
    /// The machine.
    pub machine: Machine,
    /// Index into [`NICS`] of the serving kernel's NIC; serial ports alternate alike.
    pub serving: usize,
    successor_cmdline: String,
}

/// How an upgrade ended.
pub enum Upgraded {
    /// It failed, or was never begun; the old kernel serves.
    Refused(Ran),
    /// The new kernel has the whole machine.
    Drained(Box<Status>),
}

/// What a successor's agent logs when the machine is its own.
const DRAINED: &str = "drained: this kernel has the machine";
/// How long the serial port is watched before the command is looked at again.
const LOOK: Duration = Duration::from_millis(100);
/// How long a whole update may take, on a busy host.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(300);

impl Stage {
    /// The machine to be started for a story.
    pub fn spec(lab: &Lab, kernel: &Kernel, shape: &Shape) -> Result<MachineSpec> {
        let mut spec = lab.incumbent(kernel, &config(shape), &shape.incumbent_modules)?;
        shape.apply(&mut spec);
        spec.cmdline = format!("{} {}", cmdline(0), shape.cmdline);
        Ok(spec)
    }

    /// The same for a Debian server ([`server`]), whose disks come before those of the shape.
    pub fn server_spec(lab: &Lab, kernel: &Kernel, shape: &Shape, server: &Server) -> Result<MachineSpec> {
        let mut spec = server::spec(lab, kernel, &server::configuration(&config(shape)), server)?;
        let mut disks = std::mem::take(&mut spec.hardware.disks);
        shape.apply(&mut spec);
        disks.append(&mut spec.hardware.disks);
        spec.hardware.disks = disks;
        spec.cmdline = format!("root=/dev/vda {} {}", cmdline(0), shape.cmdline);
        Ok(spec)
    }

    /// Starts a machine.
    pub fn start(lab: &Lab, spec: &MachineSpec, shape: &Shape) -> Result<Stage> {
        Ok(Stage { machine: lab.start(spec)?, serving: 0, successor_cmdline: shape.successor_cmdline.clone() })
    }

    /// Starts a machine and waits until its service answers.
    pub fn open(lab: &Lab, kernel: &Kernel, shape: &Shape) -> Result<Stage> {
        let stage = Stage::start(lab, &Stage::spec(lab, kernel, shape)?, shape)?;
        stage.await_serving()?;
        Ok(stage)
    }

    /// Waits until the serving kernel's service answers.
    pub fn await_serving(&self) -> Result<()> {
        let guest = self.guest();
        guest.wait_ready(Patience::BOOT.total)?;
        let deadline = Instant::now() + Patience::BOOT.total;
        loop {
            let status = self.status();
            if let Ok(status) = &status
                && !status.services.is_empty()
                && status.services.iter().all(|service| service.state == ServiceState::Serving)
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the service does not serve: {status:?}\n{}", self.machine.logs(60));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until a server's systemd has started everything, and nothing has failed.
    pub fn await_started(&self) -> Result<()> {
        let wait = ["systemctl", "is-system-running", "--wait"];
        let ran = self.guest().command(&wait).timeout(Patience::BOOT.total).run()?;
        if ran.text().trim() != "running" {
            let failed = self.guest().check(&["sh", "-c", "systemctl --failed; journalctl -b -p err -n 50"])?;
            bail!("the server is {}: {failed}\n{}", ran.text().trim(), self.machine.logs(60));
        }
        Ok(())
    }

    /// The serving kernel.
    pub fn guest(&self) -> Guest {
        self.machine.guest(self.address(self.serving))
    }

    fn address(&self, nic: usize) -> Ipv4Addr {
        NICS[nic].address
    }

    /// `baton status` of the serving kernel.
    pub fn status(&self) -> Result<Status> {
        status_of(&self.guest())
    }

    /// `baton upgrade` to this kernel. It ends in one of two ways: the command fails, and the old kernel goes on; or the new
    /// kernel says on its serial port that the machine is its own, and is looked at from then on. (The command's success is
    /// not waited for: the kernel that would tell of it leaves.)
    pub fn upgrade(&mut self, release: &str, more: &[&str]) -> Result<Upgraded> {
        let image = format!("/boot/vmlinuz-{release}");
        self.upgrade_with(&["--kernel", &image], more)
    }

    /// The same with any arguments; `--cmdline` is given already.
    pub fn upgrade_with(&mut self, image: &[&str], more: &[&str]) -> Result<Upgraded> {
        self.upgrade_telling(image, more, &mut |_| {})
    }

    /// The same, and tells each line of `baton upgrade`: phase and step.
    pub fn upgrade_telling(&mut self, image: &[&str], more: &[&str], tell: &mut dyn FnMut(&str)) -> Result<Upgraded> {
        let port = 1 - self.serving;
        let line = format!("{} {}", cmdline(port), self.successor_cmdline);
        let mut words = vec!["baton", "upgrade", "--json", "--cmdline", &line];
        words.extend(image.iter().chain(more));
        let command = self.guest().command(&words).timeout(UPGRADE_PATIENCE);
        let seen = self.machine.serial(port).position();
        let (end, ended) = mpsc::channel();
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || end.send(run_telling(&command, &line)));
        let deadline = Instant::now() + UPGRADE_PATIENCE;
        loop {
            lines.try_iter().for_each(|line: String| tell(line.trim()));
            match ended.try_recv() {
                Ok(Ok(ran)) if !ran.success() => return Ok(Upgraded::Refused(ran)),
                _ => {}
            }
            match self.machine.serial(port).wait_for(DRAINED, seen, Patience::of(LOOK)) {
                Ok(_) => {
                    self.serving = port;
                    return Ok(Upgraded::Drained(Box::new(self.status()?)));
                }
                Err(NotSeen::Closed) => bail!("the machine ended\n{}", self.machine.logs(60)),
                Err(NotSeen::TimedOut) if Instant::now() > deadline => {
                    bail!("the update did not end\n{}", self.machine.logs(60));
                }
                Err(NotSeen::TimedOut) => {}
            }
        }
    }
}

/// Runs a command to its end, handing over the lines of its standard error as they come.
fn run_telling(command: &GuestCommand, lines: &mpsc::Sender<String>) -> crate::lab::Result<Ran> {
    let mut ran = Ran::default();
    let mut told = 0;
    ran.exit = command.stream(|stream, bytes| match stream {
        Stream::Out => ran.stdout.extend_from_slice(bytes),
        Stream::Err => {
            ran.stderr.extend_from_slice(bytes);
            while let Some(len) = ran.stderr[told..].iter().position(|b| *b == b'\n') {
                // Whoever listened may have seen enough.
                let _ = lines.send(String::from_utf8_lossy(&ran.stderr[told..told + len]).into_owned());
                told += len + 1;
            }
        }
    })?;
    Ok(ran)
}

/// The kernels of one machine take the serial ports by turns, so that each log is one kernel's at a time.
///
/// `noreplace-smp`, `lpj`: a kernel that started with one CPU rewrites its own code when the second comes, and each CPU times a delay loop
/// that nobody uses where there is a TSC. In emulation on a busy host, bringing a CPU online took a successor 155 to 689 ms without both, and
/// 129 to 343 ms with them, in runs too noisy to say more. They are given to every kernel, whichever way it comes.
pub fn cmdline(port: usize) -> String {
    let online = "noreplace-smp lpj=10000000";
    format!("console=ttyS{port},115200 printk.devkmsg=on panic=-1 {online}")
}

/// `baton status` of a kernel.
pub fn status_of(guest: &Guest) -> Result<Status> {
    let text = guest.command(&["baton", "status", "--json"]).timeout(Duration::from_secs(20)).check()?;
    serde_json::from_str(&text).with_context(|| format!("`baton status --json` printed {text:?}"))
}
