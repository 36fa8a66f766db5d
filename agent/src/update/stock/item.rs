//! What stock-taking finds, before it is known what the operator accepts.

use super::accept::Accept;
use crate::daemon::control::{Finding, Verdict};

/// What it means for an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Weight {
    /// Nothing is lost.
    Fine,
    /// It ends with this kernel, and that is as it should be: the successor starts it anew, or a reboot brings it back.
    ComesBack,
    /// It ends, and the operator has to say that this is all right.
    Asks(Accept),
    /// No update, whatever the operator says.
    Forbids,
}

/// One finding of one theme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What was looked at.
    pub check: &'static str,
    /// What was found, with the numbers.
    pub found: String,
    /// What becomes of it.
    pub cause: String,
    /// What the operator can do.
    pub advice: String,
    /// What it means.
    pub weight: Weight,
}

impl Item {
    /// Nothing is lost.
    pub fn fine(check: &'static str, found: impl Into<String>) -> Item {
        Item { check, found: found.into(), cause: String::new(), advice: String::new(), weight: Weight::Fine }
    }

    /// It ends, and comes back.
    pub fn comes_back(check: &'static str, found: impl Into<String>, cause: impl Into<String>) -> Item {
        let weight = Weight::ComesBack;
        Item { check, found: found.into(), cause: cause.into(), advice: String::new(), weight }
    }

    /// It ends, if the operator accepts that.
    pub fn asks(
        check: &'static str,
        accept: Accept,
        found: impl Into<String>,
        cause: impl Into<String>,
        advice: impl Into<String>,
    ) -> Item {
        let weight = Weight::Asks(accept);
        Item { check, found: found.into(), cause: cause.into(), advice: advice.into(), weight }
    }

    /// No update.
    pub fn forbids(
        check: &'static str,
        found: impl Into<String>,
        cause: impl Into<String>,
        advice: impl Into<String>,
    ) -> Item {
        Item { check, found: found.into(), cause: cause.into(), advice: advice.into(), weight: Weight::Forbids }
    }

    /// What is told of it, when these names are accepted.
    pub fn finding(self, accepted: &[Accept]) -> Finding {
        let (verdict, accept) = match &self.weight {
            Weight::Fine => (Verdict::Ok, None),
            Weight::ComesBack => (Verdict::Lost, None),
            Weight::Asks(name) if accepted.contains(name) => (Verdict::Lost, Some(*name)),
            Weight::Asks(name) => (Verdict::Refused, Some(*name)),
            Weight::Forbids => (Verdict::Refused, None),
        };
        let advice = match (verdict, accept) {
            (Verdict::Refused, Some(name)) => {
                let own = if self.advice.is_empty() { String::new() } else { format!("{}, or ", self.advice) };
                format!("{own}accept it by name: --accept {name}")
            }
            (Verdict::Refused, None) => self.advice,
            _ => String::new(),
        };
        let (check, found, cause) = (self.check.to_owned(), self.found, self.cause);
        Finding { check, verdict, found, cause, advice, accept, class: None }
    }
}

/// At most this many names are listed; the rest is counted.
const NAMED: usize = 8;

/// `a, b, c and 4 more`.
pub fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let shown = names.iter().take(NAMED).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// `1 disk`, `3 disks`.
pub fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// Bytes, as people write them.
pub fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("GiB", 30), ("MiB", 20), ("KiB", 10), ("bytes", 0)];
    let (name, shift) = UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0).unwrap_or(("bytes", 0));
    format!("{} {name}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_accepted_is_lost_and_nothing_else_is() {
        let route = || Item::asks("routes", Accept::Routes, "default via 10.0.0.1", "it is gone", "");
        let refused = route().finding(&[Accept::Mounts]);
        assert_eq!((refused.verdict, refused.accept), (Verdict::Refused, Some(Accept::Routes)));
        assert!(refused.advice.contains("--accept routes"), "{}", refused.advice);
        let lost = route().finding(&[Accept::Mounts, Accept::Routes]);
        assert_eq!((lost.verdict, lost.accept, lost.advice.as_str()), (Verdict::Lost, Some(Accept::Routes), ""));
        let root = Item::forbids("mounts", "/ on vda", "it does not cross", "wait").finding(Accept::all());
        assert_eq!((root.verdict, root.accept), (Verdict::Refused, None));
        let shell = Item::comes_back("processes", "labd", "started anew").finding(&[]);
        assert_eq!((shell.verdict, shell.accept), (Verdict::Lost, None));
    }

    #[test]
    fn long_lists_are_counted_and_sizes_readable() {
        let names: Vec<String> = (0..11).map(|n| format!("d{n}")).collect();
        assert_eq!(listed(&names[..2]), "d0, d1");
        assert_eq!(listed(&names), "d0, d1, d2, d3, d4, d5, d6, d7 and 3 more");
        assert_eq!((size(0), size(3 << 20), counted(1, "disk")), ("0 bytes".into(), "3 MiB".into(), "1 disk".into()));
    }
}
