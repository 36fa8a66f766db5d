//! The lab alone: stock kernels boot with a BusyBox init, both NICs answer, and nothing is left behind.
//! Needs root and, on first use, a few minutes for the tree; without root it says so and passes.

use std::process::Stdio;
use std::time::Duration;

use demos::lab::net::NICS;
use demos::lab::{Initrd, Lab, MachineSpec, Patience, Progress, initrd};

const INIT: &str = "#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules); do insmod $m; done
for n in /sys/class/net/eth*; do
  case $(cat $n/address) in *:0b) a=10.77.0.11;; *:0c) a=10.77.0.12;; esac
  ip addr add $a/24 dev ${n##*/}; ip link set ${n##*/} up
done
echo ADDRESSES UP
cat /proc/sys/kernel/osrelease; nproc
read x < /dev/ttyS0
poweroff -f
";

fn busybox_initrd(lab: &Lab, kernel: &demos::lab::Kernel) -> Initrd {
    let tree = lab.tree();
    let mut archive = Initrd::new();
    archive.directory("/proc", 0o555).directory("/sys", 0o555).character_device("/dev/console", 0o600, 5, 1);
    archive.file("/init", 0o755, INIT).copy("/bin/busybox", &tree.root().join("usr/bin/busybox")).unwrap();
    for applet in ["sh", "mount", "insmod", "cat", "ip", "nproc", "poweroff"] {
        archive.symlink(&format!("/bin/{applet}"), "busybox");
    }
    let mut order = String::new();
    for module in initrd::modules_for(&tree.modules(kernel), "virtio_net").unwrap() {
        let name = format!("/{}", module.rsplit('/').next().unwrap().trim_end_matches(".xz"));
        archive.file(&name, 0o644, initrd::module_bytes(&tree.modules(kernel).join(&module)).unwrap());
        order += &format!("{name} ");
    }
    archive.file("/modules", 0o644, order);
    archive
}

#[test]
fn both_stock_kernels_boot_and_answer_on_both_nics() {
    if !demos::lab::host::is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let lab = Lab::open(Progress::auto()).unwrap();
    for kernel in lab.tree().kernels() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("initrd");
        busybox_initrd(&lab, kernel).write_to(&image).unwrap();
        let mut spec = MachineSpec::new(lab.tree().vmlinuz(kernel), image);
        (spec.vcpus, spec.memory_mib) = (2, 512);
        let mut machine = lab.start(&spec).unwrap();
        machine.wait_for(0, "ADDRESSES UP", 0, Patience::BOOT).unwrap();
        eprintln!(
            "{}: up {:.1} s after the machine's start",
            kernel.release,
            machine.started().elapsed().as_secs_f64()
        );
        machine.wait_for(0, &kernel.release, 0, Patience::BOOT).unwrap();
        for nic in NICS {
            let mut ping = machine.inside().command("busybox");
            ping.args(["ping", "-c", "3", "-W", "5", &nic.address.to_string()]).stdout(Stdio::null());
            machine.inside().output("ping", ping).unwrap_or_else(|e| panic!("{e}\n{}", machine.logs(40)));
        }
        machine.serial(0).send(b"\n").unwrap();
        machine.wait_end(Patience::of(Duration::from_secs(60))).unwrap();
    }
}

#[test]
fn the_module_builds_for_both_kernels() {
    if !demos::lab::host::is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let lab = Lab::open(Progress::auto()).unwrap();
    for kernel in lab.tree().kernels() {
        let first = demos::lab::kmod::module_for(lab.tree(), kernel, Progress::auto()).unwrap();
        let began = std::time::Instant::now();
        assert_eq!(demos::lab::kmod::module_for(lab.tree(), kernel, Progress::auto()).unwrap(), first);
        assert!(began.elapsed() < Duration::from_secs(1), "the second time it is only found");
    }
}
