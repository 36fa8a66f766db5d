//! The newest version of each payload, by name. What is not about old bytes uses these.

/// The handover record.
pub mod handover_record {
    pub use crate::v1::record::{
        Arena, ClockPair, Cpu, Ecam, Grant, Ip, IpNet, Machine, Network, PciFunction, PhaseMark, PhysRange, Program,
        Retired, Role, UpdateId,
    };
    pub use crate::v2::RecordError;
    pub use crate::v2::record::{
        CARRIED_BYTES, CARRIED_LIMIT, FILE_LIMIT, FILE_NAME_LIMIT, File, HandoverRecord, Kho, NAME_LIMIT, SEALS,
        Service,
    };
}

/// A connection that crosses.
pub mod connection {
    pub use crate::v1::connection::{
        Agreed, CONGESTION_LIMIT, Connection, ConnectionError, Endpoint, Family, Keepalive, Lengths, NOTE_LIMIT,
        QUEUE_LIMIT, SERVICE_LIMIT, Scale, Settings, State, Window, mapped,
    };
}

/// The machine's own registers.
pub mod platform {
    pub use crate::v1::platform::{Platform, PlatformError, PowerButton, PowerOff, Register, Reset};
}

/// The channel's messages.
pub mod message {
    pub use crate::v1::message::{
        Attached, Counted, Ending, Examination, ITEM_LIMIT, LiveUpdate, MessageError, PART_LIMIT, TABLE_LIMIT,
        TEXT_LIMIT, Text, ToIncumbent, ToSuccessor,
    };
}
