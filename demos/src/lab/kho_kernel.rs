//! A kernel with kexec handover (KHO) and the Live Update Orchestrator, which Debian's kernels are built without: Debian's own sources of the
//! kernel in backports, with a small configuration (`kho_kernel.config`). It is built when it is first wanted, in ten minutes or so on
//! two cores, and then is a kernel of the tree like the others: image in `/boot`, modules with `build/` for `baton.ko` in `/usr/lib/modules`.
//!
//! ```text
//! packages + sources ─► allnoconfig + ours ─► make ─► image, modules, what modules are built with, selftests
//!  (a tree of its own,   (each line of ours                    └─► one folder, named by what it was made of,
//!   removed afterwards)   must survive)                             renamed into the lab's tree
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;

use super::apt_sources;
use super::cache::{Construction, Key, Lock};
use super::error::{Doing, LabError, Result, last_lines};
use super::inside::Inside;
use super::progress::{Progress, Task};
use super::tree::{self, Kernel, Tree};

/// Raise when the way of building changes what comes out.
const RECIPE_VERSION: &str = "1";
/// What is said yes to.
const WANTED: &str = include_str!("kho_kernel.config");
/// What a kernel is built with.
const PACKAGES: &[&str] =
    &["gcc-14", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "perl", "xz-utils", "zstd", "kmod", "cpio"];
const COMPILERS: [&str; 2] = ["CC=gcc-14", "HOSTCC=gcc-14"];
/// Programs of `tools/testing/selftests/liveupdate` that are taken along: those whose second stage runs after an update.
pub const SELFTESTS: [&str; 2] = ["luo_kexec_simple", "luo_multi_session"];
/// Where they are, below the kernel's modules.
const SELFTESTS_FOLDER: &str = "selftests";
/// The kernel's image, below its modules: there until the folder is complete.
const IMAGE: &str = "vmlinuz";

/// The kernel, built now if it is not there, and from then on one of the tree's.
pub fn add_to(tree: &mut Tree, progress: Progress) -> Result<Kernel> {
    let kernel = built(tree, progress)?;
    tree.adopt(kernel.clone());
    Ok(kernel)
}

/// A program of the kernel's own selftests, static.
#[must_use]
pub fn selftest(tree: &Tree, kernel: &Kernel, name: &str) -> PathBuf {
    tree.modules(kernel).join(SELFTESTS_FOLDER).join(name)
}

fn built(tree: &Tree, progress: Progress) -> Result<Kernel> {
    // The sources are those of the stock kernel: what differs between the two is the configuration alone.
    let stock = tree.kernel("7.")?;
    let sources = Sources::of(stock)?;
    let key = [RECIPE_VERSION, tree.key(), WANTED, &sources.package, &stock.version]
        .iter()
        .chain(PACKAGES)
        .chain(&SELFTESTS)
        .fold(Key::default(), |key, part| key.with(part.as_bytes()))
        .name();
    let local = format!("-kho-{}", &key[..8]);
    let kernel = Kernel { release: format!("{}{local}", sources.upstream), version: stock.version.clone() };
    if tree.vmlinuz(&kernel).is_file() {
        return Ok(kernel);
    }
    let task = progress.task("kernel with KHO");
    let place = tree::lab_root()?.join("kho");
    let _lock = Lock::exclusive(&place.join("build.lock"), &task)?;
    // Somebody else may have built it while we waited.
    if tree.vmlinuz(&kernel).is_file() {
        return Ok(kernel);
    }
    let work = Construction::begin(&place.join("work"))?;
    build(tree, &kernel, &sources, &local, work.path(), &task)?;
    task.done(&kernel.release);
    Ok(kernel)
}

/// Which sources are a stock kernel's.
struct Sources {
    /// Debian's package.
    package: String,
    /// What the kernel calls itself without a local version.
    upstream: String,
}

impl Sources {
    fn of(stock: &Kernel) -> Result<Self> {
        let unreadable = || LabError::Reply {
            from: format!("the version {} of kernel {}", stock.version, stock.release),
            problem: "it has no three numbers".into(),
        };
        let upstream = stock.version.split('-').next().unwrap_or_default();
        let (series, _) =
            upstream.rsplit_once('.').filter(|(series, _)| series.contains('.')).ok_or_else(unreadable)?;
        Ok(Self { package: format!("linux-source-{series}"), upstream: upstream.to_owned() })
    }
}

fn build(tree: &Tree, kernel: &Kernel, sources: &Sources, local: &str, work: &Path, task: &Task) -> Result<()> {
    let root = work.join("tree");
    let packages = PACKAGES.iter().map(|p| (*p).to_owned()).chain([format!("{}={}", sources.package, kernel.version)]);
    task.step(&format!("fetching {} and what it is built with", sources.package));
    tree::install(&root, &apt_sources::debian_mirror()?, &packages.collect::<Vec<_>>(), task)?;

    let folder = work.join("src");
    fs::create_dir(&folder).doing(format_args!("creating {}", folder.display()))?;
    let shop = Workshop { inside: Inside::with_host_network(&Tree::elsewhere(root), &folder)?, folder, task };
    task.step("unpacking the sources");
    shop.run("tar", &["-C", "/mnt", "--strip-components=1", "-xf", &format!("/usr/src/{}.tar.xz", sources.package)])?;

    task.step("configuring");
    let wanted = format!("{WANTED}CONFIG_LOCALVERSION=\"{local}\"\n");
    shop.write(".wanted", &wanted)?;
    shop.make(&["KCONFIG_ALLCONFIG=.wanted", "allnoconfig"])?;
    let lost = lost(&wanted, &shop.read(".config")?);
    if !lost.is_empty() {
        let why = format!("{} does not take these lines of ours: {}", sources.package, lost.join(", "));
        return Err(LabError::Refused { who: "the configuration of the kernel with KHO".into(), why });
    }

    task.step("compiling (ten minutes or so on two cores)");
    let jobs = format!("-j{}", thread::available_parallelism().map_or(2, usize::from));
    shop.make(&[&jobs, "bzImage", "modules"])?;
    let release = shop.read("include/config/kernel.release")?;
    if release.trim() != kernel.release {
        let problem = format!("it calls itself {}, not {}", release.trim(), kernel.release);
        return Err(LabError::Reply { from: "the kernel that was built".into(), problem });
    }

    task.step("gathering");
    let modules = format!("out/lib/modules/{release}", release = kernel.release);
    shop.make(&["INSTALL_MOD_PATH=/mnt/out", "modules_install"])?;
    shop.run("rm", &["-f", &format!("/mnt/{modules}/build"), &format!("/mnt/{modules}/source")])?;
    // The kernel's own list of what modules are built with, as its Debian packages use it.
    let headers = format!("KBUILD_RUN_COMMAND=$(srctree)/scripts/package/install-extmod-build {modules}/build");
    shop.make(&["run-command", &headers])?;
    shop.make(&["headers"])?;
    shop.selftests(&format!("{modules}/{SELFTESTS_FOLDER}"))?;
    let at = |name: &str| format!("/mnt/{name}");
    shop.run("cp", &[&at("arch/x86/boot/bzImage"), &at(&format!("{modules}/{IMAGE}"))])?;
    shop.run("cp", &[&at(".config"), &at(&format!("{modules}/config"))])?;

    publish(tree, kernel, &shop.folder.join(&modules))
}

/// Modules first, the image last: a kernel is there when its image is.
fn publish(tree: &Tree, kernel: &Kernel, from: &Path) -> Result<()> {
    let rename = |from: &Path, to: &Path| {
        fs::rename(from, to).doing(format_args!("moving {} to {}", from.display(), to.display()))
    };
    let modules = Construction::begin(&tree.modules(kernel))?;
    for entry in fs::read_dir(from).doing(format_args!("listing {}", from.display()))? {
        let entry = entry.doing(format_args!("listing {}", from.display()))?;
        rename(&entry.path(), &modules.path().join(entry.file_name()))?;
    }
    modules.publish()?;
    rename(&tree.modules(kernel).join(IMAGE), &tree.vmlinuz(kernel))
}

/// The lines of `wanted` that are not in `config`, with what is there instead.
fn lost(wanted: &str, config: &str) -> Vec<String> {
    let name = |line: &str| line.split('=').next().unwrap_or_default().to_owned();
    let instead = |line: &str| {
        let there = config.lines().find(|l| l.trim_start_matches("# ").split(['=', ' ']).next() == Some(&name(line)));
        there.unwrap_or("nothing").to_owned()
    };
    wanted
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !config.lines().any(|l| l == *line))
        .map(|line| format!("{line} ({})", instead(line)))
        .collect()
}

/// The place where it is built: a tree with compilers, the sources at `/mnt`.
struct Workshop<'t> {
    inside: Inside,
    folder: PathBuf,
    task: &'t Task,
}

impl Workshop<'_> {
    /// Runs `make` in the sources, and shows how far it is.
    fn make(&self, arguments: &[&str]) -> Result<()> {
        let fixed = ["-C", "/mnt", "KBUILD_BUILD_USER=baton", "KBUILD_BUILD_HOST=lab"];
        self.run("make", &[&fixed[..], &COMPILERS, arguments].concat())
    }

    /// Runs a program to its end; what it says is shown as it comes, and its end is in the error.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.inside.command(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.inside.spawn(command)?;
        let errors = child.stderr.take();
        let reader = thread::spawn(move || {
            let mut said = String::new();
            // What cannot be read is not shown; how the program ended is what counts.
            let _ = errors.map(|mut pipe| pipe.read_to_string(&mut said));
            said
        });
        for line in child.stdout.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()) {
            self.task.detail(line.doing(format_args!("reading what {program} says"))?.trim());
        }
        let status = child.wait().doing(format_args!("waiting for {program}"))?;
        let said = reader.join().unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        Err(LabError::Program { program: program.into(), status, output: last_lines(&said, 15) })
    }

    /// The kernel's own programs that judge LUO, static: they run in initrds.
    fn selftests(&self, to: &str) -> Result<()> {
        const FOLDER: &str = "/mnt/tools/testing/selftests/liveupdate";
        let to = format!("/mnt/{to}");
        self.run("mkdir", &[&to])?;
        for name in SELFTESTS {
            let (out, main, library) =
                (format!("{to}/{name}"), format!("{FOLDER}/{name}.c"), format!("{FOLDER}/lib/lu_utils.c"));
            let include = format!("-I{FOLDER}/lib/include");
            let words = ["-static", "-O2", "-I/mnt/usr/include", "-I/mnt/tools/testing/selftests", &include];
            self.run("gcc-14", &[&words[..], &["-o", &out, &main, &library]].concat())?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, text).doing(format_args!("writing {}", path.display()))
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).doing(format_args!("reading {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_named_by_the_version() {
        let of =
            |version: &str| Sources::of(&Kernel { release: "7.3.4+deb13-cloud-amd64".into(), version: version.into() });
        let sources = of("7.3.4-1~bpo13+1").unwrap();
        assert_eq!((sources.package.as_str(), sources.upstream.as_str()), ("linux-source-7.3", "7.3.4"));
        assert!(of("7-1").is_err());
        assert!(of("7.3-1").is_err());
    }

    #[test]
    fn a_line_that_did_not_survive_is_named_with_what_is_there() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n";
        let wanted = "# why\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=y\nCONFIG_D=y\n";
        let expected = ["CONFIG_B=y (# CONFIG_B is not set)", "CONFIG_C=y (CONFIG_C=m)", "CONFIG_D=y (nothing)"];
        assert_eq!(lost(wanted, config), expected);
    }
}
