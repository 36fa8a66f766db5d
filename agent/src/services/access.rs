//! Who may be which service, and how much memory strangers may have: pure decisions.
//!
//! | who asks | a name that the configuration lists | any other name |
//! |---|---|---|
//! | root | yes | yes |
//! | the user that the configuration names for it (`user = "…"`) | yes | as anybody |
//! | another user | no | as far as `limits.unlisted_mib` goes, and only an arena that was this user's before |
//!
//! Who comes so far is root or a member of the group `baton`, to whom the socket belongs ([`GROUP`]).

use std::collections::BTreeMap;

use nix::unistd::{Group, User};

use crate::daemon::config::Config;
use crate::daemon::listen::Peer;

/// Whose members may connect, beside root.
pub const GROUP: &str = "baton";

/// The number of the group [`GROUP`], if this machine has it.
pub fn group() -> Option<u32> {
    Group::from_name(GROUP).ok().flatten().map(|group| group.gid.as_raw())
}

/// What the configuration says of services and users.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// The user of each service that is listed.
    users: BTreeMap<String, u32>,
    /// Bytes that all services which are not listed, and are not root's, may have.
    unlisted: u64,
}

/// What an arena for a service may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// What there is.
    All,
    /// All arenas of services that are not listed and not root's, together.
    Unlisted(u64),
}

/// Why somebody may not be a service, and who can change that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is another user's.
    #[error(
        "service {name} is user {owner}'s, and user {uid} asks for it: let it run as that user, or change its `user` in the configuration"
    )]
    Anothers {
        /// The service.
        name: String,
        /// Whose it is.
        owner: u32,
        /// Who asks.
        uid: u32,
    },
    /// Nobody but root may have a name that the configuration does not list.
    #[error(
        "service {name} is not in the configuration, and user {uid} asks for it: list it with its `user`, or set limits.unlisted_mib"
    )]
    Unlisted {
        /// The service.
        name: String,
        /// Who asks.
        uid: u32,
    },
    /// Services that are not listed have all they may have.
    #[error(
        "service {name} asks for {wanted} KiB; services that are not in the configuration have {had} of {most} KiB (limits.unlisted_mib)"
    )]
    TooMuch {
        /// The service.
        name: String,
        /// What it asks for.
        wanted: u64,
        /// What they have.
        had: u64,
        /// What they may have.
        most: u64,
    },
}

impl Access {
    /// As the configuration says. A user that this machine does not know can be nobody: such a service is left to root.
    pub fn of(config: &Config) -> Access {
        let user_of = |service: &crate::daemon::config::Service| {
            let uid = service.user.as_deref().map_or(Some(0), uid_of).unwrap_or_else(|| {
                let user = service.user.as_deref().unwrap_or_default();
                tracing::error!("service {}: there is no user {user} here: only root can be it", service.name);
                0
            });
            (service.name.clone(), uid)
        };
        let users: BTreeMap<_, _> = config.service.iter().map(user_of).collect();
        if group().is_none() && users.values().any(|uid| *uid != 0) {
            tracing::warn!(
                "there is no group {GROUP} (`groupadd --system {GROUP}`): only root can connect as a service"
            );
        }
        Access { users, unlisted: config.limits.unlisted_mib << 20 }
    }

    /// Whether the configuration lists this service.
    pub fn lists(&self, name: &str) -> bool {
        self.users.contains_key(name)
    }

    /// Whether this user can be any service at all.
    pub fn may_speak(&self, peer: Peer) -> bool {
        peer.is_root() || self.unlisted > 0 || self.users.values().any(|uid| *uid == peer.uid)
    }

    /// Whether this user may be the service, and what its arena may cost. `owner` is whose the arena is that it left, if
    /// it left one: nothing inside if nobody knows.
    pub fn check(&self, peer: Peer, name: &str, owner: Option<Option<u32>>) -> Result<Budget, Refused> {
        let Peer { uid, .. } = peer;
        if peer.is_root() {
            return Ok(Budget::All);
        }
        let name = name.to_owned();
        match (self.users.get(&name), owner) {
            (Some(listed), _) if *listed == uid => Ok(Budget::All),
            (Some(listed), _) => Err(Refused::Anothers { name, owner: *listed, uid }),
            (None, _) if self.unlisted == 0 => Err(Refused::Unlisted { name, uid }),
            // A predecessor's, or one of an earlier batond that did not write it down: root's, to be on the safe side.
            (None, Some(owner)) if owner != Some(uid) => {
                Err(Refused::Anothers { name, owner: owner.unwrap_or(0), uid })
            }
            (None, _) => Ok(Budget::Unlisted(self.unlisted)),
        }
    }
}

impl Budget {
    /// Whether `wanted` bytes more fit, where strangers' services have `had`.
    pub fn check(self, name: &str, wanted: u64, had: u64) -> Result<(), Refused> {
        match self {
            Budget::Unlisted(most) if had.checked_add(wanted).is_none_or(|all| all > most) => {
                let (wanted, had, most) = (wanted >> 10, had >> 10, most >> 10);
                Err(Refused::TooMuch { name: name.to_owned(), wanted, had, most })
            }
            _ => Ok(()),
        }
    }
}

/// A user's number, by name or as it is.
pub fn uid_of(user: &str) -> Option<u32> {
    user.parse().ok().or_else(|| User::from_name(user).ok().flatten().map(|user| user.uid.as_raw()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: Peer = Peer { pid: 9, uid: 65534 };
    const ROOT: Peer = Peer { pid: 1, uid: 0 };
    const KV: Peer = Peer { pid: 7, uid: 107 };

    fn access(unlisted: u64) -> Access {
        Access { users: [("kv".to_owned(), 107), ("memo".to_owned(), 0)].into(), unlisted }
    }

    #[test]
    fn a_service_is_of_the_user_that_the_configuration_names_and_of_root() {
        let access = access(0);
        assert!(access.may_speak(ROOT) && access.may_speak(KV) && !access.may_speak(NOBODY));
        for owner in [None, Some(None), Some(Some(107)), Some(Some(65534))] {
            assert_eq!(access.check(ROOT, "kv", owner), Ok(Budget::All));
            assert_eq!(access.check(KV, "kv", owner), Ok(Budget::All));
            let refused = access.check(NOBODY, "kv", owner).unwrap_err().to_string();
            assert!(refused.contains("service kv is user 107's, and user 65534 asks for it"), "{refused}");
            assert!(access.check(KV, "memo", owner).is_err(), "one without a user is root's");
            assert!(matches!(access.check(KV, "other", owner), Err(Refused::Unlisted { .. })));
            assert_eq!(access.check(ROOT, "other", owner), Ok(Budget::All));
        }
    }

    #[test]
    fn strangers_get_what_the_configuration_lets_them_have_and_only_what_is_theirs() {
        let access = access(10 << 20);
        assert!(access.may_speak(NOBODY));
        assert_eq!(access.check(NOBODY, "own", None), Ok(Budget::Unlisted(10 << 20)));
        assert_eq!(access.check(NOBODY, "own", Some(Some(65534))), Ok(Budget::Unlisted(10 << 20)));
        assert!(matches!(access.check(NOBODY, "own", Some(Some(107))), Err(Refused::Anothers { owner: 107, .. })));
        assert!(access.check(NOBODY, "own", Some(None)).is_err(), "nobody knows whose it was");
        let budget = Budget::Unlisted(10 << 20);
        assert_eq!(budget.check("own", 4 << 20, 6 << 20), Ok(()));
        let refused = budget.check("own", (4 << 20) + 4096, 6 << 20).unwrap_err().to_string();
        assert!(refused.contains("asks for 4100 KiB") && refused.contains("6144 of 10240 KiB"), "{refused}");
        assert!(budget.check("own", u64::MAX, 4096).is_err());
        assert_eq!(Budget::All.check("own", u64::MAX, 4096), Ok(()));
    }
}
