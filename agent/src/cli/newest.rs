//! `--to-newest`: the newest kernel that apt installed and `check` accepts.

use std::path::PathBuf;

use crate::daemon::control::Finding;
use crate::daemon::outcome::Failure;
use crate::userland::newest;
use crate::userland::packages::{self, State};

/// Where Debian's packages put the image of a release.
pub fn image(release: &str) -> PathBuf {
    PathBuf::from(format!("/boot/vmlinuz-{release}"))
}

/// The releases that are newer than the running kernel, wholly installed by apt, and have their image: the newest first.
pub fn candidates() -> Result<Vec<String>, Failure> {
    let look = || -> anyhow::Result<Vec<String>> {
        let running = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
        let installed = packages::kernels()?.into_iter().filter(|package| package.state == State::Installed);
        let releases: Vec<String> = installed.map(|package| package.release).filter(|r| image(r).exists()).collect();
        Ok(newest::newer(&running, releases.iter().map(String::as_str)).into_iter().map(str::to_owned).collect())
    };
    look().map_err(|error| Failure::from_error(&error))
}

/// What came of looking for the newest.
#[derive(Debug, PartialEq, Eq)]
pub enum Choice {
    /// Nothing newer is installed.
    RunsAlready,
    /// This one; newer ones that `check` refuses, each with its first cause.
    This {
        /// Its release.
        release: String,
        /// Release and cause.
        passed_over: Vec<(String, String)>,
    },
    /// All newer ones are refused: what was found of the newest.
    Refused(Vec<Finding>),
}

/// Asks about one after the other, the newest first, until one is accepted.
pub fn choose(
    candidates: Vec<String>,
    mut check: impl FnMut(&str) -> Result<Vec<Finding>, Failure>,
) -> Result<Choice, Failure> {
    let (mut passed_over, mut of_newest) = (Vec::new(), None);
    for release in candidates {
        let findings = check(&release)?;
        match findings.iter().find_map(Finding::refusal) {
            None => return Ok(Choice::This { release, passed_over }),
            Some(refusal) => passed_over.push((release, refusal.cause)),
        }
        of_newest.get_or_insert(findings);
    }
    Ok(of_newest.map_or(Choice::RunsAlready, Choice::Refused))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::Verdict;
    use crate::daemon::outcome::Class;

    fn finding(verdict: Verdict, cause: &str) -> Finding {
        let (check, found, advice) = ("image".to_owned(), String::new(), String::new());
        Finding { check, verdict, found, cause: cause.into(), advice, accept: None, class: None }
    }

    #[test]
    fn the_newest_that_is_accepted_is_taken_and_those_passed_over_are_told() {
        let all = || ["7.3", "7.2", "7.1"].map(str::to_owned).to_vec();
        let mut asked = Vec::new();
        let choice = choose(all(), |release| {
            asked.push(release.to_owned());
            let verdict = if release == "7.3" { Verdict::Refused } else { Verdict::Lost };
            Ok(vec![finding(Verdict::Ok, ""), finding(verdict, release)])
        });
        let passed_over = vec![("7.3".to_owned(), "7.3".to_owned())];
        assert_eq!(choice.unwrap(), Choice::This { release: "7.2".into(), passed_over });
        assert_eq!(asked, ["7.3", "7.2"], "nobody asks about older ones");
        let refused = choose(all(), |release| Ok(vec![finding(Verdict::Refused, release)])).unwrap();
        assert_eq!(refused, Choice::Refused(vec![finding(Verdict::Refused, "7.3")]));
        assert_eq!(choose(Vec::new(), |_| unreachable!()).unwrap(), Choice::RunsAlready);
        let down = || Failure::new(Class::Unreachable, "batond does not answer", "");
        assert_eq!(choose(all(), |_| Err(down())).unwrap_err().class, Class::Unreachable);
    }
}
