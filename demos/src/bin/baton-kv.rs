//! `baton-kv`: the demo service. See `demos::kv` for what it is and what it promises.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use baton_sdk::protocol::DEFAULT_SOCKET;
use clap::Parser;
use demos::kv::run::{Options, standalone, under_agent};

/// A key-value server (RESP2) whose data crosses a live update in place.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address and port, TCP for RESP and UDP for probes; give the service's own address: the machine need not have it yet
    #[arg(long, default_value = "0.0.0.0:6379")]
    listen: SocketAddr,
    /// The agent's socket
    #[arg(long, default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Size of the arena to ask for, in MiB
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    arena_mib: u64,
    /// Clients at most
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_clients: u32,
    /// Serve without an agent, on memory that ends with the process
    #[arg(long)]
    standalone: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options = Options {
        listen: arguments.listen,
        socket: arguments.socket,
        arena_mib: arguments.arena_mib,
        max_clients: arguments.max_clients as usize,
    };
    let ended = if arguments.standalone { standalone(&options) } else { under_agent(&options) };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baton-kv: {error}");
            ExitCode::FAILURE
        }
    }
}
