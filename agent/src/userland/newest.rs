//! Which kernel is the newest, and whether somebody should be told that it does not run yet: pure decisions.

use std::cmp::Ordering;

/// Compares two releases (`uname -r`) as Debian orders versions (deb-version(7)); what comes before a release (`-rc1`, `-trunk`) is older
/// than it, as linux-version(1) has it.
pub fn compare(one: &str, other: &str) -> Ordering {
    let before = |release: &str| release.replace("-rc", "~rc").replace("-trunk", "~trunk");
    debian_order(before(one).as_bytes(), before(other).as_bytes())
}

/// dpkg's order of two version strings without epoch and revision (lib/dpkg/version.c, `verrevcmp`): texts and numbers by turns; in a text
/// `~` is before the end, the end before letters, and letters before all else.
fn debian_order(mut one: &[u8], mut other: &[u8]) -> Ordering {
    fn rank(byte: Option<&u8>) -> i32 {
        match byte {
            None => 0,
            Some(b'~') => -1,
            Some(digit) if digit.is_ascii_digit() => 0,
            Some(letter) if letter.is_ascii_alphabetic() => i32::from(*letter),
            Some(byte) => i32::from(*byte) + 256,
        }
    }
    let is_text = |rest: &[u8]| rest.first().is_some_and(|byte| !byte.is_ascii_digit());
    while !one.is_empty() || !other.is_empty() {
        while is_text(one) || is_text(other) {
            let order = rank(one.first()).cmp(&rank(other.first()));
            if order.is_ne() {
                return order;
            }
            (one, other) = (one.get(1..).unwrap_or_default(), other.get(1..).unwrap_or_default());
        }
        fn number(rest: &[u8]) -> (&[u8], &[u8]) {
            let (digits, rest) = rest.split_at(rest.iter().take_while(|byte| byte.is_ascii_digit()).count());
            (&digits[digits.iter().take_while(|digit| **digit == b'0').count()..], rest)
        }
        let ((left, one_rest), (right, other_rest)) = (number(one), number(other));
        // More digits are more; as many are compared as they stand.
        let order = left.len().cmp(&right.len()).then_with(|| left.cmp(right));
        if order.is_ne() {
            return order;
        }
        (one, other) = (one_rest, other_rest);
    }
    Ordering::Equal
}

/// The flavour of a release of Debian's: `cloud-amd64` of `7.3.4+deb13-cloud-amd64`, `amd64` of `6.1.0-18-amd64`. Nothing where it names none.
pub fn flavour(release: &str) -> &str {
    let is_version = |part: &str| part.strip_prefix("rc").unwrap_or(part).starts_with(|c: char| c.is_ascii_digit());
    let mut rest = release;
    while let Some((part, behind)) = rest.split_once('-') {
        // The first part is the version, whatever it looks like.
        if rest.len() != release.len() && !is_version(part) {
            return rest;
        }
        rest = behind;
    }
    if rest.len() == release.len() || is_version(rest) { "" } else { rest }
}

/// Those of these releases that are newer than the one that runs and of its flavour, the newest first. (Another flavour is another choice
/// of the operator's: drivers, configuration.)
pub fn newer<'a>(running: &str, releases: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = |release: &&str| flavour(release) == flavour(running) && compare(release, running).is_gt();
    let mut newer: Vec<&str> = releases.into_iter().filter(wanted).collect();
    newer.sort_by(|one, other| compare(other, one));
    newer.dedup();
    newer
}

/// What the sentinel's list has of a kernel: its package.
const PACKAGE: &str = "linux-image-";

/// What is to become of `/run/reboot-required` and the list beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sentinel {
    /// As it is: nothing of it is about kernels.
    Leave,
    /// It is needed, for these packages.
    Needed(Vec<String>),
    /// Nobody has a reason any more: both files go.
    Clear,
}

/// What the sentinel must say. `listed`: the packages in the list now, nothing where there is none. `installed`: the releases whose
/// packages and images are there. What is listed and no kernel is somebody else's reason, and stays.
pub fn sentinel(running: &str, installed: &[&str], listed: Option<&[&str]>) -> Sentinel {
    let waits = |release: &str| installed.contains(&release) && compare(release, running).is_gt();
    let mut packages: Vec<String> = listed
        .unwrap_or_default()
        .iter()
        .filter(|package| package.strip_prefix(PACKAGE).is_none_or(waits))
        .map(|package| (*package).to_owned())
        .collect();
    if let Some(newest) = newer(running, installed.iter().copied()).first() {
        let package = format!("{PACKAGE}{newest}");
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    match listed {
        _ if !packages.is_empty() && listed.is_none_or(|listed| packages != *listed) => Sentinel::Needed(packages),
        Some(listed) if packages.is_empty() && !listed.is_empty() => Sentinel::Clear,
        _ => Sentinel::Leave,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Each is older than the next; what stands together is the same. By `dpkg --compare-versions`.
    const ORDERED: &[&[&str]] = &[
        &["5.10.0~rc1-amd64"],
        &["5.10.0-9-amd64", "5.10.00-09-amd64"],
        &["5.10.0-10-amd64"],
        &["6.1.0-18-amd64"],
        &["6.1.0-18-cloud-amd64"],
        &["6.9.12-amd64"],
        &["6.12-rc2-amd64"],
        &["6.12-amd64"],
        &["6.12.9+deb13-amd64"],
        &["6.12.107+deb13-cloud-amd64"],
        &["6.12.117+deb13+1-cloud-amd64"],
        &["6.12.117+deb13-cloud-amd64"],
        &["7.3~rc1-cloud-amd64"],
        &["7.3-rc2-cloud-amd64"],
        &["7.3-trunk-cloud-amd64"],
        &["7.3-cloud-amd64"],
        &["7.3.4+deb13-cloud-amd64"],
        &["7.3.10+deb13-cloud-amd64"],
        &["18446744073709551616.0"],
        &["99999999999999999999999.1"],
    ];

    #[test]
    fn releases_are_in_debians_order() {
        for (n, same) in ORDERED.iter().enumerate() {
            for (m, others) in ORDERED.iter().enumerate() {
                for (one, other) in same.iter().flat_map(|one| others.iter().map(move |other| (one, other))) {
                    assert_eq!(compare(one, other), n.cmp(&m), "{one} and {other}");
                }
            }
        }
    }

    /// deb-version(7)'s own examples, and what dpkg's tests have (lib/dpkg/t/t-version.c).
    #[test]
    fn strings_are_in_dpkgs_order() {
        let order = |one: &str, other: &str| debian_order(one.as_bytes(), other.as_bytes());
        for (less, more) in
            [("~~", "~~a"), ("~~a", "~"), ("~", ""), ("", "a"), ("a", "+"), ("1.0~rc1", "1.0"), ("0:0-0", "0:0-0a")]
        {
            assert_eq!((order(less, more), order(more, less)), (Ordering::Less, Ordering::Greater), "{less} {more}");
        }
        for (one, same) in [("0", "000"), ("0", ""), ("1.0", "1.00"), ("a", "a0")] {
            assert_eq!(order(one, same), Ordering::Equal, "{one} {same}");
        }
    }

    proptest! {
        #[test]
        fn any_strings_have_an_order(a in "[-~+.a-c0-9]{0,8}", b in "[-~+.a-c0-9]{0,8}", c in "[-~+.a-c0-9]{0,8}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                prop_assert!(compare(&a, &c).is_le());
            }
        }
    }

    #[test]
    fn flavours_are_told_from_versions() {
        for (release, expected) in [
            ("7.3.4+deb13-cloud-amd64", "cloud-amd64"),
            ("6.1.0-18-amd64", "amd64"),
            ("6.1.0-18-rt-amd64", "rt-amd64"),
            ("6.12-rc3+debug-amd64", "amd64"),
            ("6.12-rc3", ""),
            ("7.3.4", ""),
            ("", ""),
            ("6.8.0-31-generic", "generic"),
        ] {
            assert_eq!(flavour(release), expected, "{release}");
        }
    }

    const RUNNING: &str = "6.12.117+deb13-cloud-amd64";
    const NEW: &str = "7.3.4+deb13-cloud-amd64";

    #[test]
    fn only_newer_ones_of_the_same_flavour_are_wanted_newest_first() {
        let releases = ["6.12.9+deb13-cloud-amd64", NEW, RUNNING, "7.9.1+deb13-amd64", "7.3.10+deb13-cloud-amd64", NEW];
        assert_eq!(newer(RUNNING, releases), ["7.3.10+deb13-cloud-amd64", NEW]);
        assert!(newer(NEW, [RUNNING, NEW]).is_empty());
    }

    #[test]
    fn the_sentinel_stands_as_long_as_a_newer_kernel_waits() {
        let package = |release: &str| format!("linux-image-{release}");
        let (old, new) = (package(RUNNING), package(NEW));
        let both = [RUNNING, NEW];
        assert_eq!(sentinel(RUNNING, &both, None), Sentinel::Needed(vec![new.clone()]));
        assert_eq!(sentinel(RUNNING, &both, Some(&[&new])), Sentinel::Leave, "said already");
        assert_eq!(sentinel(NEW, &both, Some(&[&new])), Sentinel::Clear, "it runs");
        assert_eq!(sentinel(NEW, &both, None), Sentinel::Leave);
        assert_eq!(sentinel(RUNNING, &[RUNNING], Some(&[&new])), Sentinel::Clear, "it was removed again");
        // Reasons of others stay, also where nobody has named one.
        assert_eq!(sentinel(NEW, &both, Some(&["dbus", &new, &old])), Sentinel::Needed(vec!["dbus".into()]));
        assert_eq!(sentinel(NEW, &both, Some(&["dbus"])), Sentinel::Leave);
        assert_eq!(sentinel(NEW, &both, Some(&[])), Sentinel::Leave, "a sentinel without a reason is somebody else's");
        assert_eq!(sentinel(RUNNING, &both, Some(&["dbus"])), Sentinel::Needed(vec!["dbus".into(), new.clone()]));
        // Another flavour is not waited for by us, but what somebody else says of it holds.
        let generic = package("7.9.1-amd64");
        assert_eq!(sentinel(NEW, &[NEW, "7.9.1-amd64"], None), Sentinel::Leave);
        assert_eq!(sentinel(NEW, &[NEW, "7.9.1-amd64"], Some(&[&generic])), Sentinel::Leave);
    }
}
