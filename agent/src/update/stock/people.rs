//! Programs and people: who ends with this kernel, and is not started anew by the successor's configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::accept::Accept;
use super::asked::Asked;
use super::item::{Item, counted, listed};
use crate::daemon::config::Config;
use crate::machine::processes::Process;
use crate::machine::world::World;

/// Somebody who is logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The session's name.
    pub session: String,
    /// Who.
    pub user: String,
    /// From where, or at which terminal.
    pub from: String,
}

/// A socket that waits for clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Where.
    pub address: SocketAddr,
    /// The kernel's number of it.
    pub inode: u64,
}

/// A setting that is not as the kernel makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Its name, as sysctl(8) has it.
    pub name: String,
    /// Its value.
    pub value: String,
    /// A file sets it so at each boot.
    pub in_file: bool,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Processes of user space.
    pub processes: BTreeMap<u32, Process>,
    /// Who is logged in.
    pub logins: Vec<Login>,
    /// Who waits for clients.
    pub listeners: Vec<Listener>,
    /// Settings.
    pub changed: Vec<Changed>,
}

/// Settings whose value at boot depends neither on the machine nor on who built the kernel (6.12, 7.3), and that value.
const DEFAULTS: [(&str, &str); 33] = [
    ("fs.protected_fifos", "0"),
    ("fs.protected_regular", "0"),
    ("fs.suid_dumpable", "0"),
    ("kernel.core_pattern", "core"),
    ("kernel.domainname", "(none)"),
    ("kernel.hostname", "(none)"),
    ("kernel.kptr_restrict", "0"),
    ("kernel.modules_disabled", "0"),
    ("kernel.panic_on_oops", "0"),
    ("kernel.randomize_va_space", "2"),
    ("net.core.netdev_max_backlog", "1000"),
    ("net.core.somaxconn", "4096"),
    ("net.ipv4.conf.all.accept_redirects", "1"),
    ("net.ipv4.conf.all.arp_announce", "0"),
    ("net.ipv4.conf.all.arp_ignore", "0"),
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.all.send_redirects", "1"),
    ("net.ipv4.ip_forward", "0"),
    ("net.ipv4.ip_local_port_range", "32768\t60999"),
    ("net.ipv4.ip_nonlocal_bind", "0"),
    ("net.ipv4.ip_unprivileged_port_start", "1024"),
    ("net.ipv4.tcp_fin_timeout", "60"),
    ("net.ipv4.tcp_keepalive_time", "7200"),
    ("net.ipv4.tcp_syncookies", "1"),
    ("net.ipv4.tcp_timestamps", "1"),
    ("net.ipv6.conf.all.accept_ra", "1"),
    ("net.ipv6.conf.all.disable_ipv6", "0"),
    ("net.ipv6.conf.all.forwarding", "0"),
    ("vm.dirty_background_ratio", "10"),
    ("vm.dirty_ratio", "20"),
    ("vm.overcommit_memory", "0"),
    ("vm.overcommit_ratio", "50"),
    ("vm.swappiness", "60"),
];
/// Where settings are kept (sysctl.d(5)); /etc/hostname is the name's own file.
const SYSCTL_FOLDERS: [&str; 5] =
    ["/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d", "/lib/sysctl.d"];
/// Ports from here on are given to clients, unless the machine says otherwise.
const CLIENT_PORTS: u16 = 32768;

/// Looks.
pub fn read(world: &dyn World, processes: BTreeMap<u32, Process>) -> Seen {
    let mut listeners = Vec::new();
    for (protocol, file, state) in
        [("tcp", "tcp", "0A"), ("tcp", "tcp6", "0A"), ("udp", "udp", "07"), ("udp", "udp6", "07")]
    {
        let text = world.text(&format!("/proc/net/{file}")).unwrap_or_default();
        listeners.extend(text.lines().skip(1).filter_map(|line| listener(protocol, state, line)));
    }
    Seen { processes, logins: logins(world), listeners, changed: changed(world) }
}

/// A line of /proc/net/tcp and its like (Documentation/networking/proc_net_tcp.rst), if it waits for clients.
fn listener(protocol: &'static str, state: &str, line: &str) -> Option<Listener> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    if *fields.get(3)? != state {
        return None;
    }
    let (address, port) = fields.get(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    if ![8, 32].contains(&address.len()) {
        return None;
    }
    // Words of 32 bits, each as it lies in memory.
    let words: Vec<u32> = (0..address.len() / 8)
        .map(|word| u32::from_str_radix(address.get(word * 8..word * 8 + 8)?, 16).ok())
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let address = match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(v6) => IpAddr::V6(Ipv6Addr::from(v6)),
        Err(_) => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.as_slice()).ok()?)),
    };
    // A socket that a client sends from is not told apart from a server's, but by its port.
    if protocol == "udp" && (port >= CLIENT_PORTS || address.is_loopback()) {
        return None;
    }
    Some(Listener { protocol, address: SocketAddr::new(address, port), inode: fields.get(9)?.parse().ok()? })
}

fn logins(world: &dyn World) -> Vec<Login> {
    const SESSIONS: &str = "/run/systemd/sessions";
    let session = |name: String| {
        let text = world.text(&format!("{SESSIONS}/{name}"))?;
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let is_person = value("CLASS").is_none_or(|class| class.starts_with("user"));
        if !is_person || value("STATE") == Some("closing") {
            return None;
        }
        let from =
            [value("REMOTE_HOST"), value("TTY"), value("DISPLAY")].into_iter().flatten().find(|text| !text.is_empty());
        Some(Login {
            user: value("USER").or(value("UID"))?.to_owned(),
            from: from.unwrap_or("this machine").to_owned(),
            session: name,
        })
    };
    let found: Vec<Login> =
        world.names(SESSIONS).into_iter().filter(|name| !name.contains('.')).filter_map(session).collect();
    if world.exists(SESSIONS) { found } else { utmp(&world.bytes("/run/utmp").unwrap_or_default()) }
}

/// utmp(5), where no logind keeps sessions: records of 384 bytes.
fn utmp(bytes: &[u8]) -> Vec<Login> {
    const RECORD: usize = 384;
    const USER_PROCESS: u16 = 7;
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    (bytes.chunks_exact(RECORD))
        .filter(|record| u16::from_le_bytes([record[0], record[1]]) == USER_PROCESS)
        .map(|record| {
            let (line, host) = (text(&record[8..40]), text(&record[76..332]));
            Login {
                user: text(&record[44..76]),
                from: if host.is_empty() { line.clone() } else { host },
                session: line,
            }
        })
        .collect()
}

fn changed(world: &dyn World) -> Vec<Changed> {
    let mut files: Vec<String> = vec!["/etc/sysctl.conf".to_owned()];
    for folder in SYSCTL_FOLDERS {
        let names = world.names(folder).into_iter().filter(|name| name.ends_with(".conf"));
        files.extend(names.map(|name| format!("{folder}/{name}")));
    }
    let texts: Vec<String> = files.iter().filter_map(|file| world.text(file)).collect();
    let set: Vec<(String, String)> = texts.iter().flat_map(|text| text.lines()).filter_map(setting).collect();
    let hostname = world.text("/etc/hostname").unwrap_or_default();
    (DEFAULTS.iter())
        .filter_map(|(name, default)| {
            let value = world.text(&format!("/proc/sys/{}", name.replace('.', "/")))?;
            let in_file = set.iter().any(|(pattern, wanted)| matches(pattern, name) && same(wanted, &value))
                || (*name == "kernel.hostname" && hostname == value);
            (!same(&value, default)).then(|| Changed { name: (*name).to_owned(), value, in_file })
        })
        .collect()
}

/// `key = value` of sysctl.d(5); `-` in front means that a failure does not matter.
fn setting(line: &str) -> Option<(String, String)> {
    let line = line.trim();
    if line.starts_with(['#', ';']) {
        return None;
    }
    let (key, value) = line.trim_start_matches('-').split_once('=')?;
    // A key that has a slash first has slashes for dots, and dots for dots.
    let key = key.trim();
    let key = match (key.find('/'), key.find('.')) {
        (Some(slash), dot) if dot.is_none_or(|dot| slash < dot) => key.replace('/', "."),
        _ => key.to_owned(),
    };
    Some((key, value.trim().to_owned()))
}

/// Whether a key, in which `*` stands for one part, is this name.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<&str>, Vec<&str>) = (pattern.split('.').collect(), name.split('.').collect());
    pattern.len() == name.len() && pattern.iter().zip(name).all(|(part, of)| *part == "*" || *part == of)
}

/// Values of several numbers differ in their white space.
fn same(one: &str, other: &str) -> bool {
    one.split_whitespace().eq(other.split_whitespace())
}

/// What a process belongs to, by its control group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    /// A container's name or number.
    Container(String),
    /// A session's name, or a user's manager.
    Session(String),
    /// A unit of systemd, or nothing of all this: the process's own name.
    Unit(String),
}

fn group(process: &Process) -> Group {
    let parts: Vec<&str> = process.cgroup.split('/').filter(|part| !part.is_empty()).collect();
    // Docker, Podman, CRI-O, containerd, LXC, systemd-nspawn: below each, one part for each container.
    const PREFIXES: [&str; 7] =
        ["docker-", "libpod-", "crio-", "cri-containerd-", "nerdctl-", "lxc.payload.", "systemd-nspawn@"];
    let short =
        |id: &str| id.trim_end_matches(".scope").trim_end_matches(".service").chars().take(12).collect::<String>();
    for (at, part) in parts.iter().enumerate() {
        if let Some(id) = PREFIXES.iter().find_map(|prefix| part.strip_prefix(prefix)) {
            return Group::Container(short(id));
        }
        if ["docker", "lxc", "lxc.payload"].contains(part)
            && let Some(id) = parts.get(at + 1)
        {
            return Group::Container(short(id));
        }
        if *part == "machine.slice"
            && let Some(name) = parts.get(at + 1).and_then(|scope| scope.strip_prefix("machine-"))
        {
            return Group::Container(name.trim_end_matches(".scope").replace("\\x2d", "-"));
        }
        if part.starts_with("kubepods")
            && let Some(last) = parts.last().filter(|last| last.len() == 64)
        {
            return Group::Container(short(last));
        }
    }
    if let Some(session) = parts.iter().find_map(|part| part.strip_prefix("session-")?.strip_suffix(".scope")) {
        return Group::Session(session.to_owned());
    }
    if parts.first() == Some(&"user.slice") {
        return Group::Session(parts.get(1).unwrap_or(&"user.slice").trim_end_matches(".slice").to_owned());
    }
    Group::Unit(parts.last().map_or(process.name.clone(), |part| (*part).to_owned()))
}

/// Whether it is a program of the configuration, which the successor starts anew.
fn is_configured(process: &Process, config: &Config) -> bool {
    let all =
        config.service.iter().map(|service| &service.exec).chain(config.program.iter().map(|program| &program.exec));
    let is_one = |exec: &Vec<String>| {
        // As it was started, behind a launcher or an interpreter of at most two words; or by its file, where it has written over its
        // arguments, as daemons do.
        let by_words =
            !exec.is_empty() && process.argv.windows(exec.len()).take(3).any(|words| words == exec.as_slice());
        let by_file = process.argv.len() <= 1 && exec.first() == Some(&process.exe);
        by_words || by_file
    };
    let mut all = all;
    all.any(is_one)
}

/// What the machine is full of, sorted.
struct Sorted<'a> {
    /// Started anew by the successor's configuration, each with its own.
    configured: BTreeSet<u32>,
    /// Whatever was started by those, directly or not.
    theirs: Vec<&'a Process>,
    /// Everything else.
    others: Vec<&'a Process>,
    /// The session of whoever asks.
    session: Option<String>,
}

/// Process 1 of a successor, and of a machine that was made for Baton: it starts the configuration's programs, and nothing else.
const OWN_INIT: &str = "baton-init";

fn sort<'a>(seen: &'a Seen, asked: &Asked<'_>) -> Sorted<'a> {
    let configured: BTreeSet<u32> = seen
        .processes
        .values()
        .filter(|process| is_configured(process, asked.config))
        .map(|process| process.pid)
        .collect();
    let ancestors = |pid: u32| {
        let mut way = Vec::new();
        let mut at = seen.processes.get(&pid);
        // A list that was read while processes ended may run in a circle.
        while let Some(process) = at.filter(|process| !way.contains(&process.pid)) {
            way.push(process.pid);
            at = seen.processes.get(&process.parent);
        }
        way
    };
    // Up to what process 1 has started: that is a server, and none of theirs.
    let asker = asked.asker.map(ancestors).unwrap_or_default();
    let asking: BTreeSet<u32> =
        asker.iter().copied().filter(|pid| seen.processes.get(pid).is_some_and(|process| process.parent > 1)).collect();
    let session = asking.iter().filter_map(|pid| seen.processes.get(pid)).find_map(|process| match group(process) {
        Group::Session(session) => Some(session),
        _ => None,
    });
    let own_init = seen.processes.get(&1).is_some_and(|first| first.exe.rsplit('/').next() == Some(OWN_INIT));
    let (mut theirs, mut others) = (Vec::new(), Vec::new());
    for process in seen.processes.values() {
        let pid = process.pid;
        if pid == 1 || pid == asked.own || asking.contains(&pid) || configured.contains(&pid) {
            continue;
        }
        if own_init || ancestors(pid).iter().any(|above| configured.contains(above)) {
            theirs.push(process);
        } else {
            others.push(process);
        }
    }
    Sorted { configured, theirs, others, session }
}

/// `ssh.service (3), cron.service (1)`.
fn by_group<'a>(groups: impl Iterator<Item = &'a Group>) -> (usize, String) {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for group in groups {
        let (Group::Container(name) | Group::Session(name) | Group::Unit(name)) = group;
        *counts.entry(name).or_default() += 1;
    }
    let told: Vec<String> = counts.iter().map(|(name, count)| format!("{name} ({count})")).collect();
    (counts.len(), listed(&told))
}

/// Judges.
pub fn judge(seen: &Seen, asked: &Asked<'_>) -> Vec<Item> {
    let sorted = sort(seen, asked);
    let groups: Vec<(&Process, Group)> =
        sorted.others.iter().filter(|process| !process.has_vm).map(|process| (*process, group(process))).collect();
    vec![
        processes(&sorted, &groups),
        containers(&groups),
        logins_item(seen, &sorted),
        vms(seen),
        pinned(seen),
        listeners(seen, &sorted, asked),
        sysctls(seen),
    ]
}

fn processes(sorted: &Sorted<'_>, groups: &[(&Process, Group)]) -> Item {
    const CHECK: &str = "processes";
    let units = || groups.iter().map(|(_, group)| group).filter(|group| matches!(group, Group::Unit(_)));
    let count = units().count();
    let kept = format!("{} of the configuration, which are started anew", sorted.configured.len());
    if count > 0 {
        let (in_groups, told) = by_group(units());
        return Item::asks(
            CHECK,
            Accept::Processes,
            format!("{count} in {}: {told}", counted(in_groups, "group")),
            "they end with this kernel, and the successor does not start them: it starts the services and programs of the configuration",
            "add what is needed to the configuration ([[service]], [[program]])",
        );
    }
    if !sorted.theirs.is_empty() {
        let names: BTreeSet<&str> = sorted.theirs.iter().map(|process| process.name.as_str()).collect();
        let names: Vec<&str> = names.into_iter().collect();
        return Item::comes_back(
            CHECK,
            format!("{} started by those: {}", sorted.theirs.len(), listed(&names)),
            "they end with the program that started them, which is started anew",
        );
    }
    Item::fine(CHECK, kept)
}

fn containers(groups: &[(&Process, Group)]) -> Item {
    const CHECK: &str = "containers";
    let all = || groups.iter().map(|(_, group)| group).filter(|group| matches!(group, Group::Container(_)));
    if all().next().is_none() {
        return Item::fine(CHECK, "none");
    }
    let (count, told) = by_group(all());
    Item::asks(
        CHECK,
        Accept::Containers,
        format!("{}: {told}", counted(count, "container")),
        "containers end with this kernel, with what is not in their volumes",
        "stop them",
    )
}

fn logins_item(seen: &Seen, sorted: &Sorted<'_>) -> Item {
    const CHECK: &str = "logins";
    let told = |logins: &[&Login]| {
        listed(&logins.iter().map(|login| format!("{} from {}", login.user, login.from)).collect::<Vec<_>>())
    };
    let (own, others): (Vec<&Login>, Vec<&Login>) =
        seen.logins.iter().partition(|login| Some(&login.session) == sorted.session.as_ref());
    if !others.is_empty() {
        let cause = "their sessions end with this kernel";
        return Item::asks(CHECK, Accept::Logins, told(&others), cause, "have them log out");
    }
    if own.is_empty() {
        return Item::fine(CHECK, "nobody is logged in");
    }
    Item::comes_back(CHECK, format!("you ({})", told(&own)), "your session ends with this kernel")
}

fn vms(seen: &Seen) -> Item {
    const CHECK: &str = "vms";
    let told: Vec<String> = (seen.processes.values())
        .filter(|process| process.has_vm)
        .map(|process| format!("{} ({})", process.name, process.pid))
        .collect();
    if told.is_empty() {
        return Item::fine(CHECK, "none");
    }
    let cause = "virtual machines end with this kernel, as by a loss of power";
    Item::asks(CHECK, Accept::Vms, listed(&told), cause, "shut them down, or migrate them")
}

/// No reason to refuse: the kernel moves tasks when their CPU goes.
fn pinned(seen: &Seen) -> Item {
    const CHECK: &str = "pinned tasks";
    let told: Vec<String> = (seen.processes.values())
        .filter_map(|process| {
            let cpus: Vec<String> = process.bound_to.as_ref()?.iter().map(u32::to_string).collect();
            Some(format!("{} ({}) to CPU {}", process.name, process.pid, listed(&cpus)))
        })
        .collect();
    if told.is_empty() {
        return Item::fine(CHECK, "none");
    }
    let cause = "they run elsewhere while their CPU is away; whatever the successor starts binds itself anew, to its own numbers";
    Item::comes_back(CHECK, listed(&told), cause)
}

fn listeners(seen: &Seen, sorted: &Sorted<'_>, asked: &Asked<'_>) -> Item {
    const CHECK: &str = "listeners";
    let mut owners: BTreeMap<u64, Vec<&Process>> = BTreeMap::new();
    for process in seen.processes.values() {
        for inode in &process.sockets {
            owners.entry(*inode).or_default().push(process);
        }
    }
    let mut answered = 0;
    let mut lost = Vec::new();
    for listener in &seen.listeners {
        let who = owners.get(&listener.inode).map(Vec::as_slice).unwrap_or_default();
        // What a program of the configuration has open it opens again; what those open that it has started, nobody knows.
        if who.iter().any(|process| sorted.configured.contains(&process.pid) || process.pid == asked.own) {
            answered += 1;
            continue;
        }
        // Of the many that share one, the first one is the server.
        let who = who.first().map_or("the kernel".to_owned(), |process| process.name.clone());
        lost.push(format!("{}/{} ({who})", listener.protocol, listener.address));
    }
    if lost.is_empty() {
        return Item::fine(CHECK, format!("{} of the configuration's programs", counted(answered, "socket")));
    }
    Item::asks(
        CHECK,
        Accept::Listeners,
        listed(&lost),
        "nobody answers there afterwards: only the services and programs of the configuration are started again",
        "add the program to the configuration",
    )
}

fn sysctls(seen: &Seen) -> Item {
    const CHECK: &str = "sysctls";
    let told = |in_file: bool| {
        let of = seen.changed.iter().filter(|changed| changed.in_file == in_file);
        of.map(|changed| format!("{} = {}", changed.name, changed.value)).collect::<Vec<_>>()
    };
    let looked = format!("{} were looked at, others are not known", counted(DEFAULTS.len(), "setting"));
    let (by_hand, by_file) = (told(false), told(true));
    if !by_hand.is_empty() {
        let cause = format!("no file sets these, and the successor starts with the kernel's defaults ({looked})");
        return Item::asks(CHECK, Accept::Sysctls, listed(&by_hand), cause, "write them to a file in /etc/sysctl.d");
    }
    if !by_file.is_empty() {
        let cause =
            format!("files set these at boot; the successor has the kernel's defaults until a reboot ({looked})");
        return Item::comes_back(CHECK, listed(&by_file), cause);
    }
    Item::fine(CHECK, format!("as the kernel makes them ({looked})"))
}

#[cfg(test)]
mod tests {
    use super::super::item::Weight;
    use super::*;
    use crate::daemon::config::{Program, Service};
    use crate::machine::facts::Facts;
    use crate::machine::processes;
    use crate::machine::world::played::Played;

    fn process(world: Played, pid: u32, parent: u32, argv: &[&str], cgroup: &str) -> Played {
        let name = argv[0].rsplit('/').next().unwrap();
        let folder = format!("/proc/{pid}");
        world
            .file(&format!("{folder}/stat"), &format!("{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194560 0 0"))
            .file(&format!("{folder}/cmdline"), &(argv.join("\0") + "\0"))
            .file(&format!("{folder}/cgroup"), &format!("0::{cgroup}\n"))
            .linked(&format!("{folder}/exe"), argv[0])
    }

    fn config() -> Config {
        let service = Service {
            name: "kv".into(),
            exec: vec!["/usr/sbin/baton-kv".into(), "-x".into()],
            fd_store: false,
            user: None,
        };
        let program = Program { name: "labd".into(), exec: vec!["/usr/sbin/labd".into()] };
        Config { service: vec![service], program: vec![program], ..Config::default() }
    }

    fn of(world: &Played, asker: Option<u32>) -> Vec<Item> {
        let (config, facts) = (config(), Facts::default());
        let asked = Asked { config: &config, facts: &facts, own: 30, asker };
        judge(&read(world, processes::all(world, &[0, 1, 2, 3])), &asked)
    }

    fn item<'a>(items: &'a [Item], check: &str) -> &'a Item {
        items.iter().find(|item| item.check == check).unwrap()
    }

    const TCP: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn listening(world: Played, lines: &[(&str, u64)]) -> Played {
        let line = |(at, (address, inode)): (usize, &(&str, u64))| {
            format!(
                "  {at}: {address} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 100 0\n"
            )
        };
        let text: String = lines.iter().enumerate().map(line).collect();
        world.file("/proc/net/tcp", &format!("{TCP}{text}"))
    }

    /// A machine of the lab: everything is started by the configuration, or by what that has started.
    fn lab() -> Played {
        let world = process(Played::default(), 1, 0, &["/init"], "/");
        let world = world.linked("/proc/1/exe", "/usr/sbin/baton-init");
        let world = process(world, 30, 1, &["/usr/sbin/batond"], "/");
        let world = process(world, 31, 1, &["/usr/sbin/baton-kv", "-x"], "/").linked("/proc/31/fd/5", "socket:[100]");
        let world = process(world, 32, 1, &["/usr/sbin/labd"], "/").linked("/proc/32/fd/3", "socket:[101]");
        let world = process(world, 40, 32, &["baton", "check"], "/");
        listening(world, &[("0A004D0A:18EB", 100), ("00000000:1E61", 101)])
    }

    #[test]
    fn a_machine_of_the_lab_loses_nothing() {
        let items = of(&lab(), Some(40));
        assert!(items.iter().all(|item| item.weight == Weight::Fine), "{items:#?}");
        assert_eq!(item(&items, "listeners").found, "2 sockets of the configuration's programs");
    }

    #[test]
    fn what_those_programs_have_started_ends_with_them_and_its_ports_are_named() {
        let world = process(lab(), 50, 1, &["sleep", "100000"], "/");
        let world = world.file("/proc/50/status", "Cpus_allowed_list:\t2\n");
        let world = process(world, 51, 32, &["nc", "-l"], "/").linked("/proc/51/fd/3", "socket:[102]");
        let world = listening(world, &[("0A004D0A:18EB", 100), ("0B004D0A:1267", 102), ("00000000:0801", 0)]);
        let items = of(&world, Some(40));
        assert_eq!(item(&items, "processes").weight, Weight::ComesBack);
        assert_eq!(item(&items, "processes").found, "2 started by those: nc, sleep");
        assert_eq!(item(&items, "pinned tasks").weight, Weight::ComesBack);
        assert_eq!(item(&items, "pinned tasks").found, "sleep (50) to CPU 2");
        assert_eq!(item(&items, "listeners").weight, Weight::Asks(Accept::Listeners));
        assert_eq!(item(&items, "listeners").found, "tcp/10.77.0.11:4711 (nc), tcp/0.0.0.0:2049 (the kernel)");
    }

    /// A Debian server with a shell, a container and a virtual machine.
    fn server() -> Played {
        let world = process(Played::default(), 1, 0, &["/usr/lib/systemd/systemd"], "/init.scope");
        let world = process(world, 30, 1, &["/usr/sbin/batond"], "/system.slice/batond.service");
        let world = process(world, 31, 1, &["/usr/sbin/baton-kv", "-x"], "/system.slice/baton-kv.service");
        let world = process(world, 60, 1, &["/usr/sbin/sshd"], "/system.slice/ssh.service")
            .linked("/proc/60/fd/3", "socket:[7]");
        let world = process(world, 61, 60, &["sshd-session"], "/user.slice/user-0.slice/session-3.scope");
        let world = process(world, 62, 61, &["-bash"], "/user.slice/user-0.slice/session-3.scope");
        let world = process(world, 63, 62, &["baton", "check"], "/user.slice/user-0.slice/session-3.scope");
        let world = process(world, 70, 1, &["nginx: master process /usr/sbin/nginx"], "/system.slice/nginx.service");
        let world = process(world, 71, 70, &["nginx: worker process"], "/system.slice/nginx.service");
        let world = world.file("/proc/71/status", "Cpus_allowed_list:\t0\n").linked("/proc/71/fd/6", "socket:[8]");
        let id = "0123456789abcdef0123";
        let world = process(world, 80, 1, &["redis-server"], &format!("/system.slice/docker-{id}.scope"));
        let world = process(world, 81, 80, &["sh"], &format!("/system.slice/docker-{id}.scope"));
        let world = process(
            world,
            90,
            1,
            &["/usr/bin/qemu-system-x86_64"],
            "/machine.slice/machine-qemu\\x2d1\\x2dvm.scope/libvirt",
        );
        let world = world.linked("/proc/90/fd/9", "anon_inode:kvm-vm");
        let world = world
            .file(
                "/run/systemd/sessions/3",
                "# private\nUID=0\nUSER=root\nACTIVE=1\nSTATE=active\nREMOTE=1\nREMOTE_HOST=10.0.0.9\nCLASS=user\n",
            )
            .file("/run/systemd/sessions/4", "UID=0\nUSER=root\nSTATE=active\nCLASS=manager-early\n")
            .file("/run/systemd/sessions/3.ref", "");
        listening(world, &[("00000000:0016", 7), ("00000000:0050", 8)])
    }

    #[test]
    fn a_server_is_named_unit_by_unit() {
        let items = of(&server(), Some(63));
        let told = |check: &str| (item(&items, check).found.as_str(), item(&items, check).weight.clone());
        assert_eq!(
            told("processes"),
            ("3 in 2 groups: nginx.service (2), ssh.service (1)", Weight::Asks(Accept::Processes))
        );
        assert_eq!(told("containers"), ("1 container: 0123456789ab (2)", Weight::Asks(Accept::Containers)));
        assert_eq!(told("vms"), ("qemu-system-x86_64 (90)", Weight::Asks(Accept::Vms)));
        assert_eq!(told("logins"), ("you (root from 10.0.0.9)", Weight::ComesBack));
        let all = "tcp/0.0.0.0:22 (sshd), tcp/0.0.0.0:80 (nginx: worker process)";
        assert_eq!(told("listeners"), (all, Weight::Asks(Accept::Listeners)));
        assert_eq!(told("pinned tasks"), ("nginx: worker process (71) to CPU 0", Weight::ComesBack));
        // Somebody else asks: the session is somebody's.
        assert_eq!(item(&of(&server(), None), "logins").weight, Weight::Asks(Accept::Logins));
    }

    #[test]
    fn containers_of_all_kinds_are_told_from_units() {
        let of = |cgroup: &str| group(&Process { cgroup: cgroup.into(), name: "x".into(), ..Process::default() });
        let container = |name: &str| Group::Container(name.into());
        assert_eq!(of("/docker/0123456789abcdef"), container("0123456789ab"));
        assert_eq!(of("/machine.slice/libpod-fedcba9876543210.scope/container"), container("fedcba987654"));
        assert_eq!(
            of("/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-00112233445566.scope"),
            container("001122334455")
        );
        assert_eq!(of("/lxc.payload.web/init.scope"), container("web"));
        assert_eq!(of("/machine.slice/machine-deb\\x2d13.scope"), container("deb-13"));
        assert_eq!(of("/system.slice/ssh.service"), Group::Unit("ssh.service".into()));
        assert_eq!(
            of("/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope"),
            Group::Session("user-1000".into())
        );
        assert_eq!(of("/"), Group::Unit("x".into()));
    }

    #[test]
    fn settings_in_files_come_back_and_others_do_not() {
        let world = lab().file("/proc/sys/net/ipv4/ip_forward", "1\n").file("/proc/sys/vm/swappiness", "10\n");
        let items = of(&world, None);
        assert_eq!(item(&items, "sysctls").weight, Weight::Asks(Accept::Sysctls));
        assert_eq!(item(&items, "sysctls").found, "net.ipv4.ip_forward = 1, vm.swappiness = 10");
        let world = world
            .file("/etc/sysctl.d/1.conf", "# x\n-net/ipv4/ip_forward=1\n")
            .file("/usr/lib/sysctl.d/2.conf", "vm.swappiness = 10\n")
            .file("/usr/lib/sysctl.d/3.conf", "net.ipv4.conf.*.rp_filter = 2\n")
            .file("/proc/sys/net/ipv4/conf/all/rp_filter", "2\n")
            .file("/proc/sys/net/ipv4/ip_local_port_range", "32768 60999\n")
            .file("/proc/sys/kernel/hostname", "web1\n")
            .file("/etc/hostname", "web1\n");
        let items = of(&world, None);
        assert_eq!(item(&items, "sysctls").weight, Weight::ComesBack);
        assert!(
            item(&items, "sysctls").found.contains("rp_filter = 2")
                && !item(&items, "sysctls").found.contains("port_range")
        );
    }

    #[test]
    fn logins_without_logind_and_hostile_lines() {
        let mut record = vec![0; 384];
        record[0] = 7;
        record[8..12].copy_from_slice(b"tty1");
        record[44..48].copy_from_slice(b"anna");
        let dead = vec![0; 384];
        let found = utmp(&[dead, record, vec![7; 100]].concat());
        assert_eq!(found, [Login { session: "tty1".into(), user: "anna".into(), from: "tty1".into() }]);
        for line in [
            "",
            "0: x",
            "0: 0:0 0 0A",
            "0: ZZ:0016 0 0A 0 0 0 0 0 1",
            "0: 0000000000:0016 0 0A 0 0 0 0 0 1",
            "0: é:1 0 0A 0 0 0 0 0 9",
        ] {
            assert_eq!(listener("tcp", "0A", line), None, "{line}");
        }
        let six = "0: 00000000000000000000000001000000:0016 0 0A 0 0 0 0 0 9";
        assert_eq!(listener("tcp", "0A", six).unwrap().address.to_string(), "[::1]:22");
        assert_eq!(listener("udp", "07", "0: 00000000:9000 0 07 0 0 0 0 0 9"), None, "a client's port");
    }
}
