//! Commands that must fail: with the right exit code, and with words that help.

use agent::daemon::outcome::Class;
use anyhow::{Result, ensure};
use demos::lab::Guest;
use demos::lab::guest::Ran;
use std::time::Duration;

/// A check or an update reads, unpacks and packs tens of megabytes, emulated.
const PATIENCE: Duration = Duration::from_secs(240);

/// Runs `baton WORDS` and gives how it ended.
pub fn baton(guest: &Guest, words: &[&str]) -> Result<Ran> {
    Ok(guest.command(&[&["baton"], words].concat()).timeout(PATIENCE).run()?)
}

/// What `baton` printed for people.
pub fn said(ran: &Ran) -> String {
    format!("{}{}", ran.text(), String::from_utf8_lossy(&ran.stderr))
}

/// It failed, in this class, saying all of these.
pub fn assert_refused(what: &str, ran: &Ran, class: Class, words: &[&str]) -> Result<()> {
    let said = said(ran);
    let code = Some(i32::from(class.exit_code()));
    ensure!(ran.exit.code == code, "{what}: exit {:?} instead of {code:?}: {said}", ran.exit);
    for word in words {
        ensure!(said.contains(word), "{what}: {word:?} is not in what it said:\n{said}");
    }
    Ok(())
}
