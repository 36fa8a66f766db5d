//! The door through which descriptors that came beside a message get their owners.
#![expect(unsafe_code, reason = "recvmsg gives descriptors as plain numbers")]

use std::os::fd::{FromRawFd, OwnedFd};

use nix::sys::socket::ControlMessageOwned;

/// The descriptors of a control message that recvmsg(2) has just returned; nothing where it carries none.
///
/// The message is consumed, so that each descriptor gets one owner.
pub fn received(message: ControlMessageOwned) -> Vec<OwnedFd> {
    let ControlMessageOwned::ScmRights(raw) = message else { return Vec::new() };
    // SAFETY: the kernel installed these descriptors in this process for this message, and nothing else in the process has
    // learnt their numbers; each number is taken once.
    raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }).collect()
}
