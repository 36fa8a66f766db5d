//! Which Debian mirror this machine already uses, read from apt's own configuration: the lab asks no server that the machine's owner has
//! not chosen, and this code names none.

use std::path::Path;

use super::error::{Doing, LabError, Result};

/// One place that apt fetches binary packages from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Base address, without the trailing slash.
    pub uri: String,
    /// Suites (`bookworm`, `trixie-updates`, ...).
    pub suites: Vec<String>,
    /// Components (`main`, ...).
    pub components: Vec<String>,
}

/// Names under which Debian publishes its main archive.
const DEBIAN_SUITES: &[&str] = &[
    "stable",
    "oldstable",
    "oldoldstable",
    "testing",
    "unstable",
    "sid",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
];

/// Overrides what apt's configuration says; the only way on a machine that is not a Debian.
pub const MIRROR_VARIABLE: &str = "BATON_DEBIAN_MIRROR";

/// Reads every source in `/etc/apt` (or wherever `etc_apt` is).
pub fn read(etc_apt: &Path) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    let main = etc_apt.join("sources.list");
    if main.exists() {
        found.extend(parse_list(&std::fs::read_to_string(&main).doing(format_args!("reading {}", main.display()))?));
    }
    let parts = etc_apt.join("sources.list.d");
    if parts.is_dir() {
        let listing = std::fs::read_dir(&parts).doing(format_args!("listing {}", parts.display()))?;
        let mut files: Vec<_> = listing.filter_map(|e| e.ok().map(|e| e.path())).collect();
        files.sort();
        for file in files {
            let parse = match file.extension().and_then(|e| e.to_str()) {
                Some("list") => parse_list,
                Some("sources") => parse_deb822,
                _ => continue,
            };
            found.extend(parse(&std::fs::read_to_string(&file).doing(format_args!("reading {}", file.display()))?));
        }
    }
    Ok(found)
}

/// The mirror to build the tree from.
pub fn debian_mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var(MIRROR_VARIABLE) {
        return Ok(mirror.trim_end_matches('/').to_owned());
    }
    choose(&read(Path::new("/etc/apt"))?).ok_or_else(|| {
        LabError::Prerequisite(format!(
            "apt on this machine knows no Debian mirror: set {MIRROR_VARIABLE} to the address of one that has trixie"
        ))
    })
}

/// The source most likely to be Debian's main archive: a suite of Debian's that is no security or other side archive, component `main`;
/// among those, one whose path ends the way Debian's mirrors do comes first.
#[must_use]
pub fn choose(sources: &[Source]) -> Option<String> {
    let is_main_archive = |s: &&Source| {
        s.components.iter().any(|c| c == "main") && s.suites.iter().any(|suite| DEBIAN_SUITES.contains(&suite.as_str()))
    };
    let candidates = || sources.iter().filter(is_main_archive);
    candidates().find(|s| s.uri.ends_with("/debian")).or_else(|| candidates().next()).map(|s| s.uri.clone())
}

/// One-line style: `deb [options] uri suite component...`.
#[must_use]
pub fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb").filter(|r| r.starts_with([' ', '\t', '[']))?.trim_start();
    let rest = match rest.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => rest,
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let uri = words.next()?.trim_end_matches('/').to_owned();
    let suites = vec![words.next()?];
    Some(Source { uri, suites, components: words.collect() })
}

/// deb822 style: paragraphs of `Field: value`, values continued on indented lines.
#[must_use]
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut paragraph: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            found.extend(from_paragraph(&paragraph));
            paragraph.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = paragraph.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((field, value)) = line.split_once(':') {
            paragraph.push((field.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

fn from_paragraph(paragraph: &[(String, String)]) -> Vec<Source> {
    let words = |field: &str| -> Vec<String> {
        paragraph
            .iter()
            .filter(|(f, _)| f == field)
            .flat_map(|(_, v)| v.split_whitespace())
            .map(str::to_owned)
            .collect()
    };
    if !words("types").iter().any(|t| t == "deb") || words("enabled").iter().any(|e| e.eq_ignore_ascii_case("no")) {
        return Vec::new();
    }
    words("uris")
        .into_iter()
        .map(|uri| Source {
            uri: uri.trim_end_matches('/').to_owned(),
            suites: words("suites"),
            components: words("components"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suites: &[&str], components: &[&str]) -> Source {
        let own = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        Source { uri: uri.into(), suites: own(suites), components: own(components) }
    }

    #[test]
    fn one_line_style() {
        let text = "# deb http://commented.invalid/debian trixie main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.invalid/debian/ trixie main contrib # why\n\
                    deb-src http://mirror.invalid/debian trixie main\n\
                    \tdeb cdrom:[Debian]/ trixie main\n\
                    deb\n\
                    debian http://nonsense.invalid x\n";
        let found = parse_list(text);
        assert_eq!(found[0], source("http://mirror.invalid/debian", &["trixie"], &["main", "contrib"]));
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn deb822_style() {
        let text = "Types: deb\n# a remark\nURIs: http://mirror.invalid/debian\nSuites: bookworm\n bookworm-updates\nComponents: main\n\
                    Signed-By: /usr/share/keyrings/k.gpg\n\n\
                    Types: deb deb-src\nURIs: http://mirror.invalid/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\nEnabled: no\nURIs: http://off.invalid/debian\nSuites: sid\nComponents: main\n\n\
                    Types: deb-src\nURIs: http://src.invalid/debian\nSuites: sid\nComponents: main";
        assert_eq!(
            parse_deb822(text),
            [
                source("http://mirror.invalid/debian", &["bookworm", "bookworm-updates"], &["main"]),
                source("http://mirror.invalid/debian-security", &["bookworm-security"], &["main"]),
            ]
        );
    }

    #[test]
    fn the_main_archive_is_preferred() {
        let security = source("http://m.invalid/debian-security", &["bookworm-security"], &["main"]);
        let vendor = source("http://vendor.invalid/apt", &["nodistro"], &["main"]);
        let odd = source("http://cache.invalid/proxied", &["trixie"], &["main"]);
        let main = source("http://m.invalid/debian", &["bookworm", "bookworm-updates"], &["main"]);
        assert_eq!(choose(&[security.clone(), vendor.clone()]), None);
        assert_eq!(choose(&[security.clone(), odd.clone()]).as_deref(), Some("http://cache.invalid/proxied"));
        assert_eq!(choose(&[security, vendor, odd, main]).as_deref(), Some("http://m.invalid/debian"));
    }
}
