//! From bytes to what they say: every format that crosses, recognised by its first bytes. What is read here was written by
//! another kernel, or is any file at all: nothing is believed, and what is wrong with it is part of the answer.

use handover::channel::{Channel, ChannelError, Side};
use handover::kho::v4::metadata;
use handover::kho::{Metadata, Outline, Subtree};
use handover::update::machine::{JOURNAL_VERSION, JournalLine};
use serde::Serialize;
use serde_json::{Map, Value, json};
use state_schemas::arena::{self, ArenaHeader};
use state_schemas::checked::{Check, Received};
use state_schemas::control_block::{self, HANDOVER, RING_TO_INCUMBENT, RING_TO_SUCCESSOR, words};
use state_schemas::header::{self, Frame, Kind};
use state_schemas::latest::handover_record::HandoverRecord;
use state_schemas::latest::message::{MessageError, ToIncumbent, ToSuccessor};
use state_schemas::shared::Local;
use state_schemas::{Payload, PayloadError};

/// Most that is read of a file: nothing of ours is longer, but an arena, whose first page says all that is shown.
pub const INPUT_LIMIT: u64 = 16 << 20;
/// First bytes of a flattened device tree (Devicetree Specification, 5.2).
const DEVICE_TREE: [u8; 4] = [0xd0, 0x0d, 0xfe, 0xed];
/// Most messages that are shown of a ring: as many as fit in.
const MESSAGES: usize = 4096;

/// One thing that was recognised.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Piece {
    /// What it is.
    pub format: String,
    /// Where it was found.
    pub at: String,
    /// What it says.
    pub value: Value,
    /// Why a kernel would not believe it; nothing if it would.
    pub problem: Option<String>,
}

/// Why bytes are nothing of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShowError {
    /// They begin like nothing that we know.
    #[error("{len} bytes that begin with {start} are none of Baton's formats")]
    Unknown {
        /// How many there are.
        len: usize,
        /// The first of them, in hex.
        start: String,
    },
    /// There are none.
    #[error("there are no bytes to show")]
    Empty,
}

/// All that these bytes hold. `total` is the length of what they are the beginning of.
///
/// # Errors
/// If they begin like nothing of ours.
pub fn pieces(at: &str, bytes: &[u8], total: u64) -> Result<Vec<Piece>, ShowError> {
    if bytes.is_empty() {
        return Err(ShowError::Empty);
    }
    if bytes.starts_with(&header::MAGIC) {
        return Ok(vec![frame(at, bytes)]);
    }
    if bytes.starts_with(&arena::MAGIC) {
        return Ok(vec![arena_page(at, bytes, total)]);
    }
    if word(bytes, words::MAGIC_AT) == Some(words::MAGIC) {
        return Ok(control(at, bytes));
    }
    if bytes.starts_with(&DEVICE_TREE) {
        return Ok(vec![device_tree(at, bytes)]);
    }
    if bytes.first() == Some(&b'{')
        && let Ok(text) = std::str::from_utf8(bytes)
    {
        return Ok(lines(at, text));
    }
    let start = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Err(ShowError::Unknown { len: bytes.len(), start })
}

fn word(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    text
}

/// A frame, with the payload that its kind says.
fn frame(at: &str, bytes: &[u8]) -> Piece {
    let whole = match Frame::read(bytes) {
        Ok(whole) => whole,
        Err(error) => {
            return Piece {
                format: "frame".to_owned(),
                at: at.to_owned(),
                value: Value::Null,
                problem: Some(chain(&error)),
            };
        }
    };
    let length = Frame::length(bytes).unwrap_or_default();
    let (format, said) = match whole.kind {
        kind if kind == Kind::HandoverRecord as u16 => ("handover record", record(bytes)),
        kind if kind == Kind::ToSuccessor as u16 => ("message to the successor", message::<ToSuccessor>(bytes)),
        kind if kind == Kind::ToIncumbent as u16 => ("message to the incumbent", message::<ToIncumbent>(bytes)),
        _ => ("payload of a kind that this Baton does not know", Ok((Value::Null, None))),
    };
    let (payload, problem) = said.unwrap_or_else(|error| (Value::Null, Some(chain(&error))));
    let mut value = json!({ "kind": whole.kind, "version": whole.version, "bytes": length });
    if !payload.is_null() {
        value["payload"] = payload;
    }
    Piece { format: format.to_owned(), at: at.to_owned(), value, problem }
}

type Said = Result<(Value, Option<String>), PayloadError>;

fn message<T: Payload + Serialize + Check<Against = (), Error = MessageError>>(bytes: &[u8]) -> Said {
    let received: Received<T> = T::from_frame(bytes)?;
    let value = plain(received.alleged());
    Ok((value, received.check(&()).err().map(|error| chain(&error))))
}

fn record(bytes: &[u8]) -> Said {
    let received = HandoverRecord::from_frame(bytes)?;
    let alleged = received.alleged();
    let mut value = plain(alleged);
    value["update"] = alleged.update.to_string().into();
    value["carried"] = alleged.carried.iter().map(|bytes| carried(bytes)).collect();
    // Whether it is for the region it was found in, only its reader can know.
    let region = alleged.grant.region;
    Ok((value, received.check(&region).err().map(|error| chain(&error))))
}

fn carried(bytes: &[u8]) -> Value {
    match Frame::read(bytes) {
        Ok(frame) => json!({ "kind": frame.kind, "version": frame.version, "bytes": bytes.len() }),
        Err(error) => json!({ "bytes": bytes.len(), "problem": chain(&error) }),
    }
}

pub(super) fn plain(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_else(|error| error.to_string().into())
}

/// An arena's first page.
fn arena_page(at: &str, bytes: &[u8], total: u64) -> Piece {
    let (value, problem) = match ArenaHeader::read(bytes) {
        Err(error) => (Value::Null, Some(chain(&error))),
        Ok(received) => {
            let header = received.alleged();
            let state = match header.state.get() {
                arena::STATE_LIVE => "live".to_owned(),
                arena::STATE_SEALED => "sealed".to_owned(),
                other => format!("{other:#x}"),
            };
            let value = json!({
                "version": header.version.get(),
                "name": header.name(),
                "length": header.length.get(),
                "schema_kind": kind_name(header.schema_kind.get()),
                "schema_version": header.schema_version.get(),
                "epoch": header.epoch.get(),
                "state": state,
                "seal": format!("{:#010x}", header.seal.get()),
                "mutations": header.mutations.get(),
                "root": header.root.get(),
                "top": header.top.get(),
                "used": header.used.get(),
            });
            // While its owner writes, only this holds.
            let live = header.state.get() == arena::STATE_LIVE;
            let problem = if live { header.check_identity(total).err() } else { received.check(&total).err() };
            (value, problem.map(|error| chain(&error)))
        }
    };
    Piece { format: "arena".to_owned(), at: at.to_owned(), value, problem }
}

/// A schema kind is four letters where its owner chose it so.
pub(super) fn kind_name(kind: u32) -> String {
    let letters = kind.to_le_bytes();
    match letters.iter().all(u8::is_ascii_graphic) {
        true => letters.iter().map(|&letter| char::from(letter)).collect(),
        false => format!("{kind:#x}"),
    }
}

/// A control block: its words, what waits in its rings, and the record.
fn control(at: &str, bytes: &[u8]) -> Vec<Piece> {
    let word = |at| word(bytes, at).unwrap_or_default();
    let bell = |at| match word(at) {
        0 => Value::Null,
        bell => json!({ "apic_id": bell as u32, "vector": bell >> 32 }),
    };
    let version = word(words::VERSION_AT);
    let mark = words::BootMark::of_word(word(words::BOOT_MARK_AT));
    let mut value = json!({
        "version": version,
        "epoch": word(words::EPOCH_AT),
        "incumbent_bell": bell(words::INCUMBENT_BELL_AT),
        "successor_bell": bell(words::SUCCESSOR_BELL_AT),
        "incumbent_panicked": word(words::INCUMBENT_PANIC_AT) != 0,
        "successor_panicked": word(words::SUCCESSOR_PANIC_AT) != 0,
        "successor_agent": mark.map_or("no mark of ours".to_owned(), |mark| format!("{mark:?}")),
    });
    let mut problem = None;
    if version != u64::from(words::VERSION) {
        problem = Some(format!("a control block of version {version}, this program knows {}", words::VERSION));
    } else if (bytes.len() as u64) < control_block::SIZE {
        problem = Some(format!("{} of {} bytes of a control block are there", bytes.len(), control_block::SIZE));
    } else {
        value["to_successor"] = ring::<ToSuccessor>(bytes, RING_TO_SUCCESSOR.offset, Side::Successor);
        value["to_incumbent"] = ring::<ToIncumbent>(bytes, RING_TO_INCUMBENT.offset, Side::Incumbent);
    }
    let mut pieces = vec![Piece { format: "control block".to_owned(), at: at.to_owned(), value, problem }];
    let place = HANDOVER.offset as usize..HANDOVER.end() as usize;
    if let Some(piece) = bytes.get(place) {
        pieces.push(frame(&format!("{at}, byte {:#x}", HANDOVER.offset), piece));
    }
    pieces
}

/// Counts of a ring, and what its reader has not taken yet.
fn ring<T>(bytes: &[u8], at: u64, reader: Side) -> Value
where
    T: Payload + Serialize + Check<Against = (), Error = MessageError>,
{
    let count = |offset| word(bytes, at + offset).unwrap_or_default();
    let mut value = json!({ "written": count(0), "taken": count(0x80) });
    let mut waiting = Vec::new();
    let mut read = || -> Result<(), ChannelError> {
        let mut channel = Channel::attach(Local::from(bytes), reader)?;
        while let Some(message) = channel.receive::<T>()? {
            waiting.push(plain(&message));
            if waiting.len() == MESSAGES {
                break;
            }
        }
        Ok(())
    };
    let broken = read().err();
    value["waiting"] = waiting.into();
    if let Some(error) = broken {
        value["problem"] = chain(&error).into();
    }
    value
}

/// KHO's root. What it points at can be shown only where that memory can be read.
pub(super) fn device_tree(at: &str, bytes: &[u8]) -> Piece {
    let read = Outline::read(bytes);
    let value = read.as_ref().map_or(Value::Null, |outline| {
        let outline = outline.alleged();
        let blob = |tree: &Subtree| json!({ "name": tree.name, "blob": plain(&tree.blob) });
        json!({
            "version": outline.abi.compatible(),
            "bytes": outline.len,
            "preserved_pages_at": format!("{:#x}", outline.tree_root),
            "blobs": outline.subtrees.iter().map(blob).collect::<Vec<_>>(),
        })
    });
    let problem = read.err().map(|error| chain(&error));
    Piece { format: "KHO device tree".to_owned(), at: at.to_owned(), value, problem }
}

/// A blob that a kernel was handed under this name.
pub(super) fn blob(name: &str, at: &str, bytes: &[u8]) -> Piece {
    let (format, at) = ("KHO blob".to_owned(), at.to_owned());
    if name == metadata::NAME {
        let read = Metadata::from_bytes(bytes);
        let value = read.as_ref().map_or(Value::Null, |metadata| {
            json!({ "name": name, "previous_release": metadata.previous_release, "kexec_count": metadata.kexec_count })
        });
        return Piece { format, at, value, problem: read.err().map(|error| chain(&error)) };
    }
    let start: String = bytes.iter().take(32).map(|byte| format!("{byte:02x}")).collect();
    Piece { format, at, value: json!({ "name": name, "bytes": bytes.len(), "start": start }), problem: None }
}

/// An update's journal, or any report: a JSON object, or one a line.
fn lines(at: &str, text: &str) -> Vec<Piece> {
    let piece = |format: &str, at: String, value, problem| Piece { format: format.to_owned(), at, value, problem };
    if let Ok(value @ Value::Object(_)) = serde_json::from_str::<Value>(text) {
        let journal = value.get("journal_version").is_some();
        if !journal {
            return vec![piece("report", at.to_owned(), value, None)];
        }
    }
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered
        .map(|(index, line)| {
            let at = format!("{at}, line {}", index + 1);
            let value = serde_json::from_str::<Map<String, Value>>(line).map(Value::Object);
            let problem = match (serde_json::from_str::<JournalLine>(line), &value) {
                (Ok(line), _) if (1..=JOURNAL_VERSION).contains(&line.journal_version) => None,
                (Ok(line), _) => Some(format!(
                    "a line of version {}, this program knows 1 to {JOURNAL_VERSION}",
                    line.journal_version
                )),
                (Err(error), _) => Some(format!("no line of a journal: {error}")),
            };
            piece("journal line", at, value.unwrap_or_default(), problem)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RECORD: &[u8] = include_bytes!("../../../../state-schemas/golden/v2/handover_record.bin");

    fn block() -> Vec<u8> {
        let mut bytes = vec![0; control_block::SIZE as usize];
        let mut put = |at: u64, value: &[u8]| bytes[at as usize..][..value.len()].copy_from_slice(value);
        put(words::MAGIC_AT, &words::MAGIC.to_le_bytes());
        put(words::VERSION_AT, &u64::from(words::VERSION).to_le_bytes());
        put(words::BOOT_MARK_AT, &2u64.to_le_bytes());
        put(HANDOVER.offset, RECORD);
        let dump = Local::from(&bytes[..]);
        Channel::attach(&dump, Side::Successor).unwrap().send(&ToIncumbent::Pong { nonce: 5 }).unwrap();
        dump.into_bytes()
    }

    #[test]
    fn a_control_block_shows_its_words_its_rings_and_its_record() {
        let shown = pieces("dump", &block(), control_block::SIZE).unwrap();
        assert_eq!(shown.len(), 2);
        assert_eq!(shown[0].value["successor_agent"], "Network");
        assert_eq!(shown[0].value["to_incumbent"]["waiting"], json!([{ "Pong": { "nonce": 5 } }]));
        assert_eq!(shown[1].format, "handover record");
        assert_eq!(shown[1].value["payload"]["update"], "30313233343536373839616263646566");
        assert_eq!(shown[1].value["payload"]["files"][0]["name"], "cache");
        assert_eq!(shown[1].value["payload"]["carried"][0]["version"], 17);
        assert_eq!(shown[1].problem, None);
    }

    #[test]
    fn old_records_show_as_what_they_mean_today() {
        let old = include_bytes!("../../../../state-schemas/golden/v1/handover_record.bin");
        let shown = pieces("old", old, old.len() as u64).unwrap();
        assert_eq!((shown[0].value["version"].as_u64(), shown[0].problem.as_deref()), (Some(1), None));
        assert_eq!(shown[0].value["payload"]["services"][0]["arenas"], json!([1]));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let problem = |bytes: &[u8]| pieces("x", bytes, bytes.len() as u64).unwrap()[0].problem.clone().unwrap();
        let mut broken = RECORD.to_vec();
        broken[100] ^= 1;
        assert!(problem(&broken).contains("the frame's CRC is"), "{}", problem(&broken));
        assert!(problem(&RECORD[..50]).contains("50 are there"));
        assert!(problem(b"\xd0\x0d\xfe\xed").contains("4 bytes are too few"), "{}", problem(b"\xd0\x0d\xfe\xed"));
        assert!(problem(b"BATONAR\0").contains("at least 4096 bytes"));
        assert!(problem(b"{\"journal_version\":1}").contains("no line of a journal"));
        assert!(problem(&block()[..0x3000]).contains("of 1048576 bytes"));
        let unknown = pieces("x", b"\x7fELF\x02\x01\x01\0more", 12).unwrap_err();
        assert_eq!(unknown.to_string(), "12 bytes that begin with 7f454c4602010100 are none of Baton's formats");
        assert_eq!(pieces("x", b"", 0), Err(ShowError::Empty));
    }

    proptest! {
        #[test]
        fn never_panics(
            start in prop::sample::select(vec![&b"BATONMSG"[..], b"BATONAR\0", b"{", b"\xd0\x0d\xfe\xed", b""]),
            rest in prop::collection::vec(any::<u8>(), 0..5000),
        ) {
            let _ = pieces("any", &[start, &rest].concat(), rest.len() as u64);
        }

        #[test]
        fn a_changed_control_block_never_panics(changes in prop::collection::vec((0usize..0xc0000, any::<u8>()), 1..20)) {
            let mut bytes = block();
            for (at, value) in changes {
                bytes[at] = value;
            }
            let _ = pieces("any", &bytes, bytes.len() as u64);
        }
    }
}
