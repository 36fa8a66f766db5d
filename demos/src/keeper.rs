//! A service that keeps pages and does nothing else: each page of its arena says by its content which page it is. So whoever looks at them
//! in a later kernel knows what they must be, and needs nobody's word for it.
//!
//! `labd keep MIB` is the service; `labd kept` asks it to look at every page now.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use baton_sdk::client::{Client, Order};
use baton_sdk::held::Held;
use baton_sdk::mapping::Arena;
use baton_sdk::protocol::{DEFAULT_SOCKET, Hello};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// The service's name towards the agent.
pub const NAME: &str = "keeper";
/// Kind of its state: `keep`.
const KIND: u32 = u32::from_le_bytes(*b"keep");
const PAGE: usize = 4096;
/// Where it is asked.
const SOCKET: &str = "/run/keeper";

/// Where there is a file of this name, the kernel panics as soon as the service has said that it serves: for a test of what becomes
/// of a cutover then.
pub const PANIC_WHEN_SERVING: &str = "/panic-when-serving";

/// What it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Pages that it looked at.
    pub pages: u64,
    /// Those that do not hold what they must.
    pub bad: u64,
}

/// What `labd luo SESSION TOKEN` tells of a memfd that it retrieved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retrieved {
    /// Its content.
    pub bytes: Vec<u8>,
    /// Physical addresses of its pages.
    pub pages: Vec<u64>,
}

/// Keeps pages until the agent says stop.
///
/// # Errors
/// The agent's, or the socket's.
pub fn keep(mib: u64) -> io::Result<()> {
    let (mut agent, mut arena) =
        Client::connect(DEFAULT_SOCKET.as_ref(), Hello::new(NAME, KIND, 1, mib << 20)).map_err(io::Error::other)?;
    // Left by the program's earlier life on this kernel, if anything.
    let _ = std::fs::remove_file(SOCKET);
    let door = UnixListener::bind(SOCKET)?;
    agent.ready().map_err(io::Error::other)?;
    while let Some(order) = agent.wait(None).map_err(io::Error::other)? {
        match order {
            Order::Serve(held) => serve(&mut agent, &mut arena, held, &door)?,
            Order::StandBy | Order::Freeze { .. } | Order::AgentIsBack => {}
            Order::Stop => break,
        }
    }
    Ok(())
}

fn serve(agent: &mut Client, arena: &mut Arena, held: Held, door: &UnixListener) -> io::Result<()> {
    if held.fresh {
        for (number, page) in (0u64..).zip(arena.memory(&held).chunks_exact_mut(PAGE)) {
            words(number)
                .zip(page.chunks_exact_mut(8))
                .for_each(|(word, place)| place.copy_from_slice(&word.to_le_bytes()));
        }
    }
    let pages = (arena.len() / PAGE) as u64;
    agent.activated(&held, pages, 0).map_err(io::Error::other)?;
    if Path::new(PANIC_WHEN_SERVING).exists() {
        std::fs::write("/proc/sysrq-trigger", "c")?;
    }
    loop {
        let mut ready = [PollFd::new(agent.as_fd(), PollFlags::POLLIN), PollFd::new(door.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::NONE)?;
        let asked = ready[1].any().unwrap_or(false);
        match agent.poll_order().map_err(io::Error::other)? {
            Some(Order::Freeze { .. }) => return agent.frozen(held, pages, 0).map_err(io::Error::other),
            Some(Order::Stop) => std::process::exit(0),
            _ if asked => {
                let found = look(arena.memory(&held));
                // Whoever asked and went away does not hear it.
                let _ = door.accept().and_then(|(mut asker, _)| asker.write_all(&serde_json::to_vec(&found)?));
            }
            _ => {}
        }
    }
}

/// What a page of this number holds: 512 words, no two of the machine alike.
fn words(page: u64) -> impl Iterator<Item = u64> {
    // Both odd constants are those of splitmix64; distinct inputs have distinct outputs.
    (page * 512..).map(|n| {
        let mixed = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) ^ 0x9e37_79b9_7f4a_7c15
    })
}

fn look(memory: &[u8]) -> Found {
    let is_good = |(number, page): &(u64, &[u8])| {
        words(*number).zip(page.chunks_exact(8)).all(|(word, there)| word.to_le_bytes() == there)
    };
    let (pages, good) = (memory.chunks_exact(PAGE), (0u64..).zip(memory.chunks_exact(PAGE)).filter(is_good));
    let (pages, good) = (pages.count() as u64, good.count() as u64);
    Found { pages, bad: pages - good }
}

/// Asks the service that runs here.
///
/// # Errors
/// It does not run, or is not allowed to look now.
pub fn ask() -> io::Result<Found> {
    let mut answer = Vec::new();
    UnixStream::connect(Path::new(SOCKET))?.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_that_is_not_itself_is_found() {
        let mut memory: Vec<u8> = (0..4).flat_map(words_of).collect();
        assert_eq!(look(&memory), Found { pages: 4, bad: 0 });
        memory[PAGE + 77] ^= 1;
        assert_eq!(look(&memory), Found { pages: 4, bad: 1 });
        let (left, right) = memory.split_at_mut(3 * PAGE);
        left[..PAGE].swap_with_slice(&mut right[..PAGE]);
        assert_eq!(look(&memory), Found { pages: 4, bad: 3 });
        assert_eq!(look(&[0; PAGE]).bad, 1);
    }

    fn words_of(page: u64) -> Vec<u8> {
        words(page).take(PAGE / 8).flat_map(u64::to_le_bytes).collect()
    }
}
