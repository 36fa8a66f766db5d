//! The wall clock across an update. A successor has no RTC; but the TSC goes on counting, so a moment that both clocks were read at is
//! all it takes.

use anyhow::{Context, Result};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

use super::sys::tsc;

/// How often both clocks are read. Whoever reads may be interrupted in between; the reading that took least time counts.
const READINGS: usize = 5;

/// How far a measured rate may be from the kernel's before it counts instead, one part in so many. A measurement over a fraction of a
/// second is worse than a good calibration; but a calibration on a busy virtual machine can be wrong by a factor of ten.
const BELIEVED_TO: u64 = 1000;
/// Shorter than this, in nanoseconds, nothing is measured.
const LEAST_MEASURED: u64 = 100_000_000;

/// One moment on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// What the TSC read.
    pub tsc: u64,
    /// Nanoseconds since 1970; of [`Moment::raw`], since the boot.
    pub unix_ns: u64,
}

impl Moment {
    /// Now, to a few microseconds.
    pub fn now() -> Result<Moment> {
        Moment::of(ClockId::CLOCK_REALTIME)
    }

    /// Now, by the clock that nobody sets or slews.
    pub fn raw() -> Result<Moment> {
        Moment::of(ClockId::CLOCK_MONOTONIC_RAW)
    }

    fn of(clock: ClockId) -> Result<Moment> {
        let mut best: Option<(u64, Moment)> = None;
        for _ in 0..READINGS {
            let before = tsc();
            let time = clock_gettime(clock).context("cannot read the clock")?;
            let took = tsc().saturating_sub(before);
            let unix_ns = u64::try_from(time.tv_sec())
                .ok()
                .and_then(|seconds| {
                    seconds.checked_mul(1_000_000_000)?.checked_add(u64::try_from(time.tv_nsec()).ok()?)
                })
                .context("the wall clock shows a time before 1970 or after 2554")?;
            if best.is_none_or(|(least, _)| took < least) {
                best = Some((took, Moment { tsc: before + took / 2, unix_ns }));
            }
        }
        Ok(best.context("the clocks were not read")?.1)
    }

    /// The TSC's counts a millisecond, between an earlier [`Moment::raw`] and this one; `believed` is the kernel's calibration, which
    /// is only overruled where it is plainly wrong.
    pub fn khz_since(self, earlier: Moment, believed: u32) -> u32 {
        let ns = self.unix_ns.saturating_sub(earlier.unix_ns);
        let ticks = u128::from(self.tsc.saturating_sub(earlier.tsc));
        let measured = (ticks * 1_000_000).checked_div(ns.into()).and_then(|khz| u32::try_from(khz).ok());
        match measured {
            Some(khz @ 1..)
                if ns >= LEAST_MEASURED && u64::from(khz.abs_diff(believed)) * BELIEVED_TO > u64::from(khz) =>
            {
                tracing::warn!(believed, measured = khz, "the TSC's rate is not what this kernel takes it for");
                khz
            }
            _ => believed,
        }
    }

    /// What the wall clock shows when the TSC has come to `tsc`, at so many counts a millisecond. Nothing where that is no time: the
    /// other kernel said it.
    pub fn unix_ns_at(self, tsc: u64, khz: u64) -> Option<u64> {
        let ticks = u128::from(tsc.checked_sub(self.tsc)?);
        let elapsed = (ticks * 1_000_000).checked_div(khz.into())?;
        u64::try_from(u128::from(self.unix_ns) + elapsed).ok().filter(|ns| i64::try_from(*ns).is_ok())
    }

    /// Sets this kernel's wall clock by it.
    pub fn set_clock(self, khz: u64) -> Result<()> {
        let now = self.unix_ns_at(tsc(), khz).with_context(|| format!("the handed-over time is absurd: {self:?}"))?;
        let (seconds, nanoseconds) = ((now / 1_000_000_000).cast_signed(), (now % 1_000_000_000).cast_signed());
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanoseconds)).context("cannot set the wall clock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_with_the_tsc() {
        let moment = Moment { tsc: 1_000, unix_ns: 1_795_000_000_000_000_000 };
        assert_eq!(moment.unix_ns_at(1_000 + 2_400_000, 2_400_000), Some(1_795_000_000_001_000_000));
        assert_eq!(moment.unix_ns_at(999, 2_400_000), None, "a moment to come");
        assert_eq!(moment.unix_ns_at(2_000, 0), None);
        assert_eq!(moment.unix_ns_at(u64::MAX, 1), None);
        assert_eq!(Moment { unix_ns: u64::MAX, ..moment }.unix_ns_at(1_000, 1), None);
    }

    #[test]
    fn a_rate_is_measured_where_the_kernel_is_plainly_wrong() {
        let (first, after) = (Moment { tsc: 1_000, unix_ns: 5 }, |tsc, unix_ns| Moment { tsc, unix_ns });
        let second = after(1_000 + 420_000_000, 5 + 200_000_000); // 2.1 GHz
        assert_eq!(second.khz_since(first, 176_783), 2_100_000);
        assert_eq!(second.khz_since(first, 0), 2_100_000);
        assert_eq!(second.khz_since(first, 2_099_876), 2_099_876, "a calibration to 59 ppm is better than this");
        assert_eq!(after(210_000, 100_005).khz_since(first, 1_000_000), 1_000_000, "too short to tell");
        assert_eq!(first.khz_since(second, 7), 7);
        assert_eq!(after(u64::MAX, 5 + 200_000_000).khz_since(first, 7), 7);
    }

    #[test]
    fn both_clocks_are_read_at_once() {
        let first = Moment::now().unwrap();
        let second = Moment::now().unwrap();
        assert!(second.tsc > first.tsc && second.unix_ns >= first.unix_ns, "{first:?} {second:?}");
    }
}
