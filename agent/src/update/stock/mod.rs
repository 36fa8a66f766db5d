//! Stock is taken of the machine before anything is touched.
//!
//! The rule: what a reboot of this machine would bring back may be absent until it does; everything else that would end, change or be
//! overwritten is named, and refuses the update unless the operator accepted it by name. Some things cannot be accepted: the update
//! would harm the machine whatever the operator thinks of it.
//!
//! Each theme is a file of two parts: `read` makes plain data of what the kernel says ([`World`]), `judge` makes findings of the data and
//! looks at nothing else. `baton check` prints what `baton upgrade` goes by.

pub mod accept;
pub mod asked;
pub mod cpus;
pub mod disks;
pub mod guards;
pub mod item;
pub mod memory;
pub mod network;
pub mod people;

use accept::Accept;
use asked::Asked;
use item::{Item, Weight};

use crate::daemon::control::Finding;
use crate::machine::net::Mac;
use crate::machine::processes;
use crate::machine::world::World;

/// All findings, in the order of the themes.
pub fn take(world: &dyn World, asked: &Asked<'_>, accepted: &[Accept]) -> Vec<Finding> {
    let cpus = cpus::read(world);
    let processes = processes::all(world, &cpus.online);
    let items = [
        disks::judge(&disks::read(world)),
        network::judge(&network::read(world, asked), asked),
        memory::judge(&memory::read(world), asked),
        cpus::judge(&cpus),
        guards::judge(&guards::read(world, &processes)),
        people::judge(&people::read(world, processes), asked),
    ];
    items.into_iter().flatten().map(|item| item.finding(accepted)).collect()
}

/// What counts before a trial that is taken back, in the order of the themes. Nothing ends with it, so what an update would lose is no
/// matter: mounts, swap, routes, processes, people, settings. What is left is whether another kernel can run beside this one at all, and
/// what the candidate has for the time of the trial: `granted`, an interface, which loses what it carries beside its own address.
pub fn before_trial(world: &dyn World, asked: &Asked<'_>, accepted: &[Accept], granted: Option<Mac>) -> Vec<Finding> {
    let cpus = cpus::read(world);
    let processes = processes::all(world, &cpus.online);
    let network = granted.map(|mac| {
        let mut seen = network::read(world, asked);
        network::keep_only(&mut seen, mac);
        network::judge(&seen, asked)
    });
    let items = [
        network.unwrap_or_default(),
        memory::judge(&memory::read(world), asked),
        cpus::judge(&cpus),
        guards::judge(&guards::read(world, &processes)),
    ];
    items.into_iter().flatten().filter(counts_before_trial).map(|item| item.finding(accepted)).collect()
}

/// Whether a finding is about more than what an update loses.
fn counts_before_trial(item: &Item) -> bool {
    match item.check {
        // Of the interface that is granted; the others are not looked at.
        "interfaces" | "addresses" | "routes" | "neighbours" => true,
        // Memory that cannot be known is written over; what a successor would not get stays where it is.
        "memory map" => matches!(item.weight, Weight::Forbids | Weight::Fine),
        // Two kernels on this machine, their devices, and whether they are allowed.
        "platform" | "permission" | "iommu" => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::daemon::config::Config;
    use crate::daemon::control::Verdict;
    use crate::machine::facts::Facts;
    use crate::machine::net::Netlink;
    use crate::machine::world::Live;

    #[test]
    fn only_what_harms_now_counts_before_a_trial() {
        let asks = |check, accept| Item::asks(check, accept, "", "", "");
        for (check, accept) in [
            ("mounts", Accept::Mounts),
            ("swap", Accept::Swap),
            ("dns", Accept::Dns),
            ("ruleset", Accept::Ruleset),
            ("hugepages", Accept::Hugepages),
            ("numa", Accept::Numa),
            ("watchdog", Accept::Watchdog),
            ("kdump", Accept::Kdump),
            ("processes", Accept::Processes),
            ("logins", Accept::Logins),
            ("memory map", Accept::Memory),
        ] {
            assert!(!counts_before_trial(&asks(check, accept)), "{check}");
        }
        assert!(!counts_before_trial(&Item::forbids("mounts", "/ on vda", "it does not cross", "")));
        for check in ["interfaces", "memory map", "platform", "permission", "iommu"] {
            assert!(counts_before_trial(&Item::forbids(check, "", "", "")), "{check}");
        }
        assert!(counts_before_trial(&asks("routes", Accept::Routes)), "of the interface that is granted");
    }

    /// Whatever machine this is: each theme has something to say, and a refusal says what it is about.
    #[test]
    fn a_real_machine_can_be_looked_at() {
        let Ok(netlink) = Netlink::open() else { return println!("SKIPPED: no netlink") };
        let (config, facts) = (Config::default(), Facts::default());
        let asked = Asked { config: &config, facts: &facts, own: std::process::id(), asker: None };
        let began = Instant::now();
        let findings = take(&Live(&netlink), &asked, &[]);
        println!("{:?}", began.elapsed());
        for finding in &findings {
            println!(
                "{:?} {}: {} | {} | {}",
                finding.verdict, finding.check, finding.found, finding.cause, finding.advice
            );
            let told = !finding.cause.is_empty();
            assert_eq!(finding.verdict != Verdict::Ok, told, "{finding:?}");
        }
        for check in ["mounts", "swap", "addresses", "routes", "ruleset", "numa", "watchdog", "processes", "sysctls"] {
            assert!(findings.iter().any(|finding| finding.check == check), "{check}");
        }
        // A trial asks less, and the same.
        let names = |findings: &[Finding]| findings.iter().map(|finding| finding.check.clone()).collect::<Vec<_>>();
        let before_trial = before_trial(&Live(&netlink), &asked, &[], None);
        for check in ["memory map", "platform", "permission", "iommu"] {
            assert!(names(&before_trial).iter().any(|name| name == check), "{check}: {before_trial:?}");
        }
        assert!(before_trial.iter().all(|finding| findings.contains(finding)), "{before_trial:?}");
        let accepted = take(&Live(&netlink), &asked, Accept::all());
        assert!(accepted.iter().all(|finding| finding.verdict != Verdict::Refused || finding.accept.is_none()));
    }
}
