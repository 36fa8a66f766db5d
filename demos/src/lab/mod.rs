//! The lab: QEMU machines with stock Debian kernels on a network of their own, for demos and for whole-machine tests.
//!
//! Reading order: [`Lab`] (what is set up once) → [`machine`] and [`hardware`] (what runs) → [`incumbent`] and [`server`] (what is on it: as
//! little as an update needs, or all that a user's machine has) → [`net`] and [`inside`] (where it runs) → [`guest`] (how to speak with it).
//!
//! What it never does: leave processes, mounts, namespaces or interfaces behind, whatever kills it (`inside` says how).

pub mod accel;
pub mod apt_sources;
pub mod cache;
pub mod error;
pub mod guest;
pub mod guest_programs;
pub mod hardware;
pub mod host;
pub mod incumbent;
pub mod inside;
pub mod kho_kernel;
pub mod kmod;
pub mod machine;
pub mod net;
pub mod progress;
pub mod qmp;
pub mod serial;
pub mod server;
pub mod shell;
pub mod tree;
pub mod wire;

pub use error::{LabError, Result};
pub use guest::Guest;
pub use hardware::Hardware;
pub use inside::{Door, Inside};
pub use machine::{Accelerator, BootFile, Machine, MachineSpec};
pub use progress::Progress;
pub use serial::Patience;
pub use tree::{Kernel, Tree};

use std::panic::resume_unwind;
use std::thread;

use agent::daemon::config::Config;
use cache::Lock;

/// Everything that is set up once and then shared by machines; keeps `lab --clean` away while it lives.
#[derive(Debug)]
pub struct Lab {
    tree: Tree,
    progress: Progress,
    _in_use: Lock,
}

impl Lab {
    /// The tree, built now if it is not there (a minute, once) or found (milliseconds).
    pub fn open(progress: Progress) -> Result<Self> {
        let in_use = Lock::shared(&cache::root()?.join("in-use.lock"))?;
        let tree = Tree::open(progress)?;
        Ok(Self { tree, progress, _in_use: in_use })
    }

    /// Everything that machines need, now: what is slow and independent goes on side by side.
    pub fn set_up(progress: Progress) -> Result<Self> {
        thread::scope(|scope| {
            let programs = scope.spawn(move || guest_programs::build(&guest_programs::PROGRAMS, progress));
            let lab = Self::open(progress)?;
            for kernel in lab.tree.kernels() {
                kmod::module_for(&lab.tree, kernel, progress)?;
            }
            accel::choose(&lab.tree, progress)?;
            programs.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            Ok(lab)
        })
    }

    /// The Debian tree.
    #[must_use]
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The kernel with kexec handover, built now if it is not there; from then on, machines have it in their `/boot`.
    pub fn kernel_with_kho(&mut self) -> Result<Kernel> {
        let kernel = kho_kernel::add_to(&mut self.tree, self.progress)?;
        kmod::module_for(&self.tree, &kernel, self.progress)?;
        Ok(kernel)
    }

    /// Where this lab shows what it does.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// A machine that waits to be updated: this kernel, the incumbent's initrd with this configuration.
    ///
    /// `drivers` are loaded by its kernel only, beside those that the configuration names for both kernels.
    pub fn incumbent(&self, kernel: &Kernel, config: &Config, drivers: &[String]) -> Result<MachineSpec> {
        let mut spec = MachineSpec::new(self.tree.vmlinuz(kernel), incumbent::image(self, config, drivers)?);
        spec.run_by(accel::choose(&self.tree, self.progress)?);
        Ok(spec)
    }

    /// Starts a machine.
    pub fn start(&self, spec: &MachineSpec) -> Result<Machine> {
        Machine::start(&self.tree, spec)
    }
}
