//! The right to serve, as a value.

/// The right to answer clients and to use the arena: exists from the order to serve until the report that the service is
/// frozen. It cannot be copied, and only an order of the agent makes one (no other crate can write the struct out).
#[derive(Debug)]
#[non_exhaustive]
pub struct Held {
    /// The epoch.
    pub epoch: u64,
    /// The arena is blank: create, do not attach. False after the first time.
    pub fresh: bool,
    /// The service was frozen before and goes on: connections and their unsent replies are still good. The arena may have been
    /// another's meanwhile, which does not run any more, and may not have sealed it.
    pub resumed: bool,
}

impl Held {
    pub(crate) fn new(epoch: u64, fresh: bool, resumed: bool) -> Self {
        Self { epoch, fresh, resumed }
    }
}
