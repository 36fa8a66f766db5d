//! KHO and LUO formats: what is written is what the kernel reads, and whatever else lies in memory is refused in
//! bounded time.
//!
//! | file | promise |
//! |---|---|
//! | `kernel.rs` | a second reader, written after the kernel's code, finds what the writer was told |
//! | `round_trip.rs` | so does our own, for anything that can be said |
//! | `luo.rs` | sessions and memfds come out, too |
//! | `golden.rs` | the bytes do not change, and those of old releases are read |
//! | `hostile.rs` | bytes of a kernel that lies are refused; also those that the fuzzer begins with |

#[path = "../../fuzz/src/entry.rs"]
mod entry;
mod golden;
mod hostile;
mod kernel;
mod luo;
mod round_trip;
mod sample;
