//! [`Received<T>`]: what came from the other kernel, until somebody has checked it.
//!
//! Decoding proves only that the bytes have the right shape. Whether an offset lies inside its arena, a range inside
//! the machine or a count inside reason is a second question, and it is asked in one place per type: its [`Check`].
//! There is no other way from `Received<T>` to `T`, so that a skipped check does not compile.

/// A type whose values have bounds, and the one place where these are checked.
pub trait Check {
    /// What the bounds are measured against (the memory's size, the machine's limits); `()` if nothing.
    type Against;
    /// Says which bound is broken, with the numbers.
    type Error;
    /// Looks at every bound.
    ///
    /// # Errors
    /// The first bound that does not hold.
    fn check(&self, against: &Self::Against) -> Result<(), Self::Error>;
}

/// A value as it was received: decoded, not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received<T>(T);

impl<T> Received<T> {
    /// Wraps what was just decoded.
    pub const fn new(value: T) -> Self {
        Received(value)
    }

    /// The value, for showing it to a human. Decisions need [`Received::check`].
    pub const fn alleged(&self) -> &T {
        &self.0
    }
}

impl<T: Check> Received<T> {
    /// The value, if all its bounds hold.
    ///
    /// # Errors
    /// Those of the type's [`Check`].
    pub fn check(self, against: &T::Against) -> Result<T, T::Error> {
        self.0.check(against)?;
        Ok(self.0)
    }
}
