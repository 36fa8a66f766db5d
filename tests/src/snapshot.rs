//! What a machine is like from inside, so that "as before" can be said in one line.

use agent::userland::kernels::{Instance, parse_instances};
use anyhow::{Context, Result};
use demos::lab::Guest;
use demos::story::stage::{Stage, status_of};

/// Memory that may come and go without anything being lost: page cache that is in use, slabs, stacks.
const NOISE_KIB: u64 = 48 << 10;

/// How a kernel and its service are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its release.
    pub release: String,
    /// CPUs online, as Linux lists them.
    pub online: String,
    /// MemTotal, KiB.
    pub mem_total_kib: u64,
    /// MemAvailable, and the free pages that CPUs keep for themselves, which it leaves out: tens of MiB after much was freed. KiB.
    pub mem_available_kib: u64,
    /// `/proc/multikernel`.
    pub instances: Vec<Instance>,
    /// Interfaces: hardware address, flags (up or not), how they answer and ask by ARP, and addresses.
    pub links: Vec<String>,
    /// Services and how they are.
    pub services: Vec<(String, String)>,
    /// `incumbent`, but for a kernel that has not finished taking over.
    pub role: String,
}

/// Of the serving kernel.
pub fn of(stage: &Stage) -> Result<Snapshot> {
    of_guest(&stage.guest())
}

fn of_guest(guest: &Guest) -> Result<Snapshot> {
    // One request: a snapshot should be of one moment. Links by name would differ after a hot-plug that gives the same
    // interface another name, which is no difference to anybody: so by hardware address.
    let script = "uname -r; echo ==; cat /sys/devices/system/cpu/online; echo ==; cat /proc/meminfo; echo ==; \
                  cat /proc/multikernel; echo ==; \
                  for i in /sys/class/net/*; do n=${i##*/}; \
                  a=/proc/sys/net/ipv4/conf/$n; \
                  echo $(cat $i/address $i/flags $a/arp_ignore $a/arp_announce) $(ip -4 -o addr show dev $n | awk '{print $4}' | sort); done | sort; echo ==; \
                  awk '$1 == \"count:\" { n += $2 } END { print 4 * n }' /proc/zoneinfo";
    let text = guest.check(&["sh", "-c", script])?;
    let parts: Vec<&str> = text.split("==\n").collect();
    let [release, online, meminfo, multikernel, links, kept_by_cpus] = parts[..] else {
        anyhow::bail!("the guest answered {text:?}");
    };
    let field = |name: &str| -> Result<u64> {
        let line =
            meminfo.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name} in meminfo"))?;
        let number = line.split_whitespace().nth(1).with_context(|| format!("no number in {line:?}"))?;
        Ok(number.parse()?)
    };
    let kept_by_cpus: u64 = kept_by_cpus.trim().parse().with_context(|| format!("zoneinfo says {kept_by_cpus:?}"))?;
    let status = status_of(guest)?;
    Ok(Snapshot {
        release: release.trim().to_owned(),
        online: online.trim().to_owned(),
        mem_total_kib: field("MemTotal:")?,
        mem_available_kib: field("MemAvailable:")? + kept_by_cpus,
        instances: parse_instances(multikernel).with_context(|| format!("/proc/multikernel reads {multikernel:?}"))?,
        links: links.lines().map(str::to_owned).collect(),
        services: status.services.into_iter().map(|service| (service.name, service.state.to_string())).collect(),
        role: status.role.to_string(),
    })
}

/// Where the first page of the demo service's arena is, physically, as the kernel's own page tables say.
pub fn arena_of_service(guest: &Guest) -> Result<u64> {
    // pagemap (admin-guide/mm/pagemap.rst): eight bytes a page, bits 0 to 54 are the frame's number.
    const FRAME: u64 = (1 << 55) - 1;
    let script = "p=$(pidof baton-kv) && a=$(grep -m1 baton-memory /proc/$p/maps | cut -d- -f1) && \
                  dd if=/proc/$p/pagemap bs=8 skip=$((0x$a / 4096)) count=1 2>/dev/null | od -An -t x8";
    let text = guest.check(&["sh", "-c", script])?;
    let entry = u64::from_str_radix(text.trim(), 16).with_context(|| format!("pagemap reads {text:?}"))?;
    anyhow::ensure!(entry >> 63 == 1 && entry & FRAME != 0, "the arena's first page is not there: {entry:#x}");
    Ok((entry & FRAME) << 12)
}

/// CPUs, memory, instances, interfaces and services are as they were.
#[track_caller]
pub fn assert_untouched(what: &str, before: &Snapshot, after: &Snapshot) {
    let without_memory = |snapshot: &Snapshot| Snapshot { mem_available_kib: 0, ..snapshot.clone() };
    assert_eq!(without_memory(before), without_memory(after), "{what}: not as before");
    assert!(
        after.mem_available_kib + NOISE_KIB >= before.mem_available_kib,
        "{what}: {} KiB available before, {} KiB after",
        before.mem_available_kib,
        after.mem_available_kib
    );
}
