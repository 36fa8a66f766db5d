//! `cargo demo shell`: a machine to look around in, or a way into one that another command runs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use demos::lab::guest::Guest;
use demos::lab::server::Server;
use demos::lab::{Door, Lab, Machine, Progress, machine, net, shell};
use demos::story::stage::{Shape, Stage};

#[derive(Debug, Args)]
pub struct ShellArguments {
    /// Enter the machine that another `cargo demo` runs now
    #[arg(long, conflicts_with_all = ["kernel", "vcpus", "memory_mib", "server"])]
    attach: bool,
    /// Kernel to boot, by the beginning of its release
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// Make it a Debian server: root on a disk, systemd, sshd, nginx, redis, a firewall
    #[arg(long)]
    server: bool,
    /// Virtual CPUs
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=8))]
    vcpus: u8,
    /// Memory of the machine
    #[arg(long, default_value_t = 2048)]
    memory_mib: u32,
}

pub fn run(arguments: &ShellArguments) -> anyhow::Result<()> {
    if arguments.attach {
        let (logs, door) = machine::running()?.context("no machine runs now; without --attach one is started")?;
        return enter(&door, &logs, "the machine goes on");
    }
    let lab = Lab::set_up(Progress::auto())?;
    let machine = boot(&lab, arguments)?;
    enter(machine.door(), machine.folder(), "the machine is stopped then")
}

fn boot(lab: &Lab, arguments: &ShellArguments) -> anyhow::Result<Machine> {
    let kernel = lab.tree().kernel(&arguments.kernel)?;
    let shape = Shape { vcpus: arguments.vcpus, memory_mib: arguments.memory_mib, ..Shape::default() };
    let spec = if arguments.server {
        Stage::server_spec(lab, kernel, &shape, &Server::default())?
    } else {
        Stage::spec(lab, kernel, &shape)?
    };
    let task = lab.progress().task("machine");
    task.step("booting");
    let machine = lab.start(&spec)?;
    let guest = machine.guest(net::NICS[0].address);
    let patience = Duration::from_secs(180);
    guest.wait_ready(patience).map_err(|why| machine.deadline(&why.to_string(), patience))?;
    task.done("is up");
    Ok(machine)
}

/// The first kernel that answers is entered: after an update that is the one behind the other interface.
fn enter(door: &Door, logs: &Path, after: &str) -> anyhow::Result<()> {
    let patience = Duration::from_secs(60);
    let began = Instant::now();
    let stream = loop {
        let answering = net::NICS.iter().find_map(|nic| {
            let stream = Guest::new(door.clone(), nic.address).connect(Duration::from_secs(1)).ok()?;
            Some((nic, stream))
        });
        match answering {
            Some((nic, stream)) => {
                eprintln!(
                    "lab: a shell at {}; `exit` or ctrl-D leaves it ({after}); logs: {}",
                    nic.address,
                    logs.display()
                );
                break stream;
            }
            None if began.elapsed() > patience => {
                anyhow::bail!("no kernel of the machine answers; logs: {}", logs.display())
            }
            None => {}
        }
    };
    shell::attach(stream).map(drop).with_context(|| format!("the shell ended; logs: {}", logs.display()))
}
