//! What is said to the other kernel fits the channel, whatever the machine's size.
//!
//! A message has at most [`MESSAGE_LIMIT`] bytes. Two of them carry lists: `Commit` the steps so far, which are shortened until they fit
//! ([`commit`]), and `Standing` the services' names, which are counted when the plan is made ([`standing`]). `Connections` is a part
//! of a table, cut so that it fits ([`PART_LIMIT`](state_schemas::message::PART_LIMIT)). All others are shorter than two
//! [`Text`](state_schemas::message::Text)s.

use std::collections::BTreeMap;

use state_schemas::Payload;
use state_schemas::checked::Check;
use state_schemas::handover_record::PhaseMark;
use state_schemas::message::{ITEM_LIMIT, ToIncumbent, ToSuccessor};

use crate::channel::MESSAGE_LIMIT;

/// CPUs that an update can move; what Linux for x86 can be configured for ends at 8192, what distributions configure at that or at 512.
/// The handover record and the messages are tested with this many.
pub const CPU_LIMIT: usize = 4096;

/// Bytes of a step's name that are kept when the list is shortened.
const NAME: usize = 64;

/// The word that commits, with the steps so far: all of them if they fit. Else the steps that differ only in a number at the end of their
/// name, one for each CPU, become one that lasts from the first one's begin to the last one's end and says how many there were. If even these
/// are too many, the oldest are left out, and one step stands for them.
pub fn commit(marks: &[PhaseMark]) -> ToSuccessor {
    let whole = ToSuccessor::Commit { timeline: marks.to_vec() };
    if fits(&whole) {
        return whole;
    }
    let grouped = grouped(marks);
    let mut kept = grouped.len().min(ITEM_LIMIT - 1);
    loop {
        let (earlier, rest) = grouped.split_at(grouped.len() - kept);
        let stands_for = span(&format!("{} earlier steps", earlier.len()), earlier);
        let timeline = stands_for.into_iter().chain(rest.iter().cloned()).collect();
        let word = ToSuccessor::Commit { timeline };
        if kept == 0 || fits(&word) {
            return word;
        }
        kept /= 2;
    }
}

/// Whether the successor can name these services in its answer to `StandBy`.
///
/// # Errors
/// The bytes that the message would have, and those that it may have.
pub fn standing(services: &[String]) -> Result<(), (u64, u64)> {
    let answer = ToIncumbent::Standing { services: services.to_vec() };
    match len(&answer) {
        len if len <= MESSAGE_LIMIT && answer.check(&()).is_ok() => Ok(()),
        len => Err((len, MESSAGE_LIMIT)),
    }
}

/// The channel carries it, and the other side believes it.
fn fits(word: &ToSuccessor) -> bool {
    len(word) <= MESSAGE_LIMIT && word.check(&()).is_ok()
}

/// Bytes on the channel. What no frame can hold is longer than any message.
fn len<T: Payload>(message: &T) -> u64 {
    message.to_frame(message.least_version()).map_or(u64::MAX, |frame| frame.len() as u64)
}

/// One step for each name, its number apart, in the order in which each name came first.
fn grouped(marks: &[PhaseMark]) -> Vec<PhaseMark> {
    let mut groups: Vec<Vec<PhaseMark>> = Vec::new();
    let mut place = BTreeMap::new();
    for mark in marks {
        let at = *place.entry(without_number(&mark.phase)).or_insert(groups.len());
        if at == groups.len() {
            groups.push(Vec::new());
        }
        groups[at].push(mark.clone());
    }
    let named = |group: &Vec<PhaseMark>| match &group[..] {
        [only] => span(&only.phase, group),
        [first, ..] => span(&format!("{} ({} times)", short(without_number(&first.phase)), group.len()), group),
        [] => None,
    };
    groups.iter().filter_map(named).collect()
}

fn without_number(name: &str) -> &str {
    match name.rsplit_once(' ') {
        Some((rest, number)) if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => rest,
        _ => name,
    }
}

/// From the first begin to the last end; nothing of nothing.
fn span(name: &str, marks: &[PhaseMark]) -> Option<PhaseMark> {
    let start_tsc = marks.iter().map(|mark| mark.start_tsc).min()?;
    let end_tsc = marks.iter().map(|mark| mark.end_tsc).max()?;
    Some(PhaseMark { phase: short(name).to_owned(), start_tsc, end_tsc })
}

fn short(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME)]
}
