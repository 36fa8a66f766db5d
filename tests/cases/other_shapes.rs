//! Machines of other shapes than the standard one: few CPUs, many, little memory, the newest CPU that QEMU knows (five-level page
//! tables, x2APIC). One update each.

use anyhow::Result;
use baton_tests::{NEW, OLD, Turn, console, kernel, lab, snapshot, upgrade};
use demos::story::stage::{Shape, Stage};

fn one_update(from: &str, to: &str, shape: &Shape, cpu: Option<&str>) -> Result<Stage> {
    let mut spec = Stage::spec(lab(), kernel(from), shape)?;
    if let Some(cpu) = cpu {
        spec.cpu = cpu.to_owned();
    }
    let mut stage = Stage::start(lab(), &spec, shape)?;
    stage.await_serving()?;
    let before = snapshot::of(&stage)?;
    upgrade(&mut stage, to, &[])?;
    let after = snapshot::of(&stage)?;
    assert_eq!(after.online, before.online);
    assert_eq!(after.online, format!("0-{}", shape.vcpus - 1));
    assert!(
        after.mem_total_kib * 100 >= before.mem_total_kib * 97,
        "MemTotal: {} KiB of {} KiB",
        after.mem_total_kib,
        before.mem_total_kib
    );
    assert_eq!(after.services, before.services);
    assert_eq!(console::complaints(&stage.machine), [""; 0]);
    Ok(stage)
}

#[test]
fn two_cpus_and_two_gibibytes() -> Result<()> {
    let _turn = Turn::take();
    let shape = Shape { vcpus: 2, memory_mib: 2048, ..Shape::default() };
    one_update(OLD, NEW, &shape, None).map(drop)
}

#[test]
fn eight_cpus() -> Result<()> {
    let _turn = Turn::take();
    let shape = Shape { vcpus: 8, ..Shape::default() };
    one_update(NEW, OLD, &shape, None).map(drop)
}

#[test]
fn five_level_page_tables_and_x2apic() -> Result<()> {
    let _turn = Turn::take();
    let stage = one_update(OLD, NEW, &Shape::default(), Some("max"))?;
    let flags = stage.guest().check(&["grep", "-m1", "^flags", "/proc/cpuinfo"])?;
    assert!(flags.contains(" la57") && flags.contains(" x2apic"), "the machine is what it is meant to be: {flags}");
    Ok(())
}
