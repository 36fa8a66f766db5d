//! What is done with any bytes in memory that two kernels share: the channel's rings, and an arena with a store in it.

use handover::arena::store::{SCHEMA_KIND, SCHEMA_VERSION, Store};
use handover::channel::{Channel, ChannelError, Side};
use state_schemas::arena::{
    ArenaHeader, HEADER_LEN, MAGIC, OLDEST_VERSION, STATE_LIVE, STATE_SEALED, VERSION, at, first_block,
};
use state_schemas::control_block::{Piece, RING_TO_INCUMBENT, RING_TO_SUCCESSOR, SIZE};
use state_schemas::header::{Frame, Kind};
use state_schemas::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::{Local, SharedMemory};

/// The first 16 bytes are the counts of each ring, the rest stands at the beginning of its data. Then, once more, the rest as what a
/// liar sends who keeps to the ring's form.
pub fn channel(bytes: &[u8]) {
    let mut words = bytes.chunks(8).map(|word| word.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte)));
    let (head, tail) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
    let rest = bytes.get(16..).unwrap_or_default();
    let memory = Local::new(SIZE);
    let fill = |ring: Piece| {
        memory.store(ring.offset, head);
        memory.store(ring.offset + 0x80, tail);
        let room = (ring.size - 0x100).min(64 << 10) as usize;
        memory.write(ring.offset + 0x100, &rest[..rest.len().min(room)]);
    };
    fill(RING_TO_SUCCESSOR);
    fill(RING_TO_INCUMBENT);
    drain(&memory);

    Channel::reset(&memory).expect("it is large enough");
    for (side, kind) in [(Side::Incumbent, Kind::ToSuccessor), (Side::Successor, Kind::ToIncumbent)] {
        let mut liar = Channel::attach(&memory, side).expect("it is large enough");
        for bytes in [rest.to_vec(), Frame { kind: kind as u16, version: 1, payload: rest }.to_bytes()] {
            // Too long is refused by whoever writes.
            let _ = liar.send_bytes(&bytes);
        }
    }
    drain(&memory);
}

/// Both sides take all that there is, and say something.
fn drain(memory: &Local) {
    /// More records than fit: what goes on longer than this does not end.
    const MOST: usize = (64 << 10) / 16 + 1;
    let mut incumbent = Channel::attach(memory, Side::Incumbent).expect("it is large enough");
    let mut successor = Channel::attach(memory, Side::Successor).expect("it is large enough");
    for taken in 0.. {
        assert!(taken <= 2 * MOST, "a ring does not end");
        let (one, other) = (incumbent.receive::<ToIncumbent>(), successor.receive::<ToSuccessor>());
        let over = |end: Result<bool, &ChannelError>| match end {
            Ok(some) => !some,
            // A ring that was broken says so for ever; a bad message was taken.
            Err(error) => matches!(error, ChannelError::Broken(_)),
        };
        if over(one.as_ref().map(Option::is_some)) && over(other.as_ref().map(Option::is_some)) {
            break;
        }
    }
    let _ = (incumbent.send(&ToSuccessor::StandBy), successor.send(&ToIncumbent::Healthy));
}

/// An arena of at most 64 KiB that says it is one of ours, whose allocator and store are any bytes; live, and sealed by the liar.
pub fn arena(bytes: &[u8]) {
    const MOST: usize = 64 << 10;
    let mut memory = bytes[..bytes.len().min(MOST)].to_vec();
    memory.resize(memory.len().next_multiple_of(HEADER_LEN as usize).max(3 * HEADER_LEN as usize), 0);
    // Any version that we read, whichever the bytes come nearest to.
    let version = OLDEST_VERSION + u32::from(memory[8]).wrapping_sub(OLDEST_VERSION) % (VERSION - OLDEST_VERSION + 1);
    let length = memory.len() as u64;
    let mut put = |at: u64, bytes: &[u8]| memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(8, &version.to_le_bytes());
    put(12, &(first_block(version) as u32).to_le_bytes());
    put(16, &length.to_le_bytes());
    put(24, b"fuzz\0");
    put(0x38, &SCHEMA_KIND.to_le_bytes());
    put(0x3c, &SCHEMA_VERSION.to_le_bytes());
    put(at::STATE_AND_SEAL, &STATE_SEALED.to_le_bytes());
    let crc = ArenaHeader::read(&memory).expect("it has a page").alleged().compute_seal();
    let sealed = u64::from(crc) << 32 | u64::from(STATE_SEALED);
    for state in [STATE_LIVE.into(), sealed] {
        memory[at::STATE_AND_SEAL as usize..][..8].copy_from_slice(&state.to_le_bytes());
        let Ok(mut store) = Store::attach(&mut memory) else { continue };
        let _ = store.verify();
        let keys: Vec<Vec<u8>> = store.keys().map_while(|key| key.ok().map(<[u8]>::to_vec)).take(64).collect();
        for key in &keys {
            let _ = (
                store.kind(key),
                store.get(key).map(|value| value.map(<[u8]>::len)),
                store.llen(key),
                store.scard(key),
            );
            let _ = store.lrange(key, 0, -1).map(|items| items.take(1000).filter(Result::is_ok).count());
            let _ = store.smembers(key).map(|members| members.take(1000).filter(Result::is_ok).count());
        }
        let _ = (store.unseal(u64::MAX - 9), store.reclaim(u64::MAX - 8));
        let _ = (store.set(b"new", &[1; 300]), store.rpush(b"list", b"item"), store.sadd(b"set", b"member"));
        for key in &keys {
            let _ = (store.append(key, b"more"), store.lpop(key), store.spop(key), store.del(key));
        }
        let _ = (store.flush(), store.verify());
    }
}
