//! Clients that measure a machine from outside: the open-loop prober and what is made of its samples.
//!
//! *Open loop*: requests leave at a fixed rate, whether or not earlier ones were answered, and each is judged by the time at which it
//! was **to be** sent. A client that waits for its answer before it asks again would ask once during a silence and count one slow
//! request; this one counts all that were due. Clocks are the host's; the guest's clock is never asked.
//!
//! Sockets are made in the calling thread, threads are started from it: whoever calls from inside the lab's network namespace
//! measures there.
//!
//! | file | what it is |
//! |---|---|
//! | `prober.rs` | 1 kHz of UDP probes, and how exactly they are paced and stamped |
//! | `tcp.rs` | the same question over TCP (RESP `PING`), on a kept connection or a fresh one each time |
//! | `samples.rs` | **what a blackout is**, latencies, CSV |
//! | `distribution.rs` | several runs of one figure: never only a mean |

mod distribution;
mod prober;
mod samples;
mod tcp;

pub use distribution::Distribution;
pub use prober::{ProbeOptions, Prober};
pub use samples::{Latencies, ProbeReport, Sample, Samples, Silence};
pub use tcp::{Connections, TcpOptions, TcpProber};
