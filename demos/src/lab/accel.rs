//! How machines are run: by emulation, or by KVM where a short boot has proven that it works. `/dev/kvm` may open and still not run a
//! stock kernel.

use serde::{Deserialize, Serialize};

/// QEMU's accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Emulation, one host thread a CPU.
    Tcg,
    /// The host's virtualisation.
    Kvm,
}

impl Accelerator {
    /// As QEMU wants to hear it. One name only: with a list QEMU would choose silently.
    #[must_use]
    pub fn argument(self) -> &'static str {
        match self {
            Self::Tcg => "tcg,thread=multi",
            Self::Kvm => "kvm",
        }
    }

    /// As reports say it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcg => "tcg",
            Self::Kvm => "kvm",
        }
    }
}
