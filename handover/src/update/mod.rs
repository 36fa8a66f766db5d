//! The update as a pure state machine: no I/O, no clock.
//!
//! | file | what it holds |
//! |---|---|
//! | [`phase`] | the phases and their order |
//! | [`cpu`], [`blame`] | who moves; who is to blame |
//! | [`effect`], [`undo`] | what is done to the world, and what undoes it |
//! | [`probation`] | what is between the successor's first answer and the commit |
//! | [`plan`] | the script: every effect of an update, top to bottom |
//! | [`deadline`] | how long each effect may take |
//! | [`sizes`] | what is said to the other kernel fits the channel, whatever the machine's size |
//! | [`machine`] | THE MAIN PATH: what comes next, forward and back |
//! | [`recover`] | what is to be done about an update whose driver died |
//! | [`error`] | causes, and how an update can end |
//! | [`successor`] | the other role: what the successor does at each word |

pub mod blame;
pub mod cpu;
pub mod deadline;
pub mod effect;
pub mod error;
pub mod machine;
pub mod phase;
pub mod plan;
pub mod probation;
pub mod recover;
pub mod sizes;
pub mod successor;
pub mod undo;
