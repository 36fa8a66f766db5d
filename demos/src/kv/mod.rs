//! `baton-kv`: a key-value server whose data lies in an arena, so that a live update carries it to the next kernel.
//!
//! It speaks RESP2 well enough for `redis-benchmark`, `redis-cli` and the `redis` crate, and answers `PING <bytes>` datagrams
//! on the same port for the prober. It is a demonstration of the service SDK, not a database: one thread, no expiry,
//! no replication, and what it does not know it refuses as redis 5 would.
//!
//! | file | what it is |
//! |---|---|
//! | `resp.rs` | bytes → requests, replies → bytes; hostile input ends here |
//! | `commands.rs` | one request → one reply |
//! | `connection.rs` | one client: its buffers, and what bounds them |
//! | `server.rs` | the event loop, in turns |
//! | `run.rs` | the service's life: stand by, serve, freeze |
//! | `rehearsal.rs` | what it does before it is ready, so that nothing is done for the first time in a blackout |
//!
//! # Why no acknowledged write can be lost
//! 1. A write is *acknowledged* when its reply is handed to the kernel's socket; no client can have seen it before.
//! 2. A reply is made only after its command has changed the arena ([`commands::execute`] returns, then its bytes are appended to
//!    the connection's output, then the output is written to the socket). So at every moment: acknowledged ⊆ in the arena.
//! 3. Everything happens in one thread, and a freeze is obeyed only between two turns of the event loop, where no command is
//!    under way. The arena then holds every executed request, whole.
//! 4. After the freeze this process cannot reach the arena (the SDK takes the right away) and sends nothing: replies that still
//!    lie in its own buffers stay there. Their writes are in the arena but not acknowledged: to their client the outcome is open,
//!    exactly as after any lost connection. They are sent after all if the service is unfrozen.
//! 5. The successor attaches to the same memory. Requests that lay unread in the incumbent's sockets were never executed and
//!    never acknowledged; their connections are reset and their clients repeat them.
//!
//! What is *not* promised: a request whose connection was reset may have been executed. A client that repeats an `INCR` may count
//! twice, as with any server of this kind.

pub mod commands;
pub mod connection;
pub mod rehearsal;
pub mod resp;
pub mod run;
pub mod server;
#[cfg(test)]
pub(crate) mod tests;
