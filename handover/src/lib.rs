//! WHAT crosses an update, and WHEN and WHETHER it does: arenas, the channel, the update as a pure state machine.
//! No I/O, no clock, no unsafe code. Who carries the update out is the agent; what the bytes are is `state-schemas`.
//!
//! # The update
//! ```text
//!            planned ─► granted ─► booting ─► trial ─► CUTOVER ─► probation ─► COMMIT ┄► drained
//! serves     incumbent ─────────────────────────────┤ nobody ├─ successor ─────────────────────►
//!
//!  way back     ◄────────── give everything back ──────────┤◄─ reverse cutover ─┤     none
//!                                                    activated            committed
//! ```
//! *The happy path* is [`plan::Plan::script`], one list, top to bottom. Its driver, in the agent:
//!
//! ```
//! # use std::time::Duration;
//! # use handover::machine::{Event, Next, Update};
//! # use handover::undo::Effect;
//! # use handover::error::Outcome;
//! fn run(mut update: Update, mut carry_out: impl FnMut(&Effect) -> Event, now: impl Fn() -> Duration) -> Outcome {
//!     let mut event = Event::Begin;
//!     loop {
//!         match update.step(now(), event).expect("each effect is answered once") {
//!             Next::Do(effect) => event = carry_out(&effect),
//!             Next::End(outcome) => return outcome,
//!         }
//!     }
//! }
//! ```
//!
//! *The unhappy paths* are one mechanism. Every effect puts its undo on a list **before** it is carried out
//! ([`undo::Effect::undo`] is the table). Whatever goes wrong, at whatever point, the list is worked off from its end:
//!
//! 1. *An effect fails*: it left nothing behind, its own undo is taken off the list, the rest is undone.
//! 2. *Nobody knows* (time ran out, the operator called it off): its own undo is done, too.
//! 3. *The successor was told to answer, and is dead or deaf*: it is fenced before the incumbent takes anything back. Two
//!    kernels never answer: the successor has agreed to stop, or it does not run.
//! 4. *The successor cannot be fenced*: nothing that it may still use is given back. It stays, and is reported.
//! 5. *An undo fails*: it is reported as left, and the rest is undone all the same.
//! 6. *After the commit*: no way back; what is not done is reported.
//!
//! The point of no return is the successor's answer to `Commit`. Before it every k of n CPUs that have moved come back.
//! In this version the update commits as soon as the CPUs have moved ([`plan::ProbationPolicy`]); watching the successor
//! for a while, with a dead-man switch, is one more line of the script.
//!
//! # Reading order
//! [`phase`], [`plan`] (the script), [`undo`] (the table), [`machine`] (the main path), [`error`] (the ends),
//! [`deadline`]; [`successor`] is the other role; [`channel`] is how they talk; [`arena`] is what they hand over. KHO and
//! LUO, the kernel's own formats for the last, will be modules beside [`arena`].
#![forbid(unsafe_code)]

pub mod arena;
pub mod channel;
pub mod deadline;
pub mod error;
pub mod machine;
pub mod phase;
pub mod plan;
pub mod successor;
pub mod undo;
