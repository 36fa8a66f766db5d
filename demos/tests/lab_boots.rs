//! The lab alone: stock kernels boot with a BusyBox init, both NICs answer, and nothing is left behind.
//! Needs root and, on first use, a few minutes for the tree; without root it says so, in one line, and fails.

use std::process::Stdio;
use std::time::{Duration, Instant};

use agent::userland::initrd::Initrd;
use demos::lab::net::NICS;
use demos::lab::{Kernel, Lab, MachineSpec, Patience, Progress, guest_programs, incumbent, kmod};

const INIT: &str = "#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $(cat /etc/baton/modules.*); do case $m in *virtio*|*failover*) insmod $m;; esac; done
for n in /sys/class/net/eth*; do
  case $(cat $n/address) in *:0b) a=10.77.0.11;; *:0c) a=10.77.0.12;; esac
  ip addr add $a/24 dev ${n##*/}; ip link set ${n##*/} up
done
echo ADDRESSES UP
cat /proc/sys/kernel/osrelease
/usr/sbin/labd
";

fn small_machine(lab: &Lab, kernel: &Kernel) -> MachineSpec {
    let mut initrd = Initrd::new();
    incumbent::skeleton(&mut initrd);
    incumbent::busybox(&mut initrd, lab.tree()).unwrap();
    let module = kmod::module_for(lab.tree(), kernel, lab.progress()).unwrap();
    incumbent::modules(&mut initrd, lab.tree(), kernel, &module, &incumbent::DRIVERS).unwrap();
    let programs = guest_programs::build(&["labd"], lab.progress()).unwrap_or_else(|e| panic!("{e}"));
    initrd.copy_from(&programs.join("labd"), "/usr/sbin/labd").unwrap();
    initrd.file("/init", 0o755, INIT);
    let mut spec = MachineSpec::new(lab.tree().vmlinuz(kernel), incumbent::write(&initrd).unwrap());
    (spec.vcpus, spec.memory_mib) = (2, 512);
    spec
}

#[test]
fn both_stock_kernels_boot_answer_on_both_nics_and_reboot() {
    let lab = Lab::open(Progress::auto()).unwrap_or_else(|why| panic!("{why}"));
    for kernel in lab.tree().kernels() {
        let mut spec = small_machine(&lab, kernel);
        spec.reboots = kernel.release.starts_with("7.");
        let mut machine = lab.start(&spec).unwrap_or_else(|why| panic!("{why}"));
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
        let guest = machine.guest(NICS[0].address);
        guest.wait_ready(Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(guest.check(&["uname", "-r"]).unwrap_or_else(|e| panic!("{e}")).trim(), kernel.release);
        if spec.reboots {
            let before = machine.serial(0).position();
            let _begun = guest.command(&["reboot", "-f"]).begin().unwrap_or_else(|e| panic!("{e}"));
            machine.wait_for(0, "ADDRESSES UP", before, Patience::BOOT).unwrap_or_else(|e| panic!("{e}"));
            guest.wait_ready(Duration::from_secs(60)).unwrap_or_else(|e| panic!("{e}"));
        }
        // Held to the end: dropped earlier, it could be killed before it has done its work.
        let mut _begun = None;
        if spec.reboots {
            _begun = Some(guest.command(&["poweroff", "-f"]).begin().unwrap_or_else(|e| panic!("{e}")));
        } else {
            // Waiting for a command under which the kernel goes away ends, with an error.
            let began = Instant::now();
            guest.run(&["poweroff", "-f"]).unwrap_err();
            assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
        }
        machine.wait_end(Patience::of(Duration::from_secs(60))).unwrap();
    }
}

#[test]
fn the_module_builds_for_both_kernels() {
    let lab = Lab::open(Progress::auto()).unwrap_or_else(|why| panic!("{why}"));
    for kernel in lab.tree().kernels() {
        let first = kmod::module_for(lab.tree(), kernel, Progress::auto()).unwrap();
        let began = Instant::now();
        assert_eq!(kmod::module_for(lab.tree(), kernel, Progress::auto()).unwrap(), first);
        assert!(began.elapsed() < Duration::from_secs(1), "the second time it is only found");
    }
}
