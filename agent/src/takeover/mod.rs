//! The other side of an update: how a kernel that was started by another one takes the machine over.

pub mod birth;
pub mod button;
pub mod home;
pub mod successor;
pub mod trial;
