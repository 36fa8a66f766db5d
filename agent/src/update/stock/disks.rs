//! File systems, swap, and block devices that are stacked on each other.
//!
//! No block device crosses yet: the successor gets interfaces, and no disks. So what is mounted ends with this kernel, and the writes
//! that are under way with it.

use std::collections::{BTreeMap, BTreeSet};

use super::accept::Accept;
use super::item::{Item, listed, size};
use crate::machine::world::{Space, World};

/// One line of `/proc/1/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of what is mounted.
    pub device: String,
    /// Where.
    pub at: String,
    /// What kind of file system.
    pub kind: String,
    /// What it was mounted from.
    pub source: String,
}

/// A block device, and what it lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its name below /sys/class/block.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What people call it: a volume's name, a file's path.
    pub alias: Option<String>,
    /// The whole disk that it is a part of.
    pub whole: Option<String>,
    /// The devices that it is made of.
    pub slaves: Vec<String>,
}

/// A line of `/proc/swaps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swap {
    /// Device or file.
    pub name: String,
    /// Bytes that are in it.
    pub used: u64,
    /// Its size.
    pub size: u64,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What is mounted, in order. Nothing when the list cannot be read.
    pub mounts: Option<Vec<Mount>>,
    /// How full file systems in memory are, by mount point.
    pub spaces: BTreeMap<String, Space>,
    /// Names of block devices by `major:minor`.
    pub numbers: BTreeMap<String, String>,
    /// All block devices by name.
    pub blocks: BTreeMap<String, Block>,
    /// Swap.
    pub swaps: Vec<Swap>,
    /// Bytes that are written, and not yet on any disk.
    pub dirty: u64,
}

/// Kinds that hold nothing: the kernel makes their content anew.
const MADE_BY_THE_KERNEL: [&str; 25] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "cpuset",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nfsd",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "rootfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];
/// Kinds that live in memory only.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];
/// Below these, nobody counts on finding a file again after a reboot (file-hierarchy(7)).
const RUNTIME: [&str; 6] = ["/run", "/tmp", "/dev", "/sys", "/var/run", "/var/lock"];
/// The first file system of an initramfs, before anything is mounted over it.
const INITRAMFS: &str = "rootfs";

/// Reads `/proc/1/mountinfo`. Lines that are not what they should be are left out.
pub fn parse_mounts(text: &str) -> Vec<Mount> {
    let line = |line: &str| {
        let (fixed, rest) = line.split_once(" - ")?;
        let mut fixed = fixed.split(' ').skip(2);
        let (device, at) = (fixed.next()?.to_owned(), unescape(fixed.nth(1)?));
        let mut rest = rest.split(' ');
        Some(Mount { device, at, kind: rest.next()?.to_owned(), source: unescape(rest.next()?) })
    };
    text.lines().filter_map(line).collect()
}

/// `\040` is a blank (proc_pid_mountinfo(5)).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal.filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads `/proc/swaps`, whose sizes are in KiB.
pub fn parse_swaps(text: &str) -> Vec<Swap> {
    let line = |line: &str| {
        // Name and kind are first; sizes are counted from the end, because a name may hold blanks.
        let mut words = line.split_whitespace().rev().skip(1);
        let kib = |word: Option<&str>| word?.parse::<u64>().ok().map(|kib| kib.saturating_mul(1024));
        let (used, size) = (kib(words.next())?, kib(words.next())?);
        Some(Swap { name: unescape(line.split_whitespace().next()?), used, size })
    };
    text.lines().skip(1).filter_map(line).collect()
}

fn block(world: &dyn World, name: &str) -> Block {
    let folder = format!("/sys/class/block/{name}");
    let alias = ["dm/name", "loop/backing_file", "md/array_state"]
        .iter()
        .find_map(|file| world.text(&format!("{folder}/{file}")))
        .filter(|text| !text.is_empty());
    // A partition's folder lies in its disk's.
    let whole = world
        .exists(&format!("{folder}/partition"))
        .then(|| world.link(&folder).ok()?.rsplit('/').nth(1).map(str::to_owned))
        .flatten();
    Block {
        name: name.to_owned(),
        size: world.number(&format!("{folder}/size")).unwrap_or(0).saturating_mul(512),
        alias,
        whole,
        slaves: world.names(&format!("{folder}/slaves")),
    }
}

/// Looks.
pub fn read(world: &dyn World) -> Seen {
    // Process 1's: batond's unit may have a view of its own.
    let mounts = world.text("/proc/1/mountinfo").map(|text| parse_mounts(&text));
    let in_memory = mounts.iter().flatten().filter(|mount| IN_MEMORY.contains(&mount.kind.as_str()));
    let spaces = in_memory.filter_map(|mount| Some((mount.at.clone(), world.space(&mount.at).ok()?))).collect();
    let names = world.names("/sys/class/block");
    let numbers =
        names.iter().filter_map(|name| Some((world.text(&format!("/sys/class/block/{name}/dev"))?, name.clone())));
    let meminfo = world.text("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    Seen {
        mounts,
        spaces,
        numbers: numbers.collect(),
        blocks: names.iter().map(|name| (name.clone(), block(world, name))).collect(),
        swaps: parse_swaps(&world.text("/proc/swaps").unwrap_or_default()),
        dirty: kib("Dirty").saturating_add(kib("Writeback")).saturating_mul(1024),
    }
}

impl Seen {
    /// A device with all that it lies on: `dm-0 (vg-root) on vda2 on vda`.
    fn stack(&self, name: &str) -> String {
        let mut told = Vec::new();
        let mut seen = BTreeSet::new();
        let mut next = vec![name.to_owned()];
        while let Some(name) = next.pop() {
            // A circle cannot be, and a list that pretends one ends here.
            if !seen.insert(name.clone()) {
                continue;
            }
            match self.blocks.get(&name) {
                None => told.push(name),
                Some(block) => {
                    told.push(match &block.alias {
                        Some(alias) => format!("{name} ({alias})"),
                        None => name,
                    });
                    next.extend(block.slaves.iter().rev().cloned());
                    next.extend(block.whole.clone());
                }
            }
        }
        told.join(" on ")
    }

    /// All devices below one, itself among them.
    fn below(&self, name: &str, into: &mut BTreeSet<String>) {
        if !into.insert(name.to_owned()) {
            return;
        }
        let Some(block) = self.blocks.get(name) else { return };
        block.slaves.iter().chain(&block.whole).for_each(|lower| self.below(lower, into));
    }

    /// What a mount lies on, for people.
    fn origin(&self, mount: &Mount) -> String {
        match self.device_of(mount) {
            Some(name) => format!("{} on {}", mount.kind, self.stack(name)),
            None => format!("{} from {}", mount.kind, mount.source),
        }
    }

    /// The block device of a mount. File systems of several devices have a number of their own, and name one of them as source.
    fn device_of(&self, mount: &Mount) -> Option<&String> {
        let by_source = || self.blocks.get_key_value(mount.source.strip_prefix("/dev/")?).map(|(name, _)| name);
        self.numbers.get(&mount.device).or_else(by_source)
    }
}

/// Judges.
pub fn judge(seen: &Seen) -> Vec<Item> {
    let mut items = mounts(seen);
    items.push(swap(seen));
    items.push(devices(seen));
    items
}

fn mounts(seen: &Seen) -> Vec<Item> {
    const CHECK: &str = "mounts";
    let Some(mounts) = &seen.mounts else {
        return vec![Item::forbids(
            CHECK,
            "/proc/1/mountinfo cannot be read",
            "what is mounted cannot be known",
            "mount /proc",
        )];
    };
    let mut items = Vec::new();
    // The last one at a place is the one that is seen there.
    let root = mounts.iter().rev().find(|mount| mount.at == "/");
    match root {
        None => {}
        Some(root) if root.kind == INITRAMFS => {}
        Some(root) if IN_MEMORY.contains(&root.kind.as_str()) => items.push(Item::asks(
            CHECK,
            Accept::Mounts,
            format!("/ ({})", root.kind),
            "the root file system is in memory, and ends with this kernel: the successor has its initrd only",
            "",
        )),
        Some(root) => items.push(Item::forbids(
            CHECK,
            format!("/ ({})", seen.origin(root)),
            format!(
                "the root file system does not cross: the successor would have no disk, and the writes under way \
                 would be cut off ({} not yet written)",
                size(seen.dirty)
            ),
            "update this machine by a reboot; Baton carries machines that run from an initramfs only",
        )),
    }
    let mut ends: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut memory = Vec::new();
    for mount in mounts.iter().filter(|mount| mount.at != "/") {
        let kind = mount.kind.as_str();
        if MADE_BY_THE_KERNEL.contains(&kind) {
            continue;
        }
        if !IN_MEMORY.contains(&kind) {
            ends.entry(seen.origin(mount)).or_default().push(mount.at.clone());
            continue;
        }
        let runtime = RUNTIME.iter().any(|top| mount.at == *top || mount.at.starts_with(&format!("{top}/")));
        let space = seen.spaces.get(&mount.at);
        // Its root is a file, too.
        let empty = space.is_some_and(|space| space.files == 1 && space.used == 0);
        if !runtime && !empty {
            let used = space.map_or("its size is not known".to_owned(), |space| size(space.used));
            memory.push(format!("{} ({kind}, {used})", mount.at));
        }
    }
    if !memory.is_empty() {
        items.push(Item::asks(
            CHECK,
            Accept::Mounts,
            listed(&memory),
            "files in memory end with this kernel",
            "save them elsewhere and unmount",
        ));
    }
    for (origin, at) in &ends {
        items.push(Item::asks(
            CHECK,
            Accept::Mounts,
            format!("{} ({origin})", listed(at)),
            format!(
                "what it lies on does not cross: the file system is cut off, and absent until a reboot ({} not yet \
                 written)",
                size(seen.dirty)
            ),
            format!("unmount it (`umount {}`)", at.last().map_or("", String::as_str)),
        ));
    }
    if items.is_empty() {
        items.push(Item::fine(CHECK, "none that would be missed"));
    }
    items
}

fn swap(seen: &Seen) -> Item {
    const CHECK: &str = "swap";
    if seen.swaps.is_empty() {
        return Item::fine(CHECK, "none");
    }
    let told: Vec<String> = (seen.swaps.iter())
        .map(|swap| {
            let name = swap.name.trim_start_matches("/dev/");
            let what = if seen.blocks.contains_key(name) { seen.stack(name) } else { swap.name.clone() };
            format!("{what}, {} of {} used", size(swap.used), size(swap.size))
        })
        .collect();
    Item::asks(
        CHECK,
        Accept::Swap,
        listed(&told),
        "swap does not cross: the successor has none until a reboot",
        format!("`swapoff {}`", seen.swaps[0].name),
    )
}

/// Devices that are made of others, and neither mounted nor swap: somebody set them up by hand or by another program.
fn devices(seen: &Seen) -> Item {
    const CHECK: &str = "devices";
    let mut known = BTreeSet::new();
    for mount in seen.mounts.iter().flatten() {
        if let Some(name) = seen.device_of(mount) {
            seen.below(name, &mut known);
        }
    }
    for swap in &seen.swaps {
        seen.below(swap.name.trim_start_matches("/dev/"), &mut known);
    }
    let set_up = |block: &Block| !block.slaves.is_empty() || (block.alias.is_some() && block.size > 0);
    // A connected network block device has a size; an idle one has none.
    let network = |name: &str| ["nbd", "rbd", "drbd"].iter().any(|kind| name.starts_with(kind));
    let mut stacked = Vec::new();
    let mut plain = Vec::new();
    for (name, block) in &seen.blocks {
        if known.contains(name) || block.size == 0 || block.whole.is_some() {
            continue;
        }
        if set_up(block) || network(name) {
            stacked.push(seen.stack(name));
        } else if !["ram", "zram", "loop", "fd", "sr"].iter().any(|kind| name.starts_with(kind)) {
            plain.push(format!("{name} ({})", size(block.size)));
        }
    }
    if !stacked.is_empty() {
        return Item::asks(
            CHECK,
            Accept::Devices,
            listed(&stacked),
            "what is set up on disks does not cross, and whoever has it open loses it",
            "stop it (`vgchange -an`, `mdadm --stop`, `losetup -d`, `cryptsetup close`)",
        );
    }
    if plain.is_empty() {
        return Item::fine(CHECK, "no disks but those named above");
    }
    let cause = "the successor does not see it until a reboot";
    Item::comes_back(CHECK, format!("{}, not mounted", listed(&plain)), cause)
}

#[cfg(test)]
mod tests {
    use super::super::item::Weight;
    use super::*;
    use crate::machine::world::played::Played;

    /// Debian 13 in a cloud: root on the first partition of a virtio disk.
    const DEBIAN: &str = "\
22 28 0:21 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
23 28 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
24 28 0:5 / /dev rw,nosuid,relatime shared:2 - devtmpfs udev rw,size=1006028k,nr_inodes=251507,mode=755,inode64
25 24 0:23 / /dev/pts rw,nosuid,noexec,relatime shared:3 - devpts devpts rw,gid=5,mode=620,ptmxmode=000
26 28 0:24 / /run rw,nosuid,nodev,noexec,relatime shared:5 - tmpfs tmpfs rw,size=204320k,mode=755,inode64
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard,errors=remount-ro
29 22 0:6 / /sys/kernel/security rw,nosuid,nodev,noexec,relatime shared:8 - securityfs securityfs rw
36 28 0:31 / /tmp rw,nosuid,nodev shared:17 - tmpfs tmpfs rw,nr_inodes=1048576,inode64
40 28 254:15 / /boot/efi rw,relatime shared:19 - vfat /dev/vda15 rw,fmask=0077
";
    /// A machine of the lab.
    const LAB: &str = "\
1 1 0:2 / / rw - rootfs rootfs rw,size=1473680k,nr_inodes=368420
20 1 0:19 / /proc rw,relatime - proc proc rw
21 1 0:20 / /sys rw,relatime - sysfs sysfs rw
22 1 0:5 / /dev rw,relatime - devtmpfs devtmpfs rw,size=1473680k,nr_inodes=368420,mode=755
23 1 0:21 / /run rw,relatime - tmpfs tmpfs rw
24 22 0:22 / /dev/pts rw,relatime - devpts devpts rw,mode=600,ptmxmode=000
25 21 0:7 / /sys/kernel/debug rw,relatime - debugfs debugfs rw
26 21 0:23 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw
";

    fn disk(world: Played, name: &str, number: &str, size: &str) -> Played {
        let folder = format!("/sys/class/block/{name}");
        world.file(&format!("{folder}/dev"), number).file(&format!("{folder}/size"), size)
    }

    fn partition(world: Played, whole: &str, name: &str, number: &str) -> Played {
        let place = format!("../../devices/pci0000:00/0000:00:04.0/virtio1/block/{whole}/{name}");
        disk(world, name, number, "2048")
            .file(&format!("/sys/class/block/{name}/partition"), "1")
            .linked(&format!("/sys/class/block/{name}"), &place)
    }

    fn of(world: &Played) -> Vec<Item> {
        judge(&read(world))
    }

    fn weights(items: &[Item]) -> Vec<(&str, &Weight)> {
        items.iter().map(|item| (item.check, &item.weight)).collect()
    }

    #[test]
    fn a_server_with_its_root_on_a_disk_is_refused_whatever_is_accepted() {
        let world = Played::default().file("/proc/1/mountinfo", DEBIAN).file("/proc/meminfo", "Dirty:   2048 kB\n");
        let world = partition(disk(world, "vda", "254:0", "20971520"), "vda", "vda1", "254:1");
        let world = partition(world, "vda", "vda15", "254:15");
        let items = of(&world);
        assert_eq!(
            weights(&items),
            [
                ("mounts", &Weight::Forbids),
                ("mounts", &Weight::Asks(Accept::Mounts)),
                ("swap", &Weight::Fine),
                ("devices", &Weight::Fine)
            ]
        );
        assert_eq!(items[0].found, "/ (ext4 on vda1 on vda)");
        assert!(items[0].cause.contains("2 MiB not yet written"), "{}", items[0].cause);
        assert_eq!(items[1].found, "/boot/efi (vfat on vda15 on vda)");
        assert!(items[1].advice.contains("umount /boot/efi"));
    }

    #[test]
    fn a_machine_of_the_lab_misses_nothing() {
        let items = of(&Played::default().file("/proc/1/mountinfo", LAB));
        assert!(items.iter().all(|item| item.weight == Weight::Fine), "{items:?}");
    }

    #[test]
    fn other_roots_are_refused_too() {
        for (kind, source) in [("overlay", "overlay"), ("nfs4", "srv:/root"), ("btrfs", "/dev/sda2"), ("zfs", "rpool")]
        {
            let text = format!("{LAB}30 1 0:44 / / rw - {kind} {source} rw\n");
            let items = of(&Played::default().file("/proc/1/mountinfo", &text));
            assert_eq!(items[0].weight, Weight::Forbids, "{kind}");
            assert!(items[0].found.contains(kind) && items[0].found.contains(source));
        }
        let text = format!("{LAB}30 1 0:44 / / rw - tmpfs root rw\n");
        assert_eq!(of(&Played::default().file("/proc/1/mountinfo", &text))[0].weight, Weight::Asks(Accept::Mounts));
        assert_eq!(of(&Played::default())[0].weight, Weight::Forbids, "nothing is known");
    }

    #[test]
    fn a_volume_is_followed_down_to_its_disks_and_named_once() {
        let text = format!(
            "{LAB}40 1 253:0 / /srv rw - xfs /dev/mapper/vg-srv rw\n41 1 253:0 /www /var/www\\040data rw - xfs \
             /dev/mapper/vg-srv rw\n42 1 0:50 / /mnt/b rw - btrfs /dev/sdc rw\n43 1 0:51 / /nfs rw - nfs4 srv:/e rw\n"
        );
        let world = disk(Played::default().file("/proc/1/mountinfo", &text), "dm-0", "253:0", "100")
            .file("/sys/class/block/dm-0/dm/name", "vg-srv\n")
            .file("/sys/class/block/dm-0/slaves/md0/dev", "9:0");
        let world = disk(world, "md0", "9:0", "100")
            .file("/sys/class/block/md0/slaves/sda1/dev", "8:1")
            .file("/sys/class/block/md0/slaves/sdb1/dev", "8:17");
        let world = partition(disk(world, "sda", "8:0", "100"), "sda", "sda1", "8:1");
        let world = partition(disk(world, "sdb", "8:16", "100"), "sdb", "sdb1", "8:17");
        let world = disk(world, "sdc", "8:32", "100");
        let items = of(&world);
        let found: Vec<&str> = items.iter().map(|item| item.found.as_str()).collect();
        assert_eq!(
            found,
            [
                "/mnt/b (btrfs on sdc)",
                "/nfs (nfs4 from srv:/e)",
                "/srv, /var/www data (xfs on dm-0 (vg-srv) on md0 on sda1 on sda on sdb1 on sdb)",
                "none",
                "no disks but those named above",
            ]
        );
    }

    #[test]
    fn files_in_memory_count_where_somebody_would_look_for_them() {
        let text = format!("{LAB}50 1 0:60 / /data rw - tmpfs data rw\n51 1 0:61 / /empty rw - tmpfs none rw\n");
        let world = Played::default().file("/proc/1/mountinfo", &text).filled("/data", 5 << 20, 3);
        let items = of(&world.filled("/empty", 0, 1));
        assert_eq!(items[0].found, "/data (tmpfs, 5 MiB)");
        assert_eq!(items[0].weight, Weight::Asks(Accept::Mounts));
        assert_eq!(items.len(), 3);
    }

    #[test]
    fn swap_and_idle_stacks_are_named() {
        let swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/zram0                              \
                     partition\t1048572\t\t512\t\t100\n/swap\\040file file 2048 0 -2\n";
        let world = Played::default().file("/proc/1/mountinfo", LAB).file("/proc/swaps", swaps);
        let world = disk(world, "zram0", "252:0", "2097152");
        let world = disk(world, "loop0", "7:0", "64").file("/sys/class/block/loop0/loop/backing_file", "/img\n");
        let world = disk(disk(world, "loop1", "7:1", "0"), "vdb", "254:16", "4096");
        let items = of(&world);
        assert_eq!(items[1].weight, Weight::Asks(Accept::Swap));
        assert_eq!(items[1].found, "zram0, 512 KiB of 1023 MiB used, /swap file, 0 bytes of 2 MiB used");
        assert_eq!((items[2].found.as_str(), &items[2].weight), ("loop0 (/img)", &Weight::Asks(Accept::Devices)));
        let plain = disk(Played::default().file("/proc/1/mountinfo", LAB), "vdb", "254:16", "4096");
        assert_eq!(of(&plain)[2].weight, Weight::ComesBack);
    }

    #[test]
    fn hostile_lines_are_left_out() {
        assert_eq!(parse_mounts("1 2 3\n - - -\n\u{fffd}\n1 1 0:2 / \\ rw - tmpfs"), []);
        assert_eq!(unescape("a\\04\\0409\\777"), "a\\04 9\\777");
        assert_eq!(parse_swaps("h\nx\n\n/dev/sda2 partition 99999999999999999999 1 1\n"), []);
    }
}
