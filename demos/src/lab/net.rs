//! The lab's network: one bridge, the host's side of it with an address, and a TAP for each NIC of the machine. All of it is inside an
//! [`Inside`]'s network namespace and goes with it.
//!
//! The client's end is a real Linux TCP stack: QEMU's user networking would end TCP itself and hide what a client sees.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use super::error::{Doing, LabError, Result};
use super::inside::Inside;

/// Clients (prober, load, `labd`'s callers) are here.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The service's address: on NIC A before an update, on NIC B after it.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// Length of the network's prefix.
pub const PREFIX: u8 = 24;
const BRIDGE: &str = "br0";

/// A NIC of a machine. Everything about it is fixed, so that both kernels and the lab can name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Interface name of the TAP.
    pub tap: &'static str,
    /// Slot on PCI bus 0.
    pub slot: u8,
    /// Hardware address.
    pub mac: &'static str,
    /// Address for management.
    pub address: Ipv4Addr,
}

/// NIC A, then NIC B.
pub const NICS: [Nic; 2] = [
    Nic { tap: "tap0", slot: 3, mac: "52:54:00:77:00:0b", address: Ipv4Addr::new(10, 77, 0, 11) },
    Nic { tap: "tap1", slot: 4, mac: "52:54:00:77:00:0c", address: Ipv4Addr::new(10, 77, 0, 12) },
];

impl Nic {
    /// Its PCI address as Linux writes it.
    #[must_use]
    pub fn pci_address(&self) -> String {
        format!("0000:00:{:02x}.0", self.slot)
    }

    /// What udev calls it on a server, by its place on the bus.
    #[must_use]
    pub fn name_on_server(&self) -> String {
        format!("enp0s{}", self.slot)
    }
}

/// Makes bridge and TAPs in the namespace of `inside`.
pub fn lay(inside: &Inside, nics: &'static [Nic]) -> Result<()> {
    inside.run(move || {
        // No router advertisements, no neighbour discovery: nothing on this network that the lab did not send. A kernel without IPv6 has
        // no such file.
        for scope in ["all", "default"] {
            let knob = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
            if std::path::Path::new(&knob).exists() {
                std::fs::write(&knob, "1").doing(format_args!("writing {knob}"))?;
            }
        }
        // Forwarding at once and no snooping: a bridge that learns and floods, and does nothing by a timer.
        let mut script = format!(
            "link set lo up\n\
             link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             address add {CLIENT}/{PREFIX} dev {BRIDGE}\n\
             link set {BRIDGE} up\n"
        );
        for nic in nics {
            script += &format!(
                "tuntap add dev {tap} mode tap\nlink set {tap} master {BRIDGE}\nlink set {tap} up\n",
                tap = nic.tap
            );
        }
        ip_batch(&script)
    })
}

fn ip_batch(script: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .doing("starting ip")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).doing("writing to ip")?;
    }
    let output = child.wait_with_output().doing("waiting for ip")?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Program {
        program: "ip".into(),
        status: output.status,
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
