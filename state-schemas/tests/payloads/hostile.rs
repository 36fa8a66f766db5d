//! Bytes from a kernel that lies: refused with a type, never a panic, never more memory than the limit.

use crate::samples;
use proptest::prelude::*;
use proptest::sample::Index;
use state_schemas::arena::ArenaHeader;
use state_schemas::checked::Check;
use state_schemas::connection::{Connection, ConnectionError, State};
use state_schemas::connections::{self, Bytes, TableError};
use state_schemas::convert::PayloadError;
use state_schemas::handover_record::{HandoverRecord, Kho, PhaseMark, PhysRange, RecordError, Service};
use state_schemas::header::{FRAME_LIMIT, Frame, HEADER_LEN, HeaderError, Kind};
use state_schemas::latest::message::TABLE_LIMIT;
use state_schemas::message::{MessageError, PART_LIMIT, ToIncumbent, ToSuccessor};
use state_schemas::{CodecError, Payload};

/// A frame whose header and CRC are right, around any payload: a liar computes checksums, too.
fn framed(kind: Kind, version: u32, payload: &[u8]) -> Vec<u8> {
    Frame { kind: kind as u16, version, payload }.to_bytes()
}

fn read_all(bytes: &[u8]) {
    let _ = Frame::read(bytes);
    if let Ok(record) = HandoverRecord::from_frame(bytes) {
        let _ = record.check(&samples::REGION);
    }
    if let Ok(message) = ToSuccessor::from_frame(bytes) {
        let _ = message.check(&());
    }
    if let Ok(message) = ToIncumbent::from_frame(bytes) {
        let _ = message.check(&());
    }
    if let Ok(connection) = Connection::from_frame(bytes) {
        let _ = connection.check(&());
    }
    let _ = connections::read(bytes);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        read_all(&bytes);
    }

    #[test]
    fn any_payload_in_a_correct_frame(kind in 0u16..6, version in 0u32..3, payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        read_all(&Frame { kind, version, payload: &payload }.to_bytes());
    }

    #[test]
    fn a_changed_record_with_a_correct_crc(
        changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..6),
        cut in any::<Index>(),
        cuts in any::<bool>(),
        version in 1u32..3,
    ) {
        let record = if version == 1 { samples::record_1() } else { samples::record() };
        let mut payload = Frame::read(&record.to_frame(version).unwrap()).unwrap().payload.to_vec();
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        if cuts {
            payload.truncate(cut.index(payload.len()));
        }
        read_all(&framed(Kind::HandoverRecord, version, &payload));
    }

    #[test]
    fn a_changed_frame_is_never_taken_for_whole(at in any::<Index>(), bit in 0u8..8) {
        let mut frame = samples::record().to_frame(2).unwrap();
        let at = at.index(frame.len());
        frame[at] ^= 1 << bit;
        prop_assert!(Frame::read(&frame).is_err());
    }

    #[test]
    fn a_changed_table_is_refused_or_means_something_else(
        changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..4),
        cut in any::<Index>(),
        cuts in any::<bool>(),
        reframe in any::<bool>(),
    ) {
        let mut payload = Frame::read(&samples::connection().to_frame(1).unwrap()).unwrap().payload.to_vec();
        let mut table = table();
        let target = if reframe { &mut payload } else { &mut table };
        for (at, value) in changes {
            let at = at.index(target.len());
            target[at] = value;
        }
        if cuts {
            target.truncate(cut.index(target.len()));
        }
        if reframe {
            // A liar computes the frame's CRC; the bytes behind it are what they are.
            table = framed(Kind::Connection, 1, &payload);
            table.extend_from_slice(b"noteget$1x");
        }
        if let Ok(all) = connections::read(&table) {
            for (connection, bytes) in all {
                prop_assert_eq!(Some(connection.lengths), bytes.lengths());
            }
        }
    }

    #[test]
    fn a_checked_header_page_has_its_offsets_inside(page in proptest::collection::vec(any::<u8>(), 4096), fields in any::<[u64; 3]>()) {
        use zerocopy::{FromBytes, IntoBytes};
        let mut header = ArenaHeader::read_from_bytes(&page).unwrap();
        header.magic = state_schemas::arena::MAGIC;
        header.version = 1.into();
        header.header_len = 4096.into();
        header.length = (1 << 20).into();
        header.state = 1.into();
        header.name = ArenaHeader::pad_name("fuzz").unwrap();
        [header.top, header.used, header.root] = fields.map(|field| (field % (2 << 20)).into());
        header.mutations = 0.into();
        if let Ok(header) = ArenaHeader::read(header.as_bytes()).unwrap().check(&(1 << 20)) {
            prop_assert!(header.top.get() <= 1 << 20);
            prop_assert!(header.root.get() < header.top.get());
        }
    }
}

/// A count of 2^64-1 in front of nothing.
#[test]
fn absurd_counts_allocate_nothing() {
    let mut payload = 1u32.to_le_bytes().to_vec(); // Standing
    payload.extend_from_slice(&u64::MAX.to_le_bytes());
    let error = ToIncumbent::from_frame(&framed(Kind::ToIncumbent, 1, &payload)).unwrap_err();
    assert!(matches!(error, PayloadError::Codec(CodecError::Decode { len: 12, .. })), "{error:?}");

    // As many empty strings as the limit lets in, from a payload that has them all: decoded, then refused.
    let many = (FRAME_LIMIT - HEADER_LEN - 12) / 8;
    let mut payload = 1u32.to_le_bytes().to_vec();
    payload.extend_from_slice(&(many as u64).to_le_bytes());
    payload.resize(12 + many * 8, 0);
    let refused = match ToIncumbent::from_frame(&framed(Kind::ToIncumbent, 1, &payload)) {
        Err(PayloadError::Codec(CodecError::Decode { .. })) => true,
        Ok(message) => matches!(message.check(&()), Err(MessageError::TooMany { .. })),
        Err(_) => false,
    };
    assert!(refused);
}

#[test]
fn each_lie_about_a_frame_has_its_name() {
    let frame = ToSuccessor::StandBy.to_frame(1).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut lie = frame.clone();
        lie[at..at + bytes.len()].copy_from_slice(bytes);
        lie
    };
    assert!(matches!(Frame::read(&frame[..31]), Err(HeaderError::TooShort { have: 31 })));
    assert!(matches!(Frame::read(&frame[..35]), Err(HeaderError::Length { length: 36, have: 35, .. })));
    assert!(matches!(Frame::read(&with(0, b"X")), Err(HeaderError::Magic { .. })));
    assert!(matches!(Frame::read(&with(8, &[2])), Err(HeaderError::Format { found: 2 })));
    assert!(matches!(Frame::read(&with(16, &[255; 8])), Err(HeaderError::Length { length: u64::MAX, .. })));
    assert!(matches!(Frame::read(&with(16, &[31])), Err(HeaderError::Length { length: 31, .. })));
    assert!(matches!(Frame::read(&with(32, &[1])), Err(HeaderError::Crc { .. })));
    assert!(matches!(ToIncumbent::from_frame(&frame), Err(PayloadError::Kind { found: 2, .. })));
    assert!(matches!(
        ToSuccessor::from_frame(&framed(Kind::ToSuccessor, 3, &[0; 4])),
        Err(PayloadError::Version { found: 3, newest: 2, .. })
    ));
    assert!(matches!(
        ToSuccessor::from_frame(&framed(Kind::ToSuccessor, 1, &[0; 5])),
        Err(PayloadError::Codec(CodecError::Trailing { consumed: 4, len: 5 }))
    ));
    assert!(matches!(ToSuccessor::StandBy.to_frame(3), Err(PayloadError::Version { found: 3, .. })));
}

#[test]
fn registers_that_cannot_be_are_refused() {
    use state_schemas::platform::{Platform, PlatformError, Register};
    let refused = |change: &dyn Fn(&mut Platform)| {
        let mut platform = samples::platform();
        change(&mut platform);
        let received = Platform::from_frame(&platform.to_frame(1).unwrap()).unwrap();
        received.check(&()).unwrap_err()
    };
    let off = |platform: &mut Platform| platform.power_off.unwrap();
    assert_eq!(
        refused(&|p| p.power_off = Some(state_schemas::platform::PowerOff { sleep_type: 8, ..off(p) })),
        PlatformError::SleepType(8)
    );
    assert_eq!(refused(&|p| p.reset.as_mut().unwrap().register = Register::Memory(0)), PlatformError::Address("reset"));
    assert_eq!(
        refused(&|p| p.power_button.as_mut().unwrap().enable = Register::Port(0)),
        PlatformError::Address("button enable")
    );
}

#[test]
fn an_unknown_kind_is_carried_through_untouched() {
    let stranger = samples::stranger();
    let bytes = stranger.to_bytes();
    let read = Frame::read(&bytes).unwrap();
    assert_eq!(read, stranger);
    assert_eq!(read.to_bytes(), bytes);
    // In a record, from one that knows it over one that does not.
    let record = HandoverRecord::from_frame(&samples::record().to_frame(2).unwrap()).unwrap();
    assert_eq!(record.check(&samples::REGION).unwrap().carried, [bytes]);
}

#[test]
fn a_message_too_long_is_refused_by_its_writer() {
    let mark = PhaseMark { phase: "x".repeat(FRAME_LIMIT), start_tsc: 0, end_tsc: 1 };
    let message = ToSuccessor::Commit { timeline: vec![mark] };
    assert!(matches!(message.to_frame(1), Err(PayloadError::Codec(CodecError::TooLong { .. }))));
}

#[test]
fn each_lie_in_a_record_has_its_name() {
    let refusal = |lie: &dyn Fn(&mut HandoverRecord)| {
        let mut record = samples::record();
        lie(&mut record);
        let frame = record.to_frame(2).unwrap();
        HandoverRecord::from_frame(&frame).unwrap().check(&samples::REGION).unwrap_err()
    };
    let range = |start, len| PhysRange { start, len };
    let place = |error| matches!(error, RecordError::Place { .. });
    let bounds = |error| matches!(error, RecordError::Bounds { .. });
    let bad_range = |error| matches!(error, RecordError::Range { .. });
    let name = |error| matches!(error, RecordError::Name { .. });
    assert!(bounds(refusal(&|r| r.hop = 0)));
    assert!(bounds(refusal(&|r| r.epoch = u64::MAX)));
    assert!(bounds(refusal(&|r| r.clock.tsc_khz = 0)));
    assert!(bounds(refusal(&|r| r.machine.memory_block = 3 << 26)));
    assert!(bounds(refusal(&|r| r.network.service.as_mut().unwrap().prefix = 33)));
    assert!(bounds(refusal(&|r| r.arenas[0].len = 1 << 40)));
    assert!(bounds(refusal(&|r| r.machine.cpus.clear())));
    assert!(matches!(refusal(&|r| r.grant.region.start = 0), RecordError::Region { record: 0, .. }));
    assert!(bad_range(refusal(&|r| r.grant.fragments[0] = range(u64::MAX - 4095, 8192))));
    assert!(bad_range(refusal(&|r| r.grant.low_slot.len = 0)));
    assert!(bad_range(refusal(&|r| r.grant.blocks[0].start += 4096)));
    assert!(place(refusal(&|r| r.machine.ram.reverse())));
    assert!(place(refusal(&|r| r.grant.fragments[0] = samples::REGION)));
    assert!(place(refusal(&|r| r.grant.blocks.push(range(1 << 40, 128 << 20)))));
    assert!(place(refusal(&|r| r.arenas[0].ranges[0] = range(1024 << 20, 4096))));
    assert!(place(refusal(&|r| r.arenas[0].ranges[1] = r.arenas[0].ranges[0])));
    assert!(name(refusal(&|r| r.machine.cpus[1].apic_id = 0)));
    assert!(name(refusal(&|r| r.grant.boot_cpu = 9)));
    assert!(name(refusal(&|r| r.services[0].arenas = vec![9])));
    assert!(name(refusal(&|r| r.services[0].arenas = vec![1, 1])));
    assert!(name(refusal(&|r| r.files[0].arena = 1)));
    assert!(name(refusal(&|r| r.files[0].arena = 9)));
    assert!(matches!(refusal(&|r| r.services.push(r.services[0].clone())), RecordError::Name { .. }));
    assert!(matches!(
        refusal(&|r| {
            let twin = r.services[0].clone();
            r.services.push(Service { arenas: vec![7], ..twin });
        }),
        RecordError::Twice { .. }
    ));
    assert!(bounds(refusal(&|r| r.files[0].len = 3 << 20)));
    assert!(bounds(refusal(&|r| r.files[0].seals = 0x40)));
    assert!(bounds(refusal(&|r| r.files = vec![r.files[0].clone(); 513])));
    assert!(matches!(refusal(&|r| r.files[0].name = "x".repeat(256)), RecordError::Text { most: 255, .. }));
    assert!(place(refusal(&|r| r.ecam.as_mut().unwrap().address = 512 << 20)));
    assert!(bad_range(refusal(&|r| r.ecam.as_mut().unwrap().address = u64::MAX << 20)));
    let kho = |lie: &dyn Fn(&mut Kho)| refusal(&|r| lie(r.kho.as_mut().unwrap()));
    assert!(place(kho(&|k| k.room = PhysRange { start: samples::REGION.start, len: 4096 })));
    assert!(place(kho(&|k| k.room.len = samples::REGION.len)));
    assert!(place(kho(&|k| k.fdt.start = k.room.start - 4096)));
    assert!(place(kho(&|k| k.scratch.start = k.fdt.start)));
    assert!(bad_range(kho(&|k| k.fdt.len = u64::MAX)));
    assert!(matches!(kho(&|k| k.abi.clear()), RecordError::Text { .. }));
    let carried = |bytes: Vec<u8>| refusal(&|r| r.carried = vec![bytes.clone()]);
    assert!(matches!(carried(vec![1; 40]), RecordError::Carried { index: 0, source: HeaderError::Magic { .. } }));
    assert!(matches!(carried([samples::stranger().to_bytes(), vec![0]].concat()), RecordError::NotForeign { .. }));
    assert!(matches!(carried(framed(Kind::ToSuccessor, 1, &[0; 4])), RecordError::NotForeign { kind: 2, .. }));
    assert!(bounds(refusal(&|r| r.carried = vec![samples::stranger().to_bytes(); 17])));
    assert!(bounds(carried(Frame { kind: 16, version: 1, payload: &[0; 64 << 10] }.to_bytes())));
    assert!(matches!(refusal(&|r| r.services[0].name = "a\nb".into()), RecordError::Text { .. }));
}

fn table() -> Vec<u8> {
    let mut table = Vec::new();
    connections::append(&mut table, 0, samples::connection(), &samples::connection_bytes()).unwrap();
    connections::append(&mut table, 1, samples::connection_mapped(), &Bytes::default()).unwrap();
    table
}

#[test]
fn each_lie_in_a_connection_has_its_name() {
    use state_schemas::handover_record::Ip;
    let refusal = |lie: &dyn Fn(&mut Connection)| {
        let mut connection = samples::connection();
        lie(&mut connection);
        Connection::from_frame(&connection.to_frame(1).unwrap()).unwrap().check(&()).unwrap_err()
    };
    let bounds = |error| matches!(error, ConnectionError::Bounds { .. });
    let address = |error| matches!(error, ConnectionError::Address { .. });
    let name = |error| matches!(error, ConnectionError::Name { .. });
    assert!(name(refusal(&|c| c.service.clear())));
    assert!(name(refusal(&|c| c.service = "x".repeat(65))));
    assert!(name(refusal(&|c| c.service = "a\nb".into())));
    assert!(name(refusal(&|c| c.settings.congestion = "x".repeat(16))));
    assert!(address(refusal(&|c| c.local.address = Ip::V6([1; 16]))));
    assert!(address(refusal(&|c| c.peer.address = Ip::V4([0; 4]))));
    assert!(address(refusal(&|c| c.peer.address = Ip::V4([224, 0, 0, 1]))));
    let link_local = Ip::V6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let wide = Ip::V6([0x20; 16]);
    let six = |c: &mut Connection, local, peer| {
        *c = samples::connection_mapped();
        (c.local.address, c.peer.address) = (local, peer);
    };
    assert!(address(refusal(&|c| six(c, link_local, wide))));
    assert!(address(refusal(&|c| six(c, wide, Ip::V6([0xff; 16])))));
    assert_eq!(refusal(&|c| six(c, wide, samples::connection_mapped().peer.address)), ConnectionError::Mixed);
    assert!(bounds(refusal(&|c| c.peer.port = 0)));
    assert!(bounds(refusal(&|c| c.lengths.received = (32 << 20) + 1)));
    assert!(bounds(refusal(&|c| c.lengths.note = u32::MAX)));
    assert!(bounds(refusal(&|c| c.agreed.segment = 87)));
    assert!(bounds(refusal(&|c| c.agreed.scale.as_mut().unwrap().receive = 15)));
    assert!(bounds(refusal(&|c| c.window.send = c.window.send_most + 1)));
    assert!(bounds(refusal(&|c| c.window.receive = u32::MAX)));
    assert!(bounds(refusal(&|c| c.settings.keepalive.idle_s = 0)));
    assert!(bounds(refusal(&|c| c.settings.keepalive.count = 128)));
    assert!(bounds(refusal(&|c| c.settings.user_timeout_ms = u32::MAX)));
    assert!(bounds(refusal(&|c| c.settings.send_buffer = Some(0))));
    assert_eq!(refusal(&|c| c.state = State::FinWait2), ConnectionError::Unsent(3));
}

#[test]
fn each_lie_about_a_table_has_its_name() {
    let whole = table();
    assert_eq!(connections::read(&[]).unwrap(), []);
    let first = Frame::length(&whole).unwrap();
    let refusal = |bytes: &[u8]| connections::read(bytes).unwrap_err();
    assert!(matches!(refusal(&whole[..first + 9]), TableError::Short { index: 0, counted: 10, have: 9 }));
    assert!(matches!(refusal(&whole[..whole.len() - 1]), TableError::Frame { index: 1, .. }));
    let mut changed = whole.clone();
    changed[first] ^= 1;
    assert!(matches!(refusal(&changed), TableError::Crc { index: 0, .. }));
    assert!(matches!(refusal(&[whole.clone(), vec![0]].concat()), TableError::Frame { index: 2, .. }));
    assert!(matches!(
        refusal(&ToSuccessor::StandBy.to_frame(1).unwrap()),
        TableError::Frame { source: PayloadError::Kind { found: 2, .. }, .. }
    ));
    // The writer refuses what the reader would, and leaves the table as it was.
    let mut table = whole.clone();
    let long = Bytes { note: vec![0; (32 << 20) + 1], ..Bytes::default() };
    let refused = connections::append(&mut table, 2, samples::connection(), &long);
    assert!(matches!(refused, Err(TableError::Connection { index: 2, .. })));
    assert_eq!(table, whole);
    let mut table = vec![0; TABLE_LIMIT as usize];
    let refused = connections::append(&mut table, 2, samples::connection(), &Bytes::default());
    assert!(matches!(refused, Err(TableError::TooMuch { .. })));
}

#[test]
fn a_part_lies_in_its_table() {
    let refused = |at, total, len| ToSuccessor::Connections { at, total, bytes: vec![0; len] }.check(&()).err();
    assert_eq!(refused(0, 0, 0), None);
    assert_eq!(refused(3, 9, 6), None);
    assert!(matches!(refused(3, 9, 7), Some(MessageError::Part { .. })));
    assert!(matches!(refused(u64::MAX, 9, 1), Some(MessageError::Part { .. })));
    assert!(matches!(refused(0, TABLE_LIMIT + 1, 1), Some(MessageError::Part { .. })));
    assert!(matches!(refused(0, TABLE_LIMIT, PART_LIMIT + 1), Some(MessageError::TooMany { .. })));
}
