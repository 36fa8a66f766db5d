//! The initrd of a machine that waits to be updated: a small system with the agent, BusyBox, both kernels with their modules, and the
//! tools for the other ways to change a kernel (kexec, reboot).
//!
//! It is made as an operator's machine would be: kernels in `/boot`, modules in `/lib/modules` with `baton.ko` where DKMS puts it, a
//! configuration in `/etc/baton`. So whatever `baton` does to it, it can do to a real one.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use agent::daemon::config::{self, Cidr, Config};
use agent::userland::initrd::Initrd;

use super::error::{Doing, LabError, Result};
use super::tree::{Kernel, Tree};

use super::{Lab, cache, guest_programs, host, kmod, net};

/// Where `baton.ko` is, below a kernel's modules.
pub(super) const OWN_MODULE: &str = "updates/dkms/baton.ko";
/// Where the demo service listens.
pub const KV_PORT: u16 = 6379;
/// Drivers that both kernels load before the agent starts.
pub const DRIVERS: [&str; 1] = ["virtio_net"];
/// What a successor's initrd must carry besides the agent's own things, so that the machine is as complete after an update as before it.
pub const CARRIED: [&str; 7] = ["/bin", "/boot", "/lib", "/lib64", "/usr/sbin/kexec", "/etc/passwd", "/etc/group"];

/// What such a machine is told about itself: two interfaces, the service's address, `labd` in every kernel; no services yet.
#[must_use]
pub fn configuration() -> Config {
    let on_network = |address| Cidr { address, prefix: net::PREFIX };
    let nics = net::NICS.map(|nic| config::Nic { mac: nic.mac.into(), address: on_network(nic.address) });
    let labd = config::Program { name: "labd".into(), exec: vec!["/usr/sbin/labd".into()] };
    Config {
        network: config::Network {
            service_address: Some(on_network(net::SERVICE)),
            nic: nics.to_vec(),
            configure: true,
            skip_reach_check: false,
        },
        program: vec![labd],
        initrd: config::Initrd {
            include: CARRIED.map(Into::into).to_vec(),
            modules: DRIVERS.map(str::to_owned).to_vec(),
        },
        ..Config::default()
    }
}

/// The demo service, for such a machine's configuration.
#[must_use]
pub fn demo_service() -> config::Service {
    demo_service_with(&[])
}

/// The same with more arguments, such as `--arena-mib`.
#[must_use]
pub fn demo_service_with(more: &[&str]) -> config::Service {
    let listen = format!("{}:{KV_PORT}", net::SERVICE);
    config::Service {
        name: crate::kv::run::NAME.into(),
        exec: ["/usr/sbin/baton-kv", "--listen", &listen].iter().chain(more).map(|word| (*word).to_owned()).collect(),
        ..config::Service::default()
    }
}

/// The initrd, in a file without a name.
pub fn image(lab: &Lab, config: &Config, drivers: &[String]) -> Result<File> {
    let mut initrd = Initrd::new();
    fill(&mut initrd, lab, config, drivers)?;
    write(&initrd)
}

/// The initrd's content, for those who want to add to it. `drivers` are loaded in the incumbent beside those of the configuration.
pub fn fill(initrd: &mut Initrd, lab: &Lab, config: &Config, drivers: &[String]) -> Result<()> {
    skeleton(initrd);
    busybox(initrd, lab.tree())?;
    let programs = guest_programs::build(&guest_programs::PROGRAMS, lab.progress())?;
    for name in guest_programs::PROGRAMS {
        copy(initrd, &programs.join(name), &format!("/usr/sbin/{name}"))?;
    }
    initrd.symlink("/init", "/usr/sbin/baton-init");
    let text = toml::to_string(config).map_err(std::io::Error::other).doing("writing the machine's configuration")?;
    initrd.file(config::DEFAULT_PATH, 0o644, text);
    for kernel in lab.tree().kernels() {
        copy(initrd, &lab.tree().vmlinuz(kernel), &format!("/boot/vmlinuz-{}", kernel.release))?;
        let module = kmod::module_for(lab.tree(), kernel, lab.progress())?;
        let wanted: Vec<&str> = config.initrd.modules.iter().chain(drivers).map(String::as_str).collect();
        modules(initrd, lab.tree(), kernel, &module, &wanted)?;
    }
    program_of_tree(initrd, lab.tree(), "/usr/sbin/kexec")
}

/// Packs an initrd into a file without a name.
pub fn write(initrd: &Initrd) -> Result<File> {
    let root = cache::root()?;
    let mut file = tempfile::tempfile_in(&root).doing(format_args!("creating an initrd in {}", root.display()))?;
    let bytes = initrd.bytes().doing("packing an initrd")?;
    file.write_all(&bytes).doing(format_args!("writing an initrd in {}", root.display()))?;
    Ok(file)
}

/// Folders, devices and the few files of /etc that programs expect.
pub fn skeleton(initrd: &mut Initrd) {
    for folder in ["/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var"] {
        initrd.folder(folder);
    }
    initrd.char_device("/dev/console", 0o600, 5, 1);
    initrd.char_device("/dev/null", 0o666, 1, 3);
    initrd.file("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
    initrd.file("/etc/group", 0o644, "root:x:0:\n");
    initrd.file("/etc/hosts", 0o644, "127.0.0.1 localhost\n");
}

/// BusyBox under all its names.
pub fn busybox(initrd: &mut Initrd, tree: &Tree) -> Result<()> {
    copy(initrd, &tree.root().join("usr/bin/busybox"), "/bin/busybox")?;
    let names = host::run("busybox --list", tree.command("busybox").arg("--list"))?;
    for name in String::from_utf8_lossy(&names.stdout).lines().filter(|name| *name != "busybox") {
        initrd.symlink(&format!("/bin/{name}"), "busybox");
    }
    Ok(())
}

/// A kernel's drivers and `baton.ko`, with depmod's index of them and the list that `baton-init` loads.
pub fn modules(initrd: &mut Initrd, tree: &Tree, kernel: &Kernel, own: &Path, names: &[&str]) -> Result<()> {
    let folder = format!("/lib/modules/{}", kernel.release);
    let mut load = String::new();
    let mut index = String::new();
    for line in with_dependencies(tree, kernel, names)? {
        let module = line.split(':').next().unwrap_or_default();
        if !initrd.has(&format!("{folder}/{module}")) {
            copy(initrd, &tree.modules(kernel).join(module), &format!("{folder}/{module}"))?;
            load += &format!("{folder}/{module}\n");
            index += &format!("{line}\n");
        }
    }
    copy(initrd, own, &format!("{folder}/{OWN_MODULE}"))?;
    load += &format!("{folder}/{OWN_MODULE}\n");
    index += &format!("{OWN_MODULE}:\n");
    initrd.file(&format!("{folder}/modules.dep"), 0o644, index);
    initrd.file(&format!("/etc/baton/modules.{}", kernel.release), 0o644, load);
    Ok(())
}

/// The lines of a kernel's `modules.dep` for these modules and all they need, dependencies first. A module that is built in has none.
pub fn with_dependencies(tree: &Tree, kernel: &Kernel, names: &[&str]) -> Result<Vec<String>> {
    let folder = tree.modules(kernel);
    let read = |file: &str| {
        std::fs::read_to_string(folder.join(file)).doing(format_args!("reading {}", folder.join(file).display()))
    };
    let (built_in, index) = (read("modules.builtin")?, read("modules.dep")?);
    let mut lines = Vec::new();
    for name in names.iter().filter(|name| !built_in.lines().any(|path| is_module(path, name))) {
        let found = lines_for(&index, name).ok_or_else(|| LabError::Refused {
            who: folder.display().to_string(),
            why: format!("module {name} is neither there nor built in"),
        })?;
        lines.extend(found);
    }
    Ok(lines)
}

fn lines_for(index: &str, name: &str) -> Option<Vec<String>> {
    let line = |wanted: &dyn Fn(&str) -> bool| {
        index.lines().find(|line| line.split_once(':').is_some_and(|(path, _)| wanted(path)))
    };
    let direct = line(&|path| is_module(path, name))?;
    // depmod names the nearest dependency first, so the last one needs none of the others.
    let needs = direct.split_once(':')?.1.split_whitespace().rev();
    let mut lines = needs.map(|path| line(&|p| p == path).map(str::to_owned)).collect::<Option<Vec<_>>>()?;
    lines.push(direct.to_owned());
    Some(lines)
}

fn is_module(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().is_some_and(|stem| stem.replace('-', "_") == name)
}

/// A dynamic program of the tree, with its loader and libraries, at the same paths.
pub fn program_of_tree(initrd: &mut Initrd, tree: &Tree, path: &str) -> Result<()> {
    const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
    let mut list: Command = tree.command(LOADER);
    let listed = host::run(LOADER, list.args(["--list", path]))?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let libraries = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    for file in libraries.chain([path, LOADER]) {
        let from = std::fs::canonicalize(tree.root().join(file.trim_start_matches('/')));
        copy(initrd, &from.doing(format_args!("looking for {file} in the tree"))?, file)?;
    }
    Ok(())
}

pub(super) fn copy(initrd: &mut Initrd, from: &Path, at: &str) -> Result<()> {
    initrd.copy_from(from, at).map_err(|why| LabError::Refused { who: "the initrd".into(), why: format!("{why:#}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "kernel/failover.ko.xz:\nkernel/net_failover.ko.xz: kernel/failover.ko.xz\n\
                         kernel/virtio-net.ko.xz: kernel/net_failover.ko.xz kernel/failover.ko.xz\n";

    #[test]
    fn dependencies_come_first_with_their_own_lines() {
        let lines = lines_for(INDEX, "virtio_net").unwrap();
        assert_eq!(lines, INDEX.lines().collect::<Vec<_>>());
        assert_eq!(lines_for(INDEX, "failover").unwrap(), ["kernel/failover.ko.xz:"]);
        assert_eq!(lines_for(INDEX, "virtio"), None);
    }
}
