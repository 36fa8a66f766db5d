//! The bytes of each released version. The files under `golden/` are never edited: what this program writes must be
//! the same, and what stands there must still be read, to the same meaning.
//!
//! `BATON_GOLDEN=write` writes files that do not exist yet. It does not touch those that do.

use std::fs;
use std::path::Path;

use crate::samples;
use crate::table::table_of;
use serde::Serialize;
use state_schemas::header::{Frame, HEADER_LEN};
use state_schemas::{ABI, Payload};

fn compare(file: &str, bytes: &[u8]) {
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

fn check<T: Payload + Serialize + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
    let frame = value.to_frame(1).unwrap();
    let (by_hand, table) = table_of(value);
    assert_eq!(Frame::read(&frame).unwrap().payload, by_hand, "{name}: bincode and the wire form's text differ");
    let text = format!(
        "{name}, payload version 1. offset length field value bytes. The payload starts at byte {HEADER_LEN} of the frame.\n{table}"
    );
    compare(&format!("v1/{name}.txt"), text.as_bytes());
    compare(&format!("v1/{name}.bin"), &frame);
    // Old bytes, read by today's code.
    let golden = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/v1/{name}.bin"))).unwrap();
    assert_eq!(T::from_frame(&golden).unwrap().alleged(), value);
}

#[test]
fn the_record_of_version_1() {
    check("handover_record", &samples::record());
    let received = state_schemas::handover_record::HandoverRecord::from_frame(&samples::record().to_frame(1).unwrap());
    assert_eq!(received.unwrap().check(&samples::REGION).unwrap(), samples::record());
}

#[test]
fn the_messages_of_version_1() {
    for (tag, message) in samples::to_successor().iter().enumerate() {
        check(&format!("to_successor_{tag}"), message);
    }
    for (tag, message) in samples::to_incumbent().iter().enumerate() {
        check(&format!("to_incumbent_{tag}"), message);
    }
}

#[test]
fn every_tag_is_the_number_beside_its_variant() {
    let tags = |frame: Vec<u8>| u32::from_le_bytes(frame[HEADER_LEN..HEADER_LEN + 4].try_into().unwrap());
    for (number, message) in samples::to_successor().iter().enumerate() {
        assert_eq!(tags(message.to_frame(1).unwrap()), number as u32);
    }
    for (number, message) in samples::to_incumbent().iter().enumerate() {
        assert_eq!(tags(message.to_frame(1).unwrap()), number as u32);
    }
}

#[test]
fn the_header_reads_in_a_hexdump() {
    let frame = samples::to_successor()[0].to_frame(1).unwrap();
    assert_eq!(&frame[..8], b"BATONMSG");
    assert_eq!(frame[8..24], [1, 0, 2, 0, 1, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(ABI, 1);
}
