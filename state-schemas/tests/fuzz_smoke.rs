//! The fuzz targets of `fuzz/`, over their corpus and some thousand changes of it.

use std::path::Path;

use state_schemas::Payload;
use state_schemas::arena::ArenaHeader;
use state_schemas::handover_record::HandoverRecord;

#[path = "../fuzz/src/lib.rs"]
mod entries;
#[path = "../fuzz/src/smoke.rs"]
mod smoke;

fn run(target: &str, entry: fn(&[u8])) {
    smoke::run(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz"), target, 2000, entry);
}

#[test]
fn frame() {
    run("frame", entries::frame);
}

#[test]
fn record() {
    run("record", entries::record);
}

#[test]
fn messages() {
    run("messages", entries::messages);
}

#[test]
fn connections() {
    run("connections", entries::connections);
}

#[test]
fn arena_page() {
    run("arena_page", entries::arena_page);
}

/// The corpus leads past the first checks.
#[test]
fn the_corpus_holds_what_is_believed() {
    let table = include_bytes!("../fuzz/corpus/connections/two");
    assert_eq!(state_schemas::connections::read(table).unwrap().len(), 2);
    let received = HandoverRecord::from_frame(include_bytes!("../fuzz/corpus/record/frame_v2")).unwrap();
    let region = received.alleged().grant.region;
    assert!(received.check(&region).is_ok());
    for page in
        [&include_bytes!("../fuzz/corpus/arena_page/live")[..], include_bytes!("../fuzz/corpus/arena_page/sealed")]
    {
        assert!(ArenaHeader::read(page).unwrap().check(&(1 << 20)).is_ok());
    }
}
