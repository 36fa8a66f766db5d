//! Changes: what happens wholly or not at all, whoever is stopped within, and taking over an arena in which it was.
//!
//! A change is one step, most of the time, and then at most one more for each block that is to be freed: a list of a million
//! items is deleted by the step that takes its key away and notes the list as pending. What follows only frees, piece by
//! piece, and may be carried on with by whoever takes the arena over. So a step is bounded, and so is its record.

use state_schemas::arena::{PENDING_CLEAR, PENDING_LIST, PENDING_MAP, STATE_LIVE, at};

use super::error::{ArenaError, IsCorrupt, corrupt};
use super::memory::Arena;

impl Arena<'_> {
    /// Carries out one change: refused while sealed or torn, marked as under way while it runs, taken back if it fails.
    /// A change that finds corruption leaves the mark: nobody may take this arena for whole again.
    pub(super) fn change<R, E: From<ArenaError> + IsCorrupt>(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<R, E>,
    ) -> Result<R, E> {
        self.writable()?;
        self.marked(change)
    }

    /// Begins the right to write for `epoch`: the successor's at activation, or once more the owner's after an abort.
    /// Does nothing if `epoch` may write already. What a stopped service of this same epoch left half done is mended.
    ///
    /// # Errors
    /// If the arena belongs to a newer epoch, the page was changed under the seal, or another epoch is within a change.
    pub fn unseal(&mut self, epoch: u64) -> Result<(), ArenaError> {
        let owner = self.epoch();
        if epoch != owner {
            self.whole()?;
            if !self.header()?.is_sealed() {
                return Err(ArenaError::NotOwner { given: epoch, owner });
            }
        }
        self.reclaim(epoch)
    }

    /// Like [`Arena::unseal`], for an arena whose owner, of an older epoch, may have been stopped before it could seal, also within a
    /// change: it is mended, in constant time but for what a deleted list or set has left to free. Only for a caller
    /// that knows that this owner does not run any more: a service may, when its agent tells it to go on.
    ///
    /// # Errors
    /// If the arena belongs to a newer epoch, the page was changed under the seal, or the record of an unfinished change is corrupt.
    pub fn reclaim(&mut self, epoch: u64) -> Result<(), ArenaError> {
        self.mend(epoch)?;
        let owner = self.header()?.epoch.get();
        if epoch < owner {
            return Err(ArenaError::NotOwner { given: epoch, owner });
        }
        if epoch == owner && !self.is_sealed() {
            return Ok(());
        }
        self.marked(|arena| {
            // The epoch first: should this kernel die between the two stores, the older epoch stays locked out.
            arena.put(at::EPOCH, epoch)?;
            arena.put(at::STATE_AND_SEAL, STATE_LIVE.into())
        })
    }

    /// Mends what a stopped owner left half done.
    fn mend(&mut self, epoch: u64) -> Result<(), ArenaError> {
        if !self.record.torn {
            return Ok(());
        }
        // A torn birth of a right is undone: the owner is who was before it.
        self.load_record()?;
        let owner = self.before_step(at::EPOCH)?.unwrap_or(self.epoch());
        if epoch < owner {
            return Err(ArenaError::NotOwner { given: epoch, owner });
        }
        self.undo()?;
        self.finish()?;
        // As it was before: a seal that was under the change holds again.
        let mutations = self.get(at::MUTATIONS) & !1;
        self.header_with(mutations)?;
        self.store(at::MUTATIONS, mutations);
        self.record.torn = false;
        Ok(())
    }

    fn marked<R, E: From<ArenaError> + IsCorrupt>(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<R, E>,
    ) -> Result<R, E> {
        let before = self.get(at::MUTATIONS);
        self.store(at::MUTATIONS, before | 1);
        let mut result = self.step(change);
        if result.is_ok()
            && self.pending() != 0
            && let Err(error) = self.finish()
        {
            result = Err(error.into());
        }
        if matches!(&result, Err(error) if error.is_corrupt()) {
            self.spoil();
        } else if before.is_multiple_of(2) {
            self.store(at::MUTATIONS, before.wrapping_add(2));
        }
        result
    }

    /// One step: all that it stores becomes final by one store, or is brought back.
    fn step<R, E: From<ArenaError>>(&mut self, step: impl FnOnce(&mut Self) -> Result<R, E>) -> Result<R, E> {
        self.begin_step();
        let result = step(self);
        match &result {
            Ok(_) => self.commit(),
            Err(_) => self.undo()?,
        }
        result
    }

    /// The steps that only free.
    fn finish(&mut self) -> Result<(), ArenaError> {
        loop {
            let pending = self.pending();
            let kind = pending & 7;
            let at = pending - kind;
            match kind {
                0 => return Ok(()),
                PENDING_LIST => self.step(|arena| arena.list_free_step(at).and_then(|done| arena.finished(done)))?,
                PENDING_MAP => self.step(|arena| arena.map_free_step(at).and_then(|done| arena.finished(done)))?,
                PENDING_CLEAR => self.step(|arena| arena.clear().and_then(|()| arena.finished(true)))?,
                _ => return corrupt("what is to be freed", at::PENDING),
            }
        }
    }

    fn finished(&mut self, done: bool) -> Result<(), ArenaError> {
        if done { self.set_pending(0) } else { Ok(()) }
    }

    /// Empties the arena. This is done anew, not undone: nothing of what was there is read.
    fn clear(&mut self) -> Result<(), ArenaError> {
        self.free_all();
        self.begin_step();
        let root = self.map_new()?;
        self.put(at::ROOT, root)
    }

    /// For operations: this list, which nothing refers to any more, is freed once the step is final.
    pub(super) fn free_list_later(&mut self, list: u64) -> Result<(), ArenaError> {
        self.owned(list)?;
        self.set_pending(list + PENDING_LIST)
    }

    /// The same for a map.
    pub(super) fn free_map_later(&mut self, map: u64) -> Result<(), ArenaError> {
        self.owned(map)?;
        self.map_free_begin(map)?;
        self.set_pending(map + PENDING_MAP)
    }

    /// Empties the arena once the step is final.
    pub(super) fn clear_later(&mut self) -> Result<(), ArenaError> {
        self.set_pending(PENDING_CLEAR)
    }

    fn owned(&self, payload: u64) -> Result<(), ArenaError> {
        self.capacity(payload).map(drop)
    }
}
