//! Whatever the two kernels of an update read of each other may be wrong: control block, handover record, rings, arenas. Each lie is told on
//! a real machine, while a successor boots, by a program that any root could run; each is refused before the freeze, in words that name it,
//! and the incumbent goes on as if nothing had been. At the end an honest update works.

use agent::daemon::outcome::Class;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::share::is_chosen;
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, console, kernel, lab, open, upgrade};
use demos::lab::guest_programs;
use demos::story::stage::Shape;
use serde_json::Value;
use std::time::Duration;

/// The lie (see `liar`), and what must be said of it.
const LIES: [(&str, &[&str]); 14] = [
    // Such a successor cannot speak: its agent's end is read in its log.
    ("control-magic", &["booting failed", "has not answered"]),
    ("control-version", &["booting failed", "has not answered"]),
    ("record-bit", &["booting failed", "the handover record cannot be read", "the frame's CRC is"]),
    ("record-version", &["booting failed", "HandoverRecord of version 999, this program knows 1 to 2"]),
    ("record-count", &["booting failed", "the handover record cannot be read", "cannot decode"]),
    ("record-arena-outside", &["booting failed", "not credible", "arena 0x0+0x10000000000"]),
    ("record-overlap", &["booting failed", "not credible", "upon another range"]),
    ("ring-counts", &["booting failed", "the other side broke the ring: head"]),
    ("ring-crc", &["booting failed", "the other side broke the ring: record at 0x0 has CRC"]),
    ("ring-message", &["booting failed", "a message does not decode"]),
    ("ring-tail", &["trial failed", "the other side broke the ring"]),
    ("arena-magic", &["trial failed", "service baton-kv cannot stand by", "no arena here"]),
    ("arena-version", &["trial failed", "service baton-kv cannot stand by", "arena version 77"]),
    (
        "arena-length",
        &["trial failed", "service baton-kv cannot stand by", "the arena says it has 0xffffffffffffffff bytes"],
    ),
];

#[test]
fn each_lie_is_refused_before_the_freeze_and_the_incumbent_goes_on() -> Result<()> {
    let programs = guest_programs::build(&["liar"], lab().progress())?;
    let mut shape = Shape::default();
    (shape.update.boot_timeout_s, shape.update.step_timeout_s) = (25, 20);
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    guest.put("/tmp/liar", 0o755, &std::fs::read(programs.join("liar")).context("reading the liar")?)?;
    let clients = Clients::start(stage, 40)?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    // From here on the agent has what memory it keeps for such work.
    ensure!(baton(&guest, &["check", "--kernel", &image])?.success());
    let nothing = baton(&guest, &["handover", "show", "--live"])?;
    assert_refused("nothing is handed over yet", &nothing, Class::Precondition, &["the firmware booted this kernel"])?;
    let pair = baton(&guest, &["handover", "check", "--kernel", &image])?;
    ensure!(pair.success() && said(&pair).contains("reads handover record version 2"), "{}", said(&pair));
    let mut before = snapshot::of(stage)?;

    let line = format!("console=ttyS{},115200 printk.devkmsg=on panic=0", 1 - stage.serving);
    let script = "/tmp/liar $1 > /tmp/lied 2>&1 & baton upgrade --kernel $2 --cmdline \"$3\"; code=$?; wait; cat /tmp/lied; exit $code";
    for (lie, words) in LIES.into_iter().filter(|(lie, _)| is_chosen(lie)) {
        let began = std::time::Instant::now();
        let ran =
            guest.command(&["sh", "-c", script, "sh", lie, &image, &line]).timeout(Duration::from_secs(300)).run()?;
        let told = || stage.machine.logs(40);
        ensure!(ran.text().contains(&format!("lied: {lie}")), "{lie} was not told: {}\n{}", ran.text(), told());
        assert_refused(lie, &ran, Class::RolledBack, words).map_err(|why| why.context(told()))?;
        // Nobody was frozen: the phases of the cutover never came.
        let progress = String::from_utf8_lossy(&ran.stderr).into_owned();
        ensure!(!progress.contains("cutover"), "{lie} was found in the cutover: {progress}");
        clients.await_more(20)?;
        let after = snapshot::of(stage)?;
        assert_untouched(lie, &before, &after);
        eprintln!("refused in {:.0} s: {lie}", began.elapsed().as_secs_f64());
        before = after;
    }

    upgrade(stage, NEW, &[])?;
    let live = baton(&stage.guest(), &["handover", "show", "--live", "--json"])?;
    let shown: Value = serde_json::from_slice(&live.stdout).with_context(|| said(&live))?;
    ensure!(live.success(), "what was handed over is not credible: {shown:#}");
    let formats =
        shown["pieces"].as_array().into_iter().flatten().map(|piece| piece["format"].as_str().unwrap_or_default());
    assert_eq!(formats.collect::<Vec<_>>(), ["control block", "handover record", "arena"]);
    let record = &shown["pieces"][1]["value"]["payload"];
    assert_eq!(record["incumbent"]["release"].as_str(), Some(kernel(OLD).release.as_str()));
    assert_eq!(shown["pieces"][2]["value"]["name"], record["services"][0]["name"]);
    clients.await_more(20)?;
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    let first = stage.machine.serial(0).text_from(0);
    assert_eq!(console::complaints_in(&first), [""; 0], "logs in {}", stage.machine.folder().display());
    Ok(())
}
