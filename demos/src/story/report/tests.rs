use super::*;
use crate::story::scale::{FailedUpdate, OfSize, Scale, Step};

fn span(name: &str, at_ms: f64, ms: f64) -> Span {
    Span { name: name.into(), at_ms, ms }
}

/// As a successor gave it, shortened: in the order in which the steps ended.
fn timeline() -> Vec<Span> {
    vec![
        span("take memory", 0.6, 306.2),
        span("granted", 0.0, 357.7),
        span("await hello", 455.3, 3557.8),
        span("booting", 357.8, 3655.3),
        span("freeze", 4020.9, 6.6),
        span("release address", 4027.9, 12.3),
        span("activate", 4040.5, 11.3),
        span("cutover", 4020.6, 31.2),
        span("move cpu 1", 4051.9, 781.6),
        span("move cpu 3", 4833.6, 198.8),
        span("probation", 4051.9, 980.6),
        span("successor: prepare", 3779.2, 230.3),
        span("successor: activate", 4041.7, 8.9),
        span("adopt memory", 5492.2, 137.7),
        span("drained", 5320.2, 309.7),
    ]
}

fn hop(lost: u64) -> Hop {
    let silence = Silence {
        blackout_ms: 33.0,
        max_reply_gap_ms: 33.0,
        unanswered_window_ms: 31.0,
        began_at_ms: 100.0,
        ended_at_ms: 133.0,
        open_ended: false,
        prober_stalled_ms: 0.2,
    };
    Hop {
        incumbent_release: "6.12.1+deb13-cloud-amd64".into(),
        successor_release: "7.3.4+deb13-cloud-amd64".into(),
        blackout_ms: silence.blackout_ms,
        silence,
        silence_began_in: Some("cutover".into()),
        clocks_within_ms: 0.4,
        before_cutover: Probes { due: 4000, lost: 1 },
        latencies: None,
        epoch_regressions: 0,
        phases: phases(&timeline()),
        cpus: Cpus { total: 4, moved: 4, online: 4 },
        mem_total_kib: BeforeAfter { before: 1000, after: 990 },
        writes: Writes { acknowledged: 100, lost, ..Writes::default() },
        connections: Connections { kept: 0, reset: 8, timed_out: 0 },
        left_undone: Vec::new(),
    }
}

fn machine() -> MachineShape {
    MachineShape { vcpus: 4, memory_mib: 3072, probe_hz: 1000 }
}

fn report(outcome: Outcome) -> Report {
    Report {
        schema_version: SCHEMA_VERSION,
        outcome,
        accelerator: Some(Accelerator::Tcg),
        machine: machine(),
        hops: vec![hop(0)],
        unfinished: None,
        failure: (outcome != Outcome::Committed).then(|| "the reason".into()),
        logs: Some("/logs".into()),
    }
}

fn method(blackouts: &[f64], phases: Vec<PhaseTime>) -> Method {
    let mut method = Method::asked(blackouts.len(), !phases.is_empty());
    for (n, ms) in blackouts.iter().enumerate() {
        method.add(Run {
            run: n + 1,
            from: if n % 2 == 0 { "6.12.1-x" } else { "7.3.4-x" }.into(),
            to: if n % 2 == 0 { "7.3.4-x" } else { "6.12.1-x" }.into(),
            blackout_ms: *ms,
            silence_began_in: Some(if n == 0 { "probation" } else { "cutover" }.into()),
            prober_stalled_ms: 0.1,
        });
    }
    let writes = Writes { acknowledged: 10, ..Writes::default() };
    Method { phases, writes, logs: vec!["/logs".into()], ..method }
}

fn methods() -> Methods {
    let phases = phases(&timeline());
    Methods {
        baton: method(&[40.0, 30.0, 32.0], medians(&[&phases, &phases])),
        kexec: method(&[4000.0], Vec::new()),
        reboot: method(&[8000.0], Vec::new()),
    }
}

fn comparison() -> Comparison {
    Comparison::of(machine(), Accelerator::Tcg, methods())
}

#[test]
fn a_failed_run_is_told_and_the_others_count() {
    let mut methods = methods();
    methods.kexec.asked = 2;
    let why = "no new kernel answers\n--- serial port 0".to_owned();
    methods.kexec.failures.push(FailedRun { run: 1, why, logs: Some("/runs/7".into()) });
    let comparison = Comparison::of(machine(), Accelerator::Tcg, methods);
    assert_eq!((comparison.failure.as_deref(), comparison.ratio_kexec_over_baton), (None, Some(125.0)));
    let text = comparison_for_people(&comparison);
    assert!(text.contains("FAILED: run 1 of 2 of kexec -e: no new kernel answers; logs: /runs/7\n"), "{text}");
    assert!(text.contains("1 of 2"), "{text}");
    let json = serde_json::to_value(&comparison).expect("written");
    assert_eq!(json["methods"]["kexec"]["failures"][0]["run"], 1);
}

#[test]
fn no_ratio_is_made_up_and_losses_are_a_failure() {
    let mut none = methods();
    none.kexec = Method::asked(3, false);
    let comparison = Comparison::of(machine(), Accelerator::Tcg, none);
    assert_eq!((comparison.ratio_kexec_over_baton, comparison.ratio_reboot_over_baton), (None, Some(250.0)));
    assert_eq!(comparison.failure.as_deref(), Some("no ratio: none of 3 runs of kexec -e succeeded"));
    let text = comparison_for_people(&comparison);
    assert!(text.contains("0 of 3") && !text.contains("kexec's median silence is"), "{text}");
    let json = serde_json::to_value(&comparison).expect("written");
    assert!(json["ratio_kexec_over_baton"].is_null() && json["methods"]["kexec"]["blackout_ms"].is_array());
    assert_eq!(serde_json::from_value::<Comparison>(json).expect("read"), comparison);

    for (writes, wanted) in [
        (Writes { acknowledged: 9, lost: 1, ..Writes::default() }, "lost 1 of 9"),
        (Writes { unread: 5, ..Writes::default() }, "5 writes"),
    ] {
        let mut losing = methods();
        losing.baton.writes = writes;
        let failure = Comparison::of(machine(), Accelerator::Tcg, losing).failure.expect("an objection");
        assert!(failure.contains(wanted), "{failure}");
    }
    // What restarts lose is no failure: they promise nothing.
    let mut restarts = methods();
    restarts.reboot.writes.lost = 10;
    assert_eq!(Comparison::of(machine(), Accelerator::Tcg, restarts).failure, None);

    let nothing = Comparison::without_runs(machine(), "no network".into());
    assert_eq!(serde_json::to_value(&nothing).expect("written")["failure"], "no network");
    assert!(comparison_for_people(&nothing).ends_with("failed: no network\n"));
}

#[test]
fn upgrade_json_has_every_promised_field() {
    let json = serde_json::to_value(report(Outcome::Committed)).expect("written");
    assert_eq!(
        (&json["schema_version"], &json["outcome"], &json["accelerator"]),
        (&1.into(), &"committed".into(), &"tcg".into())
    );
    let hop = &json["hops"][0];
    for path in [
        "/incumbent_release",
        "/successor_release",
        "/blackout_ms",
        "/phases/0/name",
        "/phases/0/ms",
        "/cpus/total",
        "/cpus/moved",
        "/mem_total_kib/before",
        "/mem_total_kib/after",
        "/writes/acknowledged",
        "/writes/lost",
        "/connections/kept",
        "/connections/reset",
    ] {
        assert!(hop.pointer(path).is_some_and(|value| !value.is_null()), "{path} is missing in {hop:#}");
    }
    let back: Report = serde_json::from_value(json).expect("read");
    assert_eq!(back, report(Outcome::Committed));
    let failed = serde_json::to_value(report(Outcome::RolledBack)).expect("written");
    assert_eq!((&failed["outcome"], &failed["failure"]), (&"rolled_back".into(), &"the reason".into()));
}

#[test]
fn compare_json_has_every_promised_field() {
    let json = serde_json::to_value(comparison()).expect("written");
    assert_eq!((&json["schema_version"], &json["ratio_kexec_over_baton"]), (&1.into(), &125.0.into()));
    assert_eq!(json["accelerator"], "tcg");
    // In the order of the runs, not sorted.
    assert_eq!(json["methods"]["baton"]["blackout_ms"], serde_json::json!([40.0, 30.0, 32.0]));
    assert_eq!(json["methods"]["baton"]["distribution"]["median"], 32.0);
    for name in ["kexec", "reboot"] {
        assert!(json["methods"][name]["blackout_ms"].is_array() && json["methods"][name].get("phases").is_none());
    }
    assert_eq!(serde_json::from_value::<Comparison>(json).expect("read"), comparison());
}

#[test]
fn a_timeline_becomes_phases_with_steps() {
    let phases = phases(&timeline());
    let names: Vec<&str> = phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["granted", "booting", "cutover", "probation", "drained"]);
    let steps = |n: usize| phases[n].steps.iter().map(|step| step.name.as_str()).collect::<Vec<_>>();
    assert_eq!(steps(1), ["await hello", "successor: prepare"]);
    assert_eq!(steps(2), ["freeze", "release address", "activate", "successor: activate"]);
    assert_eq!((phase_at(&phases, 4030.0), phase_at(&phases, -1.0)), (Some("cutover"), None));
    assert!(super::phases(&[]).is_empty());
}

#[test]
fn medians_count_one_updates_cpus_together() {
    let other: Vec<Span> = timeline().into_iter().map(|span| Span { ms: span.ms * 3.0, ..span }).collect();
    let (one, other) = (phases(&timeline()), phases(&other));
    let medians = medians(&[&one, &other]);
    let cutover = medians.iter().find(|phase| phase.name == "cutover").expect("there");
    assert!((cutover.ms - 62.4).abs() < 1e-9, "{cutover:?}");
    let probation = medians.iter().find(|phase| phase.name == "probation").expect("there");
    assert_eq!((probation.steps.len(), probation.steps[0].name.as_str()), (1, "move cpu"));
    assert!((probation.steps[0].ms - (781.6 + 198.8) * 2.0).abs() < 1e-9);
}

#[test]
fn a_lost_write_and_a_load_without_writes_are_objected_to() {
    assert_eq!(Report::objection(&[hop(0)]), None);
    let words = Report::objection(&[hop(0), hop(2)]).expect("an objection");
    assert!(words.contains("update 2") && words.contains("2 are lost"), "{words}");
    let idle = Hop { writes: Writes::default(), ..hop(0) };
    assert!(Report::objection(&[idle]).is_some());
}

#[test]
fn people_read_what_was_measured_and_what_emulation_does_to_it() {
    let text = for_people(&report(Outcome::Committed));
    for wanted in
        ["emulated (TCG): compare ratios", "33.0 ms, began in `cutover`", "100 acknowledged, 0 of them lost", "/logs"]
    {
        assert!(text.contains(wanted), "{wanted:?} is missing:\n{text}");
    }
    assert!(for_people(&report(Outcome::Failed)).ends_with("outcome: failed: the reason\n"));
    let whole = comparison_for_people(&comparison());
    let text = whole.replace('\n', " ");
    for wanted in [
        "emulated (TCG)",
        "kexec's median silence is 125 times Baton's",
        "to 7.3.4",
        "`release address`",
        "EMPTY",
        "began 2 in `cutover`, 1 in `probation`",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is missing:\n{text}");
    }
    let width = whole.lines().map(|line| line.chars().count()).max();
    assert!(width <= Some(140), "{width:?}:\n{whole}");
}

fn of_size(arena_mib: u64, cutover_ms: f64) -> OfSize {
    let ms = |value| Distribution::of([value, value + 2.0]).expect("numbers");
    OfSize {
        arena_mib,
        filled_mib: arena_mib - 8,
        asked: 3,
        place_ms: ms(160.0),
        take_over_ms: ms(300.0),
        blackout_ms: ms(40.0),
        cutover_ms: ms(cutover_ms),
        steps: vec![Step { name: "seal".into(), ms: ms(0.2) }],
        phases: phases(&timeline()),
        writes: Writes { acknowledged: 100, ..Writes::default() },
        logs: vec!["/logs".into()],
    }
}

#[test]
fn sizes_are_told_with_the_updates_that_failed() {
    let failed = FailedUpdate { arena_mib: 1024, run: 2, why: "the machine ended\nand its logs".into(), logs: None };
    let scale = Scale {
        schema_version: SCHEMA_VERSION,
        accelerator: Accelerator::Tcg,
        machine: machine(),
        sizes: vec![of_size(16, 25.0), of_size(1024, 26.0)],
        failures: vec![failed],
        cutover_ratio: Some(1.04),
        described: Vec::new(),
        failure: None,
    };
    let text = scale_for_people(&scale);
    for wanted in ["emulated (TCG)", "1.04 times", "FAILED: 1024 MiB, update 2: the machine ended", "PKRAM"] {
        assert!(text.contains(wanted), "{wanted:?} is missing:\n{text}");
    }
    assert!(!text.contains("and its logs"), "{text}");
    let read: Scale = serde_json::from_str(&serde_json::to_string(&scale).expect("plain data")).expect("the same");
    assert_eq!(read, scale);
}
