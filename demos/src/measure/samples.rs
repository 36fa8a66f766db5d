//! What a prober saw, and what a blackout is.
//!
//! # The blackout
//! Two figures describe a silence, and each alone could flatter:
//! - the **reply gap**: the longest time between two consecutive replies, in the order in which they came. It is what a client hears. But
//!   late replies to old requests, or a few answered among many that are not, would cut it in pieces.
//! - the **unanswered window**: the longest run of consecutive requests none of which was answered in time (within
//!   [`Samples::in_time`] of the moment it was to be sent), from the first one's intended time to the intended time of the next that was
//!   answered in time. But requests that wait in a queue and are answered just in time do not show in it.
//!
//! **The blackout is the larger of the two.** Nothing is subtracted: it contains up to one period of the prober and one round
//! trip. The time before the first reply counts as a gap from the first request; a silence that had not ended when probing stopped
//! counts up to then, and is marked `open_ended`.
//!
//! # The prober's own stalls
//! On a busy machine the prober may itself be kept from running, which looks like a silence. So each sample knows how late it was sent, and how
//! long its reply lay in the socket; replies are stamped by the kernel when they arrive, so a late *receiver* does not
//! matter. [`Silence::prober_stalled_ms`] is the longest lateness of a send within the silence: if it is not much smaller than the
//! silence, the silence is the prober's own, and the run says nothing.

use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// One request. Times are nanoseconds since the prober's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// When it was to be sent.
    pub intended: u64,
    /// When it was sent; `None`: it could not be.
    pub sent: Option<u64>,
    /// When its reply reached this host.
    pub received: Option<u64>,
    /// The epoch in the reply: which kernel answered.
    pub epoch: Option<u64>,
    /// How long the reply lay in the socket before the prober read it.
    pub unread: u64,
}

/// All requests of one prober, in the order in which they were to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    /// The requests.
    pub all: Vec<Sample>,
    /// The time between two requests.
    pub period: Duration,
    /// An answer later than this does not count for the unanswered window.
    pub in_time: Duration,
}

/// The longest silence in some time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Silence {
    /// The larger of the next two.
    pub blackout_ms: f64,
    /// Longest time between two consecutive replies.
    pub max_reply_gap_ms: f64,
    /// Longest run of requests that were not answered in time.
    pub unanswered_window_ms: f64,
    /// Where the larger one began, in ms since the prober's start.
    pub began_at_ms: f64,
    /// Where it ended.
    pub ended_at_ms: f64,
    /// It had not ended when probing stopped.
    pub open_ended: bool,
    /// The prober's own worst lateness within it.
    pub prober_stalled_ms: f64,
}

/// Latencies of what was answered, from the intended time on, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// Half of all are not above this.
    pub p50_us: u64,
    /// Nine tenths.
    pub p90_us: u64,
    /// Ninety-nine hundredths.
    pub p99_us: u64,
    /// All but one in a thousand.
    pub p999_us: u64,
    /// The worst.
    pub max_us: u64,
}

/// What is told about a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Requests that were due.
    pub due: usize,
    /// Of these, answered at all.
    pub answered: usize,
    /// Sent and never answered.
    pub lost: usize,
    /// Not even sent (no route, or the connection was down).
    pub unsent: usize,
    /// The longest silence; `None`: nothing was due.
    pub silence: Option<Silence>,
    /// `None`: nothing was answered.
    pub latencies: Option<Latencies>,
    /// Sent more than [`LATE`] after they were due: the prober's own trouble.
    pub sent_late: usize,
    /// The worst of those, in ms.
    pub worst_lateness_ms: f64,
    /// Requests sent after a newer epoch had answered, and answered by an older one: a kernel that had been succeeded spoke. Must be 0.
    pub epoch_regressions: usize,
}

/// From here on a send is called late.
pub const LATE: Duration = Duration::from_millis(2);

impl Samples {
    /// All that is told about the requests that were due in `window` (nanoseconds since the start).
    #[must_use]
    pub fn report(&self, window: Range<u64>) -> ProbeReport {
        let from = self.all.partition_point(|s| s.intended < window.start);
        let to = self.all.partition_point(|s| s.intended < window.end);
        let samples = &self.all[from..to.max(from)];
        let answered = samples.iter().filter(|s| s.received.is_some()).count();
        let unsent = samples.iter().filter(|s| s.sent.is_none()).count();
        let lateness = || samples.iter().map(lateness);
        ProbeReport {
            due: samples.len(),
            answered,
            lost: samples.len() - answered - unsent,
            unsent,
            silence: self.silence(samples),
            latencies: latencies(samples),
            sent_late: lateness().filter(|l| *l > LATE.as_nanos() as u64).count(),
            worst_lateness_ms: ms(lateness().max().unwrap_or(0)),
            epoch_regressions: epoch_regressions(samples),
        }
    }

    /// Of the whole run.
    #[must_use]
    pub fn whole(&self) -> ProbeReport {
        self.report(0..u64::MAX)
    }

    /// Every sample, one a line.
    ///
    /// # Errors
    /// The writer's.
    pub fn write_csv(&self, mut to: impl Write) -> io::Result<()> {
        writeln!(to, "seq,intended_ns,sent_ns,received_ns,epoch,unread_ns")?;
        let text = |value: Option<u64>| value.map_or_else(String::new, |v| v.to_string());
        for (seq, s) in self.all.iter().enumerate() {
            let (sent, received, epoch) = (text(s.sent), text(s.received), text(s.epoch));
            writeln!(to, "{seq},{},{sent},{received},{epoch},{}", s.intended, s.unread)?;
        }
        to.flush()
    }

    fn silence(&self, samples: &[Sample]) -> Option<Silence> {
        let (first, last) = (samples.first()?, samples.last()?);
        let gap = reply_gap(samples, first.intended, last.intended);
        let window = self.unanswered_window(samples, last.intended);
        let longest = if length(&gap.0) >= length(&window.0) { &gap } else { &window };
        let (Range { start, end }, open_ended) = longest.clone();
        let inside = samples.iter().filter(|s| s.intended >= start && s.intended <= end);
        Some(Silence {
            blackout_ms: ms(end - start),
            max_reply_gap_ms: ms(length(&gap.0)),
            unanswered_window_ms: ms(length(&window.0)),
            began_at_ms: ms(start),
            ended_at_ms: ms(end),
            open_ended,
            prober_stalled_ms: ms(inside.map(lateness).max().unwrap_or(0)),
        })
    }

    fn unanswered_window(&self, samples: &[Sample], end: u64) -> (Range<u64>, bool) {
        let in_time = |s: &Sample| s.received.is_some_and(|r| r <= s.intended + self.in_time.as_nanos() as u64);
        let (mut longest, mut since) = ((end..end, false), None);
        for sample in samples {
            match (in_time(sample), since) {
                (true, Some(start)) => {
                    longer(&mut longest, start..sample.intended, false);
                    since = None;
                }
                (false, None) => since = Some(sample.intended),
                _ => {}
            }
        }
        if let Some(start) = since {
            longer(&mut longest, start..end, true);
        }
        longest
    }
}

fn reply_gap(samples: &[Sample], start: u64, end: u64) -> (Range<u64>, bool) {
    let mut replies: Vec<u64> = samples.iter().filter_map(|s| s.received).collect();
    replies.sort_unstable();
    let (mut longest, mut previous) = ((start..start, false), start);
    for reply in replies {
        longer(&mut longest, previous..reply, false);
        previous = reply;
    }
    longer(&mut longest, previous..end, true);
    longest
}

fn longer(longest: &mut (Range<u64>, bool), candidate: Range<u64>, open_ended: bool) {
    if length(&candidate) > length(&longest.0) {
        *longest = (candidate, open_ended);
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn lateness(sample: &Sample) -> u64 {
    sample.sent.map_or(0, |sent| sent.saturating_sub(sample.intended))
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

fn latencies(samples: &[Sample]) -> Option<Latencies> {
    // Three digits; grows with the values, so that no range has to be guessed.
    let mut histogram = Histogram::<u64>::new(3).ok()?;
    for sample in samples {
        if let Some(received) = sample.received {
            histogram.record(received.saturating_sub(sample.intended) / 1000).ok()?;
        }
    }
    if histogram.is_empty() {
        return None;
    }
    let at = |quantile| histogram.value_at_quantile(quantile);
    Some(Latencies { p50_us: at(0.5), p90_us: at(0.9), p99_us: at(0.99), p999_us: at(0.999), max_us: histogram.max() })
}

/// Counted only where it is certain: the request left after the newer kernel's reply had arrived. A reply of the old kernel that
/// overtakes on the way is no fault.
fn epoch_regressions(samples: &[Sample]) -> usize {
    let mut arrivals: Vec<(u64, u64)> = samples.iter().filter_map(|s| Some((s.received?, s.epoch?))).collect();
    arrivals.sort_unstable();
    let mut newest = 0;
    for (_, epoch) in &mut arrivals {
        newest = newest.max(*epoch);
        *epoch = newest;
    }
    let newest_before = |time: u64| match arrivals.partition_point(|(received, _)| *received < time) {
        0 => 0,
        n => arrivals[n - 1].1,
    };
    samples
        .iter()
        .filter(|s| matches!((s.sent, s.epoch), (Some(sent), Some(epoch)) if epoch < newest_before(sent)))
        .count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    /// 1 kHz; each entry is the latency in ms of one request, or none.
    fn samples(latencies: impl IntoIterator<Item = Option<u64>>) -> Samples {
        let sample = |(i, latency): (usize, Option<u64>)| {
            let intended = i as u64 * MS;
            Sample {
                intended,
                sent: Some(intended),
                received: latency.map(|l| intended + l * MS),
                epoch: None,
                unread: 0,
            }
        };
        let all = latencies.into_iter().enumerate().map(sample).collect();
        Samples { all, period: Duration::from_millis(1), in_time: Duration::from_millis(100) }
    }

    fn silence(latencies: impl IntoIterator<Item = Option<u64>>) -> Silence {
        samples(latencies).whole().silence.expect("requests were due")
    }

    #[test]
    fn lost_requests_are_a_silence() {
        let s = silence((0..1000).map(|i| if (300..350).contains(&i) { None } else { Some(1) }));
        // The last answered one was 299, whose reply came at 300; the next reply came at 351.
        assert_eq!((s.max_reply_gap_ms, s.unanswered_window_ms, s.blackout_ms), (51.0, 50.0, 51.0));
        assert_eq!((s.began_at_ms, s.ended_at_ms, s.open_ended), (300.0, 351.0, false));
    }

    #[test]
    fn queued_requests_do_not_hide_a_silence() {
        // Frozen from 300 to 380; what came meanwhile is answered at 380.
        let s = silence((0..1000).map(|i| Some(if (300..380).contains(&i) { 380 - i } else { 0 })));
        assert_eq!(s.unanswered_window_ms, 0.0);
        assert_eq!((s.max_reply_gap_ms, s.blackout_ms), (81.0, 81.0));
    }

    #[test]
    fn single_answers_do_not_hide_a_window_of_late_ones() {
        // Every request of the window is answered 150 ms late: replies keep coming, but nobody is served in time.
        let s = silence((0..2000).map(|i| Some(if (300..600).contains(&i) { 150 } else { 0 })));
        assert_eq!((s.max_reply_gap_ms, s.unanswered_window_ms), (151.0, 300.0));
        assert_eq!(s.blackout_ms, 300.0);
    }

    #[test]
    fn a_silence_that_lasts_to_the_end_is_counted_and_marked() {
        let s = silence((0..1000).map(|i| (i < 400).then_some(0)));
        assert_eq!((s.blackout_ms, s.open_ended), (600.0, true));
        let s = silence((0..1000).map(|_| None));
        assert_eq!((s.blackout_ms, s.open_ended), (999.0, true));
        let s = silence((0..1000).map(|i| (i >= 400).then_some(0)));
        assert_eq!((s.blackout_ms, s.open_ended), (400.0, false));
    }

    #[test]
    fn a_stalled_prober_is_told_from_a_silent_machine() {
        let mut all = samples((0..1000).map(|_| Some(0)));
        for i in 500..600 {
            // The prober slept from 500 to 600 and sent everything then.
            all.all[i].sent = Some(600 * MS);
            all.all[i].received = Some(600 * MS);
        }
        let report = all.whole();
        let s = report.silence.expect("due");
        assert_eq!(s.blackout_ms, 101.0);
        assert_eq!(s.prober_stalled_ms, 100.0);
        assert_eq!((report.sent_late, report.worst_lateness_ms), (98, 100.0));
    }

    #[test]
    fn an_old_kernel_that_speaks_is_seen() {
        let mut all = samples((0..100).map(|_| Some(1)));
        for (i, s) in all.all.iter_mut().enumerate() {
            s.epoch = Some(if i < 50 { 1 } else { 2 });
        }
        assert_eq!(all.whole().epoch_regressions, 0);
        all.all[50].epoch = Some(1); // left before any reply of epoch 2 had come
        all.all[51].epoch = Some(2);
        assert_eq!(all.whole().epoch_regressions, 0);
        all.all[70].epoch = Some(1);
        assert_eq!(all.whole().epoch_regressions, 1);
    }

    #[test]
    fn windows_and_csv() {
        let all = samples((0..10).map(|i| (i != 3).then_some(2)));
        let report = all.report(2 * MS..5 * MS);
        assert_eq!((report.due, report.answered, report.lost), (3, 2, 1));
        assert!(all.report(100 * MS..200 * MS).silence.is_none());
        let mut csv = Vec::new();
        all.write_csv(&mut csv).expect("written");
        let csv = String::from_utf8(csv).expect("text");
        assert_eq!(csv.lines().count(), 11);
        assert_eq!(csv.lines().nth(4), Some("3,3000000,3000000,,,0"));
        let l = all.whole().latencies.expect("answered");
        assert!((1999..=2001).contains(&l.p50_us) && l.max_us >= 2000, "{l:?}");
    }

    proptest! {
        /// Whatever happens, no run of lost requests is longer than the blackout, and the blackout is not longer than the run.
        #[test]
        fn a_blackout_neither_flatters_nor_invents(latencies in proptest::collection::vec(proptest::option::weighted(0.7, 0u64..50), 2..200)) {
            let run = latencies.split(Option::is_some).map(<[_]>::len).max().unwrap_or(0);
            let s = silence(latencies.iter().copied());
            prop_assert!(s.blackout_ms >= run as f64 - 1.0, "{s:?} for a run of {run}");
            prop_assert!(s.blackout_ms <= latencies.len() as f64 + 50.0);
            prop_assert!(s.blackout_ms >= s.max_reply_gap_ms && s.blackout_ms >= s.unanswered_window_ms);
        }
    }
}
