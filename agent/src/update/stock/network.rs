//! Addresses, interfaces, routes, rules, neighbours, name servers and rulesets: what of them is in the configuration crosses, and nothing
//! else does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::accept::Accept;
use super::asked::Asked;
use super::item::{Item, counted, listed};
use crate::machine::net::parse_mac;
use crate::machine::network::{Interface, LOCAL_TABLE, MAIN_TABLE, Mac, Network};
use crate::machine::nft::Table;
use crate::machine::sysfs::{Bdf, bdf_name, parse_bdf};
use crate::machine::world::World;

/// The PCI function of a configured interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub bdf: Bdf,
    /// PCI segment.
    pub segment: u16,
    /// Other functions of its IOMMU group that have a driver, where that group's DMA is translated: the IOMMU tells none of a group apart,
    /// and how it treats a group can be changed only while nobody drives it.
    pub shares_translation: Vec<String>,
    /// Whether it has MSI or MSI-X: the successor has no other interrupts. Nothing when that cannot be read.
    pub msi: Option<bool>,
}

/// What packet filters hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruleset {
    /// This kernel has none.
    None,
    /// These tables of nf_tables.
    Tables(Vec<Table>),
    /// There is nf_tables, and it does not say.
    Unknown(String),
}

/// All of it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// This namespace, or why it cannot be known.
    pub network: Result<Network, String>,
    /// Named network namespaces.
    pub namespaces: Vec<String>,
    /// Addresses in resolv.conf.
    pub servers: Vec<String>,
    /// nf_tables.
    pub ruleset: Ruleset,
    /// Tables of the older packet filter that are in use.
    pub legacy: Vec<String>,
    /// Virtual services of IPVS.
    pub ipvs: usize,
    /// The functions of configured interfaces.
    pub functions: BTreeMap<Mac, Function>,
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Looks.
pub fn read(world: &dyn World, asked: &Asked<'_>) -> Seen {
    let resolv = world.text(RESOLV_CONF).unwrap_or_default();
    let server = |line: &str| line.trim().strip_prefix("nameserver")?.split_whitespace().next().map(str::to_owned);
    let legacy = ["ip_tables_names", "ip6_tables_names", "arp_tables_names"];
    let legacy = legacy.iter().flat_map(|file| {
        let family = file.split('_').next().unwrap_or_default();
        let names = world.text(&format!("/proc/net/{file}")).unwrap_or_default();
        names.lines().map(|name| format!("{family} {name}")).collect::<Vec<_>>()
    });
    let ipvs = world.text("/proc/net/ip_vs").unwrap_or_default();
    Seen {
        network: world.network().map_err(|error| format!("{error:#}")),
        namespaces: world.names("/run/netns"),
        servers: resolv.lines().filter_map(server).collect(),
        ruleset: ruleset(world),
        legacy: legacy.collect(),
        ipvs: ipvs
            .lines()
            .filter(|line| ["TCP", "UDP", "FWM", "SCTP"].iter().any(|kind| line.starts_with(kind)))
            .count(),
        functions: (asked.facts.nics.iter()).filter_map(|(mac, bdf)| Some((*mac, function(world, *bdf)?))).collect(),
    }
}

/// Asked only where there is nf_tables already: the question would load it.
fn ruleset(world: &dyn World) -> Ruleset {
    let loaded = world.text("/proc/modules").unwrap_or_default().lines().any(|line| line.starts_with("nf_tables "));
    let release = world.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let built_in = || {
        let list = world.text(&format!("/lib/modules/{release}/modules.builtin")).unwrap_or_default();
        list.lines().any(|line| line.ends_with("/nf_tables.ko"))
    };
    if !loaded && !built_in() {
        return Ruleset::None;
    }
    match world.ruleset() {
        Ok(tables) => Ruleset::Tables(tables),
        Err(error) => Ruleset::Unknown(error.to_string()),
    }
}

fn function(world: &dyn World, bdf: Bdf) -> Option<Function> {
    let name = world.names("/sys/bus/pci/devices").into_iter().find(|name| parse_bdf(name) == Some(bdf))?;
    let folder = format!("/sys/bus/pci/devices/{name}");
    Some(Function {
        bdf,
        segment: u16::from_str_radix(name.split(':').next()?, 16).ok()?,
        shares_translation: shares_translation(world, &name),
        msi: world.bytes(&format!("{folder}/config")).ok().and_then(|config| has_msi(&config)),
    })
}

fn shares_translation(world: &dyn World, name: &str) -> Vec<String> {
    const BRIDGE_CLASS: &str = "0x06";
    let group = format!("/sys/bus/pci/devices/{name}/iommu_group");
    if world.text(&format!("{group}/type")).is_none_or(|kind| kind == "identity") {
        return Vec::new();
    }
    let device = |other: &String| format!("/sys/bus/pci/devices/{other}");
    // The driver of a bridge has no DMA, and the kernel does not count it.
    let is_driven = |other: &String| {
        let bridge =
            world.text(&format!("{}/class", device(other))).is_some_and(|class| class.starts_with(BRIDGE_CLASS));
        !bridge && world.exists(&format!("{}/driver", device(other)))
    };
    world.names(&format!("{group}/devices")).into_iter().filter(|other| other != name && is_driven(other)).collect()
}

/// Whether a function's configuration space lists MSI (5) or MSI-X (0x11) among its capabilities (PCI Local Bus Specification 3.0,
/// section 6.7). Nothing when too little of it can be read: that takes CAP_SYS_ADMIN.
fn has_msi(config: &[u8]) -> Option<bool> {
    const STATUS: usize = 0x06;
    const HAS_LIST: u8 = 1 << 4;
    const LIST: usize = 0x34;
    if config.len() < 256 {
        return None;
    }
    if config[STATUS] & HAS_LIST == 0 {
        return Some(false);
    }
    let mut at = usize::from(config[LIST] & !3);
    // 48 of them fill the space; a list that is longer runs in a circle.
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        if matches!(config[at], 0x05 | 0x11) {
            return Some(true);
        }
        at = usize::from(config[at + 1] & !3);
    }
    Some(false)
}

/// Leaves only what lies on one interface, and the interface itself.
pub fn keep_only(seen: &mut Seen, mac: Mac) {
    (seen.namespaces, seen.servers, seen.legacy, seen.ipvs) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let Ok(network) = &mut seen.network else { return };
    let kept: BTreeSet<_> = real(network, mac).into_iter().map(|interface| interface.index).collect();
    let keeps = |index| kept.contains(&index);
    network.addresses.retain(|held| keeps(held.index));
    // A route over several interfaces has none of its own.
    network.routes.retain(|route| route.index.is_none_or(keeps));
    network.rules.clear();
    network.neighbours.retain(|neighbour| keeps(neighbour.index));
    let masters: BTreeSet<_> =
        network.interfaces.iter().filter(|of| keeps(of.index)).filter_map(|of| of.master).collect();
    // And what lies on it, or has it as a part.
    network
        .interfaces
        .retain(|other| keeps(other.index) || other.lower.is_some_and(keeps) || masters.contains(&other.index));
}

/// Judges.
pub fn judge(seen: &Seen, asked: &Asked<'_>) -> Vec<Item> {
    let mut items = Vec::new();
    match &seen.network {
        Err(why) => items.push(Item::forbids(
            "addresses",
            "",
            format!("the network cannot be looked at: {why}"),
            "run batond as root",
        )),
        Ok(network) => {
            items.extend(interfaces(network, seen, asked));
            items.push(addresses(network, seen, asked));
            items.push(routes(network));
            items.push(rules(network));
            items.push(neighbours(network));
        }
    }
    items.push(dns(seen, asked));
    items.push(rulesets(seen));
    items
}

/// The real interface with a MAC address.
fn real(network: &Network, mac: Mac) -> Vec<&Interface> {
    network.interfaces.iter().filter(|interface| interface.mac == Some(mac) && interface.kind.is_none()).collect()
}

/// The configured interfaces: whether they are there, once each, and can be given away.
fn interfaces(network: &Network, seen: &Seen, asked: &Asked<'_>) -> Vec<Item> {
    const CHECK: &str = "interfaces";
    let mut items = Vec::new();
    let mut refuse = |found: String, cause: &str, advice: &str| items.push(Item::forbids(CHECK, found, cause, advice));
    let wanted = &asked.config.network;
    let mut ours = BTreeSet::new();
    for nic in &wanted.nic {
        let Ok(mac) = parse_mac(&nic.mac) else {
            refuse(format!("network.nic {}", nic.mac), "it is not a MAC address", "write it as 52:54:00:12:34:56");
            continue;
        };
        let found = real(network, mac);
        if !ours.insert(mac) {
            refuse(nic.mac.clone(), "it is configured twice", "take one entry out of the configuration");
        }
        if found.is_empty() && !asked.facts.nics.contains_key(&mac) {
            refuse(
                format!("network.nic {}", nic.mac),
                "no interface has this address: the configuration is not this machine's",
                "plug it in, or take it out of the configuration",
            );
        }
        if let [first, second, ..] = found[..] {
            refuse(
                format!("{}: {} and {}", nic.mac, first.name, second.name),
                "two interfaces have one MAC address, and no kernel could tell which one is meant",
                "give one of them another address",
            );
        }
        // What lies on an interface is destroyed when the interface is given away, and a failed update does not bring it back.
        for interface in found {
            let above: Vec<String> = (network.interfaces.iter())
                .filter(|upper| upper.lower == Some(interface.index))
                .map(|upper| format!("{} ({})", upper.name, upper.kind.as_deref().unwrap_or("unknown")))
                .collect();
            let master = interface.master.and_then(|master| network.interface(master));
            let above: Vec<String> = (above.into_iter())
                .chain(master.map(|of| format!("{} ({})", of.name, of.kind.as_deref().unwrap_or("unknown"))))
                .collect();
            if !above.is_empty() {
                refuse(
                    format!("{} ({}) carries {}", interface.name, nic.mac, listed(&above)),
                    "what lies on an interface ends when the interface is given away, and would not come back if the update failed",
                    "configure an interface that carries nothing else",
                );
            }
        }
        if let Some(function) = seen.functions.get(&mac) {
            let name = format!("{} ({})", nic.mac, bdf_name(function.bdf));
            // A successor sees what it was given in a segment of its own; the machine's number of it came with the update.
            if function.segment != 0 && asked.facts.hops == 0 {
                refuse(name.clone(), "it is in another PCI segment than 0", "configure an interface of segment 0");
            }
            if !function.shares_translation.is_empty() {
                refuse(
                    format!("{name} is in one IOMMU group with {}", listed(&function.shares_translation)),
                    "its DMA has to pass untranslated, which can be set only while no function of its group has a driver",
                    "boot this kernel with iommu=pt, or take the drivers of the others off",
                );
            }
            if function.msi == Some(false) {
                refuse(
                    name,
                    "it has neither MSI-X nor MSI, and the successor has no other interrupts",
                    "configure another interface",
                );
            }
        }
    }
    if let Some(service) = wanted.service_address {
        let address = IpAddr::V4(service.address);
        let holders = network.addresses.iter().filter(|held| held.address == address);
        for holder in holders.filter_map(|held| network.interface(held.index)) {
            if let Some(kind) = &holder.kind {
                refuse(
                    format!("{address} is on {} ({kind})", holder.name),
                    "a service address moves between configured interfaces only, and this is none of them",
                    "give it to one of the interfaces in network.nic",
                );
            }
        }
    }
    if items.is_empty() {
        let found =
            if wanted.nic.is_empty() { "none is configured".to_owned() } else { counted(ours.len(), "interface") };
        items.push(Item::fine(CHECK, found));
    }
    items
}

/// Whether this interface, by its name, is one that the kernel makes by itself for each kind of tunnel.
fn is_fallback(interface: &Interface) -> bool {
    const FALLBACK: [&str; 10] =
        ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "teql0"];
    FALLBACK.contains(&interface.name.as_str())
}

fn addresses(network: &Network, seen: &Seen, asked: &Asked<'_>) -> Item {
    const CHECK: &str = "addresses";
    const MTU: u32 = 1500;
    let wanted = &asked.config.network;
    // Without a service address no interface crosses.
    let crossing: &[_] = if wanted.service_address.is_some() { &wanted.nic } else { &[] };
    let mut kept: BTreeSet<IpAddr> = crossing.iter().map(|nic| IpAddr::V4(nic.address.address)).collect();
    kept.extend(wanted.service_address.map(|service| IpAddr::V4(service.address)));
    let ours: BTreeSet<Mac> = crossing.iter().filter_map(|nic| parse_mac(&nic.mac).ok()).collect();
    let mut lost = Vec::new();
    let mut told = BTreeSet::new();
    for held in network.addresses.iter().filter(|held| !held.automatic && !kept.contains(&held.address)) {
        told.insert(held.index);
        lost.push(format!("{}/{} on {}", held.address, held.prefix, network.name(held.index)));
    }
    for interface in &network.interfaces {
        let crosses = interface.kind.is_none() && interface.mac.is_some_and(|mac| ours.contains(&mac));
        if crosses && interface.mtu != MTU {
            lost.push(format!("MTU {} of {} (the successor's is {MTU})", interface.mtu, interface.name));
        }
        let made = interface.kind.is_some() && !is_fallback(interface);
        if made && interface.up && !told.contains(&interface.index) {
            lost.push(format!("{} ({})", interface.name, interface.kind.as_deref().unwrap_or_default()));
        }
    }
    if !seen.namespaces.is_empty() {
        lost.push(format!("network namespaces {}", listed(&seen.namespaces)));
    }
    if lost.is_empty() {
        return Item::fine(CHECK, format!("none but the {} in the configuration", kept.len()));
    }
    Item::asks(
        CHECK,
        Accept::Addresses,
        listed(&lost),
        "only the addresses in the configuration cross, on the interfaces in the configuration; the others are gone, also after an \
         update that failed, where their interface had been given away",
        "",
    )
}

fn routes(network: &Network) -> Item {
    const CHECK: &str = "routes";
    let ours = |table| table != LOCAL_TABLE;
    let lost: Vec<String> = (network.routes.iter())
        .filter(|route| !route.automatic && ours(route.table))
        .map(|route| match route.index {
            Some(index) => format!("{route} on {}", network.name(index)),
            None => route.to_string(),
        })
        .collect();
    let kernels_own = network.routes.len() - lost.len();
    if lost.is_empty() {
        return Item::fine(CHECK, format!("none but {kernels_own} of the addresses themselves"));
    }
    let cause = "routes do not cross: the successor reaches its own networks only";
    Item::asks(CHECK, Accept::Routes, listed(&lost), cause, "")
}

fn rules(network: &Network) -> Item {
    const CHECK: &str = "rules";
    /// RT_TABLE_DEFAULT.
    const DEFAULT_TABLE: u32 = 253;
    let by_itself = [(0, LOCAL_TABLE), (32766, MAIN_TABLE), (32767, DEFAULT_TABLE)];
    let lost: Vec<String> = (network.rules.iter())
        .filter(|rule| !(rule.plain && by_itself.contains(&(rule.priority, rule.table))))
        .map(|rule| format!("{}{}: table {}", if rule.v6 { "IPv6 " } else { "" }, rule.priority, rule.table))
        .collect();
    if lost.is_empty() {
        return Item::fine(CHECK, "the kernel's own");
    }
    Item::asks(CHECK, Accept::Rules, listed(&lost), "rules of policy routing do not cross", "")
}

fn neighbours(network: &Network) -> Item {
    const CHECK: &str = "neighbours";
    let lost: Vec<String> = (network.neighbours.iter())
        .map(|neighbour| format!("{} on {}", neighbour.address, network.name(neighbour.index)))
        .collect();
    if lost.is_empty() {
        return Item::fine(CHECK, "none is entered by hand");
    }
    Item::asks(CHECK, Accept::Neighbours, listed(&lost), "entries made by hand do not cross", "")
}

fn dns(seen: &Seen, asked: &Asked<'_>) -> Item {
    const CHECK: &str = "dns";
    let carried = asked.config.initrd.include.iter().any(|path| std::path::Path::new(RESOLV_CONF).starts_with(path));
    if seen.servers.is_empty() {
        return Item::fine(CHECK, "no name servers are set");
    }
    if carried {
        return Item::fine(CHECK, format!("{} (in the successor's initrd)", listed(&seen.servers)));
    }
    let cause = format!("{RESOLV_CONF} does not cross: the successor resolves no names");
    let advice = format!("name {RESOLV_CONF} in initrd.include");
    Item::asks(CHECK, Accept::Dns, listed(&seen.servers), cause, advice)
}

fn rulesets(seen: &Seen) -> Item {
    const CHECK: &str = "ruleset";
    let mut lost = Vec::new();
    match &seen.ruleset {
        Ruleset::None => {}
        Ruleset::Unknown(why) => lost.push(format!("nf_tables is there and cannot be asked ({why})")),
        Ruleset::Tables(tables) => {
            let holds = tables.iter().filter(|table| table.rules > 0 || !table.drops.is_empty());
            lost.extend(holds.map(|table| {
                let drops = match &table.drops[..] {
                    [] => String::new(),
                    drops => format!(", {} drops by default", listed(drops)),
                };
                format!("table {} {}: {}{drops}", table.family, table.name, counted(table.rules, "rule"))
            }));
        }
    }
    lost.extend(seen.legacy.iter().map(|name| format!("iptables (legacy) table {name}")));
    if seen.ipvs > 0 {
        lost.push(format!("IPVS: {}", counted(seen.ipvs, "virtual service")));
    }
    if lost.is_empty() {
        return Item::fine(CHECK, "empty");
    }
    Item::asks(
        CHECK,
        Accept::Ruleset,
        listed(&lost),
        "packet filters do not cross: the successor is open where this kernel is closed",
        "",
    )
}

#[cfg(test)]
mod tests {
    use super::super::item::Weight;
    use super::*;
    use crate::daemon::config::{Config, Network as Wanted, Nic};
    use crate::machine::facts::Facts;
    use crate::machine::network::{Address, Neighbour, Route, Rule};
    use crate::machine::world::played::Played;

    const MACS: [Mac; 2] = [[0x52, 0x54, 0, 0, 0, 1], [0x52, 0x54, 0, 0, 0, 2]];

    fn config() -> Config {
        let cidr = |text: &str| text.to_owned().try_into().unwrap();
        let nic = |mac: &str, address: &str| Nic { mac: mac.into(), address: cidr(address) };
        let network = Wanted {
            service_address: Some(cidr("10.77.0.10/24")),
            nic: vec![nic("52:54:00:00:00:01", "10.77.0.11/24"), nic("52:54:00:00:00:02", "10.77.0.12/24")],
            ..Wanted::default()
        };
        Config { network, ..Config::default() }
    }

    fn address(index: u32, text: &str) -> Address {
        let (address, prefix) = text.split_once('/').unwrap();
        Address { index, address: address.parse().unwrap(), prefix: prefix.parse().unwrap(), automatic: false }
    }

    fn nic(index: u32, mac: Mac) -> Interface {
        let name = format!("eth{}", index - 2);
        Interface { index, name, mac: Some(mac), up: true, mtu: 1500, ..Interface::default() }
    }

    fn upper(index: u32, name: &str, kind: &str, lower: Option<u32>) -> Interface {
        Interface { name: name.into(), kind: Some(kind.into()), lower, ..nic(index, MACS[0]) }
    }

    /// A machine of the lab.
    fn lab() -> Network {
        let lo =
            Interface { index: 1, name: "lo".into(), up: true, loopback: true, mtu: 65536, ..Interface::default() };
        let automatic = |index, text| Address { automatic: true, ..address(index, text) };
        let connected = Route {
            destination: Some(("10.77.0.0".parse().unwrap(), 24)),
            v6: false,
            gateways: vec![],
            index: Some(2),
            table: MAIN_TABLE,
            automatic: true,
        };
        let rule = |v6, priority, table| Rule { v6, priority, table, plain: true };
        Network {
            interfaces: vec![lo, nic(2, MACS[0]), nic(3, MACS[1])],
            addresses: vec![
                automatic(1, "127.0.0.1/8"),
                address(2, "10.77.0.11/24"),
                address(2, "10.77.0.10/24"),
                address(3, "10.77.0.12/24"),
                automatic(2, "fe80::1/64"),
            ],
            routes: vec![connected],
            rules: vec![
                rule(false, 0, 255),
                rule(false, 32766, 254),
                rule(false, 32767, 253),
                rule(true, 0, 255),
                rule(true, 32766, 254),
            ],
            neighbours: vec![],
        }
    }

    fn of(world: &Played, config: &Config, facts: &Facts) -> Vec<Item> {
        let asked = Asked { config, facts, own: 1, asker: None };
        judge(&read(world, &asked), &asked)
    }

    fn items(network: Network) -> Vec<Item> {
        of(&Played { network, ..Played::default() }, &config(), &Facts::default())
    }

    fn item<'a>(items: &'a [Item], check: &str) -> &'a Item {
        items.iter().find(|item| item.check == check).unwrap()
    }

    #[test]
    fn a_machine_of_the_lab_loses_nothing() {
        let items = items(lab());
        assert!(items.iter().all(|item| item.weight == Weight::Fine), "{items:#?}");
        let checks: Vec<&str> = items.iter().map(|item| item.check).collect();
        assert_eq!(checks, ["interfaces", "addresses", "routes", "rules", "neighbours", "dns", "ruleset"]);
    }

    #[test]
    fn what_is_not_in_the_configuration_is_named() {
        let mut network = lab();
        network.addresses.push(address(2, "192.0.2.7/24"));
        network.addresses.push(address(2, "2001:db8::7/64"));
        network.interfaces[2].mtu = 9000;
        network.interfaces.push(upper(7, "docker0", "bridge", None));
        network.interfaces.push(upper(8, "sit0", "sit", None));
        let default =
            Route { destination: None, gateways: vec!["10.77.0.1".parse().unwrap()], ..network.routes[0].clone() };
        network.routes.push(Route { automatic: false, ..default });
        network.rules.push(Rule { v6: false, priority: 100, table: 7, plain: false });
        network.neighbours.push(Neighbour { index: 3, address: "10.77.0.99".into() });
        let items = items(network);
        let expected = [
            (
                "addresses",
                Accept::Addresses,
                "192.0.2.7/24 on eth0, 2001:db8::7/64 on eth0, MTU 9000 of eth1 (the successor's is 1500), docker0 (bridge)",
            ),
            ("routes", Accept::Routes, "default via 10.77.0.1 on eth0"),
            ("rules", Accept::Rules, "100: table 7"),
            ("neighbours", Accept::Neighbours, "10.77.0.99 on eth1"),
        ];
        for (check, accept, found) in expected {
            assert_eq!(
                (item(&items, check).found.as_str(), &item(&items, check).weight),
                (found, &Weight::Asks(accept))
            );
        }
    }

    /// Before a trial only what the granted interface carries is named: it would not come back.
    #[test]
    fn of_one_interface_only_its_own_is_named() {
        let mut network = lab();
        network.addresses.push(address(2, "192.0.2.7/24"));
        network.addresses.push(address(3, "192.0.2.8/24"));
        network.interfaces[1].mtu = 9000;
        network.interfaces.push(upper(7, "docker0", "bridge", None));
        network.interfaces.push(upper(8, "eth1.7", "vlan", Some(3)));
        let default = Route { destination: None, automatic: false, ..network.routes[0].clone() };
        network.routes.push(Route { index: Some(2), ..default.clone() });
        network.rules.push(Rule { v6: false, priority: 100, table: 7, plain: false });
        network.neighbours.push(Neighbour { index: 2, address: "10.77.0.99".into() });
        let told = |network: &Network| {
            let mut facts = Facts::default();
            facts.nics.extend(MACS.iter().map(|mac| (*mac, 0x10)));
            let (config, world) = (config(), Played { network: network.clone(), ..Played::default() });
            let asked = Asked { config: &config, facts: &facts, own: 1, asker: None };
            let mut seen = read(&world, &asked);
            keep_only(&mut seen, MACS[1]);
            let items = judge(&seen, &asked).into_iter().filter(|item| item.weight != Weight::Fine);
            items.map(|item| format!("{}: {}", item.check, item.found)).collect::<Vec<_>>()
        };
        assert_eq!(
            told(&network),
            [
                "interfaces: eth1 (52:54:00:00:00:02) carries eth1.7 (vlan)",
                "addresses: 192.0.2.8/24 on eth1, eth1.7 (vlan)",
            ]
        );
        network.routes.push(Route { index: Some(3), ..default });
        network.neighbours[0].index = 3;
        assert_eq!(told(&network)[2..], ["routes: default on eth1", "neighbours: 10.77.0.99 on eth1"]);
        assert!(told(&lab()).is_empty(), "{:?}", told(&lab()));
    }

    #[test]
    fn without_a_service_address_no_interface_crosses() {
        let items = of(&Played { network: lab(), ..Played::default() }, &Config::default(), &Facts::default());
        assert_eq!(item(&items, "addresses").weight, Weight::Asks(Accept::Addresses));
        assert!(item(&items, "addresses").found.contains("10.77.0.11/24 on eth0"));
    }

    #[test]
    fn a_service_address_on_a_virtual_interface_is_refused_and_so_is_what_lies_on_a_real_one() {
        for (name, kind) in [("eth0.7", "vlan"), ("br0", "bridge"), ("mac0", "macvlan"), ("bond0", "bond")] {
            let mut network = lab();
            let lower = matches!(kind, "vlan" | "macvlan").then_some(2);
            network.interfaces.push(upper(7, name, kind, lower));
            if lower.is_none() {
                network.interfaces[1].master = Some(7);
            }
            network.addresses[2].index = 7;
            let items = items(network);
            let told: Vec<&str> =
                items.iter().filter(|i| i.weight == Weight::Forbids).map(|i| i.found.as_str()).collect();
            let on = format!("eth0 (52:54:00:00:00:01) carries {name} ({kind})");
            assert_eq!(told, [on.as_str(), &format!("10.77.0.10 is on {name} ({kind})")]);
        }
    }

    #[test]
    fn configured_interfaces_are_there_once() {
        let mut network = lab();
        network.interfaces[2].mac = Some(MACS[0]);
        let items = items(network);
        let told: Vec<&str> = items.iter().filter(|i| i.check == "interfaces").map(|i| i.found.as_str()).collect();
        assert_eq!(told, ["52:54:00:00:00:01: eth0 and eth1", "network.nic 52:54:00:00:00:02"]);
    }

    #[test]
    fn functions_in_other_segments_and_without_msi_are_named_and_those_behind_bridges_are_not() {
        let mut facts = Facts::default();
        facts.nics.insert(MACS[0], 0x0200);
        facts.nics.insert(MACS[1], 0x0018);
        let world = Played { network: lab(), ..Played::default() };
        let world = world
            .linked("/sys/bus/pci/devices/0000:02:00.0", "../../../devices/pci0000:00/0000:00:02.0/0000:02:00.0")
            .linked("/sys/bus/pci/devices/0001:00:03.0", "../../../devices/pci0001:00/0001:00:03.0")
            .file("/sys/bus/pci/devices/0001:00:03.0/config", &"\0".repeat(256));
        let items = of(&world, &config(), &facts);
        let told: Vec<&str> =
            items.iter().filter(|i| i.weight == Weight::Forbids).map(|i| i.cause.split(',').next().unwrap()).collect();
        assert_eq!(told, ["it is in another PCI segment than 0", "it has neither MSI-X nor MSI"]);
    }

    #[test]
    fn a_translated_function_is_alone_in_its_group_but_for_bridges() {
        let mut facts = Facts::default();
        facts.nics.insert(MACS[0], 0x0018);
        facts.nics.insert(MACS[1], 0x0020);
        let group = "/sys/bus/pci/devices/0000:00:03.0/iommu_group";
        let world = |kind: &str, class: &str| {
            Played { network: lab(), ..Played::default() }
                .linked("/sys/bus/pci/devices/0000:00:03.0", "../../../devices/pci0000:00/0000:00:03.0")
                .linked("/sys/bus/pci/devices/0000:00:03.1", "../../../devices/pci0000:00/0000:00:03.1")
                .linked("/sys/bus/pci/devices/0000:00:04.0", "../../../devices/pci0000:00/0000:00:04.0")
                .file(&format!("{group}/type"), kind)
                .file(&format!("{group}/devices/0000:00:03.0/class"), "0x020000")
                .file(&format!("{group}/devices/0000:00:03.1/class"), class)
                .file("/sys/bus/pci/devices/0000:00:03.1/class", class)
                .file("/sys/bus/pci/devices/0000:00:03.1/driver/module", "")
        };
        let told = |world: &Played| {
            let items = of(world, &config(), &facts);
            let forbids = items.into_iter().filter(|item| item.weight == Weight::Forbids);
            forbids.map(|item| item.found).collect::<Vec<_>>()
        };
        assert_eq!(
            told(&world("DMA-FQ", "0x010000")),
            ["52:54:00:00:00:01 (0000:00:03.0) is in one IOMMU group with 0000:00:03.1"]
        );
        assert_eq!(told(&world("DMA-FQ", "0x060400")), [""; 0], "a bridge");
        assert_eq!(told(&world("identity", "0x010000")), [""; 0], "passed through");
    }

    #[test]
    fn capabilities_are_followed_within_bounds() {
        let mut config = vec![0; 256];
        assert_eq!((has_msi(&config[..64]), has_msi(&config)), (None, Some(false)));
        config[0x06] = 0x10;
        config[0x34] = 0x98;
        (config[0x98], config[0x99]) = (0x09, 0x84);
        (config[0x84], config[0x85]) = (0x11, 0);
        assert_eq!(has_msi(&config), Some(true));
        (config[0x84], config[0x85]) = (0x09, 0x98);
        assert_eq!(has_msi(&config), Some(false), "a circle ends");
        config[0x85] = 0xfe;
        assert_eq!(has_msi(&config), Some(false), "the last byte");
    }

    #[test]
    fn rulesets_are_asked_for_where_there_are_any() {
        let with = |tables: Option<Vec<Table>>| Played { network: lab(), ruleset: tables, ..Played::default() };
        let table = |rules, drops: &[&str]| Table {
            family: "inet",
            name: "filter".into(),
            rules,
            drops: drops.iter().map(|&drop| drop.into()).collect(),
        };
        let loaded = "nf_tables 389120 25 nft_ct,nft_chain_nat, Live 0xffffffffc0a00000\n";
        let told = |world: Played| {
            let items = of(&world, &config(), &Facts::default());
            (item(&items, "ruleset").found.clone(), item(&items, "ruleset").weight.clone())
        };
        let asks = Weight::Asks(Accept::Ruleset);
        assert_eq!(told(with(None)), ("empty".into(), Weight::Fine), "nobody was asked");
        let (found, weight) = told(with(None).file("/proc/modules", loaded));
        assert!(weight == asks && found.contains("cannot be asked"), "{found}");
        let quiet = with(Some(vec![table(0, &[])])).file("/proc/modules", loaded);
        assert_eq!(told(quiet), ("empty".into(), Weight::Fine));
        let closed = with(Some(vec![table(2, &["input"])])).file("/proc/modules", loaded);
        assert_eq!(told(closed), ("table inet filter: 2 rules, input drops by default".into(), asks.clone()));
        let built_in = with(Some(vec![table(1, &[])]))
            .file("/proc/sys/kernel/osrelease", "6.12\n")
            .file("/lib/modules/6.12/modules.builtin", "kernel/net/netfilter/nf_tables.ko\n");
        assert_eq!(told(built_in), ("table inet filter: 1 rule".into(), asks.clone()));
        let old = with(None).file("/proc/net/ip_tables_names", "nat\nfilter\n").file(
            "/proc/net/ip_vs",
            "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\nTCP  0A4D000A:0050 rr\n",
        );
        let found = "iptables (legacy) table ip nat, iptables (legacy) table ip filter, IPVS: 1 virtual service";
        assert_eq!(told(old), (found.into(), asks));
    }

    #[test]
    fn name_servers_cross_with_their_file() {
        let world = Played { network: lab(), ..Played::default() };
        let world =
            world.file("/etc/resolv.conf", "# by hand\nsearch x\nnameserver 10.0.0.2\n nameserver fe80::1%eth0\n");
        let mut config = config();
        let dns = |config: &Config| item(&of(&world, config, &Facts::default()), "dns").clone();
        assert_eq!(
            (dns(&config).found.as_str(), dns(&config).weight),
            ("10.0.0.2, fe80::1%eth0", Weight::Asks(Accept::Dns))
        );
        config.initrd.include = vec!["/etc".into()];
        assert_eq!(dns(&config).weight, Weight::Fine);
    }
}
