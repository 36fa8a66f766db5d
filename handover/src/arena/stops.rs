//! A model of every stop: the real operations run on memory that writes each store down; then memory is put together anew
//! for each moment at which the CPU may have been stopped, and somebody takes the arena over.
//!
//! x86 makes the stores of one CPU visible in program order, and a CPU that is stopped by INIT or halted loses none that it has
//! made (its store buffer drains). So what memory holds at a stop is some first part of the stores. Within one copy there is
//! no order: there, any of its bytes may be missing.

use super::memory::Birth;
use super::store::{SCHEMA_KIND, SCHEMA_VERSION};
use super::*;
use proptest::prelude::*;
use state_schemas::arena::{ArenaHeaderError, HEADER_LEN, RECORD_LEN, VERSION};
use std::collections::BTreeMap;

/// An operation of the owner. Keys are few, so that they meet.
#[derive(Debug, Clone)]
enum Op {
    Set(u8, usize),
    Del(u8),
    Push(u8, bool, usize),
    Pop(u8, bool),
    Add(u8, u16),
    Remove(u8, u16),
    Flush,
    Seal,
    /// The right to write goes to the next epoch.
    Reclaim,
}

fn op() -> impl Strategy<Value = Op> {
    let key = 0u8..5;
    let len = prop_oneof![6 => 0usize..60, 2 => 400usize..600, 1 => 600usize..4000];
    prop_oneof![
        8 => (key.clone(), len.clone()).prop_map(|(k, len)| Op::Set(k, len)),
        4 => key.clone().prop_map(Op::Del),
        8 => (key.clone(), any::<bool>(), len).prop_map(|(k, end, len)| Op::Push(k, end, len)),
        4 => (key.clone(), any::<bool>()).prop_map(|(k, end)| Op::Pop(k, end)),
        12 => (key.clone(), 0u16..40).prop_map(|(k, m)| Op::Add(k, m)),
        6 => (key, 0u16..40).prop_map(|(k, m)| Op::Remove(k, m)),
        1 => Just(Op::Flush),
        1 => Just(Op::Seal),
        1 => Just(Op::Reclaim),
    ]
}

/// Everything that can be read: each key, and what it holds in the order in which it holds it (sorted, where there is none).
type Content = BTreeMap<Vec<u8>, (u32, Vec<Vec<u8>>)>;

fn content(store: &Store<'_>) -> Result<Content, StoreError> {
    let mut content = Content::new();
    for key in store.keys() {
        let key = key?;
        let kind = store.kind(key)?.expect("it is a key");
        let own = |item: Result<&[u8], StoreError>| item.map(<[u8]>::to_vec);
        let mut items: Vec<Vec<u8>> = match kind {
            store::Kind::String => vec![store.get(key)?.expect("it is a string").to_vec()],
            store::Kind::List => store.lrange(key, 0, -1)?.map(own).collect::<Result<_, _>>()?,
            store::Kind::Set => store.smembers(key)?.map(own).collect::<Result<_, _>>()?,
        };
        if kind == store::Kind::Set {
            items.sort();
        }
        content.insert(key.to_vec(), (kind as u32, items));
    }
    Ok(content)
}

/// What is refused changes nothing, and is as good an operation as any.
fn apply(store: &mut Store<'_>, op: &Op, number: u64) {
    let name = |k: u8| vec![k; 1 + usize::from(k) * 5];
    let value = |len: usize| -> Vec<u8> { number.to_le_bytes().into_iter().cycle().take(len).collect() };
    let epoch = store.epoch();
    let result = match *op {
        Op::Set(k, len) => store.set(&name(k), &value(len)),
        Op::Del(k) => store.del(&name(k)).map(drop),
        Op::Push(k, true, len) => store.lpush(&name(k), &value(len)).map(drop),
        Op::Push(k, false, len) => store.rpush(&name(k), &value(len)).map(drop),
        Op::Pop(k, true) => store.lpop(&name(k)).map(drop),
        Op::Pop(k, false) => store.rpop(&name(k)).map(drop),
        Op::Add(k, m) => store.sadd(&name(k), &m.to_le_bytes()).map(drop),
        Op::Remove(k, m) => store.srem(&name(k), &m.to_le_bytes()).map(drop),
        Op::Flush => store.flush(),
        Op::Seal => store.seal(epoch).map(drop),
        Op::Reclaim => store.reclaim(epoch + 1),
    };
    match result {
        Ok(()) | Err(StoreError::WrongType { .. } | StoreError::Arena(ArenaError::OutOfMemory { .. })) => {}
        Err(StoreError::Arena(ArenaError::Sealed { .. } | ArenaError::NotOwner { .. })) if store.is_sealed() => {}
        Err(other) => panic!("{op:?}: {other}"),
    }
}

/// What the next owner found.
struct Found {
    content: Content,
    epoch: u64,
    /// The stores of mending, and of taking over.
    tape: Vec<(u64, Vec<u8>)>,
}

/// The next owner takes over: mends, unseals, walks everything.
fn take_over(memory: &mut [u8], epoch: u64) -> Result<Found, StoreError> {
    let mut store = Store::attach(memory)?;
    if store.is_torn() {
        // Nobody reads it before it is mended.
        assert!(store.len().is_err() && store.set(b"k", b"v").is_err() && store.verify().is_err());
    }
    store.tape().clear();
    store.reclaim(epoch)?;
    let tape = std::mem::take(store.tape());
    assert!(!store.is_torn() && !store.is_sealed() && store.epoch() == epoch);
    store.verify()?;
    Ok(Found { content: content(&store)?, epoch, tape })
}

fn put(memory: &mut [u8], (at, bytes): &(u64, Vec<u8>)) {
    memory[*at as usize..][..bytes.len()].copy_from_slice(bytes);
}

/// Memory as it may be at each stop among these stores: after each of them, and within each copy.
fn each_stop(before: &[u8], tape: &[(u64, Vec<u8>)], seed: u64, mut stopped: impl FnMut(usize, &[u8])) {
    let mut memory = before.to_vec();
    let mut random = seed | 1;
    stopped(0, &memory);
    for (number, store) in tape.iter().enumerate() {
        if store.1.len() > 8 {
            let mut within = memory.clone();
            for (byte, new) in within[store.0 as usize..].iter_mut().zip(&store.1) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                if random.is_multiple_of(2) {
                    *byte = *new;
                }
            }
            stopped(number, &within);
        }
        put(&mut memory, store);
        stopped(number + 1, &memory);
    }
}

/// What a checker of stops says of one operation: stops that were looked at, or the first that left something torn.
fn check_operation(before: &[u8], tape: &[(u64, Vec<u8>)], now: &[u8], seed: u64) -> Result<u64, String> {
    // A service that was stopped in its own kernel, or whose kernel was: the next epoch takes over in both cases.
    let epoch = 1000;
    let old = take_over(&mut before.to_vec(), epoch).map_err(|error| format!("before it: {error}"))?.content;
    let new = take_over(&mut now.to_vec(), epoch).map_err(|error| format!("after it: {error}"))?.content;
    let (mut stops, mut verdict) = (0, Ok(()));
    let mut is_final = false;
    each_stop(before, tape, seed, |number, memory| {
        if verdict.is_err() {
            return;
        }
        stops += 1;
        let mut check = || -> Result<(), String> {
            let found = take_over(&mut memory.to_vec(), epoch).map_err(|error| error.to_string())?;
            if found.content != old && found.content != new {
                return Err("neither the old content nor the new".to_owned());
            }
            if old != new && is_final && found.content == old {
                return Err("it was there already, and is gone again".to_owned());
            }
            is_final |= found.content == new;
            // Whoever mends is stopped, too: of all these stops, at some thirty that lie anywhere.
            if (seed + number as u64).is_multiple_of(7) {
                let (mut again, mut count, stride) = (Ok(()), seed, 1 + found.tape.len() as u64 / 30);
                each_stop(memory, &found.tape, seed, |_, memory| {
                    count += 1;
                    if !count.is_multiple_of(stride) {
                        return;
                    }
                    stops += 1;
                    // The one who was stopped may have been let in already: the next has a newer epoch.
                    match take_over(&mut memory.to_vec(), found.epoch + 1) {
                        Ok(second) if second.content == found.content => {}
                        Ok(_) => again = Err("mended twice, it is another".to_owned()),
                        Err(error) => again = Err(format!("mended twice: {error}")),
                    }
                });
                again?;
            }
            Ok(())
        };
        verdict = check().map_err(|error| format!("stopped after {number} of {} stores: {error}", tape.len()));
    });
    verdict.map(|()| stops)
}

/// Runs operations on an arena, and checks the stops of each. `change` is what the memory does to the stores: nothing, in a machine.
fn run(
    ops: &[Op],
    kib: usize,
    version: u32,
    forgetful: bool,
    change: impl Fn(&mut Vec<(u64, Vec<u8>)>),
    seed: u64,
) -> Result<u64, String> {
    let mut memory = vec![0; kib << 10];
    let birth = Birth { name: "stops", schema_kind: SCHEMA_KIND, schema_version: SCHEMA_VERSION, epoch: 1, seed };
    drop(Store::born(&mut memory, birth, version).expect("there is room"));
    let mut stops = 0;
    for (number, op) in ops.iter().enumerate() {
        let before = memory.clone();
        let mut store = Store::attach(&mut memory).map_err(|error| error.to_string())?;
        if forgetful {
            store.forget();
        }
        store.tape().clear();
        apply(&mut store, op, number as u64);
        let mut tape = std::mem::take(store.tape());
        change(&mut tape);
        stops += check_operation(&before, &tape, &memory, seed ^ number as u64)
            .map_err(|error| format!("operation {number}, {op:?}: {error}"))?;
    }
    Ok(stops)
}

fn cases(few: u32) -> u32 {
    if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default().cases } else { few }
}

proptest! {
    // More of them: `PROPTEST_CASES=1000 cargo test --release -p handover --lib stops`.
    #![proptest_config(ProptestConfig { cases: cases(6), ..ProptestConfig::default() })]

    #[test]
    fn whoever_is_stopped_anywhere_leaves_all_or_nothing(
        ops in proptest::collection::vec(op(), 1..40),
        kib in prop_oneof![Just(16usize), Just(32)],
        seed in any::<u64>(),
    ) {
        prop_assert_eq!(run(&ops, kib, VERSION, false, |_| {}, seed >> 1).err(), None);
    }
}

/// A list and a set that take many steps to free, and the emptying of all of it.
#[test]
fn many_steps_are_one_change() {
    let mut ops: Vec<Op> = (0..20).map(|m| Op::Add(1, m)).collect();
    ops.extend((0..12).map(|len| Op::Push(2, len % 2 == 0, len)));
    ops.extend([Op::Del(1), Op::Set(2, 10), Op::Push(3, true, 5), Op::Flush, Op::Seal, Op::Reclaim, Op::Set(1, 1)]);
    let stops = run(&ops, 16, VERSION, false, |_| {}, 5).unwrap();
    assert!(stops > 2000, "{stops}");
}

/// Operations whose torn states are many: each checker below has to find one.
fn telling() -> Vec<Op> {
    let mut ops: Vec<Op> = (0..12).map(|m| Op::Add(1, m)).collect();
    ops.extend([Op::Push(2, true, 10), Op::Push(2, false, 20), Op::Set(0, 50), Op::Set(0, 40), Op::Set(3, 700)]);
    ops.extend([Op::Pop(2, true), Op::Del(0), Op::Del(1), Op::Set(3, 20), Op::Flush]);
    ops
}

/// The check can fail: without a record, or in a memory that keeps no order, it finds what is torn.
#[test]
fn the_check_finds_torn_arenas() {
    assert!(run(&telling(), 32, VERSION, false, |_| {}, 3).is_ok());
    let record = HEADER_LEN..HEADER_LEN + RECORD_LEN;
    let torn = |what: &str, result: Result<u64, String>| {
        let error = result.expect_err(what);
        assert!(error.contains("stopped after"), "{what}: {error}");
    };
    torn("nothing is saved", run(&telling(), 32, VERSION, true, |_| {}, 3));
    torn("the record does not reach memory", {
        run(&telling(), 32, VERSION, false, |tape| tape.retain(|(at, _)| !record.contains(at)), 3)
    });
    torn("a store overtakes the record of what was there before", {
        let overtake = |tape: &mut Vec<(u64, Vec<u8>)>| {
            for number in 1..tape.len() {
                // The length of the record that covers the next store, and that store.
                if tape[number - 1].0 == HEADER_LEN && !record.contains(&tape[number].0) {
                    tape.swap(number - 1, number);
                }
            }
        };
        run(&telling(), 32, VERSION, false, overtake, 3)
    });
    torn("the mark that a change is under way does not reach memory", {
        let mark = state_schemas::arena::at::MUTATIONS;
        run(&telling(), 32, VERSION, false, |tape| tape.retain(|(at, _)| *at != mark), 3)
    });
}

/// Every word that an operation changes in place stands in the record first, so that no single one can be left out: the record is
/// taken away entry by entry.
#[test]
fn no_entry_is_there_for_nothing() {
    let mut memory = vec![0; 32 << 10];
    let mut store = Store::create(&mut memory, "kv", 1, 3).unwrap();
    for m in 0..20u16 {
        store.sadd(b"set", &m.to_le_bytes()).unwrap();
    }
    let before = memory.clone();
    let mut store = Store::attach(&mut memory).unwrap();
    store.tape().clear();
    store.srem(b"set", &7u16.to_le_bytes()).unwrap();
    let tape = std::mem::take(store.tape());
    // The stores into the record that make an entry count.
    let counts: Vec<usize> = (0..tape.len()).filter(|&at| tape[at].0 == HEADER_LEN && tape[at].1 != [0; 8]).collect();
    assert!(counts.len() > 4, "{}", counts.len());
    let mut found = 0;
    for count in &counts {
        let mut without = tape.clone();
        // This entry restores what is there now: the word after it.
        let (at, new) = tape[count + 1].clone();
        assert!(!(HEADER_LEN..HEADER_LEN + RECORD_LEN).contains(&at), "the change follows its entry");
        let entry = tape[..*count].iter().rposition(|(at, _)| *at != HEADER_LEN).unwrap();
        without[entry - 1].1 = new;
        if check_operation(&before, &without, &memory, 0).is_err() {
            found += 1;
        }
    }
    // A word that is written twice has two entries: only the older one tells.
    assert!(found * 2 > counts.len(), "{found} of {}", counts.len());
}

/// An arena of version 1 is torn by a stop within a change; it says so, and nobody takes it for whole.
#[test]
fn the_old_version_says_that_it_is_torn() {
    let mut memory = vec![0; 16 << 10];
    let birth = Birth { name: "v1", schema_kind: SCHEMA_KIND, schema_version: SCHEMA_VERSION, epoch: 1, seed: 1 };
    let mut store = Store::born(&mut memory, birth, 1).unwrap();
    store.tape().clear();
    store.rpush(b"list", b"item").unwrap();
    let tape = std::mem::take(store.tape());
    let whole = content(&store).unwrap();
    let mut image = vec![0; 16 << 10];
    drop(Store::born(&mut image, birth, 1).unwrap());
    let (mut told, mut old) = (0, 0);
    each_stop(&image.clone(), &tape, 1, |_, memory| match take_over(&mut memory.to_vec(), 2) {
        Ok(found) if found.content == whole => {}
        Ok(found) => {
            assert!(found.content.is_empty());
            old += 1;
        }
        Err(StoreError::Arena(ArenaError::Header(ArenaHeaderError::Torn { .. }))) => told += 1,
        Err(other) => panic!("{other}"),
    });
    assert!(told > 10 && old == 1, "{told} {old}");
}

/// A birth that was stopped is no arena.
#[test]
fn who_is_stopped_in_a_birth_leaves_no_arena() {
    let mut memory = vec![0xa5; 16 << 10];
    let mut old = Store::create(&mut memory, "old", 1, 3).unwrap();
    old.set(b"k", b"v").unwrap();
    let before = memory.clone();
    let birth = Birth { name: "new", schema_kind: SCHEMA_KIND, schema_version: SCHEMA_VERSION, epoch: 1, seed: 1 };
    let tape = std::mem::take(Store::born(&mut memory, birth, VERSION).unwrap().tape());
    let mut seen = [0; 3];
    each_stop(&before, &tape, 9, |number, memory| match Store::attach(&mut memory.to_vec()) {
        Ok(store) if number == 0 => {
            assert_eq!(store.get(b"k").unwrap(), Some(&b"v"[..]));
            seen[0] += 1;
        }
        Ok(store) => {
            assert!(number == tape.len() && store.verify().unwrap().keys == 0);
            seen[1] += 1;
        }
        Err(StoreError::Arena(ArenaError::Header(ArenaHeaderError::NotAnArena { .. }))) => seen[2] += 1,
        Err(other) => panic!("{other}"),
    });
    assert!(seen[0] == 1 && seen[1] == 1 && seen[2] > 10, "{seen:?}");
}
