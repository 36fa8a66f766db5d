//! An update under load, and the same back: the successor has all CPUs and the machine's memory, nothing that was
//! acknowledged is lost, the service's memory is the same memory, its clients keep their connections, and no kernel has anything to complain about.

use anyhow::Result;
use baton_tests::clients::{Clients, Quiet};
use baton_tests::console::{self, NO_WX};
use baton_tests::{NEW, OLD, kernel, open, snapshot, upgrade};
use demos::story::stage::Shape;

#[test]
fn from_the_old_kernel_to_the_new_one_and_back_under_load() -> Result<()> {
    let mut played = open(OLD, &Shape::default())?;
    let stage = &mut played.stage;
    let first = snapshot::of(stage)?;
    assert_eq!(first.online, "0-3");
    let arena = snapshot::arena_of_service(&stage.guest())?;
    let clients = Clients::start(stage, 200)?;
    let mut quiet = Quiet::connect(stage)?;

    for (hop, series) in (1u32..).zip([NEW, OLD]) {
        let release = &kernel(series).release;
        let status = upgrade(stage, series, &[])?;
        let serving = clients.await_more(50);
        serving.unwrap_or_else(|why| panic!("after the update to {release}: {why}\n{}", stage.machine.logs(60)));

        let asked = quiet.ask();
        asked.unwrap_or_else(|why| panic!("in {release}: {why:#}\n{}", stage.machine.logs(60)));

        assert_eq!(
            (&status.kernel_release, status.role.to_string().as_str(), status.hops),
            (release, "incumbent", hop)
        );
        let update = status.update.as_ref().expect("an update brought this kernel here");
        assert_eq!((update.cpus_total, update.phase.to_string().as_str()), (4, "drained"));

        let after = snapshot::of(stage)?;
        assert_eq!(&after.release, release);
        assert_eq!(after.online, "0-3", "all CPUs are online in {release}");
        assert!(
            after.mem_total_kib * 100 >= first.mem_total_kib * 97,
            "MemTotal: {} KiB of {} KiB in {release}",
            after.mem_total_kib,
            first.mem_total_kib
        );
        assert_eq!(snapshot::arena_of_service(&stage.guest())?, arena, "the service's memory is the same in {release}");
        assert_eq!(after.services, first.services);
        assert_eq!(
            after.instances.iter().map(|i| i.id).collect::<Vec<_>>(),
            [0],
            "one kernel runs: {:?}",
            after.instances
        );
        assert_eq!(after.instances[0].cpus.len(), 4, "{:?}", after.instances);
        let listed = stage.guest().check(&["baton", "kernels"])?;
        assert!(listed.contains(release.as_str()) && listed.contains("ready"), "{listed}");
        eprintln!("{release}: MemTotal {} of {} KiB", after.mem_total_kib, first.mem_total_kib);
    }

    let report = clients.finish()?;
    assert!(report.is_clean(), "{report:?}");
    let connections = report.connections;
    assert_eq!((connections.kept, connections.reset, connections.timed_out), (4, 0, 0), "every connection survives");
    eprintln!("{} writes acknowledged, none lost; {:?}", report.acknowledged, report.connections);

    let machine = &stage.machine;
    assert_eq!(console::complaints(machine), [""; 0], "logs in {}", machine.folder().display());
    // Port 0 had two kernels, port 1 one.
    assert_eq!((console::count(machine, 0, NO_WX), console::count(machine, 1, NO_WX)), (2, 1), "{NO_WX}");
    Ok(())
}
