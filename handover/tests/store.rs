//! A store against std's collections, across reopening, with a full arena, and on bytes that lie.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use handover::arena::{ArenaError, Store, StoreError, Verified};
use proptest::prelude::*;
use state_schemas::arena::{ArenaHeader, ArenaHeaderError};

#[derive(Debug, Clone)]
enum Op {
    Set(u8, Vec<u8>),
    Incr(u8, i64),
    Append(u8, Vec<u8>),
    Del(u8),
    Push(u8, bool, Vec<u8>),
    Pop(u8, bool),
    Add(u8, u16),
    Remove(u8, u16),
    SPop(u8),
    Range(u8, i64, i64),
    Flush,
    Reopen,
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => proptest::collection::vec(any::<u8>(), 0..3000),
        2 => "-?[0-9]{1,19}".prop_map(String::into_bytes),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let key = 0u8..12;
    prop_oneof![
        6 => (key.clone(), bytes()).prop_map(|(k, v)| Op::Set(k, v)),
        3 => (key.clone(), any::<i64>()).prop_map(|(k, n)| Op::Incr(k, n)),
        2 => (key.clone(), bytes()).prop_map(|(k, v)| Op::Append(k, v)),
        4 => key.clone().prop_map(Op::Del),
        8 => (key.clone(), any::<bool>(), bytes()).prop_map(|(k, f, v)| Op::Push(k, f, v)),
        5 => (key.clone(), any::<bool>()).prop_map(|(k, f)| Op::Pop(k, f)),
        12 => (key.clone(), 0u16..200).prop_map(|(k, m)| Op::Add(k, m)),
        5 => (key.clone(), 0u16..200).prop_map(|(k, m)| Op::Remove(k, m)),
        2 => key.clone().prop_map(Op::SPop),
        3 => (key, -12i64..12, -12i64..12).prop_map(|(k, a, b)| Op::Range(k, a, b)),
        1 => Just(Op::Flush),
        2 => Just(Op::Reopen),
    ]
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    String(Vec<u8>),
    List(VecDeque<Vec<u8>>),
    Set(BTreeSet<Vec<u8>>),
}

type Model = BTreeMap<Vec<u8>, Value>;

/// Everything that a store holds, read through its own interface.
fn content(store: &Store<'_>) -> Model {
    let mut model = Model::new();
    for key in store.keys() {
        let key = key.unwrap();
        let value = match store.kind(key).unwrap().unwrap() {
            handover::arena::store::Kind::String => Value::String(store.get(key).unwrap().unwrap().to_vec()),
            handover::arena::store::Kind::List => {
                Value::List(store.lrange(key, 0, -1).unwrap().map(|item| item.unwrap().to_vec()).collect())
            }
            handover::arena::store::Kind::Set => {
                Value::Set(store.smembers(key).unwrap().map(|member| member.unwrap().to_vec()).collect())
            }
        };
        assert!(model.insert(key.to_vec(), value).is_none(), "a key came twice");
    }
    assert_eq!(model.len() as u64, store.len().unwrap());
    model
}

/// Applies an operation to both and compares what they answer. A full arena must change nothing.
fn apply(store: &mut Store<'_>, model: &mut Model, op: Op) {
    let before = model.clone();
    let name = |k: u8| format!("key:{k}").into_bytes();
    let result: Result<(), StoreError> = match op {
        Op::Set(k, v) => store.set(&name(k), &v).map(|()| {
            model.insert(name(k), Value::String(v));
        }),
        Op::Incr(k, by) => store.incr(&name(k), by).map(|sum| {
            let Value::String(old) = model.entry(name(k)).or_insert(Value::String(b"0".to_vec())) else {
                panic!("incremented what is no string")
            };
            let old: i64 = std::str::from_utf8(old).unwrap().parse().unwrap();
            assert_eq!(sum, old + by);
            model.insert(name(k), Value::String(sum.to_string().into_bytes()));
        }),
        Op::Append(k, tail) => store.append(&name(k), &tail).map(|len| {
            let Value::String(old) = model.entry(name(k)).or_insert(Value::String(vec![])) else {
                panic!("appended to what is no string")
            };
            old.extend_from_slice(&tail);
            assert_eq!(len, old.len() as u64);
        }),
        Op::Del(k) => store.del(&name(k)).map(|was| assert_eq!(was, model.remove(&name(k)).is_some())),
        Op::Push(k, front, v) => {
            let pushed = if front { store.lpush(&name(k), &v) } else { store.rpush(&name(k), &v) };
            pushed.map(|len| {
                let Value::List(list) = model.entry(name(k)).or_insert(Value::List(VecDeque::new())) else {
                    panic!("pushed to what is no list")
                };
                if front {
                    list.push_front(v)
                } else {
                    list.push_back(v)
                }
                assert_eq!(len, list.len() as u64);
            })
        }
        Op::Pop(k, front) => {
            let popped = if front { store.lpop(&name(k)) } else { store.rpop(&name(k)) };
            popped.map(|item| {
                let expected = match model.get_mut(&name(k)) {
                    Some(Value::List(list)) => {
                        let item = if front { list.pop_front() } else { list.pop_back() };
                        if list.is_empty() {
                            model.remove(&name(k));
                        }
                        item
                    }
                    Some(_) => panic!("popped from what is no list"),
                    None => None,
                };
                assert_eq!(item, expected);
            })
        }
        Op::Add(k, m) => store.sadd(&name(k), &m.to_le_bytes()).map(|added| {
            let Value::Set(set) = model.entry(name(k)).or_insert(Value::Set(BTreeSet::new())) else {
                panic!("added to what is no set")
            };
            assert_eq!(added, set.insert(m.to_le_bytes().to_vec()));
            assert_eq!(store.scard(&name(k)).unwrap(), set.len() as u64);
        }),
        Op::Remove(k, m) => store.srem(&name(k), &m.to_le_bytes()).map(|removed| {
            assert!(!store.sismember(&name(k), &m.to_le_bytes()).unwrap());
            let mut expected = false;
            if let Some(Value::Set(set)) = model.get_mut(&name(k)) {
                expected = set.remove(&m.to_le_bytes()[..]);
                if set.is_empty() {
                    model.remove(&name(k));
                }
            }
            assert_eq!(removed, expected);
        }),
        Op::SPop(k) => store.spop(&name(k)).map(|member| match member {
            Some(member) => {
                let Some(Value::Set(set)) = model.get_mut(&name(k)) else { panic!("no set") };
                assert!(set.remove(&member));
                if set.is_empty() {
                    model.remove(&name(k));
                }
            }
            None => assert!(!model.contains_key(&name(k))),
        }),
        Op::Range(k, start, stop) => store.lrange(&name(k), start, stop).map(|items| {
            let announced = items.len();
            let items: Vec<_> = items.map(|item| item.unwrap().to_vec()).collect();
            assert_eq!(announced, items.len());
            let list = match model.get(&name(k)) {
                Some(Value::List(list)) => list.clone(),
                _ => VecDeque::new(),
            };
            let len = list.len() as i64;
            let from_end = |i: i64| if i < 0 { i + len } else { i };
            let (start, stop) = (from_end(start).max(0), from_end(stop));
            let expected: Vec<_> = (start..=stop).filter_map(|i| list.get(usize::try_from(i).ok()?).cloned()).collect();
            assert_eq!(items, expected);
        }),
        Op::Flush => store.flush().map(|()| model.clear()),
        Op::Reopen => Ok(()),
    };
    match result {
        Ok(()) => {}
        Err(StoreError::Arena(ArenaError::OutOfMemory { .. })) => {
            assert_eq!(*model, before);
            assert_eq!(content(store), before, "a refused operation changed something");
        }
        Err(StoreError::WrongType { .. } | StoreError::NotAnInteger | StoreError::Overflow { .. }) => {
            assert_eq!(*model, before);
        }
        Err(other) => panic!("{other}"),
    }
}

/// `tests/golden/arena-v1` was written by the last Baton that knew no other version: a deleted key, a list, a set, sealed at epoch 3. Such
/// an arena is read and written as what it is, and stays readable for the program that made it.
#[test]
fn an_arena_of_the_old_version_attaches_and_keeps_its_version() {
    let golden = include_bytes!("golden/arena-v1");
    let mut memory = golden.to_vec();
    let mut store = Store::attach(&mut memory).unwrap();
    assert_eq!(store.verify().unwrap(), Verified { keys: 3, blocks: 14, free_blocks: 1 });
    let list: VecDeque<_> = ["one", "two", "three"].map(|item| item.as_bytes().to_vec()).into();
    let set = ["red", "green"].map(|member| member.as_bytes().to_vec()).into();
    let expected = Model::from([
        (b"greeting".to_vec(), Value::String(b"hello".to_vec())),
        (b"list".to_vec(), Value::List(list)),
        (b"set".to_vec(), Value::Set(set)),
    ]);
    assert_eq!(content(&store), expected);
    store.unseal(4).unwrap();
    store.set(b"greeting", b"hello again, in more words").unwrap();
    // Also where there is no room: what was begun is taken back from the process's own record.
    let before = content(&store);
    assert!(matches!(store.sadd(b"new", &[1; 3000]), Err(StoreError::Arena(ArenaError::OutOfMemory { .. }))));
    assert_eq!(content(&store), before);
    store.flush().unwrap();
    assert_eq!(store.verify().unwrap(), Verified { keys: 0, blocks: 2, free_blocks: 0 });
    assert_eq!(ArenaHeader::read(&memory).unwrap().alleged().version.get(), 1);

    // It has no record: who was stopped within a change leaves what nobody takes for whole.
    let mut torn = golden.to_vec();
    torn[state_schemas::arena::at::MUTATIONS as usize] |= 1;
    torn[state_schemas::arena::at::STATE_AND_SEAL as usize] = 1;
    let error = Store::attach(&mut torn).unwrap_err();
    assert!(matches!(error, StoreError::Arena(ArenaError::Header(ArenaHeaderError::Torn { .. }))), "{error}");
}

/// The bytes of today's version: `tests/golden/arena-v2`, sealed; `arena-v2-torn`, stopped within the second change.
#[test]
fn the_bytes_of_an_arena_are_as_released() {
    let mut memory = vec![0; 12 << 10];
    let mut store = Store::create(&mut memory, "golden", 3, 0x1234_5678_9abc_def0).unwrap();
    store.set(b"greeting", b"hello").unwrap();
    store.set(b"gone", b"this one is deleted").unwrap();
    for item in ["one", "two", "three"] {
        store.rpush(b"list", item.as_bytes()).unwrap();
    }
    for member in ["red", "green"] {
        store.sadd(b"set", member.as_bytes()).unwrap();
    }
    store.del(b"gone").unwrap();
    store.seal(3).unwrap();
    golden("arena-v2", &memory);

    // What a stop leaves of `set(greeting, HELLO)`: the record of one entry of two words, the first of them written over.
    let mut torn = golden("arena-v2", &memory);
    let at = torn.windows(5).rposition(|bytes| bytes == b"hello").unwrap();
    let put = |memory: &mut [u8], at: u64, word: u64| memory[at as usize..][..8].copy_from_slice(&word.to_le_bytes());
    use state_schemas::arena::at::{ENTRIES, MUTATIONS, RECORD, STATE_AND_SEAL};
    let old = u64::from_le_bytes(torn[at..at + 8].try_into().unwrap());
    put(&mut torn, STATE_AND_SEAL, 1);
    torn[MUTATIONS as usize] |= 1;
    put(&mut torn, RECORD, 3);
    put(&mut torn, ENTRIES, 5);
    put(&mut torn, ENTRIES + 8, old);
    put(&mut torn, ENTRIES + 16, 2 << 48 | (at as u64 - 8));
    torn[at..at + 3].copy_from_slice(b"HEL");
    let mut torn = golden("arena-v2-torn", &torn);
    let mut store = Store::attach(&mut torn).unwrap();
    assert!(store.is_torn());
    store.reclaim(4).unwrap();
    assert_eq!(store.get(b"greeting").unwrap(), Some(&b"hello"[..]));
    assert_eq!(store.verify().unwrap().keys, 3);
}

/// The golden bytes, which are those given; `BATON_GOLDEN=write` writes them where they are missing.
fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let differs = golden.iter().zip(bytes).position(|(a, b)| a != b);
    assert!(golden == bytes, "{name} differs from byte {differs:?} on: a released version may not change");
    golden
}

/// Records that lie, under a mark that says there is something to mend.
#[test]
fn a_record_that_lies_is_refused() {
    use state_schemas::arena::at::{ENTRIES, LENGTH, MUTATIONS, PENDING, RECORD};
    let mut whole = vec![0; 1 << 16];
    let mut store = Store::create(&mut whole, "kv", 1, 0).unwrap();
    store.rpush(b"list", b"item").unwrap();
    whole[MUTATIONS as usize] |= 1;
    let entry = |words: u64, at: u64| words << 48 | at;
    for (length, last, pending) in [
        (511, 0, 0),                     // longer than the record
        (2, entry(2, 0x2008), 0),        // begins before it
        (2, entry(0, 0x2008), 0),        // no words
        (2, entry(1, 0x2009), 0),        // no word
        (2, entry(1, LENGTH), 0),        // a word that no change changes
        (2, entry(1, 0), 0),             // the magic
        (2, entry(1, RECORD), 0),        // itself
        (3, entry(2, PENDING), 0),       // more than one word there
        (2, entry(1, 1 << 16), 0),       // beyond the arena
        (2, entry(1, (1 << 48) - 8), 0), // far beyond
        (3, entry(2, (1 << 16) - 8), 0), // over its end
        (0, 0, 7),                       // nothing that can be freed
        (0, 0, 0x2000 + 1),              // no payload
        (0, 0, (1 << 40) + 8 + 1),       // beyond
        (0, 0, 0x2008 + 2 + 0x100),      // no map there
    ] {
        let mut memory = whole.clone();
        let mut put = |at: u64, word: u64| memory[at as usize..][..8].copy_from_slice(&word.to_le_bytes());
        put(RECORD, length);
        if (1..=510).contains(&length) {
            put(ENTRIES + 8 * (length - 1), last);
        }
        put(PENDING, pending);
        let mut store = Store::attach(&mut memory).unwrap();
        let error = store.reclaim(1).unwrap_err();
        assert!(
            matches!(error, StoreError::Arena(ArenaError::Corrupt { .. })),
            "{length} {last:#x} {pending:#x}: {error}"
        );
        assert!(store.is_torn() && store.get(b"k").is_err(), "nobody takes it for whole");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_std_collections(
        ops in proptest::collection::vec(op(), 1..250),
        kib in prop_oneof![Just(16usize), Just(64), Just(1024)],
    ) {
        let mut memory = vec![0xa5; kib * 1024];
        let mut model = Model::new();
        let mut epoch = 1;
        let mut store = Store::create(&mut memory, "test", epoch, 99).unwrap();
        for op in ops {
            let reopen = matches!(op, Op::Reopen);
            apply(&mut store, &mut model, op);
            store.verify().unwrap();
            if reopen {
                store.seal(epoch).unwrap();
                store = Store::attach(&mut memory).unwrap();
                prop_assert!(store.is_sealed());
                epoch += 1;
                store.unseal(epoch).unwrap();
                prop_assert_eq!(&content(&store), &model);
            }
        }
        prop_assert_eq!(&content(&store), &model);
        let keys: Vec<_> = model.keys().cloned().collect();
        for key in keys {
            prop_assert!(store.del(&key).unwrap());
        }
        // Nothing leaks: an emptied store is as small as a new one.
        let Verified { keys, blocks, free_blocks } = store.verify().unwrap();
        prop_assert_eq!(keys, 0);
        prop_assert_eq!((blocks, free_blocks), (2, 0));
    }

    #[test]
    fn bytes_that_lie_never_panic(
        ops in proptest::collection::vec(op(), 10..60),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>(), any::<bool>()), 1..12),
        afterwards in proptest::collection::vec(op(), 1..40),
    ) {
        let mut memory = vec![0; 36 * 1024];
        let mut model = Model::new();
        let mut store = Store::create(&mut memory, "test", 1, 5).unwrap();
        for op in ops {
            apply(&mut store, &mut model, op);
        }
        let top = store.usage().top as usize;
        let words: Vec<u64> = memory[..top].as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        for (index, value, plausible) in damage {
            // Half of the damage is a value that stands elsewhere in the arena: such lies look most like truth.
            let value = if plausible { words[value as usize % words.len()] } else { value };
            let at = index.index(top / 8) * 8;
            memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let Ok(mut store) = Store::attach(&mut memory) else { return Ok(()) };
        let _ = store.verify();
        let _ = store.reclaim(u64::MAX - 8);
        for op in afterwards {
            hostile(&mut store, op);
        }
        let _ = store.flush();
    }

    #[test]
    fn any_bytes_at_all_never_panic(mut memory in proptest::collection::vec(any::<u8>(), 0..9000)) {
        let _ = Store::attach(&mut memory);
    }
}

/// Every operation, with no care for its answer.
fn hostile(store: &mut Store<'_>, op: Op) {
    let name = |k: u8| format!("key:{k}").into_bytes();
    for _ in store.keys().take(10_000) {}
    let _ = match op {
        Op::Set(k, v) => store.set(&name(k), &v).err(),
        Op::Incr(k, by) => store.incr(&name(k), by).err(),
        Op::Append(k, v) => store.append(&name(k), &v).err(),
        Op::Del(k) => store.del(&name(k)).err(),
        Op::Push(k, true, v) => store.lpush(&name(k), &v).err(),
        Op::Push(k, false, v) => store.rpush(&name(k), &v).err(),
        Op::Pop(k, true) => store.lpop(&name(k)).err(),
        Op::Pop(k, false) => store.rpop(&name(k)).err(),
        Op::Add(k, m) => store.sadd(&name(k), &m.to_le_bytes()).err(),
        Op::Remove(k, m) => store.srem(&name(k), &m.to_le_bytes()).err(),
        Op::SPop(k) => store.spop(&name(k)).err(),
        Op::Range(k, a, b) => store.lrange(&name(k), a, b).map(|items| items.take(10_000).count()).err(),
        Op::Flush | Op::Reopen => None,
    };
}

#[test]
fn many_keys_and_a_constant_time_seal() {
    let mut memory = vec![0; 64 << 20];
    let mut store = Store::create(&mut memory, "big", 1, 7).unwrap();
    for n in 0..200_000u32 {
        store.set(format!("key:{n:012}").as_bytes(), &n.to_le_bytes()).unwrap();
    }
    store.verify().unwrap();
    store.seal(1).unwrap();
    let mut store = Store::attach(&mut memory).unwrap();
    store.unseal(2).unwrap();
    assert_eq!(store.len().unwrap(), 200_000);
    assert_eq!(store.get(b"key:000000077777").unwrap(), Some(&77_777u32.to_le_bytes()[..]));
    store.flush().unwrap();
    assert_eq!(store.verify().unwrap().keys, 0);
}

#[test]
fn the_epoch_decides_who_may_write() {
    let mut memory = vec![0; 1 << 16];
    let mut store = Store::create(&mut memory, "kv", 7, 0).unwrap();
    store.set(b"k", b"v").unwrap();
    assert!(matches!(store.seal(6), Err(StoreError::Arena(ArenaError::NotOwner { given: 6, owner: 7 }))));
    store.seal(7).unwrap();
    assert!(matches!(store.set(b"k", b"w"), Err(StoreError::Arena(ArenaError::Sealed { epoch: 7 }))));
    assert_eq!(store.get(b"k").unwrap(), Some(&b"v"[..]));

    // The cutover is undone: the incumbent goes on.
    store.unseal(7).unwrap();
    store.set(b"k", b"w").unwrap();
    store.seal(7).unwrap();

    // It is done: the incumbent is locked out.
    let mut successor = Store::attach(&mut memory).unwrap();
    successor.unseal(8).unwrap();
    assert!(matches!(successor.unseal(7), Err(StoreError::Arena(ArenaError::NotOwner { given: 7, owner: 8 }))));
    assert!(matches!(successor.reclaim(7), Err(StoreError::Arena(ArenaError::NotOwner { given: 7, owner: 8 }))));
    assert!(successor.seal(7).is_err());
    successor.set(b"k", b"x").unwrap();
    assert_eq!(successor.epoch(), 8);

    // The successor was stopped before it could seal: only who says that it knows so gets the arena.
    let mut incumbent = Store::attach(&mut memory).unwrap();
    assert!(matches!(incumbent.unseal(9), Err(StoreError::Arena(ArenaError::NotOwner { given: 9, owner: 8 }))));
    incumbent.reclaim(9).unwrap();
    assert_eq!((incumbent.epoch(), incumbent.is_sealed()), (9, false));
}

#[test]
fn a_store_that_is_given_more_memory_uses_it_when_it_takes_it() {
    let mut memory = vec![0; 1 << 17];
    let half = 1 << 16;
    let value = vec![7; 40_000];
    let mut store = Store::create(&mut memory[..half], "kv", 1, 0).unwrap();
    store.set(b"first", &value).unwrap();
    assert!(store.set(b"second", &value).is_err(), "no room for two");

    // The memory is longer; the store goes on as it is, also in a successor, until it takes the rest.
    let mut store = Store::attach(&mut memory).unwrap();
    assert_eq!(store.usage().length, half as u64);
    assert!(store.set(b"second", &value).is_err());
    assert!(store.take_all(2).is_err(), "another epoch's");
    store.seal(1).unwrap();
    assert!(store.take_all(1).is_err(), "sealed");
    store.unseal(2).unwrap();
    assert_eq!(store.take_all(2).unwrap().length, 2 * half as u64);
    store.set(b"second", &value).unwrap();
    assert_eq!(store.verify().unwrap().keys, 2);

    let store = Store::attach(&mut memory).unwrap();
    assert_eq!(store.get(b"second").unwrap(), Some(&value[..]));
    assert!(matches!(
        Store::attach(&mut memory[..half]),
        Err(StoreError::Arena(ArenaError::Header(ArenaHeaderError::Length { .. })))
    ));
}

#[test]
fn a_broken_seal_a_torn_change_and_a_stranger_are_told_apart() {
    let mut memory = vec![0; 1 << 16];
    let attach = |memory: &mut [u8]| match Store::attach(memory) {
        Err(StoreError::Arena(ArenaError::Header(error))) => Some(error),
        Err(other) => panic!("{other}"),
        Ok(_) => None,
    };
    assert!(matches!(attach(&mut memory), Some(ArenaHeaderError::NotAnArena { found: 0 })));
    assert!(matches!(attach(&mut memory[..100]), Some(ArenaHeaderError::TooSmall { have: 100 })));
    let mut store = Store::create(&mut memory, "kv", 1, 0).unwrap();
    store.set(b"k", b"v").unwrap();
    assert_eq!(attach(&mut memory), None);
    assert!(matches!(attach(&mut memory[..1 << 15]), Some(ArenaHeaderError::Length { .. })));

    // Within a change, but nothing of it was done yet: nobody reads it before it is mended, and looking does not mend it.
    let mutations = state_schemas::arena::at::MUTATIONS as usize;
    memory[mutations] |= 1;
    let mut store = Store::attach(&mut memory).unwrap();
    assert!(store.is_torn());
    let torn = StoreError::Arena(ArenaError::Header(ArenaHeaderError::Torn { mutations: 5 }));
    assert_eq!(store.get(b"k"), Err(torn.clone()));
    assert_eq!(store.set(b"k", b"w"), Err(torn.clone()));
    assert_eq!(store.seal(1), Err(torn.clone()));
    assert_eq!(
        store.keys().next(),
        Some(Err(StoreError::Arena(ArenaError::Corrupt { what: "points outside the arena", at: 8 })))
    );
    assert_eq!(store.unseal(2), Err(torn.clone()), "another epoch's, which may be at work");
    assert_eq!(store.reclaim(0), Err(StoreError::Arena(ArenaError::NotOwner { given: 0, owner: 1 })));
    store.reclaim(1).unwrap();
    assert!(!store.is_torn());
    assert_eq!(store.get(b"k").unwrap(), Some(&b"v"[..]));

    // No way back is marked as such.
    memory[mutations] |= 1;
    let record = state_schemas::arena::at::RECORD as usize;
    memory[record..record + 8].copy_from_slice(&[0xff; 8]);
    assert!(matches!(attach(&mut memory), Some(ArenaHeaderError::Torn { mutations: 5 })));
    memory[record..record + 8].fill(0);
    memory[mutations] &= !1;

    Store::attach(&mut memory).unwrap().seal(1).unwrap();
    assert_eq!(attach(&mut memory), None);
    memory[0x200] ^= 1;
    assert!(matches!(attach(&mut memory), Some(ArenaHeaderError::SealBroken { .. })));
    assert_eq!(ArenaHeader::read(&memory).unwrap().alleged().name(), "kv");
}

#[test]
fn a_full_arena_says_so_and_stays_usable() {
    let mut memory = vec![0; 64 * 1024];
    let mut store = Store::create(&mut memory, "small", 1, 3).unwrap();
    let mut stored = 0u32;
    let error = loop {
        match store.set(&stored.to_le_bytes(), &[7; 100]) {
            Ok(()) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Arena(ArenaError::OutOfMemory { .. })), "{error}");
    assert!(stored > 280, "only {stored} of 100 bytes each fit in 64 KiB");
    assert!(!store.exists(&stored.to_le_bytes()).unwrap());
    store.verify().unwrap();
    for n in 0..stored {
        assert!(store.del(&n.to_le_bytes()).unwrap());
    }
    // What was in small pieces is whole again.
    store.set(b"large", &[1; 50_000]).unwrap();
    store.verify().unwrap();
}

#[test]
fn a_change_that_finds_corruption_leaves_its_mark() {
    let mut memory = vec![0; 1 << 16];
    let mut store = Store::create(&mut memory, "kv", 1, 0).unwrap();
    store.rpush(b"list", b"first").unwrap();
    store.rpush(b"list", b"second").unwrap();
    let top = store.usage().top as usize;
    // The first item's node, found by its bytes; its link to the second, three words before, leads nowhere.
    let at = memory[..top].windows(5).position(|bytes| bytes == b"first").unwrap() - 24;
    memory[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let mut store = Store::attach(&mut memory).unwrap();
    let error = store.lpop(b"list").unwrap_err();
    assert!(matches!(error, StoreError::Arena(ArenaError::Corrupt { .. })), "{error}");
    // It may still be read, and is no longer taken for whole: not even after a change that went well.
    store.set(b"other", b"value").unwrap();
    let error = Store::attach(&mut memory).unwrap_err();
    assert!(matches!(error, StoreError::Arena(ArenaError::Header(ArenaHeaderError::Torn { .. }))), "{error}");
}
