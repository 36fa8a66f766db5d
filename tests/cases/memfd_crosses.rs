//! A program that keeps a memfd has it in the next kernel: the same pages, everything it wrote, its seals; there and back,
//! while it goes on writing. One such program knows systemd's fd store and nothing of Baton, the other uses the library.
//! What cannot be kept is refused with a reason.

use std::time::{Duration, Instant};

use agent::config::Service;
use anyhow::{Context, Result, ensure};
use baton_tests::{NEW, OLD, console, kernel, open};
use demos::memo::Found;
use demos::story::stage::{Shape, Stage, Upgraded};

/// By the fd store; by the library.
const MEMOS: [&str; 2] = ["memo", "memo-sdk"];
const PAGES: u64 = 1024;
/// `F_SEAL_SHRINK`, which the programs put on their files.
const SEAL_SHRINK: i32 = 2;
/// How long a program may take to say something new.
const PATIENCE: Duration = Duration::from_secs(60);

fn services() -> Vec<Service> {
    let memo = |name: &str, more: &[&str]| Service {
        name: name.to_owned(),
        exec: ["/usr/sbin/baton-memo", "--report", &format!("/run/{name}.json")]
            .into_iter()
            .chain(more.iter().copied())
            .map(str::to_owned)
            .collect(),
        fd_store: more.is_empty(),
    };
    vec![memo("memo", &[]), memo("memo-sdk", &["--sdk", "memo-sdk"])]
}

/// What a program says of itself, once it is as it should be.
fn report(stage: &Stage, name: &str, wanted: impl Fn(&Found) -> bool) -> Result<Found> {
    let until = Instant::now() + PATIENCE;
    let path = format!("/run/{name}.json");
    loop {
        let last = stage.guest().check(&["cat", &path]).map_err(anyhow::Error::from);
        let last = last.and_then(|text| serde_json::from_str::<Found>(&text).context(text));
        match last {
            Ok(found) if wanted(&found) => return Ok(found),
            last => ensure!(Instant::now() < until, "{name}: {last:?}\n{}", stage.machine.logs(60)),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// All pages behind one another, and all written to.
fn is_kept(found: &Found) -> bool {
    found.physical.len() == 1 && found.physical[0].ends_with(&format!("+{PAGES}")) && found.writes > PAGES
}

#[test]
fn kept_memory_crosses_there_and_back() -> Result<()> {
    let mut shape = Shape::default();
    shape.services.extend(services());
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
            let after = report(stage, name, |found| found.writes > found.writes_found)?;
            eprintln!("{name} in {release}: {after:?}");
            assert!(after.found && after.bad == 0 && after.torn <= 1, "{name} in {release}: {after:?}");
            assert!(after.writes_found >= before.writes, "{name} in {release}: {before:?}, then {after:?}");
            assert_eq!(after.physical, before.physical, "{name} in {release}: the same pages");
            assert_eq!(after.seals, before.seals, "{name} in {release}");
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
        ("more than there is", "no 536870912 KiB of contiguous memory"),
        ("long name", "1 to 255"),
        ("bad name", "no colon"),
        ("once", "kept"),
        ("twice", "kept"),
        ("another name", "kept already"),
        ("another's", "kept already"),
        ("kept", "1"),
        ("too many", "which is the most there can be"),
        ("left", "0"),
    ] {
        let answer = answers.lines().find_map(|line| line.strip_prefix(&format!("{what}: ")));
        assert!(answer.is_some_and(|answer| answer.contains(why)), "{what}: {answer:?}\n{answers}");
    }
}
