//! The stage on which Baton is shown and tested: machines (`lab`), clients that watch them from outside (`measure`) and clients that
//! keep them busy (`load`). The stories themselves are told by the programs in `bin/` and `cli/`; whole-machine tests (`tests/`) use
//! the same rooms.
//!
//! Nothing here is needed to update a machine: this crate depends on the others, none of them on it.

pub mod keeper;
pub mod kv;
pub mod lab;
pub mod load;
pub mod measure;
pub mod memo;
pub mod package;
pub mod story;
