//! The Debian tree: QEMU, compilers, client tools, and the kernels with their modules and headers, in a folder that is built once and
//! entered by chroot. The host's own QEMU is never used (too old ones crash guest programs at random), nor its compiler (a module is
//! built by the compiler that built the kernel).
//!
//! Kernel packages are unpacked, not installed: their installation would build initrds that nobody boots.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::cache::{self, Construction, Key, Lock};
use super::error::{Doing, LabError, Result, last_lines};
use super::progress::{Progress, Task};
use super::{apt_sources, host};

/// Raise when the way of building changes what the tree holds.
const RECIPE_VERSION: &str = "1";
const SUITE: &str = "trixie";
const SUITES: &[&str] = &["trixie", "trixie-updates", "trixie-backports"];
/// The meta package whose newest version in a suite says which kernel that suite runs in clouds.
const KERNEL_META: &str = "linux-image-cloud-amd64";
/// QEMU comes from backports: trixie's own 10.0 loses writes to devices while another CPU changes the memory map
/// (`tests/cases/the_emulator_is_sound.rs`).
const PACKAGES: &[&str] = &[
    "qemu-system-x86/trixie-backports",
    "qemu-system-common/trixie-backports",
    "qemu-system-data/trixie-backports",
    "seabios/trixie-backports",
    "gcc-14",
    "libc6-dev",
    "make",
    "kmod",
    "cpio",
    "xz-utils",
    "zstd",
    "busybox-static",
    "iproute2",
    "kexec-tools",
    "redis-tools",
    "acpica-tools",
    "tcpdump",
];
/// Nobody reads these here; leaving them out saves a third of the files.
const LEFT_OUT: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];
const COMPLETE: &str = "complete";

/// A kernel in the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// Debian's version of the package.
    pub version: String,
}

/// A complete tree.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
    key: String,
    kernels: Vec<Kernel>,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    kernels: Vec<Kernel>,
}

/// `…/baton/lab`.
pub fn lab_root() -> Result<PathBuf> {
    Ok(cache::root()?.join("lab"))
}

fn recipe_key() -> Key {
    let parts = [RECIPE_VERSION].iter().chain(SUITES).chain(PACKAGES).chain(LEFT_OUT);
    parts.fold(Key::default(), |key, part| key.with(part.as_bytes()))
}

impl Tree {
    /// The tree, built now if it is not there.
    pub fn open(progress: Progress) -> Result<Self> {
        let place = lab_root()?.join(recipe_key().name());
        if let Some(tree) = Self::complete(&place)? {
            return Ok(tree);
        }
        let task = progress.task("Debian tree");
        let _lock = Lock::exclusive(&lab_root()?.join("build.lock"), &task)?;
        // Somebody else may have built it while we waited.
        if let Some(tree) = Self::complete(&place)? {
            return Ok(tree);
        }
        build(&place, &task)?;
        cache::replace_symlink(&lab_root()?.join("current"), Path::new(&recipe_key().name()))?;
        let tree = Self::complete(&place)?.ok_or_else(|| LabError::Reply {
            from: place.display().to_string(),
            problem: "built, but not complete".into(),
        })?;
        task.done(&format!("ready at {}", tree.root.display()));
        Ok(tree)
    }

    fn complete(place: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(place.join(COMPLETE)) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).doing(format_args!("reading {}", place.join(COMPLETE).display())),
        };
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| LabError::Reply {
            from: place.join(COMPLETE).display().to_string(),
            problem: format!("{e}; `cargo demo lab --clean` starts over"),
        })?;
        let key = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Some(Self { root: place.join("tree"), key, kernels: manifest.kernels }))
    }

    /// A tree that is no lab's: without kernels, for building one.
    pub(super) fn elsewhere(root: PathBuf) -> Self {
        Self { root, key: String::new(), kernels: Vec::new() }
    }

    /// From now on one of its kernels; a kernel that it has already is not listed twice.
    pub(super) fn adopt(&mut self, kernel: Kernel) {
        if !self.kernels.contains(&kernel) {
            self.kernels.push(kernel);
        }
    }

    /// Its folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Name of the recipe it was built by.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The kernels: trixie's first, then the one from backports, then those that the lab built.
    #[must_use]
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// The kernel whose release begins so (`6.12`, `7.`).
    pub fn kernel(&self, prefix: &str) -> Result<&Kernel> {
        self.kernels.iter().find(|k| k.release.starts_with(prefix)).ok_or_else(|| {
            let there: Vec<_> = self.kernels.iter().map(|k| k.release.as_str()).collect();
            LabError::Refused {
                who: "the lab".into(),
                why: format!("no kernel {prefix}* in the tree, only {}", there.join(", ")),
            }
        })
    }

    /// The kernel's image.
    #[must_use]
    pub fn vmlinuz(&self, kernel: &Kernel) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", kernel.release))
    }

    /// The kernel's modules (`kernel/…`, `modules.dep`).
    #[must_use]
    pub fn modules(&self, kernel: &Kernel) -> PathBuf {
        self.root.join("usr/lib/modules").join(&kernel.release)
    }

    /// A program of the tree, run in it by chroot. No `/proc`, `/dev` or network of its own: see `Inside` for those.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = host::leashed("chroot");
        command.arg(&self.root).arg(program);
        // The tree's own world; setpriv and chroot are found by this PATH too.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin").env("LC_ALL", "C.UTF-8");
        command
    }
}

fn build(place: &Path, task: &Task) -> Result<()> {
    host::prepare(task)?;
    let mirror = apt_sources::debian_mirror()?;
    let work = Construction::begin(place)?;
    let tree = work.path().join("tree");
    let downloads = work.path().join("downloads");

    task.step("reading package lists");
    let apt = Apt::new(&work.path().join("apt"), &mirror)?;
    let kernels = vec![
        apt.kernel_of(|suite| !suite.ends_with("-backports"))?,
        apt.kernel_of(|suite| suite.ends_with("-backports"))?,
    ];

    task.step(&format!(
        "installing {} packages and headers of {}",
        PACKAGES.len(),
        kernels.iter().map(|k| k.release.as_str()).collect::<Vec<_>>().join(", ")
    ));
    std::thread::scope(|scope| {
        let fetch = scope.spawn(|| {
            kernels.iter().try_for_each(|kernel| apt.unpack_kernel(kernel, &downloads.join(&kernel.release)))
        });
        let headers = kernels.iter().map(|k| format!("linux-headers-{}", k.release));
        let packages: Vec<String> = PACKAGES.iter().map(|p| (*p).to_owned()).chain(headers).collect();
        install(&tree, &mirror, &packages, task)?;
        task.step("unpacking kernels");
        fetch.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;

    task.step("adding kernels to the tree");
    for kernel in &kernels {
        adopt_kernel(&downloads.join(&kernel.release), &tree, kernel)?;
    }
    for scrap in
        [&downloads, &work.path().join("apt"), &tree.join("var/cache/apt/archives"), &tree.join("var/lib/apt/lists")]
    {
        fs::remove_dir_all(scrap).doing(format_args!("removing {}", scrap.display()))?;
    }
    let manifest = serde_json::to_string_pretty(&Manifest { kernels })
        .map_err(std::io::Error::other)
        .doing("writing the tree's manifest")?;
    fs::write(work.path().join(COMPLETE), manifest).doing("writing the tree's manifest")?;
    task.step("flushing to disk");
    work.publish()
}

/// A tree of packages, by mmdebstrap in namespaces of its own: its mounts cannot be left behind, and no part of it outlives us.
pub(super) fn install(tree: &Path, mirror: &str, packages: &[String], task: &Task) -> Result<()> {
    let mut command = host::leashed("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--", "mmdebstrap"]);
    command.args(["--mode=root", "--variant=apt", "--format=directory", "--architectures=amd64"]);
    command.arg(format!("--include={}", packages.join(",")));
    command.args([
        "--aptopt=Acquire::Languages \"none\"",
        "--aptopt=APT::Install-Recommends \"false\"",
        "--dpkgopt=force-unsafe-io",
    ]);
    command.args(LEFT_OUT.iter().map(|glob| format!("--dpkgopt=path-exclude={glob}")));
    command.args(proxy_settings()?.iter().map(|line| format!("--aptopt={line}")));
    command.arg(SUITE).arg(tree).args(source_lines(mirror));
    command.env("DEBIAN_FRONTEND", "noninteractive").env_remove("TMPDIR");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .doing("starting mmdebstrap")?;
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines() {
            let line = line.doing("reading what mmdebstrap says")?;
            if let Some(step) = line.strip_prefix("I: ") {
                task.detail(step);
            }
            said.push_str(&line);
            said.push('\n');
        }
    }
    let status = child.wait().doing("waiting for mmdebstrap")?;
    if status.success() {
        Ok(())
    } else {
        Err(LabError::Program { program: "mmdebstrap".into(), status, output: last_lines(&said, 15) })
    }
}

fn source_lines(mirror: &str) -> impl Iterator<Item = String> {
    SUITES.iter().map(move |suite| format!("deb [signed-by={}] {mirror} {suite} main", host::KEYRING))
}

/// Whoever needs a proxy to reach the mirror told apt so.
fn proxy_settings() -> Result<Vec<String>> {
    let dump =
        host::run("apt-config", Command::new("apt-config").args(["dump", "--format", "%F \"%v\"%n", "Acquire"]))?;
    let lines = String::from_utf8_lossy(&dump.stdout);
    Ok(lines.lines().filter(|l| l.contains("Proxy") && !l.ends_with("\"\"")).map(str::to_owned).collect())
}

/// Moves an unpacked kernel into the tree: the image where other systems have it, the modules beside the headers' links.
fn adopt_kernel(unpacked: &Path, tree: &Path, kernel: &Kernel) -> Result<()> {
    let release = &kernel.release;
    let modules = [unpacked.join("usr/lib/modules").join(release), unpacked.join("lib/modules").join(release)]
        .into_iter()
        .find(|p| p.join("kernel").is_dir())
        .ok_or_else(|| LabError::Reply {
            from: format!("the packages of kernel {release}"),
            problem: "no modules in them".into(),
        })?;
    let image = [unpacked.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")]
        .into_iter()
        .find(|p| p.is_file())
        .ok_or_else(|| LabError::Reply {
            from: format!("the packages of kernel {release}"),
            problem: "no vmlinuz in them".into(),
        })?;
    let rename = |from: &Path, to: &Path| {
        fs::rename(from, to).doing(format_args!("moving {} to {}", from.display(), to.display()))
    };
    rename(&image, &tree.join("boot").join(format!("vmlinuz-{release}")))?;
    let config =
        [unpacked.join(format!("boot/config-{release}")), modules.join("config")].into_iter().find(|p| p.is_file());
    if let Some(config) = config {
        rename(&config, &tree.join("boot").join(format!("config-{release}")))?;
    }
    let place = tree.join("usr/lib/modules").join(release);
    fs::create_dir_all(&place).doing(format_args!("creating {}", place.display()))?;
    for entry in fs::read_dir(&modules).doing(format_args!("listing {}", modules.display()))? {
        let entry = entry.doing(format_args!("listing {}", modules.display()))?;
        let to = place.join(entry.file_name());
        if fs::symlink_metadata(&to).is_err() {
            rename(&entry.path(), &to)?;
        }
    }
    host::run("depmod", Command::new("chroot").arg(tree).args(["/usr/sbin/depmod", release]))?;
    Ok(())
}

/// An apt of our own beside the host's: its programs and network settings, our lists.
struct Apt {
    config: PathBuf,
}

impl Apt {
    fn new(dir: &Path, mirror: &str) -> Result<Self> {
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub)).doing(format_args!("creating {}", dir.join(sub).display()))?;
        }
        let write = |name: &str, text: &str| {
            fs::write(dir.join(name), text).doing(format_args!("writing {}", dir.join(name).display()))
        };
        write("status", "")?;
        write("sources.list", &source_lines(mirror).map(|l| l + "\n").collect::<String>())?;
        let d = dir.display();
        write(
            "apt.conf",
            &format!(
                "Dir::State \"{d}/state\";\nDir::State::status \"{d}/status\";\nDir::Cache \"{d}/cache\";\n\
                 Dir::Etc::sourcelist \"{d}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
                 Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
                 APT::Architecture \"amd64\";\nAPT::Architectures \"amd64\";\nAPT::Sandbox::User \"root\";\n\
                 Acquire::Languages \"none\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 Acquire::IndexTargets::deb::CNF::DefaultEnabled \"false\";\n"
            ),
        )?;
        let apt = Self { config: dir.join("apt.conf") };
        // Without this flag, lists that could not be fetched are no error.
        apt.run("apt-get", &["update", "-q", "-o", "APT::Update::Error-Mode=any"], None).map_err(|why| {
            LabError::Prerequisite(format!(
                "the Debian mirror {mirror} cannot be read: see that this machine reaches it (a proxy is taken from apt's \
                 configuration), or name another in {}; {why}",
                apt_sources::MIRROR_VARIABLE
            ))
        })?;
        Ok(apt)
    }

    fn run(&self, program: &str, args: &[&str], cwd: Option<&Path>) -> Result<String> {
        let mut command = host::leashed(program);
        command.args(args).env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        if let Some(cwd) = cwd {
            command.current_dir(cwd);
        }
        Ok(String::from_utf8_lossy(&host::run(program, &mut command)?.stdout).into_owned())
    }

    /// The newest kernel in the suites that pass the filter.
    fn kernel_of(&self, wanted: impl Fn(&str) -> bool) -> Result<Kernel> {
        let versions = self.run("apt-cache", &["madison", KERNEL_META], None)?;
        let version = newest_in(&versions, wanted).ok_or_else(|| LabError::Reply {
            from: "apt-cache madison".into(),
            problem: format!("{KERNEL_META} is not in every suite of: {}", SUITES.join(" ")),
        })?;
        let depends = self.depends(&format!("{KERNEL_META}={version}"))?;
        // Other meta packages of the same flavour are named without a digit after the prefix.
        let release = depends
            .iter()
            .filter_map(|d| d.strip_prefix("linux-image-"))
            .find(|r| r.starts_with(|c: char| c.is_ascii_digit()))
            .ok_or_else(|| LabError::Reply {
                from: "apt-cache show".into(),
                problem: format!("{KERNEL_META} {version} depends on no image: {}", depends.join(" ")),
            })?;
        Ok(Kernel { release: release.to_owned(), version })
    }

    fn depends(&self, package: &str) -> Result<Vec<String>> {
        Ok(parse_depends(&self.run("apt-cache", &["show", "--no-all-versions", package], None)?))
    }

    /// Fetches the packages of a kernel (image and whatever it is split into) and unpacks them into `dir`.
    fn unpack_kernel(&self, kernel: &Kernel, dir: &Path) -> Result<()> {
        let mut wanted = vec![format!("linux-image-{}", kernel.release)];
        let mut next = 0;
        while let Some(package) = wanted.get(next).cloned() {
            for dependency in self.depends(&package)? {
                if dependency.starts_with("linux-")
                    && dependency.ends_with(&kernel.release)
                    && !wanted.contains(&dependency)
                {
                    wanted.push(dependency);
                }
            }
            next += 1;
        }
        let debs = dir.join("debs");
        fs::create_dir_all(&debs).doing(format_args!("creating {}", debs.display()))?;
        let mut args = vec!["download", "-q"];
        args.extend(wanted.iter().map(String::as_str));
        self.run("apt-get", &args, Some(&debs))?;
        for deb in fs::read_dir(&debs).doing(format_args!("listing {}", debs.display()))? {
            let deb = deb.doing(format_args!("listing {}", debs.display()))?.path();
            host::run("dpkg-deb", host::leashed("dpkg-deb").arg("-x").arg(&deb).arg(dir))?;
        }
        Ok(())
    }
}

/// The first version in `apt-cache madison`'s table (newest first) whose suite passes.
fn newest_in(madison: &str, wanted: impl Fn(&str) -> bool) -> Option<String> {
    madison.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim).skip(1);
        let (version, origin) = (columns.next()?, columns.next()?);
        // "<uri> trixie/main amd64 Packages"
        let suite = origin.split_whitespace().nth(1)?.split('/').next()?;
        wanted(suite).then(|| version.to_owned())
    })
}

/// Names in the `Depends:` field; of alternatives the first.
fn parse_depends(show: &str) -> Vec<String> {
    let field = show.lines().find_map(|l| l.strip_prefix("Depends:")).unwrap_or_default();
    field
        .split(',')
        .filter_map(|d| d.split('|').next()?.split_whitespace().next())
        .map(|n| n.split(':').next().unwrap_or(n).to_owned())
        .collect()
}

/// Removes every tree, module and log that the lab keeps; refuses while one is in use.
pub fn clean(progress: Progress) -> Result<()> {
    let task = progress.task("clean");
    let root = cache::root()?;
    let in_use = || LabError::Refused {
        who: "the lab".into(),
        why: format!("a machine or a set-up uses {} now: end it first", root.display()),
    };
    let _users = Lock::try_exclusive(&root.join("in-use.lock"))?.ok_or_else(in_use)?;
    let _builders = Lock::try_exclusive(&root.join("lab/build.lock"))?.ok_or_else(in_use)?;
    for part in ["lab", "kmod", "runs"] {
        let path = root.join(part);
        if path.exists() {
            task.step(&format!("removing {}", path.display()));
            fs::remove_dir_all(&path).doing(format_args!("removing {}", path.display()))?;
        }
    }
    task.done("nothing is left");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MADISON: &str = "\
linux-image-cloud-amd64 | 7.3.4-1~bpo13+1 | http://m.invalid/debian trixie-backports/main amd64 Packages
linux-image-cloud-amd64 | 6.12.107-1 | http://m.invalid/debian trixie/main amd64 Packages
linux-image-cloud-amd64 | 6.12.90-1 | http://m.invalid/debian trixie-updates/main amd64 Packages
";

    #[test]
    fn versions_are_found_by_suite() {
        assert_eq!(newest_in(MADISON, |s| s.ends_with("-backports")).as_deref(), Some("7.3.4-1~bpo13+1"));
        assert_eq!(newest_in(MADISON, |s| !s.ends_with("-backports")).as_deref(), Some("6.12.107-1"));
        assert_eq!(newest_in("", |_| true), None);
        assert_eq!(newest_in("garbage | x\n|||", |_| true), None);
    }

    #[test]
    fn dependencies_are_names_only() {
        let show = "Package: p\nDepends: dracut | initramfs-tools (>= 0.120), linux-binary-7.3.4 (= 1), libc6:any\nSuggests: no\n";
        assert_eq!(parse_depends(show), ["dracut", "linux-binary-7.3.4", "libc6"]);
        assert!(parse_depends("Package: p\n").is_empty());
    }

    #[test]
    fn recipe_names_one_tree() {
        assert_eq!(recipe_key().name(), recipe_key().name());
        assert_ne!(recipe_key().name(), recipe_key().with(b"another package").name());
    }
}
