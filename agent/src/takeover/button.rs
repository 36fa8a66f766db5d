//! The machine's power button after an update. A successor has no ACPI events: their interrupt belongs to a controller that it does
//! not have. The bit that a press sets is still there, and is looked at.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, TryLockError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kexec_core::ports::Port;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use state_schemas::platform::{PowerButton, Register};

use crate::daemon::kernel::Kernel;

/// How long a press may go unnoticed. There is no event to wait for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// PWRBTN_STS and PWRBTN_EN in their registers (ACPI 6.5, section 4.8.3.1). A status bit is cleared by writing 1; the others stay
/// what they are when 0 is written.
const PRESSED: u16 = 1 << 8;

/// Watches the button of a machine that came to this kernel by an update, on a thread of its own. Elsewhere ACPI does.
pub fn watch(kernel: Arc<Kernel>) -> Result<()> {
    let Some(button) = kernel.facts().platform.and_then(|platform| platform.power_button) else { return Ok(()) };
    std::thread::Builder::new().name("power button".into()).spawn(move || {
        if let Err(error) = look(&kernel, button) {
            tracing::warn!("the power button is not heard: {error:#}");
        }
    })?;
    Ok(())
}

fn look(kernel: &Kernel, button: PowerButton) -> Result<()> {
    let (Register::Port(status), Register::Port(enable)) = (button.status, button.enable) else {
        bail!("its registers are not I/O ports ({button:?})");
    };
    let (status, enable) = (whole(status)?, whole(enable)?);
    // Until the machine is this kernel's, its incumbent hears the button.
    while kernel.is_successor() {
        std::thread::sleep(LOOK_EVERY);
    }
    // Without it, the bit is not set in every machine. Nobody hears the interrupt that it allows: the I/O APIC's pins are masked.
    let enable = Port::open(enable).context("no right to its enable register")?;
    enable.write(enable.read() | PRESSED);
    let status = Port::open(status).context("no right to its status register")?;
    loop {
        std::thread::sleep(LOOK_EVERY);
        // While an update runs here, a press is kept for whoever has the machine in the end.
        let updating = matches!(kernel.updating.try_lock(), Err(TryLockError::WouldBlock));
        if !updating && status.read() & PRESSED != 0 {
            status.write(PRESSED);
            tracing::info!("the power button was pressed");
            power_off()?;
        }
    }
}

/// The register whose upper byte is at this port. It is read and written whole, as Linux does: QEMU's have 0 for whoever reads the
/// upper byte alone, and what is written there is lost.
fn whole(upper_byte: u16) -> Result<u16> {
    upper_byte.checked_sub(1).context("its upper byte is said to be at port 0")
}

/// What a machine does whose button is pressed. `baton-init` has the signal from BusyBox's init.
fn power_off() -> Result<()> {
    if Path::new("/run/systemd/system").exists() {
        let status = Command::new("systemctl").arg("poweroff").status().context("cannot run systemctl poweroff")?;
        if !status.success() {
            bail!("systemctl poweroff: {status}");
        }
        return Ok(());
    }
    kill(Pid::from_raw(1), Signal::SIGUSR2).context("cannot tell process 1")
}
