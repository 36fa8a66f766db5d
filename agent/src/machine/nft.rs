//! What nf_tables holds: tables, chains and rules, counted. Asked over netlink (linux/netfilter/nf_tables.h), because the program `nft` need
//! not be there.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// One table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// `ip`, `ip6`, `inet` …
    pub family: &'static str,
    /// Its name.
    pub name: String,
    /// How many rules are in it.
    pub rules: usize,
    /// Chains that drop what no rule accepts.
    pub drops: Vec<String>,
}

/// NFNL_SUBSYS_NFTABLES.
const SUBSYSTEM: u16 = 10;
/// NFT_MSG_GETTABLE, and what it is answered with.
const TABLES: (u16, u16) = (1, 0);
/// NFT_MSG_GETCHAIN.
const CHAINS: (u16, u16) = (4, 3);
/// NFT_MSG_GETRULE.
const RULES: (u16, u16) = (7, 6);
/// NLMSG_ERROR, NLMSG_DONE (linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// NLM_F_REQUEST | NLM_F_DUMP.
const REQUEST_DUMP: u16 = 0x001 | 0x100 | 0x200;
/// Bytes of a netlink header, and of the nf_tables header behind it.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// A message's attributes: the table that something is in; a chain's own name and its policy.
const IN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_POLICY: u16 = 5;
/// NF_DROP.
const POLICY_DROP: [u8; 4] = [0; 4];
/// More than the kernel sends at once (NLMSG_GOODSIZE and 32 KiB of its dumps).
const ANSWER: usize = 64 << 10;

/// One message of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    kind: u16,
    family: u8,
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Message {
    fn text(&self, kind: u16) -> Option<String> {
        let bytes = self.bytes(kind)?;
        Some(String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned())
    }

    fn bytes(&self, kind: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(found, _)| *found == kind).map(|(_, bytes)| bytes.as_slice())
    }
}

/// Asks the kernel. An error where it has no nf_tables.
pub fn tables() -> io::Result<Vec<Table>> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    // The kernel has answered before sendto(2) returns. Should one not, nothing is waited for longer than this.
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(2, 0))?;
    let dump = |(ask, _): (u16, u16)| -> io::Result<Vec<Message>> {
        sendto(socket.as_raw_fd(), &request(ask), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut messages = Vec::new();
        let mut buffer = vec![0; ANSWER];
        loop {
            let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if parse(&buffer[..len], &mut messages)? {
                return Ok(messages);
            }
        }
    };
    Ok(count(&dump(TABLES)?, &dump(CHAINS)?, &dump(RULES)?))
}

fn request(kind: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(u32::try_from(HEADER + FAMILY_HEADER).unwrap_or(0).to_le_bytes());
    bytes.extend((SUBSYSTEM << 8 | kind).to_le_bytes());
    bytes.extend(REQUEST_DUMP.to_le_bytes());
    // Sequence and sender: one question at a time, from an unbound socket. All families, version 0, resource 0.
    bytes.extend([0; 8 + FAMILY_HEADER]);
    bytes
}

/// Adds the messages of one answer; says whether it was the last one.
fn parse(mut bytes: &[u8], into: &mut Vec<Message>) -> io::Result<bool> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "an answer of nf_tables that cannot be read");
    let u16_at = |bytes: &[u8], at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    while !bytes.is_empty() {
        let len = bytes.get(..4).and_then(|len| usize::try_from(u32::from_le_bytes(len.try_into().ok()?)).ok());
        let len = len.filter(|len| *len >= HEADER && *len <= bytes.len()).ok_or_else(bad)?;
        let (message, rest) = bytes.split_at(len);
        bytes = rest.get(len.next_multiple_of(4) - len..).unwrap_or_default();
        let kind = u16_at(message, 4).ok_or_else(bad)?;
        let body = &message[HEADER..];
        match kind {
            DONE => return Ok(true),
            ERROR => {
                let code = body.get(..4).and_then(|code| Some(i32::from_le_bytes(code.try_into().ok()?)));
                return match code.ok_or_else(bad)? {
                    0 => Ok(true),
                    code => Err(io::Error::from_raw_os_error(code.checked_neg().unwrap_or(libc::EIO))),
                };
            }
            _ if kind >> 8 == SUBSYSTEM => {
                let family = *body.first().ok_or_else(bad)?;
                let mut attributes = Vec::new();
                let mut rest = body.get(FAMILY_HEADER..).ok_or_else(bad)?;
                while rest.len() >= 4 {
                    let len = u16_at(rest, 0).map_or(0, usize::from);
                    if len < 4 || len > rest.len() {
                        return Err(bad());
                    }
                    // The upper two bits say how it is encoded (linux/netlink.h, NLA_TYPE_MASK).
                    let kind = u16_at(rest, 2).unwrap_or(0) & 0x3fff;
                    attributes.push((kind, rest[4..len].to_vec()));
                    rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
                }
                into.push(Message { kind: kind & 0xff, family, attributes });
            }
            _ => {}
        }
    }
    Ok(false)
}

fn count(tables: &[Message], chains: &[Message], rules: &[Message]) -> Vec<Table> {
    let key = |message: &Message| Some((message.family, message.text(IN_TABLE)?));
    let mut found: BTreeMap<(u8, String), Table> = BTreeMap::new();
    let mut entry = |key: (u8, String), change: &dyn Fn(&mut Table)| {
        let table = Table { family: family(key.0), name: key.1.clone(), rules: 0, drops: Vec::new() };
        change(found.entry(key).or_insert(table));
    };
    for key in tables.iter().filter(|m| m.kind == TABLES.1).filter_map(key) {
        entry(key, &|_| {});
    }
    for chain in chains.iter().filter(|m| m.kind == CHAINS.1 && m.bytes(CHAIN_POLICY) == Some(&POLICY_DROP)) {
        if let Some(key) = key(chain) {
            entry(key, &|table| table.drops.extend(chain.text(CHAIN_NAME)));
        }
    }
    for key in rules.iter().filter(|m| m.kind == RULES.1).filter_map(key) {
        entry(key, &|table| table.rules += 1);
    }
    found.into_values().collect()
}

/// NFPROTO_* (linux/netfilter.h), as nft(8) calls them.
fn family(number: u8) -> &'static str {
    match number {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = u16::try_from(value.len() + 4).unwrap().to_le_bytes().to_vec();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(HEADER + body.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(kind.to_le_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    fn of(kind: u16, family: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        message(SUBSYSTEM << 8 | kind, &[vec![family, 0, 0, 0], attributes.concat()].concat())
    }

    fn read(bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        assert!(parse(&[bytes, &message(DONE, &[0; 4])].concat(), &mut messages).unwrap());
        messages
    }

    #[test]
    fn rules_and_dropping_chains_are_counted_by_table() {
        let name = attribute(1, b"filter\0");
        let tables = read(&[of(0, 1, std::slice::from_ref(&name)), of(0, 2, &[attribute(1, b"nat\0")])].concat());
        let drop = of(3, 1, &[name.clone(), attribute(3, b"input\0"), attribute(5, &[0; 4])]);
        let accept = of(3, 1, &[name.clone(), attribute(3, b"output\0"), attribute(5, &[0, 0, 0, 1])]);
        let chains = read(&[drop, accept].concat());
        let rule = of(6, 1, &[name, attribute(2, b"input\0")]);
        let rules = read(&rule.repeat(3));
        let table = |family, name: &str, rules, drops: &[&str]| Table {
            family,
            name: name.into(),
            rules,
            drops: drops.iter().map(|drop| (*drop).to_owned()).collect(),
        };
        assert_eq!(
            count(&tables, &chains, &rules),
            [table("inet", "filter", 3, &["input"]), table("ip", "nat", 0, &[])]
        );
    }

    #[test]
    fn an_error_is_an_error_and_rubbish_is_not_read() {
        let error = parse(&message(ERROR, &(-libc::EOPNOTSUPP).to_le_bytes()), &mut Vec::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        let whole = of(0, 2, &[attribute(1, b"nat\0")]);
        for len in 1..whole.len() {
            assert!(parse(&whole[..len], &mut Vec::new()).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut messages = Vec::new();
            let _ = parse(&bytes, &mut messages);
            count(&messages, &messages, &messages);
        }
    }
}
