//! Fixed layouts: their byte tables are printed from the code and compared with `golden/layouts.txt`, and the drawings that people
//! read, in README and source, say the same.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};

use state_schemas::arena::{self, ArenaHeader, UndoRecord};
use state_schemas::control_block::{self as block, Piece, words};
use state_schemas::header::Header;

/// Name, offset, size.
type Rows = Vec<(&'static str, u64, u64)>;

macro_rules! rows {
    ($type:ty: $($field:ident $width:expr),*) => {
        vec![$((stringify!($field), offset_of!($type, $field) as u64, $width)),*]
    };
}

fn frame() -> Rows {
    rows!(Header: magic 8, format 2, kind 2, version 4, length 8, crc 4, reserved 4)
}

fn arena_page() -> Rows {
    rows!(ArenaHeader: magic 8, version 4, header_len 4, length 8, name arena::NAME_LEN as u64, schema_kind 4, schema_version 4,
        epoch 8, state 4, seal 4, mutations 8, root 8, top 8, used 8, seed 8, reserved 0x100 - 0x78,
        tables arena::TABLES_LEN as u64)
}

fn undo_record() -> Rows {
    rows!(UndoRecord: length 8, pending 8, entries arena::RECORD_WORDS * 8)
}

fn control_block() -> Rows {
    let row = |name, piece: Piece| (name, piece.offset, piece.size);
    vec![
        row("boot_params", block::BOOT_PARAMS),
        row("command line", block::CMDLINE),
        row("control words", block::WORDS),
        row("yield arguments", block::YIELD_ARGS),
        row("mailbox", block::MAILBOX),
        row("park page", block::PARK_PAGE),
        row("yield page", block::YIELD_PAGE),
        row("stack", block::STACK),
        row("transition table", block::TRANSITION_TABLE),
        row("setup_data", block::SETUP_DATA),
        row("ACPI tables", block::ACPI),
        row("page tables", block::PAGE_TABLES),
        row("handover record", block::HANDOVER),
        row("ring to the successor", block::RING_TO_SUCCESSOR),
        row("ring to the incumbent", block::RING_TO_INCUMBENT),
    ]
}

fn control_words() -> Rows {
    vec![
        ("magic", words::MAGIC_AT, 8),
        ("version", words::VERSION_AT, 8),
        ("incumbent bell", words::INCUMBENT_BELL_AT, 8),
        ("successor bell", words::SUCCESSOR_BELL_AT, 8),
        ("epoch", words::EPOCH_AT, 8),
        ("incumbent panic", words::INCUMBENT_PANIC_AT, 8),
        ("successor panic", words::SUCCESSOR_PANIC_AT, 8),
        ("boot mark", words::BOOT_MARK_AT, 8),
        ("clock tsc", words::CLOCK_TSC_AT, 8),
        ("clock ns", words::CLOCK_NS_AT, 8),
        ("connections", words::CONNECTIONS_AT, 8),
    ]
}

#[test]
fn the_tables_are_as_released() {
    let mut text = String::new();
    for (title, rows) in [
        ("frame, format 1", frame()),
        ("arena page, versions 1 and 2", arena_page()),
        ("arena's undo record, version 2", undo_record()),
        ("control block, version 1", control_block()),
        ("control words, version 1", control_words()),
    ] {
        text.push_str(&format!("{title}. offset length field\n"));
        rows.iter().for_each(|(name, at, len)| text.push_str(&format!("{at:#07x} {len:>6}  {name}\n")));
    }
    crate::golden::compare("layouts.txt", text.as_bytes());
}

/// Nothing overlaps, and nothing lies between: what is reserved is said to be.
#[test]
fn rows_touch() {
    let touches = |rows: Rows, end: u64| {
        let last = rows.iter().fold(rows[0].1, |at, (name, offset, len)| {
            assert_eq!(at, *offset, "{name}");
            offset + len
        });
        assert_eq!(last, end);
    };
    touches(frame(), size_of::<Header>() as u64);
    touches(arena_page(), arena::HEADER_LEN);
    touches(undo_record(), arena::RECORD_LEN);
    touches(control_block(), 0xc0000);
}

/// The first drawing in a text that begins with this offset: `0x18 name…`, each offset with the word behind it.
fn drawing(text: &str, begins: &str) -> BTreeMap<u64, String> {
    let start = text.find(begins).unwrap_or_else(|| panic!("no drawing begins with {begins:?}"));
    let drawn = &text[start..start + text[start..].find("```").expect("a drawing ends")];
    let tokens: Vec<&str> = drawn.split_whitespace().filter(|token| *token != "//!").collect();
    let offset = |token: &str| u64::from_str_radix(token.strip_prefix("0x")?, 16).ok();
    tokens.windows(2).filter_map(|pair| Some((offset(pair[0])?, pair[1].to_owned()))).collect()
}

#[test]
fn the_drawings_say_the_same() {
    let readme = include_str!("../../README.md");
    let said = |drawing: &BTreeMap<u64, String>, rows: &Rows, unnamed: &[u64]| {
        for (at, word) in drawing.iter().filter(|(at, _)| !unnamed.contains(at)) {
            let name = rows.iter().find(|row| row.1 == *at).map(|row| row.0.replace(['_', ' '], "").to_lowercase());
            let first = word.trim_end_matches(',').replace('_', "").to_lowercase();
            let same = name.as_ref().is_some_and(|name| name.starts_with(&first) || first.starts_with(name.as_str()));
            assert!(same, "the drawing has {word:?} at {at:#x}, the code {name:?}");
        }
        assert!(drawing.len() >= 4, "{drawing:?}");
    };
    // Behind the header comes the payload.
    said(&drawing(readme, "0x00 magic \"BATONMSG\""), &frame(), &[0x20]);
    said(&drawing(include_str!("../../src/arena.rs"), "0x00 magic"), &arena_page(), &[0x38, 0x100, 0x1000]);
    said(&drawing(include_str!("../../src/arena.rs"), "0x00 length u64"), &undo_record(), &[0x1000]);
    // The rings are one entry, and the last two are what is left.
    said(
        &drawing(include_str!("../../src/control_block.rs"), "0x00000 boot_params"),
        &control_block(),
        &[0x80000, 0xc0000, 0x100000],
    );
}
