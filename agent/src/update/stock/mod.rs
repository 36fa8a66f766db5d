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

use crate::daemon::control::Finding;
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::daemon::config::Config;
    use crate::daemon::control::Verdict;
    use crate::machine::facts::Facts;
    use crate::machine::net::Netlink;
    use crate::machine::world::Live;

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
        let accepted = take(&Live(&netlink), &asked, Accept::all());
        assert!(accepted.iter().all(|finding| finding.verdict != Verdict::Refused || finding.accept.is_none()));
    }
}
