//! How machines are run: by emulation, or by KVM where a short boot has proven that it works. `/dev/kvm` may open and still not run a
//! stock kernel (seen: it loops in the decompressor), and QEMU's own list of accelerators would choose without a word.

use std::fs;
use std::time::Duration;

use agent::userland::initrd::Initrd;

use super::cache::{self, Key, Lock};
use super::error::{Doing, LabError, Result};
use super::incumbent;
use super::machine::{Accelerator, Machine, MachineSpec};
use super::progress::Progress;
use super::serial::Patience;
use super::tree::Tree;

/// Overrides the proof: `tcg` or `kvm`.
pub const VARIABLE: &str = "BATON_ACCEL";
/// A kernel that KVM runs says its first word within a second.
const PROOF: Patience = Patience { silence: Duration::from_secs(6), total: Duration::from_secs(20) };
const PROVEN: &str = "kvm runs a stock kernel";
const INIT: &str = "#!/bin/sh\nmount -t devtmpfs dev /dev\necho kvm runs a stock kernel > /dev/ttyS0\npoweroff -f\n";

/// What machines on this host are run by. Proven once for each boot of the host and each tree.
pub fn choose(tree: &Tree, progress: Progress) -> Result<Accelerator> {
    if let Ok(wish) = std::env::var(VARIABLE) {
        return Accelerator::from_name(&wish)
            .ok_or_else(|| LabError::Prerequisite(format!("{VARIABLE} is {wish:?}; it can be tcg or kvm")));
    }
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accelerator::Tcg);
    }
    let boot = fs::read("/proc/sys/kernel/random/boot_id").doing("reading the host's boot id")?;
    let key = Key::default().with(&boot).with(tree.key().as_bytes()).name();
    let folder = cache::root()?.join("accel");
    let verdict = folder.join(key);
    let known = || fs::read_to_string(&verdict).ok().and_then(|name| Accelerator::from_name(&name));
    if let Some(accelerator) = known() {
        return Ok(accelerator);
    }
    let task = progress.task("KVM");
    let _lock = Lock::exclusive(&folder.join("lock"), &task)?;
    if let Some(accelerator) = known() {
        return Ok(accelerator);
    }
    task.step("trying whether it runs a stock kernel");
    let (accelerator, result) = match prove(tree) {
        Ok(()) => (Accelerator::Kvm, "works".to_owned()),
        Err(why) => {
            let why = why.to_string();
            let first = why.lines().next().unwrap_or_default().to_owned();
            (Accelerator::Tcg, format!("does not work here ({first}); machines are emulated"))
        }
    };
    fs::write(&verdict, accelerator.name()).doing(format_args!("writing {}", verdict.display()))?;
    task.done(&result);
    Ok(accelerator)
}

fn prove(tree: &Tree) -> Result<()> {
    let Some(kernel) = tree.kernels().first() else {
        return Err(LabError::Refused { who: "the tree".into(), why: "it has no kernel".into() });
    };
    let mut initrd = Initrd::new();
    incumbent::skeleton(&mut initrd);
    incumbent::busybox(&mut initrd, tree)?;
    initrd.file("/init", 0o755, INIT);
    let mut spec = MachineSpec::new(tree.vmlinuz(kernel), incumbent::write(&initrd)?);
    (spec.vcpus, spec.memory_mib, spec.nics) = (2, 512, 0);
    spec.run_by(Accelerator::Kvm);
    let machine = Machine::start(tree, &spec)?;
    machine.wait_for(0, PROVEN, 0, PROOF).map(drop)
}
