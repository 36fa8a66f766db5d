//! The probation's watch: the successor serves, and this kernel, which runs on its last CPU, looks whether it goes on doing so.
//!
//! | what is seen | what it means |
//! |---|---|
//! | it says that all is well | the watch goes on |
//! | it says that something is not | it lives, and hands everything back |
//! | its kernel panicked, or nothing is heard of it for [`SILENCE`] | it is dead: it is stopped, and the services go on here |
//! | `baton commit`, or the time is over and nobody has to say so | it stays |
//! | `baton rollback`, or the time is over and somebody had to commit | it hands everything back |

use std::time::{Duration, Instant};

use anyhow::Result;
use handover::update::error::Cause;
use handover::update::probation::WhenWatched;
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};

use super::Hands;
use crate::update::line::Unanswered;

/// How often the successor is asked how it is.
const PULSE: Duration = Duration::from_millis(500);
/// A successor that has not answered for this long is dead. Its agent answers from a loop that does nothing else meanwhile.
const SILENCE: Duration = Duration::from_secs(2);
/// An answer is waited for in pieces of this length, and no piece counts for more, however long it took: a machine that was stopped as a
/// whole (by its hypervisor, or in a debugger) has not been silent.
const PIECE: Duration = Duration::from_millis(250);

/// The time is over, and nobody has committed it.
#[derive(Debug, thiserror::Error)]
#[error("{}", Cause::not_committed(*.0))]
pub struct NotCommitted(pub Duration);

impl Hands<'_> {
    /// Until the successor may stay.
    pub(super) fn watch(&mut self, period: Duration, then: WhenWatched) -> Result<()> {
        let watching = &self.kernel.probation;
        let _watched = watching.begin();
        let end = Instant::now() + period;
        loop {
            self.ask_how_it_is()?;
            let left = end.saturating_duration_since(Instant::now());
            if watching.is_committed() {
                return Ok(());
            }
            if left.is_zero() {
                return match then {
                    WhenWatched::Commit => Ok(()),
                    WhenWatched::RollBack => Err(NotCommitted(period).into()),
                };
            }
            self.listen(left.min(PULSE))?;
        }
    }

    fn ask_how_it_is(&mut self) -> Result<()> {
        self.placed()?.line.send(&ToSuccessor::CheckHealth)?;
        for _ in 0..SILENCE.div_duration_f64(PIECE) as u32 {
            match self.placed()?.line.receive(PIECE) {
                Ok(ToIncumbent::Healthy) => return Ok(()),
                Ok(ToIncumbent::Failed { what, cause }) => {
                    return Err(Unanswered::Refused { what: what.into(), cause: cause.into() }.into());
                }
                Ok(other) => anyhow::bail!("the successor answered the question how it is with {other:?}"),
                Err(error) if is_silence(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Unanswered::Silent { peer: "successor", patience: SILENCE }.into())
    }

    /// Waits, and hears of the successor's end, of an operator's call to turn back, and of one's commit meanwhile.
    fn listen(&mut self, for_: Duration) -> Result<()> {
        let end = Instant::now() + for_;
        let kernel = self.kernel;
        while Instant::now() < end && !kernel.probation.is_committed() {
            let left = end.saturating_duration_since(Instant::now());
            match self.placed()?.line.receive_unless(left.min(PIECE), &kernel.called_off) {
                Ok(unasked) => anyhow::bail!("the successor said {unasked:?}, and nobody had asked"),
                Err(error) if is_silence(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_silence(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Unanswered::Silent { .. }))
}
