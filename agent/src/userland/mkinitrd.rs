//! `baton mkinitrd`: what a successor needs to become the machine's kernel: the agent, the module and drivers built for
//! that kernel, the services' programs, and the configuration they were started with.
//!
//! The result is an archive of its own; when the operator gives an initrd, ours is appended to it, and since the kernel
//! unpacks archives in order, our `/init` is the one that runs.

use std::collections::BTreeMap;
use std::iter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::User;

use crate::daemon::config::{self, Config};
use crate::services::access;
use crate::userland::init::MODULE_LIST;
use crate::userland::initrd::Initrd;
use crate::userland::modules::{self, Index, Modprobe};

/// The agent's own programs, taken from the folder of the running one.
const OWN_PROGRAMS: [&str; 3] = ["baton", "batond", "baton-init"];
/// The module's place below `/lib/modules/RELEASE` (DKMS's folder).
const OWN_MODULE: &str = "updates/dkms/baton.ko";

/// The module for a kernel, compressed or not: DKMS does as the kernel's other modules are.
pub fn own_module(release: &str) -> Option<PathBuf> {
    let plain = format!("/lib/modules/{release}/{OWN_MODULE}");
    ["", ".xz", ".zst", ".gz"].iter().map(|suffix| PathBuf::from(format!("{plain}{suffix}"))).find(|path| path.exists())
}

/// One of the agent's programs, as it would be packed. Not always of the version that asks: see [`crate::update::versions`].
pub fn own_program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe().context("cannot find my own program file")?;
    Ok(here.parent().context("my program file is in no folder")?.join(name))
}

/// Makes the archive for a kernel of this `release`.
///
/// `links` are the symbolic links of the archive to which this one is appended.
pub fn build(config: &Config, config_path: &Path, release: &str, links: BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut tree = Initrd::behind(links);
    for folder in ["/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var"] {
        tree.folder(folder);
    }
    tree.char_device("/dev/console", 0o600, 5, 1);
    tree.char_device("/dev/null", 0o666, 1, 3);
    users(&mut tree, config);
    for path in &config.initrd.include {
        tree.copy(path)?;
    }
    for name in OWN_PROGRAMS {
        let at = format!("/usr/sbin/{name}");
        let file = own_program(name)?;
        if file == Path::new(&at) {
            tree.program(&file)?;
        } else {
            tree.copy_from(&file, &at)?;
        }
    }
    tree.symlink("/init", "/usr/sbin/baton-init");
    for service in config.service.iter().map(|s| &s.exec) {
        tree.program(Path::new(&service[0]))?;
    }
    for program in config.program.iter().map(|p| &p.exec) {
        tree.program(Path::new(&program[0]))?;
    }
    // Without a file there are no wishes, in the successor too.
    if config_path != Path::new(config::DEFAULT_PATH) || config_path.exists() {
        tree.copy_from(config_path, config::DEFAULT_PATH)?;
    }
    modules(&mut tree, config, release)?;
    Ok(tree.bytes()?)
}

/// The users as whom services run, and the group of batond's socket: by the numbers that they have here.
fn users(tree: &mut Initrd, config: &Config) {
    let named: Vec<&str> = config.service.iter().filter_map(|service| service.user.as_deref()).collect();
    if named.is_empty() {
        return;
    }
    let known: BTreeMap<String, User> =
        named.iter().filter_map(|name| Some(((*name).to_owned(), User::from_name(name).ok().flatten()?))).collect();
    let lines = known.iter().map(|(name, user)| format!("{name}:x:{}:{}::/:/usr/sbin/nologin\n", user.uid, user.gid));
    tree.file(
        "/etc/passwd",
        0o644,
        iter::once("root:x:0:0::/root:/bin/sh\n".to_owned()).chain(lines).collect::<String>(),
    );
    let group = access::group().map(|gid| format!("{}:x:{gid}:\n", access::GROUP));
    let groups: String = iter::once("root:x:0:\n".to_owned()).chain(group).collect();
    tree.file("/etc/group", 0o644, groups);
}

/// Adds the modules and the list in which `baton-init` finds them, dependencies first: `path options`, one a line.
fn modules(tree: &mut Initrd, config: &Config, release: &str) -> Result<()> {
    let root = PathBuf::from(format!("/lib/modules/{release}"));
    let own = own_module(release).ok_or_else(|| {
        anyhow!(
            "there is no module for kernel {release}: {} is missing; build it with `dkms install baton/1 -k {release}`",
            root.join(OWN_MODULE).display()
        )
    })?;
    let modprobe = Modprobe::read();
    let index = Index::read(&root, release)?;
    let files = index.files_for(&config.initrd.modules, &modprobe, release)?;
    let mut list = String::new();
    for path in files.iter().map(|file| root.join(file)).chain([own.clone()]) {
        let content = modules::read(&path)?;
        if path == own {
            let built_for = modules::built_for(&content).unwrap_or_default();
            if built_for != release {
                bail!(
                    "{} was built for kernel {built_for:?}, not for {release}; build it anew with `dkms install --force baton/1 -k {release}`",
                    path.display()
                );
            }
        }
        let path = path.to_string_lossy();
        let plain = path.find(".ko").map_or(&*path, |at| &path[..at + 3]);
        tree.file(plain, 0o644, content);
        list.push_str(format!("{plain} {}", modprobe.options(&modules::name_of(plain))).trim_end());
        list.push('\n');
    }
    tree.file(&MODULE_LIST.replace("RELEASE", release), 0o644, list);
    Ok(())
}

/// Whether baton.ko for this kernel carries a signature; nothing where there is none, or it cannot be read.
pub fn own_module_is_signed(release: &str) -> Option<bool> {
    Some(modules::is_signed(&modules::read(&own_module(release)?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_of_services_are_known_in_the_successor_by_the_same_numbers() {
        let mut tree = Initrd::new();
        users(&mut tree, &toml::from_str("[[service]]\nname='a'\nexec=['/a']").unwrap());
        assert!(!tree.has("/etc/passwd"), "nobody asks for it");
        let nobody =
            "[[service]]\nname='a'\nexec=['/a']\nuser='nobody'\n[[service]]\nname='b'\nexec=['/b']\nuser='no-such'";
        users(&mut tree, &toml::from_str(nobody).unwrap());
        let packed = tree.bytes().unwrap();
        let text = String::from_utf8_lossy(&packed);
        assert!(text.contains("nobody:x:65534:65534::/:/usr/sbin/nologin\n") && !text.contains("no-such"));
    }
}
