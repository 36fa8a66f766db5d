//! A real CPU that is stopped at random instructions of a store's operations, and whoever takes the arena over.
//!
//! A child process works on an arena in memory that it shares with this one. It runs at full speed, is stopped by a signal
//! at any moment, led on by single instructions (`PTRACE_SINGLESTEP`), looked at between two of them, and now and then killed. What
//! memory holds then is what a stopped CPU leaves. After each stop the arena is taken over, in a copy or, after a kill, as it is: every
//! operation that was acknowledged is there, and the one under way wholly or not at all.
//!
//! The long run, with the compiler's optimisations:
//! `BATON_STOPS=100000 cargo test --release -p handover --test stopped_cpu -- --nocapture`; `BATON_SEED=N` repeats one, as far as
//! a machine with a clock can: the operations are the same, the moments are not.
#![expect(unsafe_code, reason = "fork, and memory that two processes map")]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};

use handover::arena::store::Kind;
use handover::arena::{ArenaError, Store, StoreError};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

const PAGE: usize = 4096;
const ARENA: usize = 64 << 10;
/// Stops of one child before it is killed.
const STOPS_OF_ONE: u64 = 40;

/// splitmix64: the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A page for the child's word, and an arena.
struct Shared(*mut u8);

impl Shared {
    fn new() -> Shared {
        let length = NonZeroUsize::new(PAGE + ARENA).expect("it is not zero");
        // SAFETY: a new mapping, at an address of the kernel's choice; it is never unmapped.
        let at =
            unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) };
        Shared(at.expect("there is memory").as_ptr().cast())
    }
    /// Operations that the child has acknowledged.
    fn acknowledged(&self) -> &AtomicU64 {
        // SAFETY: the mapping's first page, aligned, zero when new, used as this word by both processes only.
        unsafe { &*self.0.cast() }
    }
    /// The arena. The caller is the only one who runs and uses it: the child, or this process while the child is stopped or dead.
    #[expect(clippy::mut_from_ref, reason = "see above")]
    fn arena(&self) -> &mut [u8] {
        // SAFETY: behind the first page there are ARENA bytes of the mapping. One process at a time uses them.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(PAGE), ARENA) }
    }
}

/// Operation number `number` of this seed's.
fn operate(store: &mut Store<'_>, seed: u64, number: u64) {
    let mut random = Random(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
    let key = [b'k', random.below(6) as u8];
    let key = &key[..];
    let len = if random.below(8) == 0 { random.below(3000) } else { random.below(100) } as usize;
    let value: Vec<u8> = number.to_le_bytes().into_iter().cycle().take(len).collect();
    let member = random.below(60).to_le_bytes();
    let result = match random.below(40) {
        0..8 => store.set(key, &value),
        8..11 => store.del(key).map(drop),
        11..16 => store.lpush(key, &value).map(drop),
        16..20 => store.rpush(key, &value).map(drop),
        20..23 => store.lpop(key).map(drop),
        23..26 => store.rpop(key).map(drop),
        26..34 => store.sadd(key, &member).map(drop),
        34..39 => store.srem(key, &member).map(drop),
        _ => store.flush(),
    };
    match result {
        Ok(()) | Err(StoreError::WrongType { .. } | StoreError::Arena(ArenaError::OutOfMemory { .. })) => {}
        Err(other) => panic!("operation {number}: {other}"),
    }
}

type Content = BTreeMap<Vec<u8>, Vec<Vec<u8>>>;

fn content(store: &Store<'_>) -> Result<Content, StoreError> {
    let own = |item: Result<&[u8], StoreError>| item.map(<[u8]>::to_vec);
    let mut content = Content::new();
    for key in store.keys() {
        let key = key?;
        let items = match store.kind(key)?.expect("it is a key") {
            Kind::String => vec![store.get(key)?.expect("it is a string").to_vec()],
            Kind::List => store.lrange(key, 0, -1)?.map(own).collect::<Result<_, _>>()?,
            Kind::Set => {
                let mut members = store.smembers(key)?.map(own).collect::<Result<Vec<_>, _>>()?;
                members.sort();
                members
            }
        };
        content.insert(key.to_vec(), items);
    }
    Ok(content)
}

/// Mends, unseals, walks everything. Says whether there was something to mend.
fn take_over(memory: &mut [u8], epoch: u64) -> Result<(bool, Content), StoreError> {
    let mut store = Store::attach(memory)?;
    let torn = store.is_torn();
    store.reclaim(epoch)?;
    store.verify()?;
    Ok((torn, content(&store)?))
}

/// The same operations without any stop, always as many as were acknowledged.
struct Reference {
    memory: Vec<u8>,
    seed: u64,
    done: u64,
}

impl Reference {
    fn new(seed: u64) -> Reference {
        let mut memory = vec![0; ARENA];
        drop(Store::create(&mut memory, "stopped", 1, seed).expect("there is room"));
        Reference { memory, seed, done: 0 }
    }
    fn to(&mut self, acknowledged: u64) {
        let mut store = Store::attach(&mut self.memory).expect("it is whole");
        (self.done..acknowledged).for_each(|number| operate(&mut store, self.seed, number));
        self.done = acknowledged;
    }
    /// Compares with what was found: how many operations are in it.
    fn compare(&mut self, acknowledged: u64, found: &Content) -> Result<u64, String> {
        self.to(acknowledged);
        if content(&Store::attach(&mut self.memory).expect("it is whole")).as_ref() == Ok(found) {
            return Ok(acknowledged);
        }
        let mut next = self.memory.clone();
        let mut store = Store::attach(&mut next).expect("it is whole");
        operate(&mut store, self.seed, acknowledged);
        if content(&store).as_ref() == Ok(found) {
            return Ok(acknowledged + 1);
        }
        Err(format!(
            "{acknowledged} operations were acknowledged; the content is neither theirs nor that with one more"
        ))
    }
}

/// The child: stops itself once, for its parent, and works.
fn work(shared: &Shared, seed: u64, forgetful: bool) -> ! {
    ptrace::traceme().expect("a parent may trace");
    raise(Signal::SIGSTOP).expect("a signal to oneself");
    let acknowledged = shared.acknowledged();
    let mut store = Store::attach(shared.arena()).expect("it was mended");
    if forgetful {
        store.forget();
    }
    for number in acknowledged.load(Ordering::Relaxed).. {
        operate(&mut store, seed, number);
        acknowledged.store(number + 1, Ordering::Release);
    }
    unreachable!("2^64 operations")
}

/// Waits until the child is stopped.
fn stopped(child: Pid) {
    match waitpid(child, None).expect("it is our child") {
        WaitStatus::Stopped(_, Signal::SIGSTOP | Signal::SIGTRAP) => {}
        other => panic!("the child came to {other:?}"),
    }
}

#[derive(Debug, Default)]
struct Tally {
    stops: u64,
    torn: u64,
    kills: u64,
    operations: u64,
}

/// Stops children until there were so many stops, or the first one that left something torn.
fn stop_often(seed: u64, stops: u64, forgetful: bool) -> Result<Tally, String> {
    let mut random = Random(seed);
    let shared = Shared::new();
    let mut reference = Reference::new(seed);
    shared.arena().copy_from_slice(&reference.memory);
    let (mut tally, mut epoch) = (Tally::default(), 1);
    while tally.stops < stops {
        // SAFETY: this process has one more thread, the test harness's, which waits. The child allocates, which glibc allows after a
        // fork, and calls nothing else that another thread may have held.
        let child = match unsafe { fork() }.expect("there is room for a process") {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                // Whatever happens there, it never comes back into the harness.
                let _ = std::panic::catch_unwind(AssertUnwindSafe(|| work(&shared, seed, forgetful)));
                std::process::abort()
            }
        };
        stopped(child);
        let mut look = |in_place: bool, epoch: u64| -> Result<u64, String> {
            tally.stops += 1;
            let acknowledged = shared.acknowledged().load(Ordering::Acquire);
            let taken = match in_place {
                true => take_over(shared.arena(), epoch),
                false => take_over(&mut shared.arena().to_vec(), epoch),
            };
            let (torn, found) = taken.map_err(|error| format!("operation {acknowledged}: {error}"))?;
            tally.torn += u64::from(torn);
            reference.compare(acknowledged, &found)
        };
        let mut run = || -> Result<(), String> {
            for _ in 0..STOPS_OF_ONE / 4 {
                ptrace::cont(child, None).expect("it is stopped");
                // However busy the machine is: the child gets some operations further, and then anywhere.
                let until = shared.acknowledged().load(Ordering::Acquire) + random.below(4);
                while shared.acknowledged().load(Ordering::Acquire) < until {
                    let status = waitpid(child, Some(WaitPidFlag::WNOHANG)).expect("it is our child");
                    assert_eq!(status, WaitStatus::StillAlive, "the child ended by itself");
                    std::thread::yield_now();
                }
                for _ in 0..random.below(3000) {
                    std::hint::spin_loop();
                }
                kill(child, Signal::SIGSTOP).expect("it is there");
                stopped(child);
                look(false, epoch + 1)?;
                for _ in 0..3 {
                    for _ in 0..=random.below(30) {
                        ptrace::step(child, None).expect("it is stopped");
                        stopped(child);
                    }
                    look(false, epoch + 1)?;
                }
            }
            Ok(())
        };
        let ran = run();
        kill(child, Signal::SIGKILL).expect("it is there");
        waitpid(child, None).expect("it is our child");
        ran?;
        epoch += 1;
        let done = look(true, epoch)?;
        shared.acknowledged().store(done, Ordering::Release);
        tally.kills += 1;
        tally.operations = done;
    }
    Ok(tally)
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

#[test]
fn a_cpu_stopped_at_random_instructions_leaves_all_or_nothing() {
    let seed = number_from("BATON_SEED").unwrap_or_else(|| std::process::id().into());
    let stops = number_from("BATON_STOPS").unwrap_or(4000);
    println!("seed {seed} (BATON_SEED), {stops} stops (BATON_STOPS)");
    let tally = stop_often(seed, stops, false).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    println!("{tally:?}");
    assert!(tally.torn * 20 > tally.stops, "few stops were within a change: {tally:?}");
    // The check can fail: a store that saves nothing is found torn.
    let error = stop_often(seed, stops, true).expect_err("nothing was saved, and nothing was found torn");
    println!("without the record: {error}");
}
