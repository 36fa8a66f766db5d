//! The network as this kernel holds it, as plain data: interfaces, addresses, routes, rules, neighbours, rulesets.

use std::fmt;
use std::net::IpAddr;

/// A MAC address.
pub type Mac = [u8; 6];

/// Kernel's number of an interface.
pub type Index = u32;

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: Index,
    /// Its name.
    pub name: String,
    /// Its hardware address, where it is an Ethernet one.
    pub mac: Option<Mac>,
    /// What kind of virtual interface it is (`vlan`, `bridge` …); nothing for a real one.
    pub kind: Option<String>,
    /// Whether it is up.
    pub up: bool,
    /// Whether it is `lo`.
    pub loopback: bool,
    /// Bytes of a frame.
    pub mtu: u32,
    /// The bridge, bond or VRF that it is a part of.
    pub master: Option<Index>,
    /// The interface that it lies on, where that is one of this namespace.
    pub lower: Option<Index>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Whose.
    pub index: Index,
    /// Which.
    pub address: IpAddr,
    /// Leading bits of its network.
    pub prefix: u8,
    /// The kernel made it itself: link-local, loopback, by router advertisement.
    pub automatic: bool,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Whereto; nothing for the default route.
    pub destination: Option<(IpAddr, u8)>,
    /// Which family, when it is the default route.
    pub v6: bool,
    /// By which gateways.
    pub gateways: Vec<IpAddr>,
    /// By which interface.
    pub index: Option<Index>,
    /// In which table.
    pub table: u32,
    /// The kernel made it itself, out of an address or of a router's advertisement.
    pub automatic: bool,
}

/// A rule of policy routing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// For IPv6.
    pub v6: bool,
    /// Order.
    pub priority: u32,
    /// Table to look in, 0 for none.
    pub table: u32,
    /// It applies to everything.
    pub plain: bool,
}

/// An entry of the neighbour table that somebody made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// By which interface.
    pub index: Index,
    /// Whose.
    pub address: String,
}

/// All of it, of one network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// Interfaces.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub addresses: Vec<Address>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Rules.
    pub rules: Vec<Rule>,
    /// Neighbours that somebody entered.
    pub neighbours: Vec<Neighbour>,
}

impl Network {
    /// An interface by its number.
    pub fn interface(&self, index: Index) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.index == index)
    }

    /// Its name, or its number.
    pub fn name(&self, index: Index) -> String {
        self.interface(index).map_or_else(|| format!("interface {index}"), |interface| interface.name.clone())
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.destination {
            None if self.v6 => f.write_str("default (IPv6)")?,
            None => f.write_str("default")?,
            Some((address, prefix)) => write!(f, "{address}/{prefix}")?,
        }
        for gateway in &self.gateways {
            write!(f, " via {gateway}")?;
        }
        match self.table {
            MAIN_TABLE => Ok(()),
            table => write!(f, " table {table}"),
        }
    }
}

/// The table that is looked in where no rule says otherwise (RT_TABLE_MAIN).
pub const MAIN_TABLE: u32 = 254;
/// Where the kernel keeps its own addresses (RT_TABLE_LOCAL).
pub const LOCAL_TABLE: u32 = 255;
