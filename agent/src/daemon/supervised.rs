//! What `batond` and its service manager owe each other while it runs (systemd.service(5): `Type=notify-reload`, `WatchdogSec=`): signs of
//! life, reading the configuration again on SIGHUP, and an orderly end on SIGTERM.
//!
//! A reload is a check of the new file, and then a start anew in place: the same process becomes `batond` once more. What every restart
//! under running services does (take back what is held, take on who serves) is so the only way in which a configuration comes into
//! force, for each of its keys. A file that is wrong changes nothing.

use std::convert::Infallible;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::TryLockError;
use std::time::Duration;

use anyhow::{Context, Result};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use crate::daemon::config::Config;
use crate::daemon::kernel::Kernel;

/// Signals that must not kill from here on.
pub struct Signals {
    end: Signal,
    reload: Signal,
}

impl Signals {
    /// Begins to listen. Before READY is said: the service manager sends them only after that.
    pub fn listen() -> Result<Signals> {
        let listen = |kind| signal(kind).context("cannot wait for signals");
        Ok(Signals { end: listen(SignalKind::terminate())?, reload: listen(SignalKind::hangup())? })
    }
}

/// Says something to the service manager, if there is one.
pub fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("cannot speak with the service manager: {error}");
    }
}

/// Serves until SIGTERM.
pub async fn until_the_end(kernel: &Kernel, config: &Path, signals: Signals) {
    let Signals { mut end, mut reload } = signals;
    let mut alive = sd_notify::watchdog_enabled().map(twice_in);
    loop {
        tokio::select! {
            _ = end.recv() => break,
            _ = reload.recv() => reload_from(kernel, config),
            () = next(&mut alive) => {
                // Whoever cannot say how things stand does not live: this takes every lock that an answer takes.
                drop(kernel.status());
                tell(&[NotifyState::Watchdog]);
            }
        }
    }
    // An update that is under way ends first: half of one would have to be taken back by the next batond.
    drop(kernel.updating.lock());
}

/// Twice in the time after which silence counts as death.
fn twice_in(patience: Duration) -> Interval {
    let mut ticks = interval((patience / 2).max(Duration::from_millis(1)));
    // After a pause (a machine that was stopped) one sign of life is as good as all that were missed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Never, where nobody watches.
async fn next(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// Why the configuration is not read again now.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Unfit {
    #[error("an update runs: reload when it is over")]
    Updating,
    #[error("{0}: this batond goes on with the configuration that it has")]
    Wrong(String),
}

/// Whether a reload may be. A kernel that has not taken over yet is in the middle of an update, too.
fn fit(updates: bool, checked: Result<(), String>) -> Result<(), Unfit> {
    if updates {
        return Err(Unfit::Updating);
    }
    checked.map_err(Unfit::Wrong)
}

fn reload_from(kernel: &Kernel, config: &Path) {
    let began = NotifyState::monotonic_usec_now();
    match began {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => warn!("cannot read the clock: {error}"),
    }
    let held = kernel.updating.try_lock();
    let updates = matches!(held, Err(TryLockError::WouldBlock)) || kernel.is_successor();
    let checked = Config::load(config).map(drop).map_err(|error| format!("{:#}", anyhow::Error::from(error)));
    let error = match fit(updates, checked) {
        Ok(()) => {
            info!("reading {} again", config.display());
            // Only an error comes back. The lock goes with this program's memory: no update begins in between.
            match begin_anew() {
                Ok(never) => match never {},
                Err(error) => format!("cannot start anew: {error}"),
            }
        }
        Err(unfit) => unfit.to_string(),
    };
    drop(held);
    error!("not reloaded: {error}");
    tell(&[NotifyState::Ready]);
}

/// Becomes the same program with the same arguments. All descriptors are closed by that; the process, which the service manager knows,
/// stays.
fn begin_anew() -> io::Result<Infallible> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    Err(Command::new("/proc/self/exe").arg0(name).args(arguments).exec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_reloaded_in_an_update_or_from_a_wrong_file() {
        assert_eq!(fit(false, Ok(())), Ok(()));
        assert_eq!(fit(true, Ok(())), Err(Unfit::Updating));
        assert_eq!(fit(true, Err("line 3".into())), Err(Unfit::Updating), "the file is looked at when it is over");
        let wrong = fit(false, Err("/f: line 3".into())).unwrap_err();
        assert!(wrong.to_string().contains("/f: line 3") && wrong.to_string().contains("goes on"), "{wrong}");
    }

    #[tokio::test(start_paused = true)]
    async fn signs_of_life_come_twice_in_the_time_that_is_given() {
        let began = tokio::time::Instant::now();
        let mut ticks = Some(twice_in(Duration::from_secs(10)));
        for _ in 0..3 {
            next(&mut ticks).await;
        }
        assert_eq!(began.elapsed(), Duration::from_secs(10), "at 0, 5 and 10 s");
    }
}
