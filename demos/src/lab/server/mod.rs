//! A machine as a user's is: a Debian server with its root on an ext4 disk, systemd as process 1, sshd, nginx, redis, cron and a
//! firewall as their packages leave them, swap, a default route, both kernels in `/boot`, and Baton installed as its README says: module by
//! DKMS's place, `batond` and a service of ours as units, `/etc/baton/config.toml`.
//!
//! ```text
//! kernel + the lab's initrd ─► mounts /dev/vda ─► puts today's Baton and the owner's files on it ─► systemd
//! ```
//! [`image`] makes the disk; [`spec`] the machine. It differs from a user's in two ways: its initrd is the lab's, because what is being
//! developed changes every minute, and `labd` runs on it, so that tests get in.

pub mod image;

use agent::daemon::config::{self, Config};
use agent::userland::initrd::Initrd;

use super::error::{Doing, Result};
use super::hardware::{Disk, DiskBus, DiskContent};
use super::machine::MachineSpec;
use super::tree::Kernel;
use super::{Lab, accel, guest_programs, incumbent, kmod, net};

/// What its kernel must load to mount its root; ext4 is built into Debian's cloud kernels.
const ROOT_DRIVERS: [&str; 1] = ["virtio_blk"];
/// What the initrd puts on the disk.
const OVERLAY: &str = "/overlay";
/// Size of its swap disk.
const SWAP_MIB: u32 = 256;

const INIT: &str = "#!/bin/sh
export PATH=/bin
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod $module; done
until [ -b /dev/vda ]; do usleep 20000; done
mkdir /sysroot && mount -t ext4 /dev/vda /sysroot && cp -a /overlay/. /sysroot/ || exec sh
for folder in proc sys dev; do mount --move /$folder /sysroot/$folder; done
exec switch_root /sysroot /sbin/init
";

const BATOND: &str = "[Unit]
Description=Baton, live replacement of the kernel
After=systemd-modules-load.service network.target

[Service]
Type=notify
ExecStart=/usr/sbin/batond
Restart=on-failure

[Install]
WantedBy=multi-user.target
";

const LABD: &str = "[Unit]
Description=The lab's hand
After=network.target

[Service]
ExecStart=/usr/sbin/labd
KillMode=process

[Install]
WantedBy=multi-user.target
";

/// What our own units say is wanted when a test fails, and the machine's journal is gone by then.
const ALSO_ON_CONSOLE: &str = "[Service]\nStandardOutput=journal+console\nStandardError=journal+console\n";

/// Whoever may reach the machine, and nothing else: a user's `/etc/nftables.conf`.
const RULESET: &str = "#!/usr/sbin/nft -f
flush ruleset
table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		iif lo accept
		ct state established,related accept
		icmp type echo-request accept
		tcp dport { 22, 80, 6379, 7777 } accept
		udp dport 6379 accept
	}
}
";

/// Who sets the interfaces' addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manager {
    /// `/etc/network/interfaces`, as Debian's installer does it.
    #[default]
    Ifupdown,
    /// systemd-networkd, as images for clouds do it.
    Networkd,
}

/// A file that the machine's owner has put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnFile {
    /// Where.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// What is in it.
    pub content: String,
}

/// What can differ between servers beyond a machine's shape.
#[derive(Clone, Debug, Default)]
pub struct Server {
    /// Who sets addresses.
    pub manager: Manager,
    /// Files beyond the standard ones, or in their place.
    pub files: Vec<OwnFile>,
}

/// The configuration of Baton on such a machine, made from that of the lab's plain machines: the machine sets its own addresses, and
/// nothing of its root goes into the successor's initrd.
#[must_use]
pub fn configuration(plain: &Config) -> Config {
    let mut config = plain.clone();
    config.network.configure = false;
    config.initrd.include.clear();
    config
}

/// The machine. Its disks come first among those of its hardware.
pub fn spec(lab: &Lab, kernel: &Kernel, config: &Config, server: &Server) -> Result<MachineSpec> {
    let image = image::open(lab.tree(), lab.progress())?;
    let mut initrd = Initrd::new();
    incumbent::skeleton(&mut initrd);
    incumbent::busybox(&mut initrd, lab.tree())?;
    initrd.file("/init", 0o755, INIT);
    let mut modules = String::new();
    for line in incumbent::with_dependencies(lab.tree(), kernel, &ROOT_DRIVERS)? {
        let module = line.split(':').next().unwrap_or_default();
        let at = format!("/lib/modules/{module}");
        incumbent::copy(&mut initrd, &lab.tree().modules(kernel).join(module), &at)?;
        modules += &format!("{at}\n");
    }
    initrd.file("/modules", 0o644, modules);
    overlay(&mut initrd, lab, config, server)?;
    let mut spec = MachineSpec::new(lab.tree().vmlinuz(kernel), incumbent::write(&initrd)?);
    spec.run_by(accel::choose(lab.tree(), lab.progress())?);
    let disk = |content| Disk { bus: DiskBus::Virtio, content };
    spec.hardware.disks = vec![
        disk(DiskContent::Image(image)),
        disk(DiskContent::Swap { mib: SWAP_MIB, uuid: image::SWAP_UUID.to_owned() }),
    ];
    Ok(spec)
}

/// Today's Baton, and what the machine's owner wrote.
fn overlay(initrd: &mut Initrd, lab: &Lab, config: &Config, server: &Server) -> Result<()> {
    let programs = guest_programs::build(&guest_programs::PROGRAMS, lab.progress())?;
    for name in guest_programs::PROGRAMS {
        incumbent::copy(initrd, &programs.join(name), &format!("{OVERLAY}/usr/sbin/{name}"))?;
    }
    for kernel in image::kernels(lab.tree()) {
        let module = kmod::module_for(lab.tree(), kernel, lab.progress())?;
        let at = format!("{OVERLAY}/usr/lib/modules/{}/{}", kernel.release, incumbent::OWN_MODULE);
        incumbent::copy(initrd, &module, &at)?;
    }
    let text = toml::to_string(config).map_err(std::io::Error::other).doing("writing the machine's configuration")?;
    let mut put = |path: &str, content: &str| initrd.file(&format!("{OVERLAY}{path}"), 0o644, content);
    put(config::DEFAULT_PATH, &text);
    put("/etc/modules-load.d/baton.conf", "baton\n");
    put("/etc/nftables.conf", RULESET);
    let mut units = vec![("batond".to_owned(), BATOND.to_owned()), ("labd".to_owned(), LABD.to_owned())];
    units.extend(config.service.iter().map(service_unit));
    for (name, text) in &units {
        put(&format!("/etc/systemd/system/{name}.service"), text);
        put(&format!("/etc/systemd/system/{name}.service.d/lab.conf"), ALSO_ON_CONSOLE);
    }
    match server.manager {
        Manager::Ifupdown => put("/etc/network/interfaces", &interfaces(config)),
        Manager::Networkd => {
            put("/etc/network/interfaces", "auto lo\niface lo inet loopback\n");
            for (index, nic) in config.network.nic.iter().enumerate() {
                let file = format!("/etc/systemd/network/{index}0-lab.network");
                put(&file, &networkd(config, index, nic));
            }
        }
    }
    let mut enable = |target: &str, unit: &str, at: &str| {
        initrd.symlink(&format!("{OVERLAY}/etc/systemd/system/{target}.wants/{unit}"), &format!("{at}/{unit}"));
    };
    for (name, _) in &units {
        enable("multi-user.target", &format!("{name}.service"), "/etc/systemd/system");
    }
    enable("sysinit.target", "nftables.service", "/usr/lib/systemd/system");
    if server.manager == Manager::Networkd {
        enable("multi-user.target", "systemd-networkd.service", "/usr/lib/systemd/system");
    }
    for OwnFile { path, mode, content } in &server.files {
        initrd.file(&format!("{OVERLAY}{path}"), *mode, content.as_str());
    }
    Ok(())
}

/// A service of the configuration as a unit.
fn service_unit(service: &config::Service) -> (String, String) {
    let launcher = if service.fd_store { format!("/usr/sbin/baton run {} -- ", service.name) } else { String::new() };
    let text = format!(
        "[Unit]\nDescription={name}, which crosses\nWants=batond.service\nAfter=batond.service\n\n\
         [Service]\nExecStart={launcher}{exec}\n\n[Install]\nWantedBy=multi-user.target\n",
        name = service.name,
        exec = service.exec.join(" ")
    );
    (service.name.clone(), text)
}

/// The address that moves is on the first interface.
fn service_address(config: &Config, index: usize) -> Option<String> {
    config.network.service_address.filter(|_| index == 0).map(String::from)
}

fn interfaces(config: &Config) -> String {
    let mut text = "auto lo\niface lo inet loopback\n".to_owned();
    for (index, nic) in config.network.nic.iter().enumerate() {
        let name = net::NICS[index].name_on_server();
        text += &format!("\nauto {name}\niface {name} inet static\n\taddress {}\n", String::from(nic.address));
        if let Some(address) = service_address(config, index) {
            text += &format!("\tgateway {}\n\tup ip address add {address} dev $IFACE\n", net::CLIENT);
        }
    }
    text
}

fn networkd(config: &Config, index: usize, nic: &config::Nic) -> String {
    let mut text = format!("[Match]\nMACAddress={}\n\n[Network]\nAddress={}\n", nic.mac, String::from(nic.address));
    if let Some(address) = service_address(config, index) {
        text += &format!("Address={address}\nGateway={}\n", net::CLIENT);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_interface_has_the_service_address_and_the_route() {
        let config = configuration(&incumbent::configuration());
        let text = interfaces(&config);
        let (first, second) = text.split_once("auto enp0s4").unwrap();
        assert!(
            first.contains("address 10.77.0.11/24\n\tgateway 10.77.0.1\n\tup ip address add 10.77.0.10/24"),
            "{text}"
        );
        assert!(!second.contains("gateway") && second.contains("address 10.77.0.12/24"), "{text}");
        let nics = &config.network.nic;
        assert!(networkd(&config, 0, &nics[0]).contains("Gateway=10.77.0.1"));
        assert!(!networkd(&config, 1, &nics[1]).contains("Gateway"));
    }

    #[test]
    fn a_program_of_the_fd_store_is_started_by_baton_run() {
        let mut service = incumbent::demo_service();
        assert!(service_unit(&service).1.contains("ExecStart=/usr/sbin/baton-kv --listen 10.77.0.10:6379\n"));
        service.fd_store = true;
        assert!(service_unit(&service).1.contains("ExecStart=/usr/sbin/baton run baton-kv -- /usr/sbin/baton-kv"));
    }
}
