//! A program that keeps a memfd has it in the next kernel: the same pages, everything it wrote, its seals; there and back,
//! while it goes on writing. One such program knows systemd's fd store and nothing of Baton, the other uses the library.
//! What cannot be kept is refused with a reason.

use std::time::Duration;

use anyhow::{Context, Result};
use baton_tests::memo::{self, assert_crossed, is_kept, report};
use baton_tests::{NEW, OLD, console, kernel, open};
use demos::story::stage::{Shape, Upgraded};

/// By the fd store; by the library.
const MEMOS: [&str; 2] = ["memo", "memo-sdk"];
/// `F_SEAL_SHRINK`, which the programs put on their files.
const SEAL_SHRINK: i32 = 2;

#[test]
fn kept_memory_crosses_there_and_back() -> Result<()> {
    let mut shape = Shape::default();
    shape.services.extend([memo::service(MEMOS[0], false), memo::service(MEMOS[1], true)]);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let mut before = Vec::new();
    for name in MEMOS {
        let found = report(stage, name, is_kept)?;
        assert!(!found.found && found.seals == SEAL_SHRINK, "{name}: {found:?}");
        before.push(found);
    }
    let impossible =
        stage.guest().command(&["baton-memo", "--impossible"]).timeout(Duration::from_secs(240)).check()?;
    refused(&impossible);

    for series in [NEW, OLD] {
        let release = &kernel(series).release;
        for (name, before) in MEMOS.iter().zip(&mut before) {
            // Of now: what is written from here on may be in the last report or not.
            *before = report(stage, name, |found| found.writes > before.writes)?;
        }
        if let Upgraded::Refused(ran) = stage.upgrade(release, &[])? {
            panic!("to {release}: {} {}", ran.text(), String::from_utf8_lossy(&ran.stderr));
        }
        for (name, before) in MEMOS.iter().zip(&before) {
            assert_crossed(stage, name, before).with_context(|| format!("in {release}"))?;
        }
    }
    let machine = &stage.machine;
    assert_eq!(console::complaints(machine), [""; 0], "logs in {}", machine.folder().display());
    Ok(())
}

/// Every bad input is answered with what is wrong with it.
fn refused(answers: &str) {
    for (what, why) in [
        ("pipe", "no memfd"),
        ("file", "no memfd"),
        ("device", "no memfd"),
        ("empty", "0 bytes"),
        ("huge pages", "huge pages"),
        ("too large", "1 byte to 1 TiB"),
        ("more than there is", "536870912 KiB of memory that crosses are asked for"),
        ("long name", "1 to 255"),
        ("bad name", "no colon"),
        ("once", "kept"),
        ("twice", "kept"),
        ("another name", "kept already"),
        ("another's", "kept already"),
        ("kept", "1"),
        ("too many", "separate pieces of memory, and a successor surely remembers 72"),
        ("left", "0"),
    ] {
        let answer = answers.lines().find_map(|line| line.strip_prefix(&format!("{what}: ")));
        assert!(answer.is_some_and(|answer| answer.contains(why)), "{what}: {answer:?}\n{answers}");
    }
}
