//! Files of sessions: a file kept under a name of this form is the Live Update Orchestrator's (LUO) in a successor that has one. It is handed
//! over in that kernel's own format ([`handover::luo`]); its program asks `/dev/liveupdate` for it and owes nothing to us. Any other successor
//! gets it as it gets all files.
//!
//! ```text
//! luo/TOKEN/SESSION    a file of a session; the token in hexadecimal
//! luo//SESSION         the session itself, which may have no file; what this one holds means nothing
//! ```
//! Such a name comes from the program itself (`FDNAME=`, [`baton_sdk::files`]), or is made of what a program
//! that knows LUO asked for ([`super::orchestrator`]).

use anyhow::{Context, Result, bail};
use handover::kho::Outgoing;
use handover::luo::{File, Memfd, Session};

use super::CrossingFile;
use crate::takeover::birth::phys;

const PREFIX: &str = "luo/";
/// Longest name of a session (`LIVEUPDATE_SESSION_NAME_LENGTH`, without the zero).
pub const MAX_SESSION: usize = 63;

/// Where a file belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'n> {
    /// Name of the session.
    pub session: &'n str,
    /// The file's; nothing for the session itself.
    pub token: Option<u64>,
}

impl<'n> Place<'n> {
    /// The place that a file's name says, if it says one.
    pub fn of(name: &'n str) -> Option<Place<'n>> {
        let (token, session) = name.strip_prefix(PREFIX)?.split_once('/')?;
        let token = if token.is_empty() { None } else { Some(u64::from_str_radix(token, 16).ok()?) };
        let place = Place { session, token };
        // `+1` and `01` would parse too, and one place would have several names.
        (place.name() == name && (1..=MAX_SESSION).contains(&session.len())).then_some(place)
    }

    /// The name of the file for it.
    pub fn name(&self) -> String {
        let token = self.token.map(|token| format!("{token:x}")).unwrap_or_default();
        format!("{PREFIX}{token}/{}", self.session)
    }

    /// Writes the file, and adds it to its session.
    pub fn add(&self, file: &CrossingFile, sessions: &mut Vec<Session>, out: &mut Outgoing) -> Result<()> {
        let known = sessions.iter().position(|session| session.name == self.session);
        let at = known.unwrap_or_else(|| {
            sessions.push(Session { name: self.session.to_owned(), files: Vec::new() });
            sessions.len() - 1
        });
        let Some(token) = self.token else { return Ok(()) };
        let pages: Vec<_> = file.pieces.iter().copied().map(phys).collect();
        let data = Memfd::across(&pages, file.len, file.seals).write(out);
        let data = data.with_context(|| format!("file {token:#x} of session {:?}", self.session))?;
        sessions[at].files.push(File::memfd(token, data));
        Ok(())
    }
}

/// Refuses names that look like a place and are none, and the session that is batond's.
pub fn check(name: &str) -> Result<()> {
    match Place::of(name) {
        Some(place) if place.session == crate::update::kho::NAME => {
            bail!("the session {:?} is batond's: take another name", place.session)
        }
        None if name.starts_with(PREFIX) => {
            bail!("{name:?} begins as a place in a session does, which is {PREFIX}TOKEN/SESSION, TOKEN in hexadecimal")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_places_and_only_one_name_says_each() {
        for (name, session, token) in [
            ("luo/1a/test-session", "test-session", Some(0x1a)),
            ("luo//empty", "empty", None),
            ("luo/0/a/b", "a/b", Some(0)),
            ("luo/ffffffffffffffff/x", "x", Some(u64::MAX)),
        ] {
            let place = Place::of(name).unwrap();
            assert_eq!(place, Place { session, token });
            assert_eq!(place.name(), name);
            check(name).unwrap();
        }
        for name in ["luo/", "luo/1", "luo/1/", "luo//", "luo/01/x", "luo/+1/x", "luo/A/x", "luo/10000000000000000/x"] {
            assert_eq!(Place::of(name), None, "{name}");
            assert!(check(name).is_err(), "{name}");
        }
        assert!(Place::of(&format!("luo/1/{}", "x".repeat(64))).is_none());
        for name in ["table", "luo", "xluo/1/x"] {
            assert_eq!(Place::of(name), None, "{name}");
            check(name).unwrap();
        }
        assert!(check("luo/1/baton").is_err(), "the record's");
    }
}
