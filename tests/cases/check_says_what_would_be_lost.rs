//! What a machine has that would end, change or be overwritten, one thing after the other on one machine: `check` names each, refuses the update
//! because of it under the name by which an operator may accept it, and is content again when it is gone. `upgrade` says the same as `check`.

use agent::daemon::outcome::Class;
use anyhow::{Context, Result, ensure};
use baton_tests::findings::Checked;
use baton_tests::refusal::{assert_refused, baton};
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, console, kernel, open};
use demos::lab::Hardware;
use demos::lab::hardware::{Disk, DiskBus, DiskContent};
use demos::story::stage::Shape;

/// Something on a machine that an update would not leave as it is.
struct Loss {
    what: &'static str,
    /// A shell's words that make it, and that undo it.
    make: &'static str,
    undo: &'static str,
    /// The name by which it could be accepted.
    accept: &'static str,
    /// What must be said.
    words: &'static [&'static str],
}

const fn loss(
    what: &'static str,
    make: &'static str,
    undo: &'static str,
    accept: &'static str,
    words: &'static [&'static str],
) -> Loss {
    Loss { what, make, undo, accept, words }
}

/// Finds the interface that has the service address, and its name as `$n`.
macro_rules! on_service_nic {
    ($rest:literal) => {
        concat!("n=$(ip -4 -o a | awk '/10.77.0.10\\//{print $2}'); [ -n \"$n\" ] || exit 1; ", $rest)
    };
}

const LOSSES: [Loss; 17] = [
    loss(
        "a file system on virtio-blk",
        "mkdir -p /mnt/a && mount -t ext4 /dev/vda /mnt/a && echo x > /mnt/a/x",
        "umount /mnt/a",
        "mounts",
        &["/mnt/a", "vda"],
    ),
    loss(
        "a file system on NVMe, read-only",
        "mkdir -p /mnt/b && mount -t ext4 -o ro /dev/nvme0n1 /mnt/b",
        "umount /mnt/b",
        "mounts",
        &["/mnt/b", "nvme0n1"],
    ),
    loss(
        "a file system in a file on a disk",
        "mount -t ext4 /dev/vda /mnt/a && truncate -s 16M /mnt/a/f && mke2fs -F /mnt/a/f >/dev/null && \
         mount -o loop -t ext4 /mnt/a/f /mnt/b",
        "umount /mnt/b; umount /mnt/a",
        "mounts",
        &["/mnt/b", "loop"],
    ),
    loss("swap on a disk", "mkswap /dev/vdb >/dev/null && swapon /dev/vdb", "swapoff /dev/vdb", "swap", &["vdb"]),
    loss(
        "swap on zram",
        "echo 32M > /sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && swapon /dev/zram0",
        "swapoff /dev/zram0; echo 1 > /sys/block/zram0/reset",
        "swap",
        &["zram0"],
    ),
    loss(
        "a default route",
        "ip route add default via 10.77.0.1",
        "ip route del default",
        "routes",
        &["default", "10.77.0.1"],
    ),
    loss("a rule", "ip rule add from 10.9.8.0/24 lookup 7 pref 77", "ip rule del pref 77", "rules", &["77"]),
    loss(
        "a static neighbour",
        "arp -s 10.77.0.99 52:54:00:77:00:99",
        "arp -d 10.77.0.99",
        "neighbours",
        &["10.77.0.99"],
    ),
    loss(
        "a second address",
        on_service_nic!("ip a add 10.66.0.1/24 dev $n"),
        on_service_nic!("ip a del 10.66.0.1/24 dev $n"),
        "addresses",
        &["10.66.0.1"],
    ),
    loss(
        "an address of IPv6",
        on_service_nic!("ip a add 2001:db8::1/64 dev $n"),
        on_service_nic!("ip a del 2001:db8::1/64 dev $n"),
        "addresses",
        &["2001:db8::1"],
    ),
    loss(
        "the service address on a VLAN",
        on_service_nic!(
            "ip link add link $n name v7 type vlan id 7 && ip a del 10.77.0.10/24 dev $n && ip link set v7 up && \
             ip a add 10.77.0.10/24 dev v7"
        ),
        "ip link del v7; n=$(ip -4 -o a | awk '/10.77.0.11\\//{print $2}'); ip a add 10.77.0.10/24 dev $n",
        "",
        &["v7"],
    ),
    loss(
        "the service address on a macvlan",
        on_service_nic!(
            "ip link add link $n name m0 type macvlan && ip a del 10.77.0.10/24 dev $n && ip link set m0 up && \
             ip a add 10.77.0.10/24 dev m0"
        ),
        "ip link del m0; n=$(ip -4 -o a | awk '/10.77.0.11\\//{print $2}'); ip a add 10.77.0.10/24 dev $n",
        "",
        &["m0"],
    ),
    loss(
        "the service address on a bridge",
        on_service_nic!(
            "ip link add b0 type bridge && ip a del 10.77.0.10/24 dev $n && ip a del 10.77.0.11/24 dev $n && \
             ip link set $n master b0 && ip link set b0 up && ip a add 10.77.0.11/24 dev b0 && ip a add 10.77.0.10/24 dev b0"
        ),
        "n=$(ls /sys/class/net/b0/brif); ip link set $n nomaster; ip link del b0; ip a add 10.77.0.11/24 dev $n; \
         ip a add 10.77.0.10/24 dev $n",
        "",
        &["b0"],
    ),
    loss("huge pages", "echo 8 > /proc/sys/vm/nr_hugepages", "echo 0 > /proc/sys/vm/nr_hugepages", "hugepages", &["8"]),
    // Opened and petted by a program that lives on; `V` is the magic close.
    loss(
        "an armed watchdog",
        "(exec 3>/dev/watchdog0; while [ ! -e /tmp/calm ]; do echo p >&3; sleep 1; done; echo V >&3) >/dev/null 2>&1 </dev/null & \
         until grep -q ^active /sys/class/watchdog/watchdog0/state; do usleep 50000; done",
        "touch /tmp/calm; until grep -q ^inactive /sys/class/watchdog/watchdog0/state; do usleep 50000; done; rm /tmp/calm",
        "watchdog",
        &[],
    ),
    loss(
        "a setting of the kernel that is in no file",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "echo 0 > /proc/sys/net/ipv4/ip_forward",
        "sysctls",
        &["net.ipv4.ip_forward"],
    ),
    loss(
        "a listener that nobody answers for afterwards",
        "nc -l -p 4711 >/dev/null 2>&1 </dev/null & echo $! > /tmp/nc; \
         until grep -q ':1267 ' /proc/net/tcp /proc/net/tcp6; do usleep 50000; done",
        "kill $(cat /tmp/nc); while grep -q ':1267 ' /proc/net/tcp /proc/net/tcp6; do usleep 50000; done",
        "listeners",
        &["4711"],
    ),
];

#[test]
fn each_loss_is_named_by_check_and_upgrade_and_refused_until_it_is_accepted() -> Result<()> {
    let disk = |bus, content| Disk { bus, content };
    let hardware = Hardware {
        disks: vec![
            disk(DiskBus::Virtio, DiskContent::Ext4(64)),
            disk(DiskBus::Virtio, DiskContent::Blank(64)),
            disk(DiskBus::Nvme, DiskContent::Ext4(64)),
        ],
        watchdog: true,
        ..Hardware::default()
    };
    let modules = ["virtio_blk", "loop", "zram", "8021q", "macvlan", "bridge", "i6300esb"];
    let shape = Shape { hardware, incumbent_modules: modules.map(str::to_owned).to_vec(), ..Shape::default() };
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    Checked::ask(&guest, &image, &[])?.assert_possible("as it comes")?;
    let before = snapshot::of(stage)?;

    let mut wrong = Vec::new();
    for Loss { what, make, undo, accept, words } in &LOSSES {
        let shell = |script: &str| guest.check(&["sh", "-c", script]);
        // All are looked at before the test says no: one boot shows everything that is missing.
        let judged = shell(make)
            .with_context(|| format!("making {what}"))
            .and_then(|_| judge(&guest, &image, what, accept, words));
        wrong.extend(judged.err().map(|why| format!("{why:#}")));
        wrong.extend(shell(undo).err().map(|why| format!("undoing {what}: {why:#}")));
    }
    ensure!(wrong.is_empty(), "{} of {} are not as they should be:\n{}", wrong.len(), LOSSES.len(), wrong.join("\n"));
    Checked::ask(&guest, &image, &[])?.assert_possible("when all is gone again")?;
    assert_untouched("all of it", &before, &snapshot::of(stage)?);
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}

fn judge(guest: &demos::lab::Guest, image: &str, what: &str, accept: &str, words: &[&str]) -> Result<()> {
    let checked = Checked::ask(guest, image, &[])?;
    if accept.is_empty() {
        // What cannot be accepted either.
        ensure!(checked.exit == Some(3), "{what}: exit {:?}", checked.exit);
        let all: Vec<_> = checked.refused().map(|finding| finding.text.as_str()).collect();
        ensure!(words.iter().all(|word| all.iter().any(|text| text.contains(word))), "{what}: {all:?}");
    } else {
        checked.assert_refuses(what, accept, words)?;
    }
    let upgraded = baton(guest, &["upgrade", "--kernel", image])?;
    assert_refused(what, &upgraded, Class::Precondition, words)?;
    if !accept.is_empty() {
        let with = Checked::ask(guest, image, &["--accept", accept])?;
        ensure!(!with.refused_names().contains(accept), "{what}: accepted, and refused: {:#?}", with.findings);
    }
    Ok(())
}
