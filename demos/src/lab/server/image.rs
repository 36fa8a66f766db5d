//! The server's disk: a Debian trixie as its installer leaves it, with the packages of an ordinary server, on one ext4 file system. Made
//! by mmdebstrap and `mke2fs -d`: nothing is mounted, nothing boots for it. Built when it is first wanted, and named by what it was made
//! of; machines only write to copies.
//!
//! What changes with this repository (the agent, its module, the configuration) is not in it: the machine's initrd puts that in place
//! before it starts the system (`mod.rs` of this folder), so an image outlives the day.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::cache::{Construction, Key, Lock};
use super::super::error::{Doing, LabError, Result};
use super::super::progress::{Progress, Task};
use super::super::tree::{self, Kernel, Tree};
use super::super::{apt_sources, host, kmod};

/// Raise when the way of building changes what comes out.
const RECIPE_VERSION: &str = "1";
/// What an ordinary server has: what Debian's installer puts on every machine, and the programs it is there for.
const PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "libpam-systemd",
    "dbus",
    "udev",
    "kmod",
    "ifupdown",
    "iproute2",
    "iputils-ping",
    "procps",
    "e2fsprogs",
    "login",
    "passwd",
    "cron",
    "logrotate",
    "nftables",
    "openssh-server",
    "nginx",
    "redis-server",
];
/// Bytes of the file system; its file is as large as what is in it.
const SIZE: &str = "2G";
/// The file system's UUID, by which its fstab names it.
pub const ROOT_UUID: &str = "ba707000-5e7e-4000-8000-000000000001";
/// The UUID of the swap space.
pub const SWAP_UUID: &str = "ba707000-5e7e-4000-8000-000000000002";
const DISK: &str = "disk.raw";
/// Started when apt feels like it; on a machine without a way to a mirror they only take time.
const NOT_HERE: [&str; 4] = ["apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"];

/// The image, built now if it is not there.
pub fn open(tree: &Tree, progress: Progress) -> Result<PathBuf> {
    let parts = [RECIPE_VERSION, tree.key(), SIZE, ROOT_UUID, SWAP_UUID];
    let key = parts.iter().chain(PACKAGES).chain(&NOT_HERE).fold(Key::default(), |key, part| key.with(part.as_bytes()));
    let place = tree::lab_root()?.join("server").join(key.name());
    let disk = place.join(DISK);
    if disk.is_file() {
        return Ok(disk);
    }
    let task = progress.task("Debian server");
    let _lock = Lock::exclusive(&place.with_file_name("build.lock"), &task)?;
    // Somebody else may have built it while we waited.
    if disk.is_file() {
        return Ok(disk);
    }
    host::prepare(&task)?;
    let work = Construction::begin(&place)?;
    let root = work.path().join("root");
    let packages: Vec<String> = PACKAGES.iter().map(|package| (*package).to_owned()).collect();
    task.step(&format!("installing {} packages", packages.len()));
    tree::install(&root, &apt_sources::debian_mirror()?, &packages, &task)?;
    task.step("adding kernels");
    add_kernels(tree, &root, progress)?;
    settle(&root)?;
    task.step("making its file system");
    make_disk(&root, &work.path().join(DISK), &task)?;
    fs::remove_dir_all(&root).doing(format_args!("removing {}", root.display()))?;
    task.step("flushing to disk");
    work.publish()?;
    task.done("built");
    Ok(disk)
}

/// The kernels that a server has: Debian's, not those that the lab built.
pub(super) fn kernels(tree: &Tree) -> impl Iterator<Item = &Kernel> {
    tree.kernels().iter().filter(|kernel| !kernel.release.contains("-kho-"))
}

/// These kernels, each with `baton.ko` in its place, which the boot replaces by the one of the day: depmod is to know of it.
fn add_kernels(tree: &Tree, root: &Path, progress: Progress) -> Result<()> {
    for kernel in kernels(tree) {
        let release = &kernel.release;
        let modules = root.join("usr/lib/modules");
        fs::create_dir_all(&modules).doing(format_args!("creating {}", modules.display()))?;
        host::run("cp", Command::new("cp").arg("-a").arg(tree.modules(kernel)).arg(&modules))?;
        let image = root.join("boot").join(format!("vmlinuz-{release}"));
        fs::copy(tree.vmlinuz(kernel), &image).doing(format_args!("writing {}", image.display()))?;
        let modules = modules.join(release);
        for link in ["build", "source"] {
            // Headers are for building, which no server does; a kernel of one package has neither link.
            let _ = fs::remove_file(modules.join(link));
        }
        let own = modules.join(super::super::incumbent::OWN_MODULE);
        fs::create_dir_all(own.parent().unwrap_or(&modules)).doing(format_args!("creating {}", own.display()))?;
        let built = kmod::module_for(tree, kernel, progress)?;
        fs::copy(built, &own).doing(format_args!("writing {}", own.display()))?;
        host::run("depmod", Command::new("chroot").arg(root).args(["/usr/sbin/depmod", release]))?;
    }
    Ok(())
}

/// What Debian's installer would ask for.
fn settle(root: &Path) -> Result<()> {
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        fs::write(&path, text).doing(format_args!("writing {}", path.display()))
    };
    write("etc/hostname", "server\n")?;
    write("etc/hosts", "127.0.0.1\tlocalhost\n127.0.1.1\tserver\n")?;
    write(
        "etc/fstab",
        &format!("UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1\nUUID={SWAP_UUID} none swap sw,nofail 0 0\n"),
    )?;
    // Without one, its first boot would be a first boot: all units as their packages preset them, whatever was chosen since.
    write("etc/machine-id", "ba7070005e7e40008000000000000003\n")?;
    write("etc/resolv.conf", "nameserver 10.77.0.1\n")?;
    for unit in NOT_HERE {
        let link = root.join("etc/systemd/system").join(unit);
        std::os::unix::fs::symlink("/dev/null", &link).doing(format_args!("masking {unit}"))?;
    }
    for scrap in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        let scrap = root.join(scrap);
        fs::remove_dir_all(&scrap).doing(format_args!("removing {}", scrap.display()))?;
    }
    Ok(())
}

fn make_disk(root: &Path, disk: &Path, task: &Task) -> Result<()> {
    let mut mke2fs = host::leashed("mke2fs");
    // Complete at once: a kernel that finds it half made goes on making it while the machine is measured.
    mke2fs.args(["-q", "-t", "ext4", "-U", ROOT_UUID, "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]);
    host::run("mke2fs", mke2fs.arg(root).arg(disk).arg(SIZE))?;
    let size = fs::metadata(disk).doing(format_args!("looking at {}", disk.display()))?;
    if size.len() == 0 {
        return Err(LabError::Reply { from: "mke2fs".into(), problem: format!("{} is empty", disk.display()) });
    }
    task.detail("made");
    Ok(())
}
