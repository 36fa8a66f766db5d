//! What a machine has, and what an update would do with each of it, for `baton setup`: a picture before anybody asks for an update.
//! What refuses one is `baton check`'s to say ([`super::stock`]).

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use serde::Serialize;

use crate::daemon::config::{Cidr, Config};
use crate::machine::net::{mac_name, parse_mac};
use crate::machine::network::{Interface, Network};
use crate::machine::sysfs::parse_bdf;
use crate::machine::world::World;
use crate::update::stock::disks::{self, Block};
use crate::update::stock::item::size;

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// The PCI function behind it.
    pub pci: Option<String>,
    /// The driver of it.
    pub driver: Option<String>,
    /// What else is known: addresses, sizes, where it is mounted.
    pub what: String,
    /// What an update does with it.
    pub update: String,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// Version of this object.
    pub schema_version: u32,
    /// The kernel that runs.
    pub kernel_release: String,
    /// What the root file system is, and on what.
    pub root: String,
    /// Network interfaces but `lo`.
    pub interfaces: Vec<Found>,
    /// Whole disks.
    pub disks: Vec<Found>,
    /// Services and programs of the configuration, and the units of the system that are neither.
    pub services: Vec<Found>,
}

impl Setup {
    /// Looks.
    pub fn of(world: &dyn World, config: &Config) -> Result<Setup> {
        let seen = disks::read(world);
        let network = world.network()?;
        let mounts = seen.mounts.unwrap_or_default();
        let root = mounts.iter().rev().find(|mount| mount.at == "/");
        // What lies on a disk, by the disk's name.
        let mut used: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for mount in &mounts {
            for disk in seen.numbers.get(&mount.device).into_iter().flat_map(|name| wholes(&seen.blocks, name)) {
                let places = used.entry(disk).or_default();
                if !places.contains(&mount.at) {
                    places.push(mount.at.clone());
                }
            }
        }
        for swap in &seen.swaps {
            let name = swap.name.strip_prefix("/dev/").unwrap_or(&swap.name);
            for disk in wholes(&seen.blocks, name) {
                used.entry(disk).or_default().push("swap".to_owned());
            }
        }
        let is_disk = |block: &&Block| {
            block.size > 0 && hardware(world, "block", &block.name).0.is_some() && block.whole.is_none()
        };
        Ok(Setup {
            schema_version: 1,
            kernel_release: world.text("/proc/sys/kernel/osrelease").unwrap_or_default(),
            root: root.map_or_else(
                || "cannot be known: /proc/1/mountinfo cannot be read".to_owned(),
                |mount| format!("{} from {}", mount.kind, mount.source),
            ),
            interfaces: (network.interfaces.iter().filter(|interface| !interface.loopback))
                .map(|interface| link(world, &network, interface, config))
                .collect(),
            disks: (seen.blocks.values().filter(is_disk))
                .map(|block| disk(world, block, used.get(&block.name).map_or(&[], Vec::as_slice)))
                .collect(),
            services: services(world, config),
        })
    }
}

/// The whole disks below a block device.
fn wholes(blocks: &BTreeMap<String, Block>, name: &str) -> Vec<String> {
    let (mut found, mut seen, mut next) = (Vec::new(), Vec::new(), vec![name.to_owned()]);
    while let Some(name) = next.pop() {
        let Some(block) = blocks.get(&name).filter(|_| !seen.contains(&name)) else { continue };
        if block.slaves.is_empty() && block.whole.is_none() {
            found.push(name.clone());
        }
        next.extend(block.slaves.iter().chain(&block.whole).cloned());
        seen.push(name);
    }
    found
}

/// The PCI function behind a device of a class, and the driver that makes it what it is.
fn hardware(world: &dyn World, class: &str, name: &str) -> (Option<String>, Option<String>) {
    let folder = format!("/sys/class/{class}/{name}");
    let path = world.link(&folder).unwrap_or_default();
    let pci = path.rsplit('/').find(|part| parse_bdf(part).is_some()).map(str::to_owned);
    // A disk of NVMe lies below its controller, whose driver is the next folder's up.
    let driver = ["device/driver", "device/device/driver"]
        .iter()
        .find_map(|below| world.link_name(&format!("{folder}/{below}")));
    (pci, driver)
}

fn link(world: &dyn World, network: &Network, interface: &Interface, config: &Config) -> Found {
    let (pci, driver) = hardware(world, "net", &interface.name);
    let own = || network.addresses.iter().filter(|address| address.index == interface.index && !address.automatic);
    let mut what = vec![if interface.up { "up".to_owned() } else { "down".to_owned() }];
    what.extend(interface.mac.map(mac_name));
    what.extend(own().map(|address| format!("{}/{}", address.address, address.prefix)));
    let named = config.network.nic.iter().any(|nic| parse_mac(&nic.mac).is_ok_and(|mac| Some(mac) == interface.mac));
    let service = config.network.service_address;
    let has_service = service.is_some_and(|service: Cidr| own().any(|address| address.address == service.address));
    let update = match (&pci, named, has_service) {
        (None, ..) => "is not of hardware: it ends with this kernel, and what made it makes it again",
        (_, true, true) => {
            "has the service address: that moves at the cutover, and the interface follows after the commit"
        }
        (_, true, false) => "may be given to the successor for its trial",
        (_, false, true) => "has the service address, but is not among network.nic: no update can move it",
        (_, false, false) => "is not among network.nic: it ends with this kernel",
    };
    Found { name: interface.name.clone(), pci, driver, what: what.join(", "), update: update.to_owned() }
}

fn disk(world: &dyn World, block: &Block, used: &[String]) -> Found {
    let (pci, driver) = hardware(world, "block", &block.name);
    let mut what = vec![size(block.size)];
    what.extend(used.iter().cloned());
    let update = if used.is_empty() {
        "is not in use"
    } else {
        "does not cross: what is on it refuses an update, or has to be accepted"
    };
    Found { name: block.name.clone(), pci, driver, what: what.join(", "), update: update.to_owned() }
}

fn services(world: &dyn World, config: &Config) -> Vec<Found> {
    let found = |name: &str, what: String, update: &str| Found {
        name: name.to_owned(),
        pci: None,
        driver: None,
        what,
        update: update.to_owned(),
    };
    let mut all: Vec<Found> = Vec::new();
    for service in &config.service {
        let how = if service.fd_store { "crosses with its memfds" } else { "crosses with its arena" };
        all.push(found(&service.name, service.exec.join(" "), how));
    }
    for program in &config.program {
        all.push(found(&program.name, program.exec.join(" "), "is started anew in the successor"));
    }
    for unit in world.names("/sys/fs/cgroup/system.slice").iter().filter_map(|unit| unit.strip_suffix(".service")) {
        if unit != "batond" && all.iter().all(|found| found.name != unit) {
            all.push(found(unit, "unit".to_owned(), "ends with this kernel"));
        }
    }
    all
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel      {}", self.kernel_release)?;
        writeln!(f, "root        {}", self.root)?;
        for (title, all) in [("interface", &self.interfaces), ("disk", &self.disks), ("service", &self.services)] {
            let width = all.iter().map(|found| found.name.len()).max().unwrap_or(0);
            for found in all {
                let hardware = [&found.pci, &found.driver].into_iter().flatten().map(|text| format!("{text}, "));
                let hardware: String = hardware.collect();
                writeln!(f, "{title:<11} {:<width$}  {hardware}{}", found.name, found.what)?;
                writeln!(f, "{:<11} {:<width$}  {}", "", "", found.update)?;
            }
        }
        writeln!(f, "whether an update would be started: baton check --kernel IMAGE, or --to-newest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::network::Address;
    use crate::machine::world::played::Played;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    fn server() -> Played {
        let net = "../../devices/pci0000:00/0000:00:01.0/0000:01:00.0/virtio0/net/enp1s0";
        let block = "../../devices/pci0000:00/0000:00:02.0/virtio1/block";
        let mut world = Played::default()
            .file("/proc/sys/kernel/osrelease", "6.12.1\n")
            .file("/proc/1/mountinfo", "1 0 254:1 / / rw - ext4 /dev/vda1 rw\n2 1 0:5 / /proc rw - proc proc rw\n3 1 254:1 /x /srv rw - ext4 /dev/vda1 rw\n")
            .file("/proc/swaps", "Filename Type Size Used Priority\n/dev/vda2 partition 1024 0 -2\n")
            .file("/sys/class/block/vda/size", "4096\n")
            .file("/sys/class/block/vda/dev", "254:0")
            .file("/sys/class/block/vda1/size", "2048\n")
            .file("/sys/class/block/vda1/dev", "254:1")
            .file("/sys/class/block/vda1/partition", "1")
            .file("/sys/class/block/vda2/size", "2048\n")
            .file("/sys/class/block/vda2/dev", "254:2")
            .file("/sys/class/block/vda2/partition", "2")
            .file("/sys/class/block/loop0/size", "8\n")
            .file("/sys/fs/cgroup/system.slice/nginx.service/pids", "1")
            .file("/sys/fs/cgroup/system.slice/kv.service/pids", "1")
            .linked("/sys/class/block/vda", &format!("{block}/vda"))
            .linked("/sys/class/block/vda1", &format!("{block}/vda/vda1"))
            .linked("/sys/class/block/vda2", &format!("{block}/vda/vda2"))
            .linked("/sys/class/block/loop0", "../../devices/virtual/block/loop0")
            .linked("/sys/class/block/vda/device/driver", "../../../bus/virtio/drivers/virtio_blk")
            .linked("/sys/class/net/enp1s0", net)
            .linked("/sys/class/net/enp1s0/device/driver", "../../../bus/virtio/drivers/virtio_net")
            .linked("/sys/class/net/br0", "../../devices/virtual/net/br0");
        let interface = |index, name: &str| Interface { index, name: name.into(), up: true, ..Interface::default() };
        world.network.interfaces = vec![
            Interface { loopback: true, ..interface(1, "lo") },
            Interface { mac: Some(MAC), ..interface(2, "enp1s0") },
            Interface { up: false, ..interface(3, "br0") },
        ];
        let address =
            |text: &str, automatic| Address { index: 2, address: text.parse().unwrap(), prefix: 24, automatic };
        world.network.addresses = vec![address("10.0.0.2", false), address("fe80::1", true)];
        world
    }

    #[test]
    fn an_ordinary_server_is_shown_with_what_becomes_of_each() {
        let shown = Setup::of(&server(), &Config::default()).unwrap().to_string();
        let expected = "\
kernel      6.12.1
root        ext4 from /dev/vda1
interface   enp1s0  0000:01:00.0, virtio_net, up, 52:54:00:00:00:01, 10.0.0.2/24
                    is not among network.nic: it ends with this kernel
interface   br0     down
                    is not of hardware: it ends with this kernel, and what made it makes it again
disk        vda  0000:00:02.0, virtio_blk, 2 MiB, /, /srv, swap
                 does not cross: what is on it refuses an update, or has to be accepted
service     kv     unit
                   ends with this kernel
service     nginx  unit
                   ends with this kernel
whether an update would be started: baton check --kernel IMAGE, or --to-newest
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_the_configuration_names_moves() {
        let text = "[network]\nservice_address = '10.0.0.2/24'\n[[network.nic]]\nmac = '52:54:00:00:00:01'\naddress = '10.0.0.3/24'\n\
                    [[service]]\nname = 'kv'\nexec = ['/kv']\n[[service]]\nname = 'memo'\nexec = ['/memo']\nfd_store = true\n\
                    [[program]]\nname = 'sshd'\nexec = ['/sshd']\n";
        let setup = Setup::of(&server(), &toml::from_str(text).unwrap()).unwrap();
        assert!(setup.interfaces[0].update.contains("moves at the cutover"), "{setup}");
        let services: Vec<_> =
            setup.services.iter().map(|found| (found.name.as_str(), found.update.as_str())).collect();
        assert_eq!(
            services,
            [
                ("kv", "crosses with its arena"),
                ("memo", "crosses with its memfds"),
                ("sshd", "is started anew in the successor"),
                ("nginx", "ends with this kernel"),
            ]
        );
        let other = text.replace("00:00:01'", "00:00:09'");
        let setup = Setup::of(&server(), &toml::from_str(&other).unwrap()).unwrap();
        assert!(setup.interfaces[0].update.contains("no update can move it"), "{setup}");
    }
}
