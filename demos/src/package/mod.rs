//! The Debian packages, as `cargo demo package` builds them: `baton` (the agent, with what a service manager, a shell and a reader want of
//! it) and `baton-dkms` (the module's source, built on the machine for each of its kernels).
//!
//! A tree is laid out as it will lie on the machine, and dpkg-deb packs it. What is written by hand is in `agent/packaging`; man pages and
//! completions are made of the programs' own command lines and of the configuration's types ([`documents`]).

pub mod documents;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use super::lab::error::{Doing, LabError, Result};
use super::lab::{Progress, guest_programs, host, kmod};
use tree::Tree;

/// The agent's programs.
const PROGRAMS: [&str; 3] = ["baton", "batond", "baton-init"];
/// Who is asked about the packages, unless `DEBFULLNAME` and `DEBEMAIL` say otherwise.
const MAINTAINER: (&str, &str) = ("The Baton authors", "maintainers@baton.invalid");
const SUITE: &str = "trixie";

/// The two files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packages {
    /// `baton_VERSION_amd64.deb`.
    pub baton: PathBuf,
    /// `baton-dkms_VERSION_all.deb`.
    pub dkms: PathBuf,
}

/// The packages' version.
#[must_use]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Where what is written by hand lies.
fn written() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/packaging")
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).doing(format_args!("reading {}", path.display()))
}

/// The module's version, by dkms.conf.
pub fn module_version() -> Result<String> {
    let conf = kmod::sources().join("dkms.conf");
    let text = read(&conf)?;
    let version = text.lines().find_map(|line| line.strip_prefix("PACKAGE_VERSION=\"")?.strip_suffix('"'));
    version
        .map(str::to_owned)
        .ok_or_else(|| LabError::Reply { from: conf.display().to_string(), problem: "no PACKAGE_VERSION in it".into() })
}

/// Builds both into a folder, which is made if it is not there.
pub fn build(output: &Path, progress: Progress) -> Result<Packages> {
    fs::create_dir_all(output).doing(format_args!("creating {}", output.display()))?;
    let programs = guest_programs::build(&PROGRAMS, progress)?;
    let when = When::of_sources()?;
    let task = progress.task("packages");
    task.step("baton");
    let baton = agent(&programs, when)?.pack(output, when.unix)?;
    task.step("baton-dkms");
    let dkms = module(when)?.pack(output, when.unix)?;
    task.done("built");
    Ok(Packages { baton, dkms })
}

/// The time of the packages and of all files in them: that of the last commit, so that the same sources give the same bytes.
#[derive(Clone, Copy, Debug)]
struct When {
    unix: u64,
}

impl When {
    fn of_sources() -> Result<Self> {
        let told = env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
        let committed = || {
            let mut git = Command::new("git");
            git.current_dir(env!("CARGO_MANIFEST_DIR")).args(["log", "-1", "--format=%ct"]);
            let output = host::run("git log", &mut git).ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        // Sources without a history are as old as their manifest.
        let changed = || {
            use std::os::unix::fs::MetadataExt;
            let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
            let found = fs::metadata(&manifest).doing(format_args!("looking at {}", manifest.display()))?;
            Ok(u64::try_from(found.mtime()).unwrap_or_default())
        };
        Ok(Self { unix: told.or_else(committed).map_or_else(changed, Ok)? })
    }

    /// As changelogs have it (deb-changelog(5)).
    fn rfc5322(self) -> Result<String> {
        let mut date = Command::new("date");
        date.env("LC_ALL", "C").args(["--utc", "--rfc-email", &format!("--date=@{}", self.unix)]);
        Ok(String::from_utf8_lossy(&host::run("date", &mut date)?.stdout).trim().to_owned())
    }
}

fn maintainer() -> String {
    let of = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
    format!("{} <{}>", of("DEBFULLNAME", MAINTAINER.0), of("DEBEMAIL", MAINTAINER.1))
}

/// What every package has.
fn common(name: &str, architecture: &str, fields: &str, when: When) -> Result<Tree> {
    let version = version();
    let mut tree = Tree::new(name, version, architecture)?;
    tree.control(&format!(
        "Package: {name}\nSource: baton\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: {}\n{fields}",
        maintainer()
    ));
    let changelog = format!(
        "baton ({version}) {SUITE}; urgency=medium\n\n  * Built from the sources of this version.\n\n -- {}  {}\n",
        maintainer(),
        when.rfc5322()?
    );
    tree.gzip(&format!("/usr/share/doc/{name}/changelog.gz"), changelog.as_bytes())?;
    let mit = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../LICENSE-MIT"))?;
    // Its title and its own copyright line are said in other fields.
    let (_, mit) = mit.split_once("Permission").unwrap_or_default();
    let indented = |line: &str| if line.is_empty() { " .".to_owned() } else { format!(" {line}") };
    let mit: Vec<String> = format!("Permission{mit}").lines().map(indented).collect();
    let copyright = read(&written().join("copyright"))?.replace("@MIT@", &mit.join("\n"));
    tree.file(&format!("/usr/share/doc/{name}/copyright"), 0o644, copyright.as_bytes())?;
    Ok(tree)
}

/// Scripts and overrides, by the package's name.
fn add_written(tree: &mut Tree, name: &str) -> Result<()> {
    let version = module_version()?;
    for script in ["postinst", "prerm", "postrm"] {
        let path = written().join(format!("{name}.{script}"));
        if path.is_file() {
            tree.script(script, &read(&path)?.replace("@MODULE_VERSION@", &version))?;
        }
    }
    let overrides = written().join(format!("{name}.lintian-overrides"));
    if overrides.is_file() {
        tree.file(&format!("/usr/share/lintian/overrides/{name}"), 0o644, read(&overrides)?.as_bytes())?;
    }
    Ok(())
}

fn agent(programs: &Path, when: When) -> Result<Tree> {
    const NAME: &str = "baton";
    let mut tree = common(
        NAME,
        "amd64",
        &format!(
            "Section: admin\nPriority: optional\nPre-Depends: init-system-helpers (>= 1.54~)\n\
             Depends: kmod, systemd | systemd-standalone-sysusers\nRecommends: baton-dkms (= {})\n\
             Description: live replacement of the running Linux kernel\n \
             A new kernel boots beside the running one, proves itself, and takes over\n \
             services with their memory, CPUs and the rest of the machine. This package\n \
             has the agent (batond) and the operator's command (baton).\n .\n \
             The kernel's side is a module, which the package baton-dkms builds.\n",
            version()
        ),
        when,
    )?;
    for program in PROGRAMS {
        let from = programs.join(program);
        let bytes = fs::read(&from).doing(format_args!("reading {}", from.display()))?;
        tree.file(&format!("/usr/sbin/{program}"), 0o755, &bytes)?;
    }
    // The agent looks for its programs beside each other (for a successor's initrd), and its operator looks in /usr/bin.
    tree.symlink("/usr/bin/baton", "../sbin/baton")?;
    for (name, to) in [
        ("batond.service", "/usr/lib/systemd/system/batond.service"),
        ("baton-kernels.service", "/usr/lib/systemd/system/baton-kernels.service"),
        ("baton-upgrade.service", "/usr/lib/systemd/system/baton-upgrade.service"),
        ("baton-upgrade.timer", "/usr/lib/systemd/system/baton-upgrade.timer"),
        ("modules-load.conf", "/usr/lib/modules-load.d/baton.conf"),
        ("sysusers.conf", "/usr/lib/sysusers.d/baton.conf"),
    ] {
        tree.file(to, 0o644, read(&written().join(name))?.as_bytes())?;
    }
    for (name, to) in
        [("kernel-postinst", "/etc/kernel/postinst.d/zz-baton"), ("kernel-postrm", "/etc/kernel/postrm.d/zz-baton")]
    {
        tree.conffile(to, 0o755, read(&written().join(name))?.as_bytes())?;
    }
    for page in documents::man_pages(when.unix)? {
        tree.gzip(&format!("/usr/share/man/man{}/{}.gz", page.section, page.file), &page.text)?;
    }
    for completion in documents::completions() {
        tree.file(&completion.path, 0o644, &completion.text)?;
    }
    let example = format!("/usr/share/doc/{NAME}/examples/config.toml");
    tree.file(&example, 0o644, documents::example_configuration().as_bytes())?;
    add_written(&mut tree, NAME)?;
    Ok(tree)
}

fn module(when: When) -> Result<Tree> {
    const NAME: &str = "baton-dkms";
    let mut tree = common(
        NAME,
        "all",
        "Section: kernel\nPriority: optional\nDepends: dkms (>= 2.1.0.0)\nRecommends: linux-headers-amd64\n\
         Description: live replacement of the running Linux kernel - module source\n \
         What the agent of live kernel updates (package baton) needs of a kernel, as\n \
         source that DKMS builds for each installed kernel whose headers are there.\n",
        when,
    )?;
    let to = format!("/usr/src/baton-{}", module_version()?);
    for (name, bytes) in kmod::read_sources(&kmod::sources())? {
        // What tests the module is no part of it.
        if name.starts_with("tests") || name.starts_with("selftest.c") {
            continue;
        }
        tree.file(&format!("{to}/{}", name.display()), 0o644, &bytes)?;
    }
    tree.file(&format!("{to}/dkms.conf"), 0o644, read(&kmod::sources().join("dkms.conf"))?.as_bytes())?;
    add_written(&mut tree, NAME)?;
    Ok(tree)
}
