//! The kernels of this machine: those that run (`/proc/multikernel`) and the images that could (`/boot`).

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kexec_core::cpus::parse_cpu_list;
use kexec_core::image::BzImage;
use kexec_core::image::bzimage::MAX_IMAGE;
use kexec_core::memory_map::Range;
use kexec_core::registry::State;
use serde::Serialize;

use crate::daemon::outcome::Failure;
pub use crate::machine::hardware::INSTANCES;
use crate::machine::hardware::{self, Hardware};
use crate::machine::regular;
use crate::userland::packages;
use crate::userland::verdicts::{self, Verdict};

/// One row of [`INSTANCES`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// The module's number; 0 is the running kernel.
    pub id: u32,
    /// What people call it.
    pub name: String,
    /// How far it is.
    pub state: State,
    /// APIC ids of its CPUs.
    pub cpus: Vec<u32>,
    /// Bytes of memory accounted to it.
    pub bytes: u64,
    /// Where that memory is.
    pub ranges: String,
    /// Its kernel.
    pub image: String,
}

impl Instance {
    /// Its region: nothing else of an instance is as large. Its control block is its first MiB.
    pub fn region(&self) -> Option<Range> {
        let range = |text: &str| {
            let (start, last) = text.split_once('-')?;
            let hex = |text: &str| u64::from_str_radix(text, 16).ok();
            Range::checked(hex(start)?, hex(last)?.checked_add(1)?)
        };
        self.ranges.split(',').filter_map(range).max_by_key(|range| range.len())
    }
}

/// A kernel image on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    /// Where.
    pub path: PathBuf,
    /// Its release, or why it is not usable.
    pub release: Option<String>,
    /// What is wrong with it.
    pub problem: Option<String>,
    /// Whether baton.ko is installed for it.
    pub module: bool,
    /// Whether apt (dpkg) has installed it, wholly.
    pub installed: bool,
    /// What `baton check` said of it when it came, or when this kernel started; nothing where nobody has asked since.
    pub verdict: Option<Verdict>,
}

/// Reads what is to be an image.
pub fn read_image(path: &Path) -> Result<Vec<u8>, Failure> {
    regular::read(path, MAX_IMAGE).map_err(|error| not_an_image(path, &error))
}

/// What is to be done about a file that is no image.
pub fn not_an_image(path: &Path, why: &dyn fmt::Display) -> Failure {
    Failure::precondition(
        format!("{}: {why}", path.display()),
        "name a 64-bit Linux bzImage, such as /boot/vmlinuz-* of an amd64 kernel package",
    )
}

/// Both lists.
#[derive(Debug, Clone, Serialize)]
pub struct Kernels {
    /// Version of this object.
    pub schema_version: u32,
    /// Those that run.
    pub instances: Vec<Instance>,
    /// Those that could.
    pub images: Vec<Image>,
}

/// Reads both.
pub fn list() -> Result<Kernels> {
    let mut images = images(Path::new("/boot"));
    let (packages, verdicts) = (packages::kernels()?, verdicts::read(Path::new(verdicts::STORE)));
    let running = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    for image in &mut images {
        image.installed = packages.iter().any(|package| {
            Some(&package.release) == image.release.as_ref() && package.state == packages::State::Installed
        });
        image.verdict = verdicts.iter().find(|verdict| verdict.holds(&image.path, &running)).cloned();
    }
    Ok(Kernels { schema_version: 1, instances: instances(&hardware::Live)?, images })
}

/// The kernels that run, this one first; nothing where the module is not loaded.
pub fn instances(hardware: &dyn Hardware) -> Result<Vec<Instance>> {
    let Some(text) = hardware.instances()? else { return Ok(Vec::new()) };
    parse_instances(&text).with_context(|| format!("{INSTANCES} has a row that cannot be read"))
}

/// The kernels that run beside this one.
pub fn others(hardware: &dyn Hardware) -> Result<Vec<Instance>> {
    Ok(instances(hardware)?.into_iter().filter(|instance| instance.id != 0).collect())
}

/// Parses [`INSTANCES`]: `id name state cpus bytes ranges image`, "-" for nothing.
pub fn parse_instances(text: &str) -> Option<Vec<Instance>> {
    text.lines()
        .skip(1)
        .map(|line| {
            let mut columns = line.splitn(7, ' ');
            let mut next = || columns.next();
            Some(Instance {
                id: next()?.parse().ok()?,
                name: next()?.to_owned(),
                state: State::named(next()?)?,
                cpus: match next()? {
                    "-" => Vec::new(),
                    cpus => parse_cpu_list(cpus).ok()?,
                },
                bytes: next()?.parse().ok()?,
                ranges: next()?.to_owned(),
                image: next()?.to_owned(),
            })
        })
        .collect()
}

/// The images of a folder. Each entry that cannot be read or is none has its line, and keeps nobody from the others.
fn images(folder: &Path) -> Vec<Image> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let named = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")));
    let mut images: Vec<Image> = named.map(image).collect();
    images.sort_by(|a, b| a.path.cmp(&b.path));
    images
}

fn image(path: PathBuf) -> Image {
    let bytes = regular::read(&path, MAX_IMAGE).map_err(|error| error.to_string());
    let release =
        bytes.and_then(|bytes| Ok(BzImage::parse(&bytes).map_err(|error| error.to_string())?.release().to_owned()));
    let (release, problem) = match release {
        Ok(release) => (Some(release), None),
        Err(problem) => (None, Some(problem)),
    };
    let module = release.as_deref().and_then(crate::userland::mkinitrd::own_module).is_some();
    Image { path, release, problem, module, installed: false, verdict: None }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>3} {:<16} {:<9} {:<12} {:>9}  kernel", "id", "name", "state", "cpus", "MiB")?;
        for i in &self.instances {
            let cpus = i.cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            writeln!(
                f,
                "{:>3} {:<16} {:<9} {:<12} {:>9}  {}",
                i.id,
                i.name,
                i.state.name(),
                cpus,
                i.bytes >> 20,
                i.image
            )?;
        }
        for image in &self.images {
            let text = match (&image.release, &image.problem) {
                (Some(release), _) => {
                    let module = if image.module { "ready" } else { "no baton.ko for it" };
                    let verdict = image.verdict.as_ref().map_or_else(|| "not checked".to_owned(), Verdict::summary);
                    format!("{release}, {module}; {verdict}")
                }
                (None, problem) => problem.clone().unwrap_or_default(),
            };
            writeln!(f, "{}: {text}", image.path.display())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_entry_costs_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("gone", at("vmlinuz.old")).unwrap();
        fs::create_dir(at("vmlinuz-dir")).unwrap();
        nix::unistd::mkfifo(&at("vmlinuz-fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at("vmlinuz-text"), "no kernel").unwrap();
        fs::write(at("config-6.12"), "").unwrap();
        let images = images(folder.path());
        let lines: Vec<_> = images.iter().map(|image| image.problem.clone().unwrap()).collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[0].contains("folder")
                && lines[1].contains("FIFO")
                && lines[2].contains("truncated")
                && lines[3].contains("No such file"),
            "{lines:?}"
        );
        assert!(super::images(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn rows_are_read_and_rubbish_is_not() {
        let text = "id name state cpus bytes ranges image\n\
                    0 self serving 0-2 0 - 6.12.107+deb13-cloud-amd64\n\
                    3 update booting 3 536870912 60000000-7fffffff,8000-8fff vmlinuz 7.3\n";
        let rows = parse_instances(text).unwrap();
        assert_eq!(rows[0].cpus, [0, 1, 2]);
        assert_eq!((rows[1].id, rows[1].image.as_str()), (3, "vmlinuz 7.3"));
        assert_eq!((rows[0].region(), rows[1].region()), (None, Some(Range::new(0x6000_0000, 0x8000_0000))));
        assert_eq!(parse_instances("header\n1 x y"), None);
    }
}
