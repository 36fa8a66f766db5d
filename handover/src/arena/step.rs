//! What a process remembers of the step that is under way; what the arena itself remembers is in [`super::record`].

use state_schemas::arena::RECORD_WORDS;

/// What this process knows of the step that is under way.
#[derive(Debug)]
pub(super) struct Record {
    /// Words of entries.
    pub(super) length: u64,
    /// What is still to be freed, as `at::PENDING` says it.
    pub(super) pending: u64,
    /// The arena's top when the step began: above it, nothing needs to be saved.
    pub(super) top: u64,
    /// Where the entries are, if not in the arena: it has no record, or its record is spoilt.
    pub(super) own: Option<Box<[u64; RECORD_WORDS as usize]>>,
    /// The arena's owner was stopped within a change. Nothing is read or written before it is mended.
    pub(super) torn: bool,
    /// The step has freed a block.
    pub(super) freed: bool,
    /// Words of the header page that the step has saved already: 1 the top, 2 the bytes used.
    pub(super) header_saved: u8,
    /// Nothing is saved; see `Arena::forget`.
    pub(super) forgetful: bool,
}

impl Record {
    /// For an arena of this version.
    pub(super) fn new(version: u32, torn: bool) -> Record {
        let own = (version < 2).then(own_record);
        Record { length: 0, pending: 0, top: 0, own, torn, freed: false, header_saved: 0, forgetful: false }
    }
}

/// A record outside the arena.
pub(super) fn own_record() -> Box<[u64; RECORD_WORDS as usize]> {
    Box::new([0; RECORD_WORDS as usize])
}
