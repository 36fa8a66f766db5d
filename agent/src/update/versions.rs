//! Which versions of what crosses this program writes and reads; and what another Baton's programs do.
//!
//! The successor's agent is what `baton mkinitrd` packs: the programs beside the running batond. That is not always this
//! batond's own version. A package may have been installed or taken back since it started, and the operator may well
//! mean to go back to the older Baton with this very update. An initrd of the operator's changes nothing: ours is unpacked
//! after it, and its `/init` is the one that runs.
//!
//! So those programs are asked (`baton handover versions --json`), before anything is touched, and the record is written in
//! the newest version that both sides know. A Baton that does not know the question is older than record version 2.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use state_schemas::Payload;
use state_schemas::control_block::words;
use state_schemas::latest::handover_record::HandoverRecord;
use state_schemas::latest::message::{ToIncumbent, ToSuccessor};

use crate::daemon::outcome::{Class, Failure};
use crate::userland::mkinitrd;

/// What one Baton speaks. Each payload is read in every version from 1 on to the one named here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// Version of this object.
    pub schema_version: u32,
    /// Layout of control block and rings: must be the same on both sides.
    pub control_block: u32,
    /// Newest handover record.
    pub handover_record: u32,
    /// Newest message of an incumbent.
    pub to_successor: u32,
    /// Newest message of a successor.
    pub to_incumbent: u32,
}

impl Versions {
    /// This program's.
    pub const OURS: Versions = Versions {
        schema_version: 1,
        control_block: words::VERSION,
        handover_record: HandoverRecord::VERSION,
        to_successor: ToSuccessor::VERSION,
        to_incumbent: ToIncumbent::VERSION,
    };

    /// Those of a Baton that cannot be asked.
    pub const FIRST: Versions =
        Versions { schema_version: 1, control_block: 1, handover_record: 1, to_successor: 1, to_incumbent: 1 };

    /// Asks a `baton` program.
    pub fn of_program(baton: &Path) -> Result<Versions> {
        let ran = Command::new(baton)
            .args(["handover", "versions", "--json"])
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", baton.display()))?;
        if ran.status.code() == Some(Class::Usage.exit_code().into()) {
            return Ok(Versions::FIRST);
        }
        if !ran.status.success() {
            let said = String::from_utf8_lossy(&ran.stderr).into_owned();
            bail!("{} does not say which versions it speaks: {} {}", baton.display(), ran.status, said.trim());
        }
        serde_json::from_slice(&ran.stdout)
            .with_context(|| format!("{} says something else than which versions it speaks", baton.display()))
    }

    /// The record's version that an incumbent with these writes for a successor with those.
    pub fn record_for(self, successor: Versions) -> Result<u32> {
        if self.control_block != successor.control_block {
            bail!(
                "the successor's agent speaks version {} of the control block, this one version {}",
                successor.control_block,
                self.control_block
            );
        }
        // Messages need no agreement: each word is said in the version in which it came, and an update needs those of version 1 only.
        Ok(self.handover_record.min(successor.handover_record))
    }

    /// The newest words that both sides know.
    pub fn words_with(self, successor: Versions) -> u32 {
        let ours = self.to_successor.min(self.to_incumbent);
        ours.min(successor.to_successor).min(successor.to_incumbent)
    }
}

/// What the agent that would be put into the initrd understands: the version of the record, and that of the messages.
pub fn agent() -> Result<((u32, u32), String)> {
    let program = mkinitrd::own_program("baton")?;
    let refuse = |error: anyhow::Error| {
        Failure::precondition(format!("{error:#}"), "install baton, batond and baton-init of one release")
    };
    let successor = Versions::of_program(&program).map_err(refuse)?;
    let record = Versions::OURS.record_for(successor).map_err(refuse)?;
    let words = Versions::OURS.words_with(successor);
    Ok(((record, words), format!("{} reads handover record version {record}", program.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn program(script: &str) -> tempfile::TempPath {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        file.into_temp_path()
    }

    #[test]
    fn an_older_baton_gets_the_record_that_it_reads() {
        assert_eq!(Versions::OURS.record_for(Versions::OURS).unwrap(), 2);
        assert_eq!(Versions::OURS.record_for(Versions::FIRST).unwrap(), 1);
        let future = Versions { handover_record: 7, ..Versions::OURS };
        assert_eq!(Versions::OURS.record_for(future).unwrap(), 2);
        let other = Versions { control_block: 2, ..Versions::OURS };
        assert!(Versions::OURS.record_for(other).unwrap_err().to_string().contains("version 2 of the control block"));
        // Of messages each knows the other's older words.
        let other = Versions { to_successor: 9, to_incumbent: 9, ..Versions::OURS };
        assert_eq!((Versions::OURS.record_for(other).unwrap(), Versions::OURS.words_with(other)), (2, 2));
        assert_eq!(Versions::OURS.words_with(Versions::FIRST), 1);
        assert_eq!(Versions::FIRST.words_with(Versions::OURS), 1);
    }

    #[test]
    fn programs_say_it_or_are_too_old_to_know() {
        let ours = serde_json::to_string(&Versions::OURS).unwrap();
        assert_eq!(Versions::of_program(&program(&format!("echo '{ours}'"))).unwrap(), Versions::OURS);
        assert_eq!(
            Versions::of_program(&program("echo 'unrecognized subcommand' >&2; exit 2")).unwrap(),
            Versions::FIRST
        );
        let error = Versions::of_program(&program("echo trouble >&2; exit 1")).unwrap_err().to_string();
        assert!(error.contains("trouble"), "{error}");
        assert!(Versions::of_program(&program("echo rubbish")).is_err());
        assert!(Versions::of_program(Path::new("/nonexistent/baton")).is_err());
    }
}
