//! The machine's own registers: what the firmware told the kernel that it booted, and tells no successor.
//!
//! It crosses as a frame of its own in the record's [`carried`](crate::handover_record::HandoverRecord::carried): a Baton that
//! does not know it hands it on, so that it comes through from the first kernel to the last.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::checked::Check;

/// Where a register is that is read and written by the byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Register {
    /// 0: memory, by physical address.
    Memory(u64),
    /// 1: an I/O port.
    Port(u16),
}

/// How the machine is powered off (ACPI 6.5, section 4.8.3.7): `sleep_type << 2 | 0x20` is written to `control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerOff {
    /// The sleep control register, or what has its layout: the upper byte of PM1a_CNT.
    pub control: Register,
    /// The sleep status register, with the wake status in bit 7, or what has it there: the upper byte of PM1a_STS.
    pub status: Register,
    /// What `\_S5` says is written there; three bits.
    pub sleep_type: u8,
}

/// How the machine is reset: `value` is written to `register`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reset {
    /// Where.
    pub register: Register,
    /// What.
    pub value: u8,
}

/// A power button that is seen in PM1a_STS and PM1a_EN: bit 0 of their upper bytes. Both are registers of 16 bits, and not every
/// machine has them by the byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerButton {
    /// The upper byte of PM1a_STS: 1 was pressed, and is cleared by writing 1.
    pub status: Register,
    /// The upper byte of PM1a_EN.
    pub enable: Register,
}

/// The registers, each if the machine has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Platform {
    /// To power off.
    pub power_off: Option<PowerOff>,
    /// To reset.
    pub reset: Option<Reset>,
    /// The power button.
    pub power_button: Option<PowerButton>,
}

/// What cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlatformError {
    /// More bits than there are.
    #[error("sleep type {0} has more than three bits")]
    SleepType(u8),
    /// No address.
    #[error("the {0} register is at address 0")]
    Address(&'static str),
}

impl Check for Platform {
    type Against = ();
    type Error = PlatformError;

    fn check(&self, (): &()) -> Result<(), PlatformError> {
        let mut registers = Vec::new();
        if let Some(PowerOff { control, status, sleep_type }) = self.power_off {
            if sleep_type > 7 {
                return Err(PlatformError::SleepType(sleep_type));
            }
            registers.extend([("sleep control", control), ("sleep status", status)]);
        }
        registers.extend(self.reset.map(|reset| ("reset", reset.register)));
        if let Some(PowerButton { status, enable }) = self.power_button {
            registers.extend([("button status", status), ("button enable", enable)]);
        }
        let nowhere = |register| matches!(register, Register::Memory(0) | Register::Port(0));
        match registers.into_iter().find(|(_, register)| nowhere(*register)) {
            Some((name, _)) => Err(PlatformError::Address(name)),
            None => Ok(()),
        }
    }
}
