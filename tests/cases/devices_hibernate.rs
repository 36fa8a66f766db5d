//! A PCI function that is frozen for another kernel, and restored, is as before here: the same disks with their mounts, the same
//! interfaces with their addresses, routes and connections. Whatever wants something of it meanwhile waits, and no request fails.
//! On both kernels, for each kind of disk that the lab's kernels have drivers for, all at once, with writers on them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::share::is_chosen;
use baton_tests::{NEW, OLD, Turn, console, kernel, lab, selftest, skip};
use demos::lab::hardware::{Disk, DiskBus, DiskContent, Hardware};
use demos::lab::net::NICS;
use demos::lab::{Kernel, Machine, MachineSpec, Patience, incumbent, kmod};

/// Drivers that are modules in the lab's kernels (NVMe's is built in), and one that cannot hibernate.
const DRIVERS: [&str; 7] = ["virtio_net", "virtio_blk", "virtio_scsi", "ahci", "sd_mod", "vmxnet3", "i6300esb"];
/// What the lab cannot describe: a second kind of interface, with nothing at its other end, and a bridge.
const MORE: [&str; 6] = [
    "-netdev",
    "hubport,id=nowhere,hubid=0",
    "-device",
    "vmxnet3,netdev=nowhere,mac=52:54:00:77:00:1d,bus=pcie.0,addr=0x14,romfile=",
    "-device",
    "pcie-root-port,id=rp0,bus=pcie.0,addr=0x15,chassis=9",
];
/// A port of the guest whose server says all that it hears.
const ECHO: u16 = 7;

/// Process 1. The kernel's words go to the second port, its own to the first.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1
while read module; do insmod $module || echo "not ok - insmod $module"; done < /etc/baton/modules.$(uname -r)
ip link set lo up; ip link set eth0 up; ip addr add ADDRESS/24 dev eth0; ip route add 192.0.2.0/24 via 10.77.0.1
ip link set eth1 up; ip addr add 198.51.100.1/24 dev eth1; ip route add 203.0.113.0/24 via 198.51.100.2
until [ $(ls /sys/block | grep -c -E '^(vd|nvme|sd)') = 4 ]; do sleep 0.1; done
DISKS=$(ls /sys/block | grep -E '^(vd|nvme|sd)')
address() { readlink -f $1 | tr / '\n' | grep -E '^0000:..:..\..$' | tail -n 1; }
ALL=; for d in $DISKS; do ALL="$ALL $(address /sys/block/$d)"; done
ALL="$ALL $(address /sys/class/net/eth0/device) $(address /sys/class/net/eth1/device)"
echo "disks $DISKS, functions $ALL"

# A writer on each disk: what it counts is on the disk.
for d in $DISKS; do
  mkdir -p /mnt/$d; mount -t ext4 /dev/$d /mnt/$d || echo "not ok - mount $d"; echo 0 > /run/$d
  (n=0; until [ -e /run/stop ]; do n=$((n + 1))
     dd if=/dev/urandom of=/mnt/$d/f bs=4k count=2 conv=fsync 2>/dev/null && echo $n > /run/$d.new && mv /run/$d.new /run/$d || echo $n >> /run/errors
   done; echo > /run/$d.ended) &
done
nc -ll -p 7 -e cat &
counts() { for d in $DISKS; do cat /run/$d; done | tr '\n' ' '; }
all_write() { for d in $DISKS; do n=$(($(cat /run/$d) + 2)); until [ $(cat /run/$d) -ge $n ]; do sleep 0.1; done; done; echo "ok - $1: all write"; }
none_writes() { sleep 1; a=$(counts); sleep 4; b=$(counts); [ "$a" = "$b" ] && echo "ok - $1: none writes" || echo "not ok - $1: $a, then $b"; }
carrier() { until [ "$(cat /sys/class/net/eth0/operstate /sys/class/net/eth1/operstate | sort -u)" = $1 ]; do sleep 0.1; done; echo "ok - carrier $1"; }
state() {
  for d in $DISKS; do echo $d $(cat /sys/block/$d/diskseq /sys/block/$d/size /sys/block/$d/ro); done; grep ^/dev /proc/mounts
  for n in eth0 eth1; do echo $n $(cat /sys/class/net/$n/ifindex /sys/class/net/$n/address /sys/class/net/$n/flags /sys/class/net/$n/mtu); done
  ip -o addr | grep -v ' lo ' | sed 's/ tentative//'; ip route
}
same() { state > /run/after; cmp -s /run/before /run/after && echo "ok - $1: as before" || { echo "not ok - $1"; diff /run/before /run/after; }; }
hold() { rm -f /run/hold; mkfifo /run/hold; exec 4<>/run/hold; selftest --hibernate "$@" </run/hold >/run/held 2>&1 & HOLDER=$!
  until grep -q HELD /run/held || ! kill -0 $HOLDER; do sleep 0.1; done; }
release() { echo >&4; wait $HOLDER || echo "not ok - holder ended $?"; cat /run/held; }

all_write start; carrier up; state > /run/before; cat /run/before

echo "ROUND restore"; hold hold $ALL; carrier down; none_writes frozen; cat /sys/class/net/eth0/statistics/rx_bytes
echo FROZEN; read -t 600 word </dev/ttyS0; release; carrier up; all_write restored; same restored; echo RESTORED; read -t 600 word </dev/ttyS0

echo "ROUND killed"; hold hold $ALL; none_writes frozen; kill -9 $HOLDER; cat /run/held
all_write "after kill"; carrier up; same "after kill"

echo "ROUND killed while a CPU is away"; hold give $ALL; kill -9 $HOLDER; cat /run/held; none_writes "killed, still frozen"
selftest --hibernate take $ALL; carrier up; all_write "taken back"; same "taken back"

echo "ROUND one by one"; for f in $ALL; do hold hold $f; release; done; carrier up; all_write "one by one"; same "one by one"

echo "ROUND down"; NICS=$(echo $ALL | tr ' ' '\n' | tail -n 2); hold hold $NICS
for n in eth0 eth1; do ip link set $n down && echo "ok - $n down" || echo "not ok - $n down"; ip link set $n up 2>/dev/null && echo "not ok - $n up while frozen"; done
release; for n in eth0 eth1; do [ $(($(cat /sys/class/net/$n/flags) & 1)) = 0 ] && echo "ok - $n is down" || echo "not ok - $n is up"; ip link set $n up; done
carrier up; ip route add 192.0.2.0/24 via 10.77.0.1; ip route add 203.0.113.0/24 via 198.51.100.2; same "up again"; echo UP; read -t 600 word </dev/ttyS0

echo "ROUND unbind"; f=${NICS%%[!0-9a-f:.]*}; hold hold $f; v=$(basename $(readlink -f /sys/class/net/eth0/device))
(echo $v > /sys/bus/virtio/drivers/virtio_net/unbind; echo > /run/unbound) &
sleep 2; [ ! -e /run/unbound ] && [ -e /sys/class/net/eth0 ] && echo "ok - unbind waits" || echo "not ok - unbind waits"
release; until [ -e /run/unbound ]; do sleep 0.1; done; [ ! -e /sys/class/net/eth0 ] && echo "ok - and goes on" || echo "not ok - and goes on"

echo "ROUND obstacles"; W=$(for f in /sys/bus/pci/drivers/i6300*/0*; do basename "$f"; done)
selftest --hibernate look 0000:00:15.0 $W 0000:00:1f.0 $(address /sys/block/vda)
touch /run/stop; for d in $DISKS; do until [ -e /run/$d.ended ]; do sleep 0.1; done; umount /mnt/$d && echo "ok - umount $d" || echo "not ok - umount $d"; done
[ -e /run/errors ] && echo "not ok - a writer failed" || echo "ok - no write failed"
rmmod baton && echo "ok - rmmod" || echo "not ok - rmmod"
echo ENDED; poweroff -f
"#;

fn machine(kernel: &Kernel) -> Result<Machine> {
    let lab = lab();
    let mut initrd = Initrd::new();
    incumbent::skeleton(&mut initrd);
    incumbent::busybox(&mut initrd, lab.tree())?;
    let own = kmod::module_for(lab.tree(), kernel, lab.progress())?;
    incumbent::modules(&mut initrd, lab.tree(), kernel, &own, &DRIVERS)?;
    initrd.file("/usr/sbin/selftest", 0o755, selftest::build()?);
    initrd.file("/init", 0o755, INIT.replace("ADDRESS", &NICS[0].address.to_string()));
    let mut spec = MachineSpec::new(lab.tree().vmlinuz(kernel), incumbent::write(&initrd)?);
    spec.vcpus = 2;
    spec.nics = 1;
    let disk = |bus| Disk { bus, content: DiskContent::Ext4(64) };
    let disks = [DiskBus::Virtio, DiskBus::Nvme, DiskBus::Scsi, DiskBus::Sata].map(disk).to_vec();
    spec.hardware = Hardware { disks, watchdog: true, ..Hardware::default() };
    spec.extra = MORE.map(str::to_owned).to_vec();
    spec.cmdline = "console=ttyS1,115200 panic=-1 net.ifnames=0".into();
    Ok(lab.start(&spec)?)
}

/// What the other end has heard of a connection that was never made anew.
fn echo(stream: &mut TcpStream, text: &str) -> Result<()> {
    stream.write_all(text.as_bytes())?;
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).with_context(|| format!("{text:?} does not come back"))?;
    ensure!(heard == text.as_bytes(), "{text:?} came back as {:?}", String::from_utf8_lossy(&heard));
    Ok(())
}

fn story(series: &str, kernel: &Kernel) -> Result<()> {
    let mut machine = machine(kernel)?;
    eprintln!("{series}: machine's logs: {}", machine.folder().display());
    let at = machine.wait_for(0, "ROUND restore", 0, Patience::BOOT)?;
    let mut stream = machine.door().connect(SocketAddr::from((NICS[0].address, ECHO)), Duration::from_secs(20))?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let at = machine.wait_for(0, "FROZEN", at, Patience::BOOT)?;
    // Whatever comes in now is heard when the interface is back.
    stream.write_all(b"meanwhile")?;
    machine.serial(0).send(b"\n")?;
    let at = machine.wait_for(0, "RESTORED", at, Patience::BOOT)?;
    let mut heard = [0; 9];
    stream.read_exact(&mut heard).context("what was sent while the interface was frozen does not come back")?;
    ensure!(&heard == b"meanwhile", "{heard:?}");
    echo(&mut stream, "afterwards")?;
    machine.serial(0).send(b"\n")?;
    let at = machine.wait_for(0, "UP", at, Patience::BOOT)?;
    echo(&mut stream, "after four rounds, and a stop while frozen")?;
    machine.serial(0).send(b"\n")?;
    machine.wait_for(0, "ENDED", at, Patience::BOOT)?;
    machine.wait_end(Patience::BOOT)?;
    judge(series, &machine)
}

fn judge(series: &str, machine: &Machine) -> Result<()> {
    let text = machine.serial(0).text_from(0);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let failed: Vec<_> = lines.iter().filter(|line| line.starts_with("not ok")).collect();
    ensure!(failed.is_empty(), "{series}: {failed:#?}\nlogs in {}", machine.folder().display());
    let good = lines.iter().filter(|line| line.starts_with("ok ")).count();
    ensure!(good > 150, "{series}: only {good} results:\n{}", machine.logs(60));
    // A bridge, a driver that cannot, a function without message interrupts, and one against which nothing stands.
    let looks: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix("looked at ")).collect();
    let said = |look: &str, wanted: &str| {
        ensure!(look.contains(wanted), "{series}: {look:?}, not {wanted:?}");
        Ok(())
    };
    let [bridge, watchdog, isa, disk] = looks[..] else { anyhow::bail!("{series}: {looks:?}") };
    said(bridge, "EOPNOTSUPP, obstacle 1 of 0000:00:15.0")?;
    said(watchdog, "EOPNOTSUPP, obstacle 2 of")?;
    said(isa, "EOPNOTSUPP, obstacle 3 of 0000:00:1f.0")?;
    said(disk, "0, obstacle 0 of none")?;
    for line in lines.iter().filter(|line| line.contains(" in ") && line.starts_with("# 0000")) {
        eprintln!("{series}: {line}");
    }
    assert_eq!(console::complaints(machine), [""; 0], "{series}: logs in {}", machine.folder().display());
    let kernels = machine.serial(1).text_from(0);
    let errors: Vec<_> =
        kernels.lines().filter(|line| line.contains("I/O error") || line.contains("EXT4-fs error")).collect();
    ensure!(errors.is_empty(), "{series}: {errors:#?}");
    Ok(())
}

#[test]
fn disks_and_interfaces_come_back_as_they_were() -> Result<()> {
    let _turn = Turn::take();
    for series in [OLD, NEW].into_iter().filter(|series| is_chosen(&format!("devices of {series} hibernate"))) {
        story(series, kernel(series))?;
    }
    skip("e1000e is not in Debian's cloud kernels: of interfaces, virtio-net and vmxnet3 are tried");
    Ok(())
}
