//! Connections that cross: TCP_REPAIR takes each from a socket of this kernel's and puts it into one of the next.
//!
//! ```text
//! incumbent  service ─ Keep{socket, note} ─► held, under repair, written down ─┬─ table, in parts ─► successor
//!                                                                           ├─ undone: repair off, it goes on
//!                                                                           └─ crossed: forgotten without a word
//! successor  parts ─► a table ─ Activate ─► sockets under repair ─► let go ─ Sockets ─► service ─► address announced
//! ```
//! The service needs no privilege for any of it; it asks at a socket of its own ([`server`], [`baton_sdk::connections`]). What can cross, and in
//! which order it is made again, [`judge`] decides; [`dump`] and [`restore`] do it.
//!
//! No segment for a held connection is acknowledged or refused: each socket has a filter that loses all of them, until it goes on or is
//! forgotten. That is not before this kernel has dropped the address. In the successor the sockets stand before the address is announced.

pub mod dump;
pub mod judge;
pub mod restore;
pub mod server;
mod sys;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use state_schemas::connections::{append, read};
use state_schemas::latest::message::TABLE_LIMIT;
use state_schemas::latest::message::{PART_LIMIT, ToSuccessor};

use self::dump::Held;
use self::restore::Restored;
use crate::machine::sys::tsc;

/// A connection that has come from the predecessor.
#[derive(Debug)]
pub struct Carried {
    /// What the service said of it there.
    pub note: Vec<u8>,
    /// Its socket here.
    pub socket: OwnedFd,
}

#[derive(Debug, Default)]
struct Inner {
    /// Services that keep their connections, and whose they are.
    carriers: BTreeMap<String, u32>,
    /// The services are told to freeze: they may keep connections.
    keeping: bool,
    held: Vec<Held>,
    /// What is held, as it is told to the successor.
    table: Vec<u8>,
    /// What the predecessor tells, as far as it has come.
    arriving: Vec<u8>,
    /// How much of it there will be.
    total: u64,
    /// What waits for its service.
    here: BTreeMap<String, Vec<Carried>>,
}

/// The connections that cross, of all services.
#[derive(Debug, Default)]
pub struct Connections(Mutex<Inner>);

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is whole, or its lists are shorter than they might be.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- services ------------------------------------------------------------------------------------------------------

    /// This service keeps its connections; nobody but this user may do so in its name.
    pub fn enlist(&self, service: &str, uid: u32) {
        self.lock().carriers.insert(service.to_owned(), uid);
    }

    /// Whether any service does.
    pub fn are_wanted(&self) -> bool {
        !self.lock().carriers.is_empty()
    }

    fn is_carrier(inner: &Inner, service: &str, uid: u32) -> Result<()> {
        match inner.carriers.get(service) {
            Some(owner) if *owner == uid => Ok(()),
            Some(_) => bail!("service {service} is another user's"),
            None => bail!("service {service} has not said that it keeps connections (`Carrier::begin`)"),
        }
    }

    /// Takes a connection of a service that freezes.
    ///
    /// # Errors
    /// A [`judge::Refusal`]; or not now.
    pub fn keep(&self, service: &str, uid: u32, socket: OwnedFd, note: Vec<u8>) -> Result<()> {
        let mut inner = self.lock();
        Self::is_carrier(&inner, service, uid)?;
        if !inner.keeping {
            bail!(
                "connections are kept between the order to freeze and the report of it, in a kernel that has not taken over just now"
            );
        }
        let (held, connection, bytes) = dump::take(socket, service, note)?;
        let index = inner.held.len();
        append(&mut inner.table, index, connection, &bytes)?;
        inner.held.push(held);
        Ok(())
    }

    /// Gives a service what has come for it.
    pub fn fetch(&self, service: &str, uid: u32) -> Result<Vec<Carried>> {
        let mut inner = self.lock();
        Self::is_carrier(&inner, service, uid)?;
        Ok(inner.here.remove(service).unwrap_or_default())
    }

    // ---- incumbent -----------------------------------------------------------------------------------------------------

    /// The services are about to freeze.
    pub fn open(&self) {
        let mut inner = self.lock();
        inner.keeping = true;
        inner.table.clear();
    }

    /// They are frozen; says how many connections are held.
    pub fn close(&self) -> usize {
        let mut inner = self.lock();
        inner.keeping = false;
        inner.held.len()
    }

    /// Tells the successor of them, a part at a time; `tell` gives how much of the table is there.
    pub fn tell(&self, mut tell: impl FnMut(ToSuccessor) -> Result<u64>) -> Result<()> {
        let inner = self.lock();
        let total = inner.table.len() as u64;
        let mut at = 0;
        for part in inner.table.chunks(PART_LIMIT) {
            let end = at + part.len() as u64;
            let have = tell(ToSuccessor::Connections { at, total, bytes: part.to_vec() })?;
            if have != end {
                bail!("the successor has {have} bytes of the table of connections, and was given {end}");
            }
            at = end;
        }
        Ok(())
    }

    /// The cutover is undone before the successor let any of them go: they go on.
    pub fn go_on(&self) {
        let mut inner = self.lock();
        inner.keeping = false;
        inner.table = Vec::new();
        let held = std::mem::take(&mut inner.held);
        if !held.is_empty() {
            tracing::info!("{} connections that were held go on", held.len());
        }
    }

    /// They are the successor's, and this kernel has the address no longer, or they cannot go on here.
    pub fn forget(&self) {
        let mut inner = self.lock();
        inner.table = Vec::new();
        std::mem::take(&mut inner.held).into_iter().for_each(Held::forget);
    }

    // ---- successor -----------------------------------------------------------------------------------------------------

    /// A part of the table has come; says how much of it is here. One that begins it begins anew.
    pub fn arrive(&self, at: u64, total: u64, bytes: &[u8]) -> Result<u64> {
        let mut inner = self.lock();
        if at == 0 {
            inner.arriving.clear();
            inner.total = total;
        }
        let have = inner.arriving.len() as u64;
        // The channel has checked that the part lies in its table, and the table within its limit.
        if at != have || total != inner.total || have + bytes.len() as u64 > total.min(TABLE_LIMIT) {
            bail!("bytes {at} to {at} + {} of a table of {total}: {have} of {} are here", bytes.len(), inner.total);
        }
        inner.arriving.extend_from_slice(bytes);
        Ok(have + bytes.len() as u64)
    }

    /// Whether the predecessor has told of any.
    pub fn have_arrived(&self) -> bool {
        !self.lock().arriving.is_empty()
    }

    /// Makes the sockets. The address must be this kernel's own; the peers hear nothing yet.
    pub fn restore(&self, tsc_khz: u64) -> Result<Vec<Restored>> {
        let (table, total) = {
            let mut inner = self.lock();
            (std::mem::take(&mut inner.arriving), std::mem::take(&mut inner.total))
        };
        if table.len() as u64 != total {
            bail!("{} of {total} bytes of the table of connections have come", table.len());
        }
        let all = read(&table).context("the table of connections")?;
        let now = tsc();
        let passed = |then: u64| {
            let ms = now.saturating_sub(then) / tsc_khz.max(1);
            // What is further away than any cutover is no time that has passed.
            Duration::from_millis(ms).min(Duration::from_secs(60))
        };
        all.into_iter()
            .map(|(connection, bytes)| {
                let passed = passed(connection.tsc);
                restore::restore(connection, bytes, passed)
            })
            .collect()
    }

    /// From here on the peers may hear of them, and they wait for their services.
    pub fn let_go(&self, restored: Vec<Restored>) -> Result<()> {
        let mut inner = self.lock();
        for one in restored {
            let service = one.service().to_owned();
            let (note, socket) = one.let_go().with_context(|| format!("a connection of {service}"))?;
            inner.here.entry(service).or_default().push(Carried { note, socket });
        }
        Ok(())
    }

    /// Closes what no service has fetched: its peer would wait for ever.
    pub fn settle(&self) {
        for (service, left) in std::mem::take(&mut self.lock().here) {
            tracing::warn!("service {service} has left {} of its connections here: they are closed", left.len());
        }
    }
}

/// For the tests of this room, which are outside: sets an option that is one number.
#[doc(hidden)]
pub fn test_set(socket: std::os::fd::BorrowedFd<'_>, level: i32, option: i32, value: i32) -> std::io::Result<()> {
    sys::set_number(socket, level, option, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_comes_in_order_or_not_at_all() {
        let connections = Connections::default();
        assert_eq!(connections.arrive(0, 10, b"abcd").unwrap(), 4);
        assert!(connections.arrive(5, 10, b"x").is_err());
        assert!(connections.arrive(4, 11, b"x").is_err());
        assert!(connections.arrive(4, 10, b"1234567").is_err());
        assert_eq!(connections.arrive(4, 10, b"efg").unwrap(), 7);
        let error = connections.restore(1_000_000).unwrap_err().to_string();
        assert!(error.contains("7 of 10"), "{error}");
        // One that begins again is another one; nothing is there when nothing was told.
        connections.arrive(0, 3, b"abc").unwrap();
        connections.arrive(0, 2, b"ab").unwrap();
        assert!(connections.restore(1_000_000).is_err());
        assert!(connections.restore(1_000_000).unwrap().is_empty());
        assert_eq!(connections.arrive(0, 0, b"").unwrap(), 0);
        assert!(!connections.have_arrived());
    }

    #[test]
    fn nobody_keeps_a_connection_in_anothers_name_or_time() {
        let connections = Connections::default();
        let socket = || OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let why = |uid| connections.keep("kv", uid, socket(), Vec::new()).unwrap_err().to_string();
        assert!(why(7).contains("has not said"));
        connections.enlist("kv", 7);
        assert!(why(8).contains("another user's"));
        assert!(why(7).contains("between the order"));
        connections.open();
        assert!(why(7).contains("it listens"));
        assert_eq!(connections.close(), 0);
        assert!(connections.fetch("kv", 8).is_err());
        assert!(connections.fetch("kv", 7).unwrap().is_empty());
    }
}
