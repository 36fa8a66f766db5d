//! Sessions and files, whatever the version; and what no kernel would accept of them.

use std::collections::BTreeSet;

use state_schemas::checked::Check;
use state_schemas::handover_record::PhysRange;

use super::error::LuoError;
use super::memfd_v2;
use super::names::{MEMFD, Names};
use crate::kho::{Incoming, OutgoingError, PAGE};

/// Bytes of a session's name, without the zero behind it (`LIVEUPDATE_SESSION_NAME_LENGTH`).
pub const SESSION_NAME: usize = 63;
/// Bytes of a handler's name, without the zero behind it (`LIVEUPDATE_HNDL_COMPAT_LENGTH`).
pub const HANDLER_NAME: usize = 47;

/// Everything that the orchestrator carries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orchestration {
    /// `liveupdate_num`: which live update of this machine it is.
    pub update: u64,
    /// Sessions.
    pub sessions: Vec<Session>,
    /// Objects that several files share. Baton makes none; it carries those of others.
    pub flbs: Vec<Flb>,
    /// The names of the formats in the kernel that reads it.
    pub names: Names,
}

/// Files that are retrieved together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Session {
    /// By which it is asked for.
    pub name: String,
    /// Its files.
    pub files: Vec<File>,
}

/// A file, as the orchestrator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// By which it is asked for within its session.
    pub token: u64,
    /// Who can restore it: "memfd-v2", maybe with the names of its parts.
    pub compatible: String,
    /// What that one is told. For a memfd the address from [`crate::luo::Memfd::write`].
    pub data: u64,
}

impl File {
    /// A memfd that has been written. It goes by the name that [`Orchestration::names`] has for memfds.
    pub fn memfd(token: u64, data: u64) -> File {
        File { token, compatible: MEMFD[0].to_owned(), data }
    }
}

/// A file-lifecycle-bound object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flb {
    /// Who can restore it.
    pub name: String,
    /// What that one is told.
    pub data: u64,
    /// How many files depend on it.
    pub count: u64,
}

fn name(what: &'static str, name: &str, limit: usize) -> Result<(), LuoError> {
    match (1..=limit).contains(&name.len()) && !name.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(LuoError::Name { what, name: name.to_owned(), limit }),
    }
}

impl Orchestration {
    /// Everything that holds whatever the machine.
    pub(crate) fn consistent(&self) -> Result<(), LuoError> {
        let mut names = BTreeSet::new();
        let mut contents = BTreeSet::new();
        for session in &self.sessions {
            name("session", &session.name, SESSION_NAME)?;
            if !names.insert(session.name.as_str()) {
                return Err(LuoError::NameTwice { what: "session", name: session.name.clone() });
            }
            let mut tokens = BTreeSet::new();
            for file in &session.files {
                name("handler", &file.compatible, HANDLER_NAME)?;
                if !tokens.insert(file.token) {
                    return Err(LuoError::TokenTwice { session: session.name.clone(), token: file.token });
                }
                if memfd_v2::is_ours(&file.compatible) && !contents.insert(file.data) {
                    return Err(LuoError::DataTwice { data: file.data });
                }
            }
        }
        let mut names = BTreeSet::new();
        for flb in &self.flbs {
            name("FLB", &flb.name, HANDLER_NAME)?;
            if !names.insert(flb.name.as_str()) {
                return Err(LuoError::NameTwice { what: "FLB", name: flb.name.clone() });
            }
        }
        Ok(())
    }
}

impl Check for Orchestration {
    type Against = Incoming;
    type Error = LuoError;

    /// Addresses of files other than memfds are their handlers' to judge.
    fn check(&self, incoming: &Incoming) -> Result<(), LuoError> {
        self.consistent()?;
        let memfds = self.sessions.iter().flat_map(|session| &session.files);
        for file in memfds.filter(|file| memfd_v2::is_ours(&file.compatible)) {
            if incoming.folio_at(file.data).is_none() {
                let range = PhysRange { start: file.data, len: PAGE };
                return Err(OutgoingError::Range { what: "a memfd that is not preserved", range }.into());
            }
        }
        Ok(())
    }
}
