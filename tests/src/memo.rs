//! The programs that keep a memfd (`demos::memo`), as the tests see them.

use std::time::{Duration, Instant};

use agent::daemon::config::Service;
use anyhow::{Context, Result, ensure};
use demos::memo::Found;
use demos::story::stage::Stage;

/// How long a program may take to say something new.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pages of its file.
const PAGES: u64 = 1024;

/// The program under this name, by the library or by the fd store; for a machine's configuration.
pub fn service(name: &str, by_library: bool) -> Service {
    let report = format!("/run/{name}.json");
    let words = ["/usr/sbin/baton-memo", "--report", &report];
    let more: &[&str] = if by_library { &["--sdk", name] } else { &[] };
    let exec = words.iter().chain(more).map(|word| (*word).to_owned()).collect();
    Service { name: name.to_owned(), exec, fd_store: !by_library, ..Service::default() }
}

/// What a program says of itself, once it is as it should be.
pub fn report(stage: &Stage, name: &str, wanted: impl Fn(&Found) -> bool) -> Result<Found> {
    let until = Instant::now() + PATIENCE;
    let path = format!("/run/{name}.json");
    loop {
        let last = stage.guest().check(&["cat", &path]).map_err(anyhow::Error::from);
        let last = last.and_then(|text| serde_json::from_str::<Found>(&text).context(text));
        match last {
            Ok(found) if wanted(&found) => return Ok(found),
            last => ensure!(Instant::now() < until, "{name}: {last:?}\n{}", stage.machine.logs(60)),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// All pages behind one another, and all written to.
#[must_use]
pub fn is_kept(found: &Found) -> bool {
    found.physical.len() == 1 && found.physical[0].ends_with(&format!("+{PAGES}")) && found.writes > PAGES
}

/// In the next kernel, what it kept is all there: on the same pages, everything it wrote until `before` and later, its seals.
pub fn assert_crossed(stage: &Stage, name: &str, before: &Found) -> Result<Found> {
    let after = report(stage, name, |found| found.writes > found.writes_found)?;
    eprintln!("{name}: {after:?}");
    assert!(after.found && after.bad == 0 && after.torn <= 1, "{name}: {after:?}");
    assert!(after.writes_found >= before.writes, "{name}: {before:?}, then {after:?}");
    assert_eq!(after.physical, before.physical, "{name}: the same pages");
    assert_eq!(after.seals, before.seals, "{name}");
    Ok(after)
}
