//! The bytes of each released version. The files under `golden/` are never edited: what this program writes must be
//! the same, and what stands there must still be read, to the same meaning.
//!
//! `BATON_GOLDEN=write` writes files that do not exist yet. It does not touch those that do.

use std::fs;
use std::path::Path;

use crate::samples;
use crate::table::table_of;
use serde::Serialize;
use state_schemas::Payload;
use state_schemas::connection::Connection;
use state_schemas::connections::{self, Bytes};
use state_schemas::handover_record::{Arena, HandoverRecord};
use state_schemas::header::{Frame, HEADER_LEN};
use state_schemas::message::ToSuccessor;
use state_schemas::platform::Platform;

pub fn compare(file: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(file);
    if !path.exists() && std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        golden == bytes,
        "{file} differs from what is written today (at byte {:?} of {} and {}): a released version may not change",
        golden.iter().zip(bytes).position(|(a, b)| a != b),
        golden.len(),
        bytes.len(),
    );
}

/// `wire` is what the version's own type makes of `value`; for the newest version, the value itself.
fn check<T, W>(version: u32, name: &str, value: &T, wire: &W)
where
    T: Payload + PartialEq + std::fmt::Debug,
    W: Serialize,
{
    let frame = value.to_frame(version).unwrap();
    let (by_hand, table) = table_of(wire);
    assert_eq!(Frame::read(&frame).unwrap().payload, by_hand, "{name}: bincode and the wire form's text differ");
    let text = format!(
        "{name}, payload version {version}. offset length field value bytes. The payload starts at byte {HEADER_LEN} of the frame.\n{table}"
    );
    compare(&format!("v{version}/{name}.txt"), text.as_bytes());
    let file = format!("v{version}/{name}.bin");
    compare(&file, &frame);
    // Old bytes, read by today's code.
    let golden = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(file)).unwrap();
    assert_eq!(T::from_frame(&golden).unwrap().alleged(), value);
}

#[test]
fn the_record_of_each_version() {
    check(1, "handover_record", &samples::record_1(), &samples::record_as_1());
    check(2, "handover_record", &samples::record(), &samples::record());
    for (version, record) in [(1, samples::record_1()), (2, samples::record_1()), (2, samples::record())] {
        let received = HandoverRecord::from_frame(&record.to_frame(version).unwrap()).unwrap();
        assert_eq!(received.check(&samples::REGION).unwrap(), record);
    }
}

/// An older reader is refused what it has no words for: it would take that memory for nobody's.
#[test]
fn what_version_1_cannot_say_is_not_said_in_it() {
    let refused = |change: &dyn Fn(&mut HandoverRecord)| {
        let mut record = samples::record_1();
        change(&mut record);
        assert!(record.to_frame(2).is_ok());
        record.to_frame(1).unwrap_err().to_string()
    };
    let all = samples::record();
    let refusals = [
        refused(&|r| r.files = all.files.clone()),
        refused(&|r| r.kho = all.kho.clone()),
        refused(&|r| r.carried = all.carried.clone()),
        refused(&|r| r.services[0].arenas = vec![1, 2]),
        refused(&|r| r.services[0].arenas = vec![]),
    ];
    insta::assert_snapshot!(refusals.join("\n"), @r"
    HandoverRecord of version 1 cannot say 1 memory files
    HandoverRecord of version 1 cannot say KHO structures
    HandoverRecord of version 1 cannot say 1 payloads of a newer Baton
    HandoverRecord of version 1 cannot say 2 arenas of service kv (it has room for exactly one)
    HandoverRecord of version 1 cannot say 0 arenas of service kv (it has room for exactly one)
    ");
    // An arena of nobody is kept by every version.
    let mut record = samples::record_1();
    record.arenas.push(Arena { id: 9, ..record.arenas[0].clone() });
    assert!(record.to_frame(1).is_ok());
}

/// Each word in the version in which it came: the golden bytes of version 1 are those of its own words.
#[test]
fn the_messages_of_each_version() {
    for (tag, message) in samples::to_successor().iter().enumerate() {
        check(message.least_version(), &format!("to_successor_{tag}"), message, message);
    }
    for (tag, message) in samples::to_incumbent().iter().enumerate() {
        check(message.least_version(), &format!("to_incumbent_{tag}"), message, message);
    }
    assert_eq!(samples::to_successor().iter().filter(|word| word.least_version() == 1).count(), 10);
    assert_eq!(samples::to_incumbent().iter().filter(|word| word.least_version() == 1).count(), 10);
}

/// A reader of version 1 is not told what it has no word for, and version 1 does not pass for more than it is.
#[test]
fn a_word_of_version_2_is_not_said_in_version_1() {
    let error = ToSuccessor::Examine.to_frame(1).unwrap_err().to_string();
    assert_eq!(error, "ToSuccessor of version 1 cannot say a word of version 2");
    let frame = ToSuccessor::Examine.to_frame(2).unwrap();
    let payload = Frame::read(&frame).unwrap().payload;
    let older = Frame { kind: ToSuccessor::KIND as u16, version: 1, payload }.to_bytes();
    assert!(ToSuccessor::from_frame(&older).unwrap_err().to_string().contains("cannot say a word of version 2"));
    // What version 1 has words for, version 2 says alike.
    let old = ToSuccessor::Ping { nonce: 7 };
    assert_eq!(ToSuccessor::from_frame(&old.to_frame(2).unwrap()).unwrap().alleged(), &old);
}

/// It stands in a record, beside what this program does not know, and takes its own place there only.
#[test]
fn the_platform_of_version_1() {
    let platform = samples::platform();
    check(1, "platform", &platform, &platform);
    let mut record = samples::record();
    assert!(record.carried_payload::<Platform>().is_none());
    record.carry(Some(&Platform::default())).unwrap();
    record.carry(Some(&platform)).unwrap();
    assert_eq!(record.carried, [samples::stranger().to_bytes(), platform.to_frame(1).unwrap()]);
    let record = HandoverRecord::from_frame(&record.to_frame(2).unwrap()).unwrap().check(&samples::REGION).unwrap();
    assert_eq!(record.carried_payload::<Platform>().unwrap().check(&()), Ok(platform));
    let mut without = record;
    without.carry::<Platform>(None).unwrap();
    assert_eq!(without.carried, [samples::stranger().to_bytes()]);
}

/// The frames, and a table with both and the bytes of one.
#[test]
fn the_connections_of_version_1() {
    let (one, other) = (samples::connection(), samples::connection_mapped());
    check(1, "connection", &one, &one);
    check(1, "connection_mapped", &other, &other);
    let mut table = Vec::new();
    connections::append(&mut table, 0, one.clone(), &samples::connection_bytes()).unwrap();
    connections::append(&mut table, 1, other.clone(), &Bytes::default()).unwrap();
    compare("v1/connections.bin", &table);
    let read = connections::read(&table).unwrap();
    assert_eq!((read[0].0.lengths, &read[0].1), (one.lengths, &samples::connection_bytes()));
    let with_crc = |connection: &Connection, crc| Connection { bytes_crc: crc, ..connection.clone() };
    assert_eq!(read[0].0, with_crc(&one, read[0].0.bytes_crc));
    assert_eq!(read[1], (with_crc(&other, 0), Bytes::default()));
    // 3 received bytes and a FIN before the next number; 3 that the peer has not acknowledged.
    assert_eq!((one.receive_first(), one.send_first()), (1_000_000, 4));
}

#[test]
fn every_tag_is_the_number_beside_its_variant() {
    let tags = |frame: Vec<u8>| u32::from_le_bytes(frame[HEADER_LEN..HEADER_LEN + 4].try_into().unwrap());
    for (number, message) in samples::to_successor().iter().enumerate() {
        assert_eq!(tags(message.to_frame(2).unwrap()), number as u32);
    }
    for (number, message) in samples::to_incumbent().iter().enumerate() {
        // Word 11 stands there once for each of the four ways in which a check ends.
        let word = if number > 11 { number.saturating_sub(3).max(11) } else { number };
        assert_eq!(tags(message.to_frame(2).unwrap()), word as u32);
    }
}

#[test]
fn the_header_reads_in_a_hexdump() {
    let frame = samples::to_successor()[0].to_frame(1).unwrap();
    assert_eq!(&frame[..8], b"BATONMSG");
    assert_eq!(frame[8..24], [1, 0, 2, 0, 1, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0]);
}
