//! `baton check`: whether an upgrade would be started, and why not. Touches nothing.

use crate::daemon::control::{Finding, Upgrade};
use crate::daemon::kernel::Kernel;
use crate::update::plan;

/// All findings, in the order of the checks. What depends on something that was refused is not looked at.
pub fn findings(kernel: &Kernel, wish: &Upgrade) -> Vec<Finding> {
    plan::make(kernel, wish, None).0.into_list()
}
