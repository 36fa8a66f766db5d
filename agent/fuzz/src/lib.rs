//! What is done with any bytes: the fuzz targets call these, and so does `tests/fuzz_smoke.rs` in `cargo test`.

use agent::cli::handover::show;
use agent::machine::net::parse_mac;
use agent::userland::kernels::parse_instances;
use baton_sdk::files::{Ask, Told};
use baton_sdk::protocol::{Inbox, Standing, ToAgent, ToService, encode};

/// What a service and its agent say to each other, in pieces as a socket may give them, from any standing on.
pub fn service(bytes: &[u8]) {
    let (piece, bytes) = bytes.split_first().unwrap_or((&7, &[]));
    let chunks = || bytes.chunks(usize::from(*piece).max(1));

    let mut inbox = Inbox::default();
    let mut standing = Standing::Unknown;
    'all: for chunk in chunks() {
        if inbox.push(chunk, None).is_err() {
            break;
        }
        loop {
            match inbox.take::<ToAgent>() {
                Ok(Some(report)) => {
                    assert!(encode(&report).is_ok(), "what was read can be written: {report:?}");
                    if let ToAgent::Hello(hello) = &report {
                        let _ = hello.check();
                    }
                    standing = standing.reported(&report).unwrap_or(standing);
                }
                Ok(None) => break,
                Err(_) => break 'all,
            }
        }
    }
    let mut inbox = Inbox::default();
    'all: for chunk in chunks() {
        if inbox.push(chunk, None).is_err() {
            break;
        }
        loop {
            match inbox.take::<ToService>() {
                Ok(Some(order)) => standing = standing.ordered(&order).unwrap_or(standing),
                Ok(None) => break,
                Err(_) => break 'all,
            }
        }
    }
    let mut inbox = Inbox::default();
    if inbox.push(bytes, None).is_ok() {
        while let Ok(Some(_)) = inbox.take::<Ask>() {}
    }
    let mut inbox = Inbox::default();
    if inbox.push(bytes, None).is_ok() {
        while let Ok(Some(_)) = inbox.take::<Told>() {}
    }
}

/// `baton handover show` of any file.
pub fn show(bytes: &[u8]) {
    let _ = show::pieces("fuzz", bytes, bytes.len() as u64);
}

/// What the module and the operator write.
pub fn texts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for row in parse_instances(&text).unwrap_or_default() {
        let _ = row.region();
    }
    let _ = parse_mac(&text);
}
