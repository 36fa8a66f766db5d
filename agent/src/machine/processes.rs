//! The processes of this machine, out of /proc.

use std::collections::BTreeMap;

use kexec_core::cpus::parse_cpu_list;

use crate::machine::world::World;

/// One process of user space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// What the kernel calls it (15 bytes at most).
    pub name: String,
    /// Its arguments, the program's name first.
    pub argv: Vec<String>,
    /// The file that it runs.
    pub exe: String,
    /// Its control group, from the root.
    pub cgroup: String,
    /// Numbers of the sockets that it has open.
    pub sockets: Vec<u64>,
    /// It has a virtual machine of KVM open.
    pub has_vm: bool,
    /// Watchdogs that it has open.
    pub watchdogs: Vec<String>,
    /// CPUs that it may run on, where those are not all.
    pub bound_to: Option<Vec<u32>>,
}

/// PF_KTHREAD (linux/sched.h): a thread of the kernel's own.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// All processes of user space, by number. Those that end while they are looked at are left out.
pub fn all(world: &dyn World, online: &[u32]) -> BTreeMap<u32, Process> {
    let numbers = world.list("/proc").unwrap_or_default();
    let pids = numbers.iter().filter_map(|name| name.parse().ok());
    pids.filter_map(|pid| Some((pid, process(world, pid, online)?))).collect()
}

fn process(world: &dyn World, pid: u32, online: &[u32]) -> Option<Process> {
    let folder = format!("/proc/{pid}");
    let (name, parent) = parse_stat(&world.text(&format!("{folder}/stat"))?)?;
    let argv = world.bytes(&format!("{folder}/cmdline")).unwrap_or_default();
    let argv = argv.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    let mut argv: Vec<String> = argv.collect();
    // Each ends with a NUL, so what is behind the last one is none.
    argv.pop_if(|last| last.is_empty());
    let status = world.text(&format!("{folder}/status")).unwrap_or_default();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let allowed = allowed.and_then(|list| parse_cpu_list(list).ok()).unwrap_or_default();
    let mut process = Process {
        pid,
        parent,
        name,
        argv,
        exe: world.link(&format!("{folder}/exe")).unwrap_or_default().trim_end_matches(" (deleted)").to_owned(),
        cgroup: cgroup(&world.text(&format!("{folder}/cgroup")).unwrap_or_default()),
        bound_to: (!allowed.is_empty() && online.iter().any(|cpu| !allowed.contains(cpu))).then_some(allowed),
        ..Process::default()
    };
    for descriptor in world.list(&format!("{folder}/fd")).unwrap_or_default() {
        let Ok(target) = world.link(&format!("{folder}/fd/{descriptor}")) else { continue };
        if let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')?.parse().ok()) {
            process.sockets.push(inode);
        } else if target == "anon_inode:kvm-vm" {
            process.has_vm = true;
        } else if target.starts_with("/dev/watchdog") {
            process.watchdogs.push(target);
        }
    }
    Some(process)
}

/// Name and parent out of `stat` (proc_pid_stat(5)). Nothing for threads of the kernel. A name may hold anything, also `) R 1`.
fn parse_stat(text: &str) -> Option<(String, u32)> {
    let (_, rest) = text.split_once('(')?;
    let (name, rest) = rest.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let flags: u64 = fields.get(6)?.parse().ok()?;
    (flags & KERNEL_THREAD == 0).then_some((name.to_owned(), fields.get(1)?.parse().ok()?))
}

/// The path in the one hierarchy of cgroup2, or in that of systemd where there are several.
fn cgroup(text: &str) -> String {
    let of = |which: &str| text.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(which)?.strip_prefix(':'));
    let path = of("").filter(|path| *path != "/").or_else(|| of("name=systemd")).unwrap_or("/");
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::world::played::Played;

    #[test]
    fn a_process_is_what_proc_says() {
        let world = Played::default()
            .file("/proc/2/stat", "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0")
            .file("/proc/77/stat", "77 (odd) R 1 (x) S 1 77 77 0 -1 4194560 1 2 3")
            .file("/proc/77/cmdline", "/usr/sbin/odd\0-x\0\0")
            .linked("/proc/77/exe", "/usr/sbin/odd (deleted)")
            .file("/proc/77/cgroup", "0::/system.slice/odd.service\n")
            .file("/proc/77/status", "Name:\todd\nCpus_allowed_list:\t2\n")
            .linked("/proc/77/fd/3", "socket:[4711]")
            .linked("/proc/77/fd/4", "anon_inode:kvm-vm")
            .linked("/proc/77/fd/5", "/dev/watchdog0")
            .linked("/proc/77/fd/6", "socket:[x]")
            .file("/proc/78/stat", "78 (broken")
            .file("/proc/uptime", "1 1");
        let all = all(&world, &[0, 1, 2, 3]);
        assert_eq!(all.keys().collect::<Vec<_>>(), [&77]);
        let expected = Process {
            pid: 77,
            parent: 1,
            name: "odd) R 1 (x".into(),
            argv: vec!["/usr/sbin/odd".into(), "-x".into(), String::new()],
            exe: "/usr/sbin/odd".into(),
            cgroup: "/system.slice/odd.service".into(),
            sockets: vec![4711],
            has_vm: true,
            watchdogs: vec!["/dev/watchdog0".into()],
            bound_to: Some(vec![2]),
        };
        assert_eq!(all[&77], expected);
    }

    #[test]
    fn control_groups_of_both_kinds() {
        assert_eq!(cgroup("0::/init.scope\n"), "/init.scope");
        assert_eq!(cgroup("12:pids:/a\n1:name=systemd:/b.service\n0::/\n"), "/b.service");
        assert_eq!((cgroup(""), cgroup("0::/")), ("/".into(), "/".into()));
    }
}
