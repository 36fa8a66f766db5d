//! The successor's agent may be older than the incumbent's: then the handover record is written in the version that it reads, and the
//! update works. What makes an older one here is its answer: it does not know the question which versions it speaks.

use agent::daemon::outcome::Class;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{baton, said};
use baton_tests::{NEW, OLD, kernel, lab, open, upgrade};
use demos::lab::guest_programs;
use demos::story::stage::Shape;
use serde_json::Value;

#[test]
fn an_older_agent_gets_the_record_of_its_version() -> Result<()> {
    let programs = guest_programs::build(&["baton"], lab().progress())?;
    let program = std::fs::read(programs.join("baton")).context("reading baton")?;
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let older =
        format!("#!/bin/sh\n[ \"$1\" = handover ] && exit {}\nexec /tmp/baton \"$@\"\n", Class::Usage.exit_code());
    guest.put("/tmp/baton", 0o755, &program)?;
    // The test's own questions are answered in the successor, too.
    let mut beside = Initrd::new();
    beside.file("/tmp/baton", 0o755, program);
    guest.put("/tmp/beside", 0o644, &beside.bytes()?)?;
    guest.put("/tmp/older", 0o755, older.as_bytes())?;
    guest.check(&["mv", "/tmp/older", "/usr/sbin/baton"])?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let check = baton(&guest, &["check", "--kernel", &image])?;
    ensure!(check.success() && said(&check).contains("reads handover record version 1"), "{}", said(&check));

    let clients = Clients::start(stage, 40)?;
    upgrade(stage, NEW, &["--initrd", "/tmp/beside"])?;
    clients.await_more(20)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");

    let shown: Value =
        serde_json::from_str(&stage.guest().check(&["/tmp/baton", "handover", "show", "--live", "--json"])?)?;
    let record = &shown["pieces"][1];
    assert_eq!((record["format"].as_str(), record["value"]["version"].as_u64()), (Some("handover record"), Some(1)));
    // Read by the newest, it means the same.
    assert_eq!(record["value"]["payload"]["services"][0]["arenas"], serde_json::json!([1]));
    Ok(())
}
