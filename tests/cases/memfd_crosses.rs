//! A program that keeps a memfd has it in the next kernel: the same pages, everything it wrote, its seals; there and back,
//! while it goes on writing. One such program knows systemd's fd store and nothing of Baton, the other uses the library.
//! A file that has grown lies in two pieces, and crosses as one file. What cannot be kept is refused with a reason.

use std::time::Duration;

use anyhow::{Context, Result};
use baton_tests::memo::{self, assert_crossed, is_kept, report};
use baton_tests::{NEW, OLD, console, kernel, open, upgrade};
use demos::lab::Guest;
use demos::story::stage::Shape;
use serde_json::Value;

/// By the fd store; by the library.
const MEMOS: [&str; 2] = ["memo", "memo-sdk"];
/// Of one of them the file gets longer than the program knows, and has a mark at its end: what is added lies in a piece of its own.
const LONGER: u64 = 11 << 20;
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
    let end = LONGER - 1;
    let script = format!("truncate -s {LONGER} $f && printf Z | dd of=$f bs=1 seek={end} conv=notrunc 2>/dev/null");
    on_file(&stage.guest(), before[0].pid, &script)?;

    for series in [NEW, OLD] {
        let release = &kernel(series).release;
        for (name, before) in MEMOS.iter().zip(&mut before) {
            // Of now: what is written from here on may be in the last report or not.
            *before = report(stage, name, |found| found.writes > before.writes)?;
        }
        upgrade(stage, series, &[])?;
        for (name, before) in MEMOS.iter().zip(&before) {
            let after = assert_crossed(stage, name, before).with_context(|| format!("in {release}"))?;
            if *name == MEMOS[0] {
                let mark = format!("dd if=$f bs=1 skip={end} 2>/dev/null");
                assert_eq!(on_file(&stage.guest(), after.pid, &mark)?, "Z", "the file's last byte in {release}");
            }
        }
        assert_eq!(pieces(&stage.guest(), MEMOS[0])?, 2, "in {release}");
    }
    let machine = &stage.machine;
    assert_eq!(console::complaints(machine), [""; 0], "logs in {}", machine.folder().display());
    Ok(())
}

/// Runs a line of shell on the file `$f` that the program keeps.
fn on_file(guest: &Guest, pid: u32, script: &str) -> Result<String> {
    let find =
        format!("for f in /proc/{pid}/fd/*; do case $(readlink $f) in /memfd:*) {script}; exit;; esac; done; exit 1");
    Ok(guest.check(&["sh", "-c", &find])?)
}

/// In how many pieces of memory a program's file came to this kernel.
fn pieces(guest: &Guest, name: &str) -> Result<usize> {
    let shown: Value = serde_json::from_str(&guest.check(&["baton", "handover", "show", "--live", "--json"])?)?;
    let mut arenas =
        shown["pieces"].as_array().into_iter().flatten().filter_map(|p| p["value"]["payload"]["arenas"].as_array());
    let mine = arenas.next().into_iter().flatten().find(|arena| arena["name"] == name);
    mine.and_then(|arena| Some(arena["ranges"].as_array()?.len())).with_context(|| format!("{shown}"))
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
