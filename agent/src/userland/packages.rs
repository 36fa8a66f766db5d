//! What dpkg knows of this machine's kernels. A machine without dpkg has no kernels of packages.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A package `linux-image-RELEASE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelPackage {
    /// As `uname -r` will say it.
    pub release: String,
    /// How far its installation is.
    pub state: State,
}

/// How far a package's installation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is there.
    Installed,
    /// All files are there; its scripts have not ended (in one of them, a hook runs), or have failed.
    Unfinished,
    /// Anything else: removed, half unpacked.
    Absent,
}

/// All of them.
///
/// # Errors
/// dpkg is there and does not answer.
pub fn kernels() -> Result<Vec<KernelPackage>> {
    let mut command = Command::new("dpkg-query");
    command.args(["--show", "--showformat", "${Package} ${db:Status-Status}\n", "linux-image-*"]);
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("cannot run dpkg-query"),
    };
    // 1: no package is called so.
    if !matches!(output.status.code(), Some(0 | 1)) {
        bail!("dpkg-query: {} ({})", String::from_utf8_lossy(&output.stderr).trim(), output.status);
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// `linux-image-RELEASE STATE`, one a line. Packages that only depend on such a one (`linux-image-amd64`) are no kernels.
fn parse(text: &str) -> Vec<KernelPackage> {
    let line = |line: &str| {
        let (package, state) = line.split_once(' ')?;
        let release =
            package.strip_prefix("linux-image-").filter(|release| release.starts_with(|c: char| c.is_ascii_digit()))?;
        // The same kernel without Debian's signature.
        let release = release.strip_suffix("-unsigned").unwrap_or(release);
        let state = match state {
            "installed" | "triggers-awaited" | "triggers-pending" => State::Installed,
            "unpacked" | "half-configured" => State::Unfinished,
            _ => State::Absent,
        };
        Some(KernelPackage { release: release.to_owned(), state })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_from_what_depends_on_them() {
        let text = "linux-image-amd64 installed\nlinux-image-7.3.4+deb13-cloud-amd64 half-configured\n\
                    linux-image-6.12.117+deb13-cloud-amd64 installed\nlinux-image-6.1.0-18-amd64 config-files\nodd\n\n";
        let found: Vec<_> = parse(text).into_iter().map(|package| (package.release, package.state)).collect();
        let expected = [
            ("7.3.4+deb13-cloud-amd64", State::Unfinished),
            ("6.12.117+deb13-cloud-amd64", State::Installed),
            ("6.1.0-18-amd64", State::Absent),
        ];
        assert_eq!(found, expected.map(|(release, state)| (release.to_owned(), state)));
    }
}
