//! Which CPUs an update moves, and in which order.

use serde::{Deserialize, Serialize};

/// A CPU of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cpu {
    /// Its number in this kernel.
    pub number: u32,
    /// Its local APIC id, by which both kernels mean the same CPU.
    pub apic_id: u32,
}

/// A CPU that is to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// Which.
    pub cpu: Cpu,
    /// It is online in this kernel: it has to be taken offline first, and brought back online on the way back. One that is not
    /// goes over all the same, so that it waits in no memory that changes hands, and stays offline there.
    pub online: bool,
}

/// All CPUs, in the order in which they go over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// The successor starts on this one.
    pub spare: Moving,
    /// These follow one by one. One that cannot be fenced (the firmware's boot CPU) should be the last of them.
    pub others: Vec<Moving>,
    /// This kernel leaves it last: its own boot CPU, which it cannot take offline.
    pub last: Cpu,
}
