//! The newest version of each payload, by name. What is not about old bytes uses these.

/// The handover record.
pub mod handover_record {
    pub use crate::v1::record::{
        Arena, ClockPair, Cpu, Ecam, Grant, HandoverRecord, Ip, IpNet, Machine, Network, PciFunction, PhaseMark,
        PhysRange, Program, RecordError, Retired, Role, Service, UpdateId,
    };
}

/// The channel's messages.
pub mod message {
    pub use crate::v1::message::{ITEM_LIMIT, MessageError, TEXT_LIMIT, ToIncumbent, ToSuccessor};
}
