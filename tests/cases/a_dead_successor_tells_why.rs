//! A successor that dies or hangs before its agent answers tells why: the incumbent reads its log out of its memory, without its help,
//! alive and dead. Both kernels as successors, one machine.

use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, Instant};

use agent::daemon::control::Status;
use agent::daemon::outcome::Class;
use agent::daemon::successor_log::Log;
use agent::userland::initrd::Initrd;
use anyhow::{Context, Result, bail, ensure};
use baton_tests::refusal::{assert_refused, baton, said};
use baton_tests::share::is_chosen;
use baton_tests::snapshot::{self, assert_untouched};
use baton_tests::{NEW, OLD, kernel, lab, open, upgrade};
use demos::lab::guest::Ran;
use demos::lab::{Progress, kmod};
use demos::story::stage::{Shape, Stage};
use kexec_core::klog::Kind;

/// What a successor runs instead of its init.
struct End {
    what: &'static str,
    /// In kernels of which series.
    of: &'static [&'static str],
    /// Its script; nothing: there is no such file.
    script: Option<&'static str>,
    /// What the failure says.
    told: &'static [&'static str],
    /// What its log says that it died of.
    kind: Option<Kind>,
    /// Its log is read while it runs, and must come to this line.
    live: Option<&'static str>,
}

const ENDS: [End; 5] = [
    End {
        what: "no init",
        of: &[NEW, OLD],
        script: None,
        // Not waited for until the deadline.
        told: &[
            "booting failed",
            "the successor panicked, or was restarted; its CPU entered the kernel, and its agent never came up; \
             its kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0), in mount_root_generic+0x",
            "  | [",
            "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
        ],
        kind: Some(Kind::Panic),
        live: None,
    },
    End {
        what: "an init that leaves",
        of: &[NEW],
        script: Some("exit 3"),
        told: &["its kernel panicked: Attempted to kill init! exitcode=0x00000300"],
        kind: Some(Kind::Panic),
        live: None,
    },
    End {
        what: "a module that was built for another kernel",
        of: &[OLD],
        script: Some(
            "while read f; do case $f in */baton.ko*) cat /wrong.ko > $f;; esac; done < /etc/baton/modules.$(uname -r)\n\
             exec /init",
        ),
        // Its agent never runs, so that it is waited for.
        told: &["its agent never came up; a module did not load in it: baton: "],
        kind: Some(Kind::Module),
        live: None,
    },
    End {
        what: "no driver for its interface",
        of: &[NEW],
        script: Some(
            "list=/etc/baton/modules.$(uname -r)\nwhile read f; do case $f in */virtio_net.ko*) ;; *) echo $f;; esac; done < $list > /l\n\
             cat /l > $list\nexec /init",
        ),
        told: &[
            "the successor cannot take over: ",
            "its agent reported: as successor: ",
            "no interface appeared on PCI function ",
        ],
        kind: Some(Kind::Agent),
        live: None,
    },
    End {
        what: "an init that hangs",
        of: &[NEW, OLD],
        script: Some("mount -t devtmpfs dev /dev; printf '<4>it hangs \\033[31mhere' > /dev/kmsg; sleep 1000"),
        // Between the two may be an error of the kernel's, of those that each successor has.
        told: &["was silent for 2", "its agent never came up; ", "; its last message: it hangs \\u{1b}[31mhere"],
        kind: None,
        live: Some("it hangs \\u{1b}[31mhere"),
    },
];

fn initrd(end: &End, series: &str) -> Result<Vec<u8>> {
    let mut initrd = Initrd::new();
    if let Some(script) = end.script {
        initrd.file("/end", 0o755, format!("#!/bin/sh\n{script}\n"));
    }
    let other = kernel(if series == OLD { NEW } else { OLD });
    initrd.file("/wrong.ko", 0o644, std::fs::read(kmod::module_for(lab().tree(), other, Progress::auto())?)?);
    Ok(initrd.bytes()?)
}

#[test]
fn a_successor_that_dies_or_hangs_tells_why() -> Result<()> {
    let mut shape = Shape::default();
    shape.update.boot_timeout_s = 25;
    let mut played = open(OLD, &shape)?;
    let stage = &mut played.stage;
    let guest = stage.guest();
    let nobody = baton(&guest, &["dmesg"])?;
    assert_refused("no successor", &nobody, Class::Failed, &["no successor runs"])?;
    for series in [NEW, OLD] {
        for end in ENDS.iter().filter(|end| end.of.contains(&series) && is_chosen(&format!("{series}: {}", end.what))) {
            fail(stage, series, end)
                .with_context(|| format!("{} in {series}\n{}", end.what, stage.machine.logs(20)))?;
        }
    }
    upgrade(stage, NEW, &[])?;
    Ok(())
}

fn fail(stage: &Stage, series: &str, end: &End) -> Result<()> {
    let guest = stage.guest();
    guest.put("/tmp/end", 0o644, &initrd(end, series)?)?;
    let release = &kernel(series).release;
    let image = format!("/boot/vmlinuz-{release}");
    let before = snapshot::of(stage)?;
    // Without a script it finds nothing to begin with: the initrd is not unpacked.
    let first = if end.script.is_some() { "rdinit=/end" } else { "initcall_blacklist=populate_rootfs" };
    let line = format!("printk.devkmsg=on panic=0 {first} lpj=10000000");
    let (ended, end_of_it) = mpsc::channel();
    let began = Instant::now();
    let wish = ["upgrade", "--kernel", &image, "--initrd", "/tmp/end", "--cmdline", &line].map(str::to_owned);
    let asked = stage.guest();
    std::thread::spawn(move || {
        let words: Vec<&str> = wish.iter().map(String::as_str).collect();
        ended.send(baton(&asked, &words))
    });
    let ran = match end.live {
        Some(line) => follow(stage, line, &end_of_it)?,
        None => end_of_it.recv()??,
    };
    assert_refused(end.what, &ran, Class::RolledBack, end.told)?;
    assert_untouched(end.what, &before, &snapshot::of(stage)?);
    eprintln!("{} in {series}, {:.0} s: {}", end.what, began.elapsed().as_secs_f64(), last_line(&ran));
    // Afterwards, too: the whole of it, and its end.
    let log: Log = serde_json::from_str(&guest.check(&["baton", "dmesg", "--json"])?)?;
    ensure!(!log.alive && &log.release == release, "{} {}", log.alive, log.release);
    let cause = log.cause.as_ref().map(|cause| cause.kind);
    ensure!(end.kind.is_none() || cause == end.kind, "{cause:?}");
    ensure!(log.records[0].text.starts_with("Linux version "), "begins with {}", log.records[0]);
    ensure!(log.records.iter().map(|record| record.seq).eq(0..log.records.len() as u64), "records are missing");
    let status: Status = serde_json::from_str(&guest.check(&["baton", "status", "--json"])?)?;
    let words = status.update.and_then(|update| update.last_words).context("no last words in the status")?;
    ensure!(words.lines.len() == 30 && words.cause == log.cause, "{words:?}");
    let other = (log.instance + 100).to_string();
    let nobody = baton(&guest, &["dmesg", &other])?;
    assert_refused("an instance that never was", &nobody, Class::Failed, &[&format!("no instance {other}")])
}

/// Reads a living successor's log until it says this, and then follows it to its end.
fn follow(stage: &Stage, line: &str, update: &mpsc::Receiver<Result<Ran>>) -> Result<Ran> {
    let guest = stage.guest();
    loop {
        let read = baton(&guest, &["dmesg", "--json"])?;
        if let Ok(log) = serde_json::from_slice::<Log>(&read.stdout)
            && log.alive
            && log.records.iter().any(|record| record.text == line)
        {
            ensure!(log.records[0].text.starts_with("Linux version "), "begins with {}", log.records[0]);
            let instances = guest.check(&["cat", "/proc/multikernel"])?;
            ensure!(instances.contains(&format!("{} successor booting", log.instance)), "{instances}");
            let followed = baton(&guest, &["dmesg", "-f", &log.instance.to_string()])?;
            ensure!(followed.success() && followed.text().contains(line), "{}", said(&followed));
            return update.recv_timeout(Duration::from_secs(60)).context("it is over, and its update goes on")?;
        }
        match update.try_recv() {
            Err(TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(200)),
            Ok(ran) => bail!("it ended before its log said {line:?}: {}\n{}", said(&ran?), said(&read)),
            Err(error) => return Err(error.into()),
        }
    }
}

fn last_line(ran: &Ran) -> String {
    let said = said(ran);
    said.lines().find(|line| line.starts_with("baton: ")).unwrap_or_default().to_owned()
}
