//! A server on which Baton is installed as its packages do it: from `apt install` to `apt purge`, with a service that goes on meanwhile.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use agent::daemon::control::ServiceState;
use anyhow::{Context, Result, ensure};
use demos::lab::Guest;
use demos::package::Packages;
use demos::story::stage::Stage;
use serde_json::Value;

use crate::findings::Checked;
use crate::refusal::{baton, said};

/// dpkg and apt, emulated.
const PATIENCE: Duration = Duration::from_secs(300);
const PACKAGE: &str = "/var/tmp/baton.deb";
/// All files but those that dpkg, apt, logs and system accounts keep of everything that ever was.
const FILES: &str = "find / -xdev \\( -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log -o -path /tmp \
                     -o -path /proc -o -path /sys -o -path /dev -o -path /var/lib/systemd/timers \\) -prune -o -print \
                     | grep -v -x -e /etc/group- -e /etc/gshadow- -e /etc/.pwd.lock | sort; find /run -name '*baton*' | sort";

fn sh(guest: &Guest, script: &str) -> Result<String> {
    Ok(guest.command(&["sh", "-e", "-c", script]).timeout(PATIENCE).check()?.trim().to_owned())
}

fn apt(guest: &Guest, words: &str) -> Result<String> {
    sh(guest, &format!("DEBIAN_FRONTEND=noninteractive apt-get -q -y {words} 2>&1"))
}

fn files(guest: &Guest) -> Result<BTreeSet<String>> {
    Ok(sh(guest, FILES)?.lines().map(str::to_owned).collect())
}

fn main_process(guest: &Guest) -> Result<String> {
    let pid = sh(guest, "systemctl show -P MainPID batond")?;
    ensure!(pid != "0" && !pid.is_empty(), "batond does not run");
    Ok(pid)
}

fn assert_well(guest: &Guest, when: &str) -> Result<()> {
    let active = sh(guest, "systemctl is-active batond baton-kernels.service || true; systemctl --failed --no-legend")?;
    // The second has done its work and ended.
    ensure!(active == "active\ninactive", "{when}: {active}\n{}", sh(guest, "journalctl -b -u 'baton*' -n 60")?);
    Ok(())
}

/// The service that the lab has put there serves, on whichever batond.
fn assert_serves(stage: &Stage, when: &str) -> Result<()> {
    stage.await_serving().context(when.to_owned())?;
    let services = stage.status()?.services;
    ensure!(services.iter().all(|service| service.state == ServiceState::Serving), "{when}: {services:?}");
    Ok(())
}

fn json(guest: &Guest, words: &[&str]) -> Result<Value> {
    let ran = baton(guest, &[words, &["--json"]].concat())?;
    ensure!(ran.success(), "baton {words:?}: {}", said(&ran));
    serde_json::from_slice(&ran.stdout).with_context(|| said(&ran))
}

/// Takes the lab's own Baton away: what is left is as a user's server, but for a module in DKMS's place, a service that runs, and `labd`.
fn take_away(guest: &Guest) -> Result<()> {
    sh(
        guest,
        "systemctl disable --now batond; rm -rf /etc/systemd/system/batond.service /etc/systemd/system/batond.service.d \
         /usr/sbin/baton /usr/sbin/batond /usr/sbin/baton-init /etc/modules-load.d/baton.conf /etc/baton /var/lib/baton; \
         systemctl daemon-reload",
    )
    .map(drop)
}

/// Everything that the package promises, on one machine, in the order of its life. `images`: the kernel that runs, and the other one.
pub fn assert_lives_and_leaves(stage: &Stage, packages: &Packages, releases: [&str; 2]) -> Result<()> {
    let guest = stage.guest();
    take_away(&guest)?;
    let before = files(&guest)?;
    let service = sh(&guest, "systemctl show -P MainPID baton-kv")?;
    guest.put(PACKAGE, 0o644, &fs::read(&packages.baton)?)?;

    let installed = apt(&guest, &format!("install {PACKAGE}"))?;
    eprintln!("{installed}");
    assert_well(&guest, "installed")?;
    ensure!(sh(&guest, "systemctl is-enabled batond baton-kernels")? == "enabled\nenabled");
    ensure!(sh(&guest, "systemctl is-enabled baton-upgrade.timer || true")? == "disabled");
    let unit = sh(&guest, "systemctl show -P Type -P WatchdogUSec batond; getent group baton | cut -d: -f1")?;
    ensure!(unit == "notify-reload\n3min\nbaton", "{unit}");
    assert_serves(stage, "a service is taken on by the package's batond")?;

    without_configuration(&guest, releases)?;
    reloads(stage)?;
    newest(&guest, releases)?;

    let old = main_process(&guest)?;
    apt(&guest, &format!("install --reinstall {PACKAGE}"))?;
    assert_well(&guest, "installed anew")?;
    ensure!(main_process(&guest)? != old, "batond was not restarted when its package was installed anew");
    assert_serves(stage, "a service goes on while the package is installed anew")?;
    ensure!(sh(&guest, "systemctl show -P MainPID baton-kv")? == service, "the service was started anew");

    sh(
        &guest,
        "systemctl disable --now baton-kv; until baton status --json | grep -q absent; do sleep 0.2; done; baton release baton-kv",
    )?;
    apt(&guest, "purge baton")?;
    sh(&guest, &format!("rm {PACKAGE}"))?;
    let left: Vec<String> = files(&guest)?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:#?}");
    let gone = "pidof batond || getent group baton || systemctl --failed --no-legend | grep . || ls -d /run/baton || lsmod | grep ^baton || echo gone";
    let gone = sh(&guest, gone)?;
    ensure!(gone == "gone", "after purge: {gone}");
    Ok(())
}

/// Not one line of configuration: what there is was found.
fn without_configuration(guest: &Guest, [running, other]: [&str; 2]) -> Result<()> {
    ensure!(sh(guest, "ls /etc/baton 2>&1 || true")?.contains("No such file"));
    let checked = baton(guest, &["config", "check"])?;
    ensure!(checked.success() && checked.text().contains("does not exist"), "{}", said(&checked));
    let effective = baton(guest, &["config", "show", "--effective"])?;
    ensure!(effective.text().contains("region_mib = 512"), "{}", said(&effective));
    ensure!(baton(guest, &["config", "show"])?.text().is_empty());

    let checked = Checked::ask(guest, &format!("/boot/vmlinuz-{other}"), &[])?;
    checked.assert_refuses("a server whose root is on a disk", "mounts", &["ext4 on vda"])?;
    ensure!(checked.findings.iter().any(|finding| finding.check == "module" && finding.verdict == "ok"));

    let setup = json(guest, &["setup"])?;
    ensure!(
        setup["kernel_release"] == running && setup["root"].as_str().is_some_and(|root| root.starts_with("ext4")),
        "{setup}"
    );
    let named = |list: &str, name: &str| {
        setup[list]
            .as_array()
            .and_then(|all| all.iter().find(|found| found["name"] == name))
            .cloned()
            .unwrap_or_default()
    };
    ensure!(
        named("disks", "vda")["driver"] == "virtio_blk"
            && named("disks", "vdb")["what"].as_str().is_some_and(|what| what.contains("swap")),
        "{setup}"
    );
    ensure!(named("services", "nginx")["what"] == "unit", "{setup}");
    let interfaces = setup["interfaces"].as_array().map_or(0, Vec::len);
    ensure!(interfaces == 2 && setup["interfaces"][0]["driver"] == "virtio_net", "{setup}");

    // Found when the package came, by its unit.
    let kernels = json(guest, &["kernels"])?;
    for release in [running, other] {
        let images = kernels["images"].as_array().context("no images")?;
        let image = images.iter().find(|image| image["release"] == release).with_context(|| kernels.to_string())?;
        let refusals = image["verdict"]["refusals"].as_array().with_context(|| kernels.to_string())?;
        ensure!(refusals.iter().any(|refusal| refusal["check"] == "mounts"), "{kernels}");
    }
    Ok(())
}

/// A configuration comes into force by a reload; a wrong one changes nothing, and is told with what was meant.
fn reloads(stage: &Stage) -> Result<()> {
    let guest = stage.guest();
    let process = main_process(&guest)?;
    sh(
        &guest,
        "mkdir -p /etc/baton; printf '[update]\\nregion_mib = 256\\n' > /etc/baton/config.toml; systemctl reload batond",
    )?;
    assert_well(&guest, "reloaded")?;
    ensure!(main_process(&guest)? == process, "a reload is no restart for the service manager");
    let journal = "journalctl -b -u batond -o cat | grep -c 'batond is ready'";
    let ready = sh(&guest, journal)?;
    assert_serves(stage, "a service goes on over a reload")?;
    sh(&guest, "printf '[update]\\nregoin_mib = 256\\n' > /etc/baton/config.toml; systemctl reload batond")?;
    assert_well(&guest, "not reloaded")?;
    ensure!(main_process(&guest)? == process && sh(&guest, journal)? == ready, "a wrong file changes nothing");
    let said_by_batond = sh(&guest, "journalctl -b -u batond -o cat | grep 'not reloaded'")?;
    ensure!(said_by_batond.contains("did you mean `update.region_mib`?"), "{said_by_batond}");
    let checked = baton(&guest, &["config", "check"])?;
    ensure!(checked.exit.code == Some(3) && said(&checked).contains("update.regoin_mib"), "{}", said(&checked));
    sh(&guest, "rm -r /etc/baton; systemctl reload batond")?;
    assert_serves(stage, "a service goes on over the next reload")
}

/// A kernel comes by apt (here: a package that only has its name, since its image is there already): it is checked, and the sentinel says
/// that it waits; it goes, and nobody waits any more.
fn newest(guest: &Guest, [running, other]: [&str; 2]) -> Result<()> {
    let sentinel =
        "cat /run/reboot-required.pkgs 2>/dev/null; test -e /run/reboot-required && echo required || echo not required";
    ensure!(sh(guest, sentinel)? == "not required");
    let none = baton(guest, &["upgrade", "--to-newest"])?;
    ensure!(none.success() && none.text().contains("no kernel"), "{}", said(&none));
    sh(
        guest,
        &format!(
            "rm -f /var/lib/baton/kernels.json; d=$(mktemp -d); mkdir -p $d/DEBIAN; \
             printf 'Package: linux-image-{other}\\nVersion: 1\\nArchitecture: amd64\\nMaintainer: x <x@x>\\nDescription: x\\n' > $d/DEBIAN/control; \
             printf '#!/bin/sh\\nexec run-parts --report --exit-on-error --arg={other} --arg=/boot/vmlinuz-{other} /etc/kernel/postinst.d\\n' > $d/DEBIAN/postinst; \
             chmod 755 $d/DEBIAN/postinst; dpkg-deb -b $d /var/tmp/kernel.deb; dpkg -i /var/tmp/kernel.deb; rm -r $d /var/tmp/kernel.deb"
        ),
    )?;
    ensure!(sh(guest, sentinel)? == format!("linux-image-{other}\nrequired"), "{}", sh(guest, sentinel)?);
    let kernels = json(guest, &["kernels"])?;
    let image = |release: &str| {
        let images = kernels["images"].as_array()?;
        images.iter().find(|image| image["release"] == release).cloned()
    };
    let new = image(other).unwrap_or_default();
    ensure!(new["installed"] == true && new["verdict"]["checked_on"] == running, "{kernels}");
    ensure!(
        image(running).is_some_and(|image| image["verdict"].is_null()),
        "only the new one was asked about: {kernels}"
    );
    // It is the newest, and this machine refuses it.
    let refused = baton(guest, &["upgrade", "--to-newest"])?;
    ensure!(refused.exit.code == Some(3) && said(&refused).contains("ext4 on vda"), "{}", said(&refused));
    sh(guest, &format!("dpkg --purge linux-image-{other}; run-parts --arg={other} /etc/kernel/postrm.d"))?;
    ensure!(sh(guest, sentinel)? == "not required");
    // The timer's service takes a refusal, or nothing to do, as no failure.
    sh(guest, "systemctl start baton-upgrade.service; systemctl is-failed baton-upgrade.service && exit 1 || true")?;
    Ok(())
}
