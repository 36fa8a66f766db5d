//! Interfaces and addresses, by netlink: found by MAC, brought up, given an address, announced.
//!
//! How the service address changes hands. Giving an interface an address, or taking it away, costs milliseconds (notifiers,
//! routes, a grace period), so neither is done in the blackout:
//!
//! ```text
//!                 trial                cutover                         afterwards
//! incumbent       on its interface     [`HeldAddress::hush`]: answers         [`Net::drop_held`]
//!                                      no ARP request any more
//! successor       [`Net::reserve`]:                [`Announcer`]:  [`Net::settle`]:
//!                 on lo, so that its                   gratuitous ARP  on its interface
//!                 sockets may answer
//! ```
//! The address of `lo` is this kernel's own for whatever arrives, and nobody hears of it: the interface answers ARP requests for its own
//! addresses only (`arp_ignore`, Documentation/networking/ip-sysctl.rst).

use std::fs::{File, OpenOptions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

use crate::daemon::config::Cidr;
pub use crate::machine::network::Mac;
use crate::machine::network::{Address, Interface, Neighbour, Network, Route, Rule};
use crate::machine::sys;

/// Reads `52:54:00:12:34:56`.
pub fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()
        .with_context(|| format!("`{text}` is not a MAC address"))?;
    bytes.try_into().map_err(|_| anyhow!("`{text}` is not a MAC address: it needs six bytes"))
}

/// Writes `52:54:00:12:34:56`.
pub fn mac_name(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// An open netlink socket with its own small runtime, so that plain threads can use it.
pub struct Netlink {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

/// The network as an update moves it. [`Netlink`] is this machine's; a test plays another.
pub trait Net: Send + Sync {
    /// The interface with this MAC address, if there is one. VLANs, bridges and bonds have the address of what they lie on: the real
    /// interface is meant.
    fn find(&self, mac: Mac) -> Result<Option<Link>>;
    /// Brings a link up.
    fn link_up(&self, link: &Link) -> Result<()>;
    /// Gives the link an address; no error when it has it already.
    fn add(&self, link: &Link, cidr: Cidr) -> Result<()>;
    /// Looks up who holds an address, before it has to be dropped.
    fn held(&self, cidr: Cidr) -> Result<HeldAddress>;
    /// Drops the address; the interface answers as before for the others.
    fn drop_held(&self, held: &HeldAddress) -> Result<()>;
    /// Gives interfaces their former rules, those that are there.
    fn restore(&self, rules: Vec<(Mac, ArpRules)>) -> Result<()>;
    /// Takes a hushed or dropped address again, and announces it. No error when it is there still.
    fn take_again(&self, held: &HeldAddress) -> Result<()>;
    /// Makes an address this kernel's own, and tells nobody: it is on `lo`, and `link`, by which its clients will come, answers ARP
    /// requests for its own addresses only, and asks with them.
    fn reserve(&self, link: &Link, address: Ipv4Addr) -> Result<()>;
    /// Moves a reserved address to the interface by which its clients come.
    fn settle(&self, link: &Link, cidr: Cidr) -> Result<()>;
    /// The link that holds `address` now. (A reserved address is held by none.)
    fn holder(&self, address: Ipv4Addr) -> Result<Option<u32>>;
    /// The network of this namespace as plain data.
    fn look(&self) -> Result<Network>;
    /// The rules by which interfaces answer ARP requests now.
    fn rules(&self, links: &[&Link]) -> Result<Vec<(Mac, ArpRules)>>;
    /// Before an interface goes that is on the network of `held`: it may have answered for the addresses of the one that stays, and does
    /// not any more, and whoever sends to them is told which one does. [`Net::rules`] of both are to be kept beforehand, for
    /// [`Net::restore`] is the undo.
    fn part(&self, held: &HeldAddress, going: &Link) -> Result<()>;
    /// Prepares to say that an interface holds an address.
    fn announcer(&self, link: &Link, address: Ipv4Addr) -> Result<Announcer>;
}

/// Index of `lo` in every network namespace (include/net/flow.h, LOOPBACK_IFINDEX).
const LOOPBACK: u32 = 1;

/// An address that an interface of this kernel holds, with all that is needed to drop it and to take it again.
pub struct HeldAddress {
    link: Link,
    cidr: Cidr,
    message: AddressMessage,
    announcer: Announcer,
    arp: ArpAnswers,
}

impl HeldAddress {
    /// No ARP request that comes in by this interface is answered any more. In the blackout: one write.
    pub fn hush(&self) -> Result<()> {
        self.arp.set(ArpAnswers::NONE)
    }

    /// One whose interface is `arp_ignore` in this file.
    #[cfg(test)]
    pub fn played(link: Link, cidr: Cidr, file: File, before: String, announcer: Announcer) -> HeldAddress {
        HeldAddress { link, cidr, message: AddressMessage::default(), announcer, arp: ArpAnswers { file, before } }
    }

    /// The interface that holds it.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// How the interface answered ARP requests when it was looked up, and will again.
    pub fn answered(&self) -> &str {
        &self.arp.before
    }

    /// The same address, of an interface that answered like this before a batond that died hushed it.
    #[must_use]
    pub fn that_answered(mut self, before: &str) -> HeldAddress {
        before.clone_into(&mut self.arp.before);
        self
    }
}

/// Which ARP requests an interface answers: `/proc/sys/net/ipv4/conf/IF/arp_ignore`, open.
pub struct ArpAnswers {
    file: File,
    before: String,
}

impl ArpAnswers {
    /// None.
    const NONE: &'static str = "8";

    fn of(link: &Link) -> Result<ArpAnswers> {
        let path = arp_setting(link, "arp_ignore");
        let before = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let file = OpenOptions::new().write(true).open(&path).with_context(|| format!("cannot open {path}"))?;
        Ok(ArpAnswers { file, before })
    }

    /// From now on the link answers no ARP request, until [`ArpAnswers::restore`].
    pub fn none_from(link: &Link) -> Result<ArpAnswers> {
        let answers = ArpAnswers::of(link)?;
        answers.set(ArpAnswers::NONE)?;
        Ok(answers)
    }

    fn set(&self, value: &str) -> Result<()> {
        // At the start each time: anywhere else the kernel takes a number, says nothing and leaves all as it was
        // (Documentation/admin-guide/sysctl/kernel.rst, `sysctl_writes_strict`).
        self.file.write_all_at(value.as_bytes(), 0).with_context(|| format!("cannot set arp_ignore to {value}"))
    }

    /// Those that it answered before.
    pub fn restore(&self) -> Result<()> {
        self.set(self.before.trim())
    }
}

fn arp_setting(link: &Link, name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{}/{name}", link.name)
}

impl Netlink {
    /// Opens it.
    pub fn open() -> Result<Netlink> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (connection, handle, _) = {
            let _guard = runtime.enter();
            rtnetlink::new_connection().context("cannot open a netlink socket")?
        };
        runtime.spawn(connection);
        Ok(Netlink { runtime, handle })
    }

    fn links(&self) -> Result<Vec<LinkMessage>> {
        self.runtime
            .block_on(self.handle.link().get().execute().try_collect())
            .context("cannot list network interfaces")
    }

    /// Brings an interface up by name.
    pub fn up(&self, name: &str) -> Result<()> {
        let index = self
            .links()?
            .into_iter()
            .find(|message| message.attributes.contains(&LinkAttribute::IfName(name.to_owned())))
            .with_context(|| format!("there is no interface {name}"))?
            .header
            .index;
        self.set_up(index)
    }

    fn set_up(&self, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.runtime
            .block_on(self.handle.link().set(message).execute())
            .with_context(|| format!("cannot bring interface {index} up"))
    }

    fn delete(&self, message: &AddressMessage) -> Result<()> {
        Ok(self.runtime.block_on(self.handle.address().del(message.clone()).execute())?)
    }

    fn by_index(&self, index: u32) -> Result<Link> {
        let all = self.links()?;
        all.into_iter()
            .find(|message| message.header.index == index)
            .and_then(|message| {
                let name = message.attributes.iter().find_map(|a| match a {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                })?;
                let mac = message.attributes.iter().find_map(|a| match a {
                    LinkAttribute::Address(bytes) => Mac::try_from(bytes.as_slice()).ok(),
                    _ => None,
                })?;
                Some(Link { index, name, mac })
            })
            .with_context(|| format!("interface {index} is gone"))
    }

    fn holding(&self, address: Ipv4Addr) -> Result<Option<AddressMessage>> {
        Ok(self.addresses(address)?.into_iter().find(|message| message.header.index != LOOPBACK))
    }

    fn addresses(&self, address: Ipv4Addr) -> Result<Vec<AddressMessage>> {
        let local = AddressAttribute::Local(address.into());
        Ok(self.all_addresses()?.into_iter().filter(|message| message.attributes.contains(&local)).collect())
    }

    fn all_addresses(&self) -> Result<Vec<AddressMessage>> {
        let all: Vec<_> = self
            .runtime
            .block_on(self.handle.address().get().execute().try_collect())
            .context("cannot list addresses")?;
        Ok(all.into_iter().filter(|message: &AddressMessage| message.header.family == AddressFamily::Inet).collect())
    }
}

impl Net for Netlink {
    fn find(&self, mac: Mac) -> Result<Option<Link>> {
        let mut found: Vec<Interface> =
            self.links()?.iter().map(seen_interface).filter(|interface| interface.mac == Some(mac)).collect();
        found.sort_by_key(|interface| (interface.kind.is_some(), interface.index));
        Ok(found.into_iter().next().map(|Interface { index, name, .. }| Link { index, name, mac }))
    }

    fn link_up(&self, link: &Link) -> Result<()> {
        self.set_up(link.index)
    }

    fn add(&self, link: &Link, cidr: Cidr) -> Result<()> {
        self.runtime
            .block_on(self.handle.address().add(link.index, cidr.address.into(), cidr.prefix).replace().execute())
            .with_context(|| format!("cannot give {} to {}", cidr.address, link.name))
    }

    fn held(&self, cidr: Cidr) -> Result<HeldAddress> {
        let message = self.holding(cidr.address)?.with_context(|| format!("no interface holds {}", cidr.address))?;
        let link = self.by_index(message.header.index)?;
        let announcer = Announcer::new(&link, cidr.address)?;
        let arp = ArpAnswers::of(&link)?;
        Ok(HeldAddress { link, cidr, message, announcer, arp })
    }

    fn drop_held(&self, held: &HeldAddress) -> Result<()> {
        self.delete(&held.message)
            .with_context(|| format!("cannot take {} off {}", held.cidr.address, held.link.name))?;
        held.arp.restore()
    }

    fn restore(&self, rules: Vec<(Mac, ArpRules)>) -> Result<()> {
        let back = |(mac, rules): (Mac, ArpRules)| self.find(mac)?.map_or(Ok(()), |link| rules.set(&link));
        // Each of them, whatever becomes of the others.
        rules.into_iter().map(back).fold(Ok(()), Result::and)
    }

    fn take_again(&self, held: &HeldAddress) -> Result<()> {
        self.add(&held.link, held.cidr)?;
        held.arp.restore()?;
        held.announcer.announce()
    }

    fn reserve(&self, link: &Link, address: Ipv4Addr) -> Result<()> {
        ArpRules::strict().set(link)?;
        let lo = Link { index: LOOPBACK, name: "lo".to_owned(), mac: [0; 6] };
        self.add(&lo, Cidr { address, prefix: 32 })
    }

    fn settle(&self, link: &Link, cidr: Cidr) -> Result<()> {
        self.add(link, cidr)?;
        for message in self.addresses(cidr.address)?.iter().filter(|message| message.header.index == LOOPBACK) {
            self.delete(message).with_context(|| format!("cannot take {} off lo", cidr.address))?;
        }
        Ok(())
    }

    fn holder(&self, address: Ipv4Addr) -> Result<Option<u32>> {
        Ok(self.holding(address)?.map(|message| message.header.index))
    }

    fn look(&self) -> Result<Network> {
        self.runtime.block_on(async {
            let interfaces: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await?;
            let addresses: Vec<AddressMessage> = self.handle.address().get().execute().try_collect().await?;
            let neighbours: Vec<NeighbourMessage> = self.handle.neighbours().get().execute().try_collect().await?;
            let (mut routes, mut rules) = (Vec::new(), Vec::new());
            for version in [IpVersion::V4, IpVersion::V6] {
                let wish = match version {
                    IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
                    IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
                };
                // A kernel without IPv6 knows neither.
                let found: Result<Vec<RouteMessage>, _> = self.handle.route().get(wish).execute().try_collect().await;
                routes.extend(known_family(found, &version)?);
                let found: Result<Vec<RuleMessage>, _> =
                    self.handle.rule().get(version.clone()).execute().try_collect().await;
                rules.extend(known_family(found, &version)?);
            }
            Ok(Network {
                interfaces: interfaces.iter().map(seen_interface).collect(),
                addresses: addresses.iter().filter_map(seen_address).collect(),
                routes: routes.iter().filter_map(seen_route).collect(),
                rules: rules.iter().map(seen_rule).collect(),
                neighbours: neighbours.iter().filter_map(seen_neighbour).collect(),
            })
        })
    }

    fn rules(&self, links: &[&Link]) -> Result<Vec<(Mac, ArpRules)>> {
        links.iter().map(|link| Ok((link.mac, ArpRules::of(link)?))).collect()
    }

    fn part(&self, held: &HeldAddress, going: &Link) -> Result<()> {
        let both = [&held.link, going];
        both.iter().try_for_each(|link| ArpRules::strict().set(link))?;
        for message in self.all_addresses()?.iter().filter(|message| message.header.index == held.link.index) {
            for attribute in &message.attributes {
                if let AddressAttribute::Local(IpAddr::V4(address)) = attribute {
                    Announcer::new(&held.link, *address)?.announce()?;
                }
            }
        }
        Ok(())
    }

    fn announcer(&self, link: &Link, address: Ipv4Addr) -> Result<Announcer> {
        Announcer::new(link, address)
    }
}

/// What is known of a family. A kernel without IPv6 has nothing to say of it, and one without policy routing
/// (CONFIG_IP_MULTIPLE_TABLES) has no rules.
fn known_family<T>(found: Result<Vec<T>, rtnetlink::Error>, version: &IpVersion) -> Result<Vec<T>> {
    match (found, version) {
        (Ok(found), _) => Ok(found),
        (Err(rtnetlink::Error::NetlinkError(why)), _) if why.raw_code() == -libc::EOPNOTSUPP => Ok(Vec::new()),
        (Err(rtnetlink::Error::NetlinkError(_)), IpVersion::V6) => Ok(Vec::new()),
        (Err(error), _) => Err(error).context("cannot list routes and rules"),
    }
}

fn seen_interface(message: &LinkMessage) -> Interface {
    let flags = message.header.flags;
    let mut interface = Interface {
        index: message.header.index,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        ..Interface::default()
    };
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(bytes) => interface.mac = Mac::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Controller(index) => interface.master = Some(*index),
            LinkAttribute::Link(index) => interface.lower = Some(*index).filter(|lower| *lower != 0),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                interface.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // Its number means something in that other namespace only.
    interface.lower = interface.lower.filter(|_| !elsewhere);
    interface
}

fn seen_address(message: &AddressMessage) -> Option<Address> {
    let mut address = None;
    let mut permanent = message.header.flags.contains(AddressHeaderFlags::Permanent);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            // Of a point-to-point interface, this one is the peer's.
            AddressAttribute::Address(own) if address.is_none() => address = Some(*own),
            AddressAttribute::Flags(flags) => permanent = flags.contains(AddressFlags::Permanent),
            _ => {}
        }
    }
    let address = address?;
    let automatic = match address {
        IpAddr::V4(v4) => v4.is_loopback(),
        // An IPv6 address that is not permanent has come by router advertisement or DHCP, and will again.
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || !permanent,
    };
    Some(Address { index: message.header.index, address, prefix: message.header.prefix_len, automatic })
}

fn seen_route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let address = |of: &RouteAddress| match of {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    // The kernel makes local and broadcast routes itself, with each address, and cached ones from traffic: nobody has set them.
    if matches!(header.kind, RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast)
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let mut route = Route {
        destination: None,
        v6: header.address_family == AddressFamily::Inet6,
        gateways: Vec::new(),
        index: None,
        table: header.table.into(),
        automatic: matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(of) => {
                route.destination = address(of).map(|address| (address, header.destination_prefix_length));
            }
            RouteAttribute::Gateway(of) => route.gateways.extend(address(of)),
            RouteAttribute::Via(RouteVia::Inet(v4)) => route.gateways.push(IpAddr::V4(*v4)),
            RouteAttribute::Via(RouteVia::Inet6(v6)) => route.gateways.push(IpAddr::V6(*v6)),
            RouteAttribute::Oif(index) => route.index = Some(*index),
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::MultiPath(hops) => {
                for attribute in hops.iter().flat_map(|hop| &hop.attributes) {
                    if let RouteAttribute::Gateway(of) = attribute {
                        route.gateways.extend(address(of));
                    }
                }
            }
            _ => {}
        }
    }
    Some(route)
}

fn seen_rule(message: &RuleMessage) -> Rule {
    let mut rule = Rule {
        v6: message.header.family == AddressFamily::Inet6,
        priority: 0,
        table: message.header.table.into(),
        plain: message.header.src_len == 0 && message.header.dst_len == 0,
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::FwMark(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::L3MDev(true) => rule.plain = false,
            _ => {}
        }
    }
    rule
}

fn seen_neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent || message.header.ifindex == LOOPBACK {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(v4.to_string()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(v6.to_string()),
        _ => None,
    })?;
    Some(Neighbour { index: message.header.ifindex, address })
}

/// How one interface answers ARP, and whose address it names when it asks.
///
/// Two interfaces on one network need the strict rules: by default Linux answers on either for the addresses of both
/// (net/ipv4/arp.c, `arp_ignore` and `arp_announce`), and clients would send to the interface that is about to be given
/// away. The stricter of an interface's own rule and that of `all` counts (include/linux/inetdevice.h, `IN_DEV_MAXCONF`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArpRules {
    ignore: String,
    announce: String,
}

impl ArpRules {
    /// Answer for the interface's own addresses only; name the one that fits the network.
    pub fn strict() -> ArpRules {
        ArpRules { ignore: "1".to_owned(), announce: "2".to_owned() }
    }

    /// The rules of an interface.
    pub fn of(link: &Link) -> Result<ArpRules> {
        let read = |rule| {
            let path = arp_setting(link, rule);
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        Ok(ArpRules { ignore: read("arp_ignore")?, announce: read("arp_announce")? })
    }

    /// Both values, `arp_ignore` first.
    #[cfg(test)]
    pub fn texts(&self) -> (String, String) {
        (self.ignore.clone(), self.announce.clone())
    }

    /// The undo of [`ArpRules::texts`].
    #[cfg(test)]
    pub fn of_texts((ignore, announce): &(String, String)) -> ArpRules {
        ArpRules { ignore: ignore.clone(), announce: announce.clone() }
    }

    /// Gives an interface these rules.
    pub fn set(&self, link: &Link) -> Result<()> {
        for (rule, value) in [("arp_ignore", &self.ignore), ("arp_announce", &self.announce)] {
            let path = arp_setting(link, rule);
            std::fs::write(&path, value.trim()).with_context(|| format!("cannot set {path} to {}", value.trim()))?;
        }
        Ok(())
    }
}

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number.
    pub index: u32,
    /// The kernel's name.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
}

/// Says to everyone on the link who holds the service's address now (gratuitous ARP, RFC 5227 section 3).
pub struct Announcer(Box<dyn Fn() -> Result<()> + Send + Sync>);

impl Announcer {
    /// Prepares socket and frame.
    pub fn new(link: &Link, address: Ipv4Addr) -> Result<Announcer> {
        if link.index == 0 {
            bail!("{} has no interface number", link.name);
        }
        let socket = sys::PacketSocket::open(link.index)
            .with_context(|| format!("cannot open a packet socket on {}", link.name))?;
        let frame = gratuitous_arp(link.mac, address);
        Ok(Announcer::by(move || socket.send(&frame).context("cannot announce the service's address")))
    }

    /// One that does this.
    pub fn by(announce: impl Fn() -> Result<()> + Send + Sync + 'static) -> Announcer {
        Announcer(Box::new(announce))
    }

    /// Sends one announcement.
    pub fn announce(&self) -> Result<()> {
        (self.0)()
    }
}

/// The Ethernet frame of an ARP request whose sender and target are both `address` at `mac`.
fn gratuitous_arp(mac: Mac, address: Ipv4Addr) -> [u8; 42] {
    const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
    // Hardware type 1 (Ethernet), protocol IPv4, lengths 6 and 4, operation 1 (request).
    const FIXED: [u8; 8] = [0, 1, 0x08, 0x00, 6, 4, 0, 1];
    let mut frame = [0u8; 42];
    frame[0..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ETHERTYPE_ARP);
    frame[14..22].copy_from_slice(&FIXED);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&address.octets());
    frame[38..42].copy_from_slice(&address.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_written_at_its_start_each_time() {
        let file = tempfile::tempfile().unwrap();
        let answers = ArpAnswers { file, before: "1\n".into() };
        answers.set(ArpAnswers::NONE).unwrap();
        answers.restore().unwrap();
        let mut written = [0; 2];
        assert_eq!((answers.file.read_at(&mut written, 0).unwrap(), written), (1, *b"1\0"));
    }

    #[test]
    fn a_gratuitous_arp_names_the_address_twice_and_the_sender_once() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 9], Ipv4Addr::new(10, 77, 0, 10));
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[28..32], frame[38..42]);
        assert_eq!(frame[22..28], [2, 0, 0, 0, 0, 9]);
        assert_eq!(frame[32..38], [0; 6]);
    }

    #[test]
    fn mac_addresses_are_six_hex_bytes() {
        assert_eq!(parse_mac("52:54:00:ba:70:0a").unwrap()[5], 0x0a);
        assert!(parse_mac("52:54:00:ba:70").is_err());
        assert!(parse_mac("52:54:00:ba:70:zz").is_err());
    }
}
