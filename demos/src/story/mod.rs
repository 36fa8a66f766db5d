//! The stories that `cargo demo` tells, as functions that tests call too.
//!
//! | file | what it is |
//! |---|---|
//! | `stage.rs` | a machine, and which of its kernels serves |
//! | `clients.rs` | who looks on from outside: the prober and the load, for the length of one change of kernel |
//! | `upgrade.rs` | the main story: live updates under load |
//! | `canary.rs` | kernels tried beside the one that serves, and taken back |
//! | `compare.rs` | the same change three ways: Baton, kexec, reboot |
//! | `kho.rs` | updates to kernels with kexec handover and from them, and what those kernels say of it |
//! | `rollback.rs` | a successor on probation that is taken back, for each reason |
//! | `traps.rs` | what makes a successor go wrong |
//! | `scale.rs` | live updates with small and with large arenas |
//! | `report.rs` | what they say: plain data, as JSON and for people |

pub mod canary;
pub mod clients;
pub mod compare;
pub mod kho;
pub mod report;
pub mod rollback;
pub mod scale;
pub mod stage;
pub mod traps;
pub mod upgrade;
