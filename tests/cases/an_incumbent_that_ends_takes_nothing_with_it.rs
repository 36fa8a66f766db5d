//! An incumbent that ends after the cutover, by a panic or a restart, ends alone: the successor goes on serving with what it has, and
//! says what it lacks. One that ends before the cutover ends with the machine, and its successor is stopped first.

use agent::daemon::control::ServiceState;
use agent::daemon::control::Status;
use anyhow::{Context, Result, ensure};
use baton_tests::clients::Clients;
use baton_tests::share::is_chosen;
use baton_tests::{NEW, OLD, Turn, kernel, lab};
use demos::lab::Patience;
use demos::lab::guest::Begun;
use demos::story::stage::{Shape, Stage, cmdline, status_of};
use demos::story::traps;

/// Makes an update, in which the incumbent does this as soon as its successor is in a state; maybe with a trap in the successor's initrd.
fn upgrade_until(stage: &Stage, state: &str, then: &str, trap: Option<&str>) -> Result<Begun> {
    let script = format!(
        "(until grep -q ' successor {state} ' /proc/multikernel; do sleep 0.05; done; {then}) < /dev/null > /dev/null 2>&1 &"
    );
    stage.guest().check(&["sh", "-c", &script])?;
    let image = format!("/boot/vmlinuz-{}", kernel(NEW).release);
    let line = format!("{}{}", cmdline(1), if trap.is_some() { " rdinit=/trap" } else { "" });
    let mut words = vec!["baton", "upgrade", "--kernel", &image, "--cmdline", &line];
    words.extend(trap.iter().flat_map(|initrd| ["--initrd", initrd]));
    Ok(stage.guest().command(&words).begin()?)
}

/// What the successor says when it has noticed.
fn left_behind(stage: &Stage) -> Result<Status> {
    let began = std::time::Instant::now();
    loop {
        let status = status_of(&stage.guest());
        if let Ok(status) = &status
            && status.update.as_ref().is_some_and(|update| !update.left_undone.is_empty())
        {
            return Ok(status.clone());
        }
        ensure!(began.elapsed() < Patience::BOOT.total, "{status:?}\n{}", stage.machine.logs(60));
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

fn ends_alone(stage: &mut Stage, how: &str, said: &str) -> Result<()> {
    let clients = Clients::start(stage, 40)?;
    let seen = stage.machine.serial(0).position();
    let _updating = upgrade_until(stage, "serving", how, None)?;
    stage.machine.wait_for(0, said, seen, Patience::BOOT).context("the incumbent's end")?;
    stage.serving = 1;
    let status = left_behind(stage)?;
    let update = status.update.context("it was an update")?;
    eprintln!("{how}: {:?}", update.left_undone);
    let all = update.left_undone.join("\n");
    for wanted in [
        "the incumbent panicked, or was restarted",
        "CPUs with APIC id ",
        " 0: the incumbent had them",
        "MiB that the incumbent had",
    ] {
        ensure!(all.contains(wanted), "{wanted:?} is not in {all}");
    }
    ensure!(status.services.iter().all(|service| service.state == ServiceState::Serving), "{:?}", status.services);
    // Longer than `panic=1` would wait, and than other CPUs need to be stopped.
    clients.await_more(200)?;
    stage.guest().check(&["sleep", "3"])?;
    ensure!(!stage.machine.serial(0).text_from(seen).contains("Linux version"), "the machine was reset");
    let report = clients.finish()?;
    ensure!(report.is_clean(), "{report:?}");
    Ok(())
}

/// By its firmware, whoever asked for it.
fn restarted(stage: &mut Stage, seen: usize) -> Result<()> {
    stage.machine.wait_for(0, "Linux version", seen, Patience::BOOT)?;
    stage.serving = 0;
    stage.await_serving()
}

#[test]
fn by_a_panic_by_a_restart_and_before_the_cutover() -> Result<()> {
    let shape = Shape::default();
    let mut spec = Stage::spec(lab(), kernel(OLD), &shape)?;
    spec.reboots = true;
    let _turn = Turn::take();
    let mut stage = Stage::start(lab(), &spec, &shape)?;
    eprintln!("machine's logs: {}", stage.machine.folder().display());
    stage.await_serving()?;

    if is_chosen("an incumbent that panics") {
        ends_alone(&mut stage, "echo 1 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger", "end Kernel panic")?;
        // The machine is the successor's: it ends with that one.
        let seen = stage.machine.serial(0).position();
        let _going = stage.guest().command(&["reboot", "-f"]).begin()?;
        restarted(&mut stage, seen).context("after a panic")?;
    }
    if is_chosen("an incumbent that restarts") {
        ends_alone(&mut stage, "reboot -f", "this one stops here")?;
        let seen = stage.machine.serial(0).position();
        let _going = stage.guest().command(&["reboot", "-f"]).begin()?;
        restarted(&mut stage, seen).context("after a restart")?;
    }
    // Before the cutover: the machine restarts, and no successor runs on. Its service never stands by, so that the trial lasts.
    stage.guest().put("/tmp/waits", 0o644, &traps::service("sleep 1000")?)?;
    let seen = stage.machine.serial(0).position();
    let _updating = upgrade_until(&stage, "running", "reboot -f", Some("/tmp/waits"))?;
    restarted(&mut stage, seen).context("in a trial")?;
    let quiet = stage.machine.serial(1).position();
    Clients::start(&stage, 40)?.await_more(40)?;
    ensure!(stage.machine.serial(1).position() == quiet, "a successor runs on beside a kernel that was started anew");
    Ok(())
}
