//! The channel between two sides that keep the rules, between two threads, and with a side that does not.

use std::collections::VecDeque;
use std::sync::Arc;

use handover::channel::{Broken, Channel, ChannelError, MESSAGE_LIMIT, Side};
use proptest::prelude::*;
use state_schemas::control_block::{RING_TO_INCUMBENT, RING_TO_SUCCESSOR, SIZE};
use state_schemas::message::{ToIncumbent, ToSuccessor};
use state_schemas::shared::{Local, SharedMemory};

fn both(memory: &Local) -> (Channel<&Local>, Channel<&Local>) {
    Channel::reset(&memory).unwrap();
    (Channel::attach(memory, Side::Incumbent).unwrap(), Channel::attach(memory, Side::Successor).unwrap())
}

#[test]
fn messages_arrive_in_order_and_once() {
    let memory = Local::new(SIZE);
    let (mut incumbent, mut successor) = both(&memory);
    assert!(!successor.has_message());
    assert!(successor.receive::<ToSuccessor>().unwrap().is_none());
    incumbent.send(&ToSuccessor::StandBy).unwrap();
    incumbent.send(&ToSuccessor::Activate { epoch: 8 }).unwrap();
    assert!(successor.has_message());
    assert_eq!(successor.receive().unwrap(), Some(ToSuccessor::StandBy));
    assert_eq!(successor.receive().unwrap(), Some(ToSuccessor::Activate { epoch: 8 }));
    assert_eq!(successor.receive::<ToSuccessor>().unwrap(), None);
    successor.send(&ToIncumbent::Activated { epoch: 8, tsc: 1 }).unwrap();
    assert_eq!(incumbent.receive().unwrap(), Some(ToIncumbent::Activated { epoch: 8, tsc: 1 }));
}

#[test]
fn a_message_for_the_other_side_is_refused_and_the_next_follows() {
    let memory = Local::new(SIZE);
    let (mut incumbent, mut successor) = both(&memory);
    incumbent.send(&ToIncumbent::Healthy).unwrap();
    incumbent.send(&ToSuccessor::StandBy).unwrap();
    assert!(matches!(successor.receive::<ToSuccessor>(), Err(ChannelError::Payload(_))));
    assert_eq!(successor.receive().unwrap(), Some(ToSuccessor::StandBy));
}

#[test]
fn a_side_that_restarts_goes_on_where_it_was() {
    let memory = Local::new(SIZE);
    let (mut incumbent, mut successor) = both(&memory);
    for nonce in 0..3 {
        incumbent.send(&ToSuccessor::Ping { nonce }).unwrap();
    }
    assert_eq!(successor.receive().unwrap(), Some(ToSuccessor::Ping { nonce: 0 }));
    let mut successor = Channel::attach(&memory, Side::Successor).unwrap();
    let mut incumbent = Channel::attach(&memory, Side::Incumbent).unwrap();
    incumbent.send(&ToSuccessor::Ping { nonce: 3 }).unwrap();
    for nonce in 1..4 {
        assert_eq!(successor.receive().unwrap(), Some(ToSuccessor::Ping { nonce }));
    }
}

#[test]
fn too_long_too_full_too_small() {
    let memory = Local::new(SIZE);
    let (mut incumbent, mut successor) = both(&memory);
    let long = vec![1; MESSAGE_LIMIT as usize];
    assert!(matches!(incumbent.send_bytes(&vec![0; long.len() + 1]), Err(ChannelError::TooLong { .. })));
    for _ in 0..3 {
        incumbent.send_bytes(&long).unwrap();
    }
    assert!(matches!(incumbent.send_bytes(&long), Err(ChannelError::Full { need: 16400, free: 16336 })));
    assert_eq!(successor.receive_bytes().unwrap().as_deref(), Some(&long[..]));
    incumbent.send_bytes(&long).unwrap();
    struct Tiny;
    impl SharedMemory for Tiny {
        fn size(&self) -> u64 {
            4096
        }
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {}
        fn load(&self, _: u64) -> u64 {
            0
        }
        fn store(&self, _: u64, _: u64) {}
    }
    assert!(matches!(Channel::attach(Tiny, Side::Incumbent), Err(ChannelError::TooSmall { .. })));
}

#[test]
fn each_lie_has_its_name_and_ends_the_ring() {
    let head = RING_TO_SUCCESSOR.offset;
    let data = RING_TO_SUCCESSOR.offset + 0x100;
    type Lie<'a> = (&'a str, &'a dyn Fn(&Local));
    let lies: [Lie<'_>; 6] = [
        ("Counts", &|memory| memory.store(head, u64::MAX)),
        ("Counts", &|memory| memory.store(head, 36)),
        ("Length", &|memory| memory.store(head, 8)),
        ("Length", &|memory| memory.store(data, u64::MAX)),
        ("Position", &|memory| memory.store(data + 8, 1)),
        ("Crc", &|memory| memory.store(data + 24, 1)),
    ];
    for (name, lie) in lies {
        let memory = Local::new(SIZE);
        let (mut incumbent, mut successor) = both(&memory);
        incumbent.send(&ToSuccessor::StandBy).unwrap();
        lie(&memory);
        for _ in 0..2 {
            let Err(ChannelError::Broken(how)) = successor.receive::<ToSuccessor>() else { panic!("{name}: believed") };
            assert!(format!("{how:?}").starts_with(name), "{name}: {how:?}");
        }
    }
    // The writer, too, believes no count.
    let memory = Local::new(SIZE);
    let (mut incumbent, _) = both(&memory);
    memory.store(RING_TO_SUCCESSOR.offset + 0x80, 8);
    assert!(matches!(
        incumbent.send(&ToSuccessor::StandBy),
        Err(ChannelError::Broken(Broken::Counts { head: 0, tail: 8 }))
    ));
}

#[test]
fn two_threads_a_hundred_thousand_messages() {
    const MESSAGES: u64 = 100_000;
    let memory = Arc::new(Local::new(SIZE));
    Channel::reset(&memory).unwrap();
    let message = |n: u64| -> Vec<u8> { (0..n * 7919 % 300).map(|i| (i ^ n) as u8).chain(n.to_le_bytes()).collect() };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut incumbent = Channel::attach(memory.clone(), Side::Incumbent).unwrap();
            for n in 0..MESSAGES {
                loop {
                    match incumbent.send_bytes(&message(n)) {
                        Ok(()) => break,
                        Err(ChannelError::Full { .. }) => std::thread::yield_now(),
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        });
        let mut successor = Channel::attach(memory.clone(), Side::Successor).unwrap();
        for n in 0..MESSAGES {
            let bytes = loop {
                match successor.receive_bytes().unwrap() {
                    Some(bytes) => break bytes,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!(bytes, message(n));
        }
        assert!(!successor.has_message());
    });
}

#[derive(Debug, Clone)]
enum Step {
    Send(Vec<u8>),
    Receive,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![proptest::collection::vec(any::<u8>(), 0..2000).prop_map(Step::Send), Just(Step::Receive),]
}

proptest! {
    #[test]
    fn behaves_like_a_queue(steps in proptest::collection::vec(step(), 1..300)) {
        let memory = Local::new(SIZE);
        let (mut incumbent, mut successor) = both(&memory);
        let mut queue = VecDeque::new();
        for step in steps {
            match step {
                Step::Send(bytes) => match incumbent.send_bytes(&bytes) {
                    Ok(()) => queue.push_back(bytes),
                    Err(ChannelError::Full { need, free }) => {
                        prop_assert!(need > free && !queue.is_empty());
                    }
                    Err(other) => panic!("{other}"),
                },
                Step::Receive => {
                    prop_assert_eq!(successor.has_message(), !queue.is_empty());
                    prop_assert_eq!(successor.receive_bytes().unwrap(), queue.pop_front());
                }
            }
        }
    }

    /// The other kernel writes anything anywhere in the rings, between any two steps.
    #[test]
    fn a_lying_kernel_can_only_be_refused(
        steps in proptest::collection::vec((step(), proptest::option::of((any::<u64>(), any::<u64>()))), 1..60),
    ) {
        let memory = Local::new(SIZE);
        let (mut incumbent, mut successor) = both(&memory);
        for (step, lie) in steps {
            if let Some((at, value)) = lie {
                let rings = RING_TO_SUCCESSOR.offset..RING_TO_INCUMBENT.end();
                // Mostly near the words that matter, with values that look like counts.
                let at = if at % 2 == 0 { at % 0x140 } else { at % (rings.end - rings.start) };
                let value = if value % 4 == 0 { value } else { value % (1 << 17) };
                memory.store((rings.start + at) & !7, value);
            }
            match step {
                Step::Send(bytes) => {
                    let _ = incumbent.send_bytes(&bytes);
                }
                Step::Receive => {
                    let _ = successor.receive::<ToSuccessor>();
                }
            }
        }
    }
}
