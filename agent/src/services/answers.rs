//! Orders to many services at once: all are told first, then what they answer is gathered, under one deadline for all.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Result, bail};
use baton_sdk::agent_end::AgentEnd;
use baton_sdk::protocol::{ToAgent, ToService, timeout};
use nix::poll::{PollFd, PollFlags, poll};

/// What a service reported when it was sealed or activated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// How many items are in its arena.
    pub items: u64,
    /// The seal it computed.
    pub seal: u64,
}

/// What came of an order to all.
#[derive(Debug)]
pub(super) struct Gathered<T> {
    pub(super) answers: BTreeMap<String, T>,
    /// Who did not do it, and why.
    pub(super) failed: BTreeMap<String, String>,
}

impl<T> Gathered<T> {
    /// All answers, or everything that went wrong.
    pub(super) fn all(self, what: &str) -> Result<BTreeMap<String, T>> {
        if self.failed.is_empty() {
            return Ok(self.answers);
        }
        bail!("{}", told(&self.failed, what))
    }
}

pub(super) fn told(failed: &BTreeMap<String, String>, what: &str) -> String {
    let all: Vec<_> = failed.iter().map(|(name, why)| format!("service {name} was told {what}: {why}")).collect();
    all.join("; ")
}

/// What came of the order to go on.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// Who serves again.
    pub serving: BTreeSet<String>,
    /// Who has not even answered the freeze yet: it goes on as soon as it does.
    pub late: BTreeSet<String>,
    /// Who was told and did not go on, and why.
    pub failed: BTreeMap<String, String>,
}

/// Says what the operator must know of it.
pub(super) fn report(resumed: &Resumed) {
    for name in &resumed.late {
        tracing::warn!("service {name} has not answered the freeze: it goes on as soon as it does");
    }
    if !resumed.failed.is_empty() {
        tracing::error!("{}", told(&resumed.failed, "to go on"));
    }
}

/// Tells all of them, then gathers what they answer.
pub(super) fn order_all<T>(
    ends: &mut Vec<(&str, &mut AgentEnd)>,
    order: &ToService,
    until: Option<Instant>,
    answer: impl Fn(ToAgent) -> Option<T>,
) -> Gathered<T> {
    let mut failed = BTreeMap::new();
    ends.retain_mut(|(name, end)| match end.order(order) {
        Ok(()) => true,
        Err(error) => {
            failed.insert((*name).to_owned(), error.to_string());
            false
        }
    });
    let mut gathered = gather(ends, until, answer);
    gathered.failed.extend(failed);
    gathered
}

/// Gathers one answer of each, in the order in which they come, until all have answered or the deadline has passed.
pub(super) fn gather<T>(
    ends: &mut Vec<(&str, &mut AgentEnd)>,
    until: Option<Instant>,
    answer: impl Fn(ToAgent) -> Option<T>,
) -> Gathered<T> {
    let began = Instant::now();
    let mut gathered = Gathered { answers: BTreeMap::new(), failed: BTreeMap::new() };
    loop {
        ends.retain_mut(|(name, end)| {
            let failed = match end.poll_report() {
                Ok(None) => return true,
                Ok(Some(report)) => {
                    let shown = format!("{report:?}");
                    match answer(report) {
                        Some(answer) => {
                            gathered.answers.insert((*name).to_owned(), answer);
                            return false;
                        }
                        None => format!("it answered {shown}"),
                    }
                }
                Err(error) => error.to_string(),
            };
            gathered.failed.insert((*name).to_owned(), failed);
            false
        });
        let over = until.is_some_and(|until| Instant::now() >= until);
        if ends.is_empty() || over {
            let why = || format!("it has not answered in {:.1?}", began.elapsed());
            gathered.failed.extend(ends.drain(..).map(|(name, _)| (name.to_owned(), why())));
            return gathered;
        }
        let mut polled: Vec<_> = ends.iter().map(|(_, end)| PollFd::new(end.as_fd(), PollFlags::POLLIN)).collect();
        // Which of them has answered is looked up above; where poll(2) is interrupted, that is only done earlier.
        let _ = poll(&mut polled, timeout(until));
    }
}

pub(super) fn activated(report: ToAgent) -> Option<Seal> {
    match report {
        ToAgent::Activated { items, seal, .. } => Some(Seal { items, seal }),
        _ => None,
    }
}
