//! A machine that was updated is still a machine: it powers off, restarts, hears its power button, and shows the right time; its
//! watchdog does not bite after the update, and the devices that the old kernel left interrupt nobody. While an update runs, it does
//! not go to sleep.

use anyhow::{Context, Result, ensure};
use baton_tests::refusal::said;
use baton_tests::{NEW, OLD, Turn, console, kernel, lab, upgrade};
use demos::lab::{Guest, Patience};
use demos::story::stage::{Shape, Stage, Upgraded};
use serde_json::Value;

/// A watchdog on the PCI bus, and how long it waits before it resets the machine, in seconds: long enough for a busy host.
const WATCHDOG: &str = "i6300esb";
const WATCHDOG_WAITS: u32 = 30;
/// What a successor's kernel says when it can power the machine off.
const S5: &str = "(supports S0 S5)";
/// How far the wall clock may be off after an update.
const CLOCK_TOLERANCE_NS: f64 = 5e6;

/// A kernel's wall clock as a line over the TSC, which goes on across updates.
#[derive(Debug, Clone, Copy)]
struct Wall {
    tsc: u64,
    unix_ns: f64,
    ns_per_tick: f64,
}

fn moment(guest: &Guest) -> Result<(u64, u64)> {
    let text = guest.check(&["labd", "wall"])?;
    let (tsc, unix_ns) = text.trim().split_once(' ').with_context(|| format!("`labd wall` says {text:?}"))?;
    Ok((tsc.parse()?, unix_ns.parse()?))
}

impl Wall {
    /// From two readings at least a second apart.
    fn of(guest: &Guest) -> Result<Wall> {
        let (first_tsc, first_ns) = moment(guest)?;
        guest.check(&["sleep", "1"])?;
        let (tsc, ns) = moment(guest)?;
        let ns_per_tick = (ns - first_ns) as f64 / (tsc - first_tsc) as f64;
        Ok(Wall { tsc: first_tsc, unix_ns: first_ns as f64, ns_per_tick })
    }

    fn at(self, tsc: u64) -> f64 {
        self.unix_ns + (tsc as f64 - self.tsc as f64) * self.ns_per_tick
    }
}

/// Makes an update and looks at the wall clock: the successor's, carried back to the cutover, is the incumbent's, carried on to it.
/// `meanwhile` is done in the incumbent while the successor boots.
fn upgrade_in_time(stage: &mut Stage, series: &str, meanwhile: &mut dyn FnMut(&Guest) -> Result<()>) -> Result<()> {
    let image = format!("/boot/vmlinuz-{}", kernel(series).release);
    let guest = stage.guest();
    let rate = Wall::of(&guest)?.ns_per_tick;
    let mut incumbent = None;
    let upgraded = stage.upgrade_telling(&["--kernel", &image, "--accept", "watchdog"], &[], &mut |line| {
        if incumbent.is_none() && line.starts_with("booting") {
            incumbent = Some(meanwhile(&guest).and_then(|()| moment(&guest)));
        }
    })?;
    let status = match upgraded {
        Upgraded::Drained(status) => status,
        Upgraded::Refused(ran) => anyhow::bail!("to {series}: {}", said(&ran)),
    };
    let (tsc, unix_ns) = incumbent.context("the update did not boot anything")??;
    let incumbent = Wall { tsc, unix_ns: unix_ns as f64, ns_per_tick: rate };
    let successor = Wall::of(&stage.guest())?;
    let update = status.update.context("it was an update")?;
    ensure!(update.left_undone.is_empty(), "{:?}", update.left_undone);
    let zero = update.zero.context("its timeline has a beginning")?;
    let cutover =
        update.timeline.iter().find(|span| span.name.contains("successor: services")).context("no cutover")?;
    let cutover = zero.tsc + (cutover.at_ms * zero.khz as f64) as u64;
    let off = successor.at(cutover) - incumbent.at(cutover);
    eprintln!(
        "to {series}: the wall clock is off by {:.3} ms; its rate differs by {:.0} ppm",
        off / 1e6,
        (successor.ns_per_tick / incumbent.ns_per_tick - 1.0) * 1e6
    );
    ensure!(off.abs() < CLOCK_TOLERANCE_NS, "the wall clock was off by {off} ns at the cutover to {series}");
    Ok(())
}

/// System sleep is refused.
fn stays_awake(guest: &Guest) -> Result<()> {
    for (what, script) in [
        ("suspend", "echo freeze > /sys/power/state"),
        ("hibernation", "echo reboot > /sys/power/disk && echo disk > /sys/power/state"),
    ] {
        let ran = guest.run(&["sh", "-c", script])?;
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        ensure!(!ran.success() && said.contains("busy"), "{what} in an update: {said}");
    }
    Ok(())
}

fn says(stage: &Stage, wanted: &str) -> Result<()> {
    let log = stage.guest().check(&["dmesg"])?;
    ensure!(log.contains(wanted), "{wanted:?} is not in the log:\n{log}");
    Ok(())
}

/// The machine starts anew, by its firmware.
fn restarted(stage: &mut Stage, before: usize) -> Result<()> {
    stage.machine.wait_for(0, "Linux version", before, Patience::BOOT)?;
    stage.serving = 0;
    stage.await_serving()
}

/// A program of the incumbent's pets the watchdog from now on, and has it open when this kernel leaves.
fn arm_watchdog(stage: &Stage) -> Result<()> {
    let pets =
        format!("watchdog -T {WATCHDOG_WAITS} -t 2 /dev/watchdog0; sleep 1; cat /sys/class/watchdog/watchdog0/state");
    let state = stage.guest().check(&["sh", "-c", &pets])?;
    ensure!(state == "active\n", "the watchdog is {state:?}");
    Ok(())
}

#[test]
fn after_one_hop_and_after_two() -> Result<()> {
    let shape = Shape { modules: vec![WATCHDOG.to_owned()], ..Shape::default() };
    let mut spec = Stage::spec(lab(), kernel(OLD), &shape)?;
    spec.extra.extend(["-device", WATCHDOG, "-watchdog-action", "reset"].map(str::to_owned));
    spec.reboots = true;
    let turn = Turn::take();
    let mut stage = Stage::start(lab(), &spec, &shape)?;
    eprintln!("machine's logs: {}", stage.machine.folder().display());
    stage.await_serving()?;

    // One hop, and a restart.
    arm_watchdog(&stage)?;
    upgrade_in_time(&mut stage, NEW, &mut stays_awake)?;
    says(&stage, S5)?;
    // Longer than the watchdog would wait.
    stage.guest().check(&["sleep", &(WATCHDOG_WAITS + 5).to_string()])?;
    let before = stage.machine.serial(0).position();
    let _going = stage.guest().command(&["reboot"]).begin()?;
    restarted(&mut stage, before).context("restarting after one hop")?;

    // Two, with a change of the clock, and the power button.
    upgrade_in_time(&mut stage, NEW, &mut |guest| {
        guest.check(&["sh", "-c", "date -s @$(($(date +%s) - 86400))"]).map(drop).map_err(Into::into)
    })?;
    upgrade(&mut stage, OLD, &[])?;
    // A kernel that kexec started would have a part of the machine only.
    assert_eq!(stage.guest().check(&["cat", "/proc/sys/kernel/kexec_load_limit_reboot"])?.trim(), "0");
    says(&stage, S5)?;
    let said = stage.machine.serial(0).position();
    stage.machine.qmp().execute("system_powerdown", Value::Null)?;
    stage.machine.wait_for(0, "the power button was pressed", said, Patience::BOOT)?;
    stage.machine.wait_end(Patience::BOOT).context("powering off after two hops")?;
    assert_eq!(console::complaints(&stage.machine), [""; 0], "logs in {}", stage.machine.folder().display());
    drop(turn);
    Ok(())
}
