//! A value that threads wait on: one way to wait, with a deadline or without.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A value behind a lock, and those who wait for it to change.
#[derive(Debug, Default)]
pub struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    /// With its first value.
    pub fn new(value: T) -> Watched<T> {
        Watched { value: Mutex::new(value), changed: Condvar::new() }
    }

    /// The value. Whoever changes it so that others may go on calls [`Watched::notify`].
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // Each change of a watched value is a whole one, so a holder that panicked has left nothing half done.
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has those who wait look again.
    pub fn notify(&self) {
        self.changed.notify_all();
    }

    /// Waits until `look` finds what it looks for; nothing if that is not so at the deadline.
    pub fn wait<R>(&self, until: Option<Instant>, mut look: impl FnMut(&mut T) -> Option<R>) -> Option<R> {
        let mut value = self.lock();
        loop {
            if let Some(found) = look(&mut value) {
                return Some(found);
            }
            value = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(value).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => return None,
                Some(left) => self.changed.wait_timeout(value, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}
