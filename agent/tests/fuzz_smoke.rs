//! The fuzz targets of `fuzz/`, over their corpus and some thousand changes of it.

use std::path::Path;

use baton_sdk::protocol::{Hello, Inbox, ToAgent, ToService, encode};

#[path = "../fuzz/src/lib.rs"]
mod entries;
#[path = "../../state-schemas/fuzz/src/smoke.rs"]
mod smoke;

fn run(target: &str, entry: fn(&[u8])) {
    smoke::run(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz"), target, 1000, entry);
}

#[test]
fn service() {
    run("service", entries::service);
}

#[test]
fn show() {
    run("show", entries::show);
}

#[test]
fn texts() {
    run("texts", entries::texts);
}

/// The corpus leads past the first checks; `BATON_GOLDEN=write` writes it where it is missing.
#[test]
fn the_corpus_holds_conversations() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/service");
    let reports = [
        ToAgent::Hello(Hello::new("kv", 7, 1, 1 << 20)),
        ToAgent::Ready,
        ToAgent::Activated { epoch: 1, items: 5, seal: 9 },
        ToAgent::Frozen { epoch: 1, items: 6, seal: 10 },
    ];
    let orders = [
        ToService::Arena { len: 4096, fresh: true, first: 4096 },
        ToService::StandBy,
        ToService::Activate { epoch: 2 },
        ToService::Freeze { epoch: 2 },
        ToService::Stop,
    ];
    // The first byte: how much a socket gives at a time.
    let said = |frames: Vec<Vec<u8>>| [vec![16], frames.concat()].concat();
    let conversations = [
        ("reports", said(reports.iter().map(|report| encode(report).unwrap()).collect())),
        ("orders", said(orders.iter().map(|order| encode(order).unwrap()).collect())),
    ];
    for (name, bytes) in conversations {
        let path = folder.join(name);
        if !path.exists() && std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == bytes, "{} is not what is said today", path.display());
    }
    let mut inbox = Inbox::default();
    inbox.push(&std::fs::read(folder.join("reports")).unwrap()[1..], None).unwrap();
    let read = std::iter::from_fn(|| inbox.take::<ToAgent>().unwrap());
    assert_eq!(read.count(), reports.len());
}
