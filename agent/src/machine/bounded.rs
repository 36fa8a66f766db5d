//! Calls into the kernel that may hang, with an end: a driver that does not let go of its device, a file system that does not
//! take what is written to it.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

/// Does `work` on a thread of its own and waits for it until `until`.
///
/// A system call that hangs cannot be called off. So on a time-out the thread stays where it is, and may still do what it was
/// asked to: whoever gets this error knows neither that it was done nor that it was not.
///
/// # Errors
/// The work's own, or that it has not ended in time; then `what` names it.
pub fn within<T: Send + 'static>(
    until: Instant,
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let patience = until.saturating_duration_since(Instant::now());
    let (done, doing) = mpsc::sync_channel(1);
    // Nobody listens any more after the time-out.
    let worker = move || drop(done.send(work()));
    thread::Builder::new().name("bounded".into()).spawn(worker).with_context(|| format!("cannot begin to {what}"))?;
    match doing.recv_timeout(patience) {
        Ok(ended) => ended,
        Err(RecvTimeoutError::Disconnected) => Err(anyhow!("a fault of batond: it panicked while it was to {what}")),
        Err(RecvTimeoutError::Timeout) => {
            Err(anyhow!("the kernel was to {what}, and has not done so after {:.1} s", patience.as_secs_f64()))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_ends_gives_its_own_result_and_what_hangs_is_named() {
        let soon = || Instant::now() + Duration::from_secs(30);
        assert_eq!(within(soon(), "count", || Ok(3)).unwrap(), 3);
        let own = within(soon(), "count", || -> Result<()> { Err(anyhow!("no")) });
        assert_eq!(own.unwrap_err().to_string(), "no");
        let (never, waits) = mpsc::channel::<()>();
        let hung = within(Instant::now(), "flush", move || Ok(waits.recv()?));
        assert!(hung.unwrap_err().to_string().starts_with("the kernel was to flush, and has not done so after 0.0 s"));
        drop(never);
    }
}
