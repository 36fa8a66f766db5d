//! Whether a successor is on probation, and whether an operator has said that it stays: one word between the thread that makes the
//! update and those that answer `baton`.

use std::sync::atomic::{AtomicU8, Ordering};

const NONE: u8 = 0;
const WATCHING: u8 = 1;
const COMMITTED: u8 = 2;

/// The word.
#[derive(Debug, Default)]
pub struct Probation(AtomicU8);

/// A watch that lasts as long as this value.
#[derive(Debug)]
pub struct Watched<'a>(&'a Probation);

impl Probation {
    /// A watch begins: what was said of an earlier one is not said of this one.
    pub fn begin(&self) -> Watched<'_> {
        self.0.store(WATCHING, Ordering::SeqCst);
        Watched(self)
    }

    /// A successor is being watched.
    pub fn is_watching(&self) -> bool {
        self.0.load(Ordering::SeqCst) != NONE
    }

    /// The operator has said that it stays.
    pub fn is_committed(&self) -> bool {
        self.0.load(Ordering::SeqCst) == COMMITTED
    }

    /// It stays, says the operator. False when no successor is being watched; asking again changes nothing.
    pub fn commit(&self) -> bool {
        match self.0.compare_exchange(WATCHING, COMMITTED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(found) => found == COMMITTED,
        }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.0.store(NONE, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_watched_is_committed() {
        let probation = Probation::default();
        assert!(!probation.commit() && !probation.is_watching());
        let watched = probation.begin();
        assert!(probation.is_watching() && !probation.is_committed());
        assert!(probation.commit() && probation.commit() && probation.is_committed());
        drop(watched);
        assert!(!probation.commit() && !probation.is_watching());
        let _next = probation.begin();
        assert!(!probation.is_committed(), "what was said of an earlier one");
    }
}
