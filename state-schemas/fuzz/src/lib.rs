//! What is done with any bytes: the fuzz targets call these, and so does `tests/fuzz_smoke.rs` in `cargo test`.
//!
//! A liar computes checksums, too: where a frame is expected, the bytes are also taken as the payload of a correct one.

use state_schemas::Payload;
use state_schemas::arena::{ArenaHeader, HEADER_LEN};
use state_schemas::checked::Check;
use state_schemas::connections;
use state_schemas::handover_record::HandoverRecord;
use state_schemas::header::{FIRST_CARRIED_KIND, Frame, Kind};
use state_schemas::message::{MessageError, ToIncumbent, ToSuccessor};

/// A frame, of any kind.
pub fn frame(bytes: &[u8]) {
    let Ok(frame) = Frame::read(bytes) else { return };
    let length = Frame::length(bytes).expect("a whole frame has a length");
    // What is carried through is carried untouched: a frame is its own only form, but for what is ignored when read.
    let again = frame.to_bytes();
    assert_eq!(again.len(), length);
    assert_eq!(Frame::read(&again), Ok(frame));
}

/// A handover record, of each version.
pub fn record(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        let Ok(received) = HandoverRecord::from_frame(bytes) else { return };
        let region = received.alleged().grant.region;
        if let Ok(record) = received.check(&region) {
            believed(&record);
        }
    };
    read(bytes);
    for version in 1..=HandoverRecord::VERSION {
        read(&Frame { kind: Kind::HandoverRecord as u16, version, payload: bytes }.to_bytes());
    }
}

/// What the agent does with a record that was checked relies on this, without checking again.
fn believed(record: &HandoverRecord) {
    let ends = |range: state_schemas::handover_record::PhysRange| range.end().expect("a checked range does not wrap");
    for arena in &record.arenas {
        let size: u64 = arena.ranges.iter().map(|range| ends(*range) - range.start).sum();
        assert!((1..=size).contains(&arena.len));
    }
    let arena = |id: u32| record.arenas.iter().find(|arena| arena.id == id).expect("a checked name names something");
    for service in &record.services {
        service.arenas.iter().for_each(|id| assert!(!arena(*id).ranges.is_empty()));
    }
    for file in &record.files {
        assert!(file.len <= arena(file.arena).len);
    }
    for bytes in &record.carried {
        assert!(Frame::read(bytes).is_ok_and(|frame| frame.kind >= FIRST_CARRIED_KIND));
    }
    // What is believed can be handed on; what an older reader could not say is refused, not lost.
    let again = record.to_frame(HandoverRecord::VERSION).expect("it came in a frame");
    assert_eq!(HandoverRecord::from_frame(&again).expect("it was just written").alleged(), record);
    if let Ok(older) = record.to_frame(1) {
        assert_eq!(HandoverRecord::from_frame(&older).expect("it was just written").alleged(), record);
    }
}

/// A message of either side.
pub fn messages(bytes: &[u8]) {
    fn one<T>(bytes: &[u8])
    where
        T: Payload + Check<Against = (), Error = MessageError> + PartialEq + std::fmt::Debug,
    {
        let framed = Frame { kind: T::KIND as u16, version: 1, payload: bytes }.to_bytes();
        for bytes in [bytes, &framed] {
            let Ok(received) = T::from_frame(bytes) else { continue };
            let again = received.alleged().to_frame(T::VERSION).expect("it came in a frame");
            assert_eq!(received, T::from_frame(&again).expect("it was just written"));
            let _ = received.check(&());
        }
    }
    one::<ToSuccessor>(bytes);
    one::<ToIncumbent>(bytes);
}

/// An arena's first page, in memory of as many bytes as it says and of one page more.
pub fn arena_page(bytes: &[u8]) {
    let mut page = bytes.to_vec();
    page.resize(page.len().max(HEADER_LEN as usize), 0);
    // A liar seals, too.
    for seal in [false, true] {
        let Ok(received) = ArenaHeader::read(&page) else { return };
        let header = received.alleged();
        let length = header.length.get();
        let _ = header.check_identity(length.wrapping_add(HEADER_LEN));
        if seal {
            let crc = header.compute_seal();
            page[0x4c..0x50].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(header) = received.check(&length) {
            assert!(header.check_identity(length).is_ok());
            assert!(
                (u64::from(header.header_len.get())..=length).contains(&header.top.get())
                    && header.used.get() < header.top.get()
            );
            assert!(header.root.get() < header.top.get());
        }
    }
}

/// A table of connections.
pub fn connections(bytes: &[u8]) {
    let read = |bytes: &[u8]| {
        let Ok(all) = connections::read(bytes) else { return };
        let mut again = Vec::new();
        for (index, (connection, bytes)) in all.iter().enumerate() {
            // What is restored is what was counted.
            assert_eq!(Some(connection.lengths), bytes.lengths());
            connections::append(&mut again, index, connection.clone(), bytes)
                .expect("what was believed can be written");
        }
        assert_eq!(connections::read(&again).expect("it was just written"), all);
    };
    read(bytes);
    read(&Frame { kind: Kind::Connection as u16, version: 1, payload: bytes }.to_bytes());
}
