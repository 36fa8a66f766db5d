//! What a driver does that finds the journal of one that died in the middle of an update.
//!
//! The machine is brought to where the lines end ([`Update::replay`]). The effect under way then may have been carried out, or not,
//! or in part. Which way it goes from there:
//!
//! | the last line announces | who may serve | what is done |
//! |---|---|---|
//! | nothing: the update had ended, or the lines are another boot's | | [`Recovery::Nothing`] |
//! | an effect before the freeze | incumbent | [`Recovery::TakeBack`]: its undo and all others |
//! | the freeze | see [`Evidence`] | the successor has answered: [`Recovery::GoOn`]; else `TakeBack`, in which the successor stands down first if it may have been told to |
//! | an effect of the probation, or `Commit` | successor | `GoOn`: the effect once more, then the rest of the script |
//! | an undo | as far as it came | `TakeBack`: the undo once more, then the rest of the list |
//! | an effect after the commit | successor | [`Recovery::Leave`]: this kernel has only to go |
//!
//! While nobody serves the journal is not written ([`Update::may_write_journal`]), so all that a driver that died there left is the line
//! that announces the freeze. How far it came from there, other places tell ([`Evidence`]).
//!
//! Whoever goes on with an update carries effects out that may be so already (rule 5 of [`super::effect`]); the successor answers a word
//! that it has obeyed before once more ([`super::successor`]). Its answers to the driver that died may still lie in the channel: `Ping`
//! first, and drop what comes before the `Pong` with that nonce.

use std::time::Duration;

use super::blame::Blame;
use super::effect::Effect;
use super::error::Cause;
use super::machine::{Event, JournalLine, Next, ReplayError, Serves, Update};

/// An update that was cut off, ready to be driven on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    /// The update. Its next lines follow those that were read, in the same journal.
    pub update: Update,
    /// The first thing to do.
    pub next: Next,
}

/// How far an update came in the blackout, where its journal is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Evidence {
    /// The module's account of the instance says that it serves, which is written down when the successor has answered `Activate`.
    pub answered: bool,
    /// What the successor's control block has at [`EPOCH_AT`](state_schemas::control_block::words::EPOCH_AT): changed before the successor is
    /// told to answer. Nothing when it cannot be read: then it is assumed that the successor was told.
    pub epoch_word: Option<u64>,
}

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// Nothing: no update was under way.
    Nothing,
    /// The update failed: everything comes back.
    TakeBack(Box<Resumed>),
    /// The successor serves: the update goes on. (If the successor does not answer any more, it turns back by itself.)
    GoOn(Box<Resumed>),
    /// The successor stays. This kernel hands over what it still has; there is no way back.
    Leave(Box<Resumed>),
}

/// The lines of a journal. A last line without an end was being written when its writer died: what it would have announced was not
/// begun.
///
/// # Errors
/// A line that is none.
pub fn parse(text: &str) -> Result<Vec<JournalLine>, serde_json::Error> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(serde_json::from_str).collect()
}

/// What has to be done about an update of which these lines are left.
///
/// - `boot`: this kernel's boot id. Whatever an update of another boot held is gone with that kernel.
/// - `evidence`: how far it came beyond the last line.
/// - `now`: the new driver's clock, from which all deadlines count anew.
///
/// # Errors
/// The lines do not lead to a state of an update. A person has to look: `baton status` and the module tell what is held.
pub fn recover(lines: &[JournalLine], boot: &str, evidence: Evidence, now: Duration) -> Result<Recovery, ReplayError> {
    let Some(first) = lines.first() else { return Ok(Recovery::Nothing) };
    if first.plan.as_ref().is_some_and(|plan| plan.boot != boot) {
        return Ok(Recovery::Nothing);
    }
    let mut update = Update::replay(lines)?;
    let Some(under_way) = update.under_way() else { return Ok(Recovery::Nothing) };
    let died = Cause::broken(Blame::Incumbent, format!("the agent died during `{}`", under_way.name()));

    if update.is_rolling_back() {
        return Ok(Recovery::TakeBack(again(update, now)));
    }
    while update.serves() == Serves::Nobody && evidence.answered {
        update.step(Duration::ZERO, Event::Done)?;
    }
    if update.is_committed() {
        return Ok(Recovery::Leave(again(update, now)));
    }
    if update.serves() == Serves::Successor {
        return Ok(Recovery::GoOn(again(update, now)));
    }
    let mut died = Event::Unknown(died);
    if update.serves() == Serves::Nobody {
        // Anywhere between the freeze and the successor's first answer, or on the way back from there. It is taken back from the farthest
        // point that can have been reached: undos work whether or not there is something to undo.
        let told = evidence.epoch_word != Some(update.plan().epochs().before);
        let farthest = |effect: &Effect| match effect {
            Effect::Activate { .. } => true,
            effect => !told && *effect == Effect::ReleaseAddress,
        };
        while update.under_way().is_some_and(|effect| !farthest(effect)) {
            update.step(Duration::ZERO, Event::Done)?;
        }
        if let (true, Event::Unknown(cause)) = (told, &died) {
            // It may serve, with data that only it has: it is asked to stand down, and stopped only if it does not answer.
            died = Event::Late(cause.clone());
        }
    }
    let next = update.step(now, died)?;
    Ok(Recovery::TakeBack(Box::new(Resumed { update, next })))
}

fn again(mut update: Update, now: Duration) -> Box<Resumed> {
    let next = update.again(now).expect("an effect is under way");
    Box::new(Resumed { update, next })
}
