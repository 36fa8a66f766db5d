//! What is read about the programs: man pages and shell completions, made of their own command lines (`clap`), and the manual of the
//! configuration, made of its types ([`agent::daemon::config::keys`]). So they cannot say what the programs do not do.

use agent::daemon::config::{self, Config};
use agent::daemon::config_keys::Key;
use agent::update::stock::accept::Accept;
use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::lab::error::{Doing, Result};

/// A page of the manual.
#[derive(Clone, Debug)]
pub struct Page {
    /// `baton-check.1`.
    pub file: String,
    /// 1, 5 or 8.
    pub section: u8,
    /// In roff.
    pub text: Vec<u8>,
}

/// What a shell completes a command with.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Where the shell looks for it on Debian.
    pub path: String,
    /// In the shell's language.
    pub text: Vec<u8>,
}

/// The operator's command and the daemon, as they parse their own arguments.
fn commands() -> [(Command, u8); 2] {
    [(agent::cli::Cli::command(), 1), (agent::daemon::Args::command(), 8)]
}

/// `Baton 0.1.0`.
fn source() -> String {
    format!("Baton {}", super::version())
}

/// All pages. `unix`: the day that they carry.
pub fn man_pages(unix: u64) -> Result<Vec<Page>> {
    let date = date(unix)?;
    let mut pages = Vec::new();
    for (command, section) in commands() {
        let name = command.get_name().to_owned();
        pages_of(command.disable_help_subcommand(true), &name, section, &date, &mut pages)?;
    }
    pages.push(Page { file: "baton-config.toml.5".into(), section: 5, text: configuration(&date).into_bytes() });
    pages.push(Page { file: "baton-init.8".into(), section: 8, text: init(&date).into_bytes() });
    Ok(pages)
}

fn date(unix: u64) -> Result<String> {
    let mut date = std::process::Command::new("date");
    date.args(["--utc", "+%Y-%m-%d", &format!("--date=@{unix}")]);
    Ok(String::from_utf8_lossy(&crate::lab::host::run("date", &mut date)?.stdout).trim().to_owned())
}

/// The page of a command and of each below it, which is called by its whole name: `baton-config-check`.
fn pages_of(mut command: Command, name: &str, section: u8, date: &str, into: &mut Vec<Page>) -> Result<()> {
    // What is global is a part of each command's arguments only then.
    command.build();
    let file = format!("{name}.{section}");
    let shown = command.clone();
    let man = Man::new(shown).section(section.to_string()).date(date).source(source()).manual("Baton");
    let mut text = Vec::new();
    man.render(&mut text).doing(format_args!("writing {file}"))?;
    let mut more = Roff::new();
    more.control("SH", ["SEE ALSO"]);
    more.text([bold("baton"), roman("(1), "), bold("baton-config.toml"), roman("(5), "), bold("batond"), roman("(8)")]);
    text.extend(more.render().into_bytes());
    into.push(Page { file, section, text });
    for below in command.get_subcommands().filter(|below| below.get_name() != "help" && !below.is_hide_set()) {
        pages_of(below.clone(), &format!("{name}-{}", below.get_name()), section, date, into)?;
    }
    Ok(())
}

fn head(name: &str, section: &str, date: &str, what: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("TH", [name, section, date, &source(), "Baton"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{name} - {what}"))]);
    roff
}

/// `baton-config.toml(5)`.
#[must_use]
pub fn configuration(date: &str) -> String {
    let mut roff = head("baton-config.toml", "5", date, "what the operator of live kernel updates wishes");
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([italic(config::DEFAULT_PATH)]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([
        roman("A file in TOML for wishes: without it, everything is found out, and each key has the default below. "),
        bold("baton config check"),
        roman(" says whether batond would take it, "),
        bold("baton config show --effective"),
        roman(" what holds with it. batond reads it when it starts, and on "),
        bold("systemctl reload batond"),
        roman(". The successor's initrd carries it: it is the same file in every kernel."),
    ]);
    let keys = config::keys();
    for table in keys.iter().filter(|key| key.is_table() && !key.path.contains("[]")) {
        let prefix = if table.kind == "table" { format!("{}.", table.path) } else { format!("{}[].", table.path) };
        let title = if table.kind == "table" { format!("[{}]", table.path) } else { format!("[[{}]]", table.path) };
        roff.control("SH", [title.as_str()]);
        roff.text([roman(&table.meaning)]);
        for key in keys.iter().filter(|key| key.path.strip_prefix(&prefix).is_some_and(|name| !name.contains('.'))) {
            describe(&mut roff, key);
        }
    }
    roff.control("SH", ["WHAT CAN BE ACCEPTED"]);
    roff.text([
        roman("The names that "),
        bold("update.accept"),
        roman(" and "),
        bold("--accept"),
        roman(" take. There is none for everything."),
    ]);
    for accept in Accept::all() {
        roff.control("TP", []);
        roff.text([bold(accept.name())]);
        roff.text([roman(accept.meaning())]);
    }
    roff.control("SH", ["FILES"]);
    roff.text([italic(config::DEFAULT_PATH)]);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("baton"), roman("(1), "), bold("batond"), roman("(8)")]);
    roff.render()
}

fn describe(roff: &mut Roff, key: &Key) {
    let default = match (&key.default, key.is_table()) {
        (_, true) => String::new(),
        (Some(default), _) if default != "null" => format!(", default {default}"),
        _ if key.path.contains("[]") && key.default.is_none() => ", must be given".to_owned(),
        _ => ", without it there is none".to_owned(),
    };
    roff.control("TP", []);
    roff.text([bold(&key.path), roman(format!(" ({}{default})", key.kind))]);
    roff.text([roman(&key.meaning)]);
}

/// `baton-init(8)`: it has no arguments.
fn init(date: &str) -> String {
    let mut roff = head("baton-init", "8", date, "process 1 of a successor's initrd");
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([
        bold("baton-init"),
        roman(" is what a successor's kernel starts first: it mounts, loads modules, and starts batond, the services and the programs of "),
        italic(config::DEFAULT_PATH),
        roman(". "),
        bold("baton mkinitrd"),
        roman(" puts it into the initrd. Nobody starts it on a running machine, and it takes no arguments. SIGUSR1 halts the machine, SIGUSR2 powers it off, and SIGTERM restarts it, each after the programs have ended."),
    ]);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("baton"), roman("(1), "), bold("batond"), roman("(8)")]);
    roff.render()
}

/// For bash, zsh and fish.
#[must_use]
pub fn completions() -> Vec<Completion> {
    let mut all = Vec::new();
    for (mut command, _) in commands() {
        let name = command.get_name().to_owned();
        for (shell, path) in [
            (Shell::Bash, format!("/usr/share/bash-completion/completions/{name}")),
            (Shell::Zsh, format!("/usr/share/zsh/vendor-completions/_{name}")),
            (Shell::Fish, format!("/usr/share/fish/vendor_completions.d/{name}.fish")),
        ] {
            let mut text = Vec::new();
            generate(shell, &mut command, &name, &mut text);
            all.push(Completion { path, text });
        }
    }
    all
}

/// A configuration that wishes for nothing, with each key in a comment.
#[must_use]
pub fn example_configuration() -> String {
    let mut text = "# Each key with its default. Nothing here is needed; baton-config.toml(5) says more.\n".to_owned();
    let keys = config::keys();
    let defaults = toml::Table::try_from(Config::default()).unwrap_or_default();
    for table in keys.iter().filter(|key| key.kind == "table" && !key.path.contains("[]")) {
        text += &format!("\n# {}\n[{}]\n", table.meaning, table.path);
        let prefix = format!("{}.", table.path);
        for key in
            keys.iter().filter(|key| key.path.starts_with(&prefix) && !key.path.contains("[]") && !key.is_table())
        {
            let value = defaults.get(&table.path).and_then(|table| table.get(key.name()));
            // What has no default is shown by its kind.
            let value = value.map_or_else(|| format!("({})", key.kind), ToString::to_string);
            text += &format!("# {}\n#{} = {value}\n", key.meaning, key.name());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a reader sees it: without roff's marks.
    fn readable(roff: &str) -> String {
        roff.replace("\\-", "-")
            .replace("\\fB", "")
            .replace("\\fI", "")
            .replace("\\fR", "")
            .replace("\\&", "")
            .replace("\\*(Aq", "'")
    }

    #[test]
    fn every_key_of_the_configuration_is_in_its_manual() {
        let text = readable(&configuration("2026-01-01"));
        let keys = config::keys();
        assert!(keys.len() > 20, "{}", keys.len());
        for key in &keys {
            let shown =
                if key.is_table() && !key.path.contains('.') { format!("[{}]", key.path) } else { key.path.clone() };
            assert!(text.contains(&shown), "{shown} is not in baton-config.toml(5)");
            let first: String = key.meaning.split('.').next().unwrap_or_default().to_owned();
            assert!(text.contains(first.trim_start_matches('\'')), "{}: {first}", key.path);
        }
        for accept in Accept::all() {
            assert!(text.contains(&accept.meaning()), "{accept}");
        }
    }

    #[test]
    fn every_command_has_its_page_and_is_completed() {
        let pages = man_pages(0).unwrap();
        let mut names: Vec<String> = Vec::new();
        fn walk(command: &Command, name: &str, into: &mut Vec<String>) {
            into.push(name.to_owned());
            command.get_subcommands().for_each(|below| walk(below, &format!("{name}-{}", below.get_name()), into));
        }
        walk(&agent::cli::Cli::command(), "baton", &mut names);
        assert!(names.len() > 12, "{names:?}");
        for name in &names {
            let page = pages.iter().find(|page| page.file == format!("{name}.1")).unwrap_or_else(|| panic!("{name}"));
            let text = readable(&String::from_utf8_lossy(&page.text));
            assert!(text.contains(&format!("{name} - ")), "{text}");
        }
        assert!(pages.iter().any(|page| page.file == "batond.8"));
        let all = completions();
        assert_eq!(all.len(), 6);
        for completion in all.iter().filter(|completion| !completion.path.contains("batond")) {
            let text = String::from_utf8_lossy(&completion.text);
            assert!(text.contains("mkinitrd") && text.contains("to-newest"), "{}", completion.path);
        }
    }

    #[test]
    fn the_example_wishes_for_nothing_and_has_every_key() {
        let text = example_configuration();
        let config = Config::parse(std::path::Path::new("example"), &text).unwrap();
        assert_eq!(toml::to_string(&config).unwrap(), toml::to_string(&Config::default()).unwrap());
        for key in config::keys().iter().filter(|key| !key.path.contains("[]") && !key.is_table()) {
            assert!(text.contains(&format!("\n#{} = ", key.name())), "{}", key.path);
        }
    }
}
