//! Whole-machine tests live in `cases/`; this crate has no code of its own.
