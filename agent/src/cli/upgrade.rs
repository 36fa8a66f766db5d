//! `baton upgrade`: the main command.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::check::summary;
use super::newest::{self, Choice};
use super::output::{complain, print_json, unexpected};
use crate::daemon::control::{Finding, Reply, Request, Upgrade};
use crate::daemon::outcome::{Class, Failure};
use crate::update::stock::accept::Accept;

/// What an upgrade and a check of one are asked for.
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// The kernel image (bzImage), such as /boot/vmlinuz-7.3.4+deb13-cloud-amd64.
    #[arg(long, required_unless_present = "to_newest")]
    kernel: Option<PathBuf>,
    /// Instead of an image: the newest kernel of the running one's flavour that apt installed and that a check accepts. Nothing is done
    /// where nothing newer is installed.
    #[arg(long, conflicts_with = "kernel")]
    to_newest: bool,
    #[command(flatten)]
    boot: BootArgs,
    /// Watch the new kernel serve for so long (30s, 5m) before it stays; until then everything can be taken back. 0: not at all.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    probation: Option<Duration>,
    /// When the probation is over, turn back unless `baton commit` was said.
    #[arg(long)]
    require_commit: bool,
}

/// How a successor is booted, by an upgrade or a trial.
#[derive(Debug, Args)]
pub struct BootArgs {
    /// An initrd to which the agent's is appended.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Added to the successor's command line.
    #[arg(long, allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Give the successor none of the words with which this kernel was booted.
    #[arg(long)]
    no_inherit: bool,
    /// The CPU on which the successor boots (Linux's number); default: the last one that may.
    #[arg(long)]
    cpu: Option<u32>,
    /// What may end or change with this kernel, by name, as `baton check` names it.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    accept: Vec<Accept>,
}

impl BootArgs {
    /// This image, booted so.
    pub fn wish(&self, kernel: &Path) -> Upgrade {
        // batond has a working directory of its own.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Upgrade {
            initrd: self.initrd.as_deref().map(absolute),
            cmdline: self.cmdline.clone(),
            no_inherit: self.no_inherit,
            cpu: self.cpu,
            accept: self.accept.clone(),
            ..Upgrade::of(absolute(kernel))
        }
    }
}

/// What came of looking for the kernel that is meant.
pub enum Meant {
    /// This is asked for.
    This(Upgrade),
    /// All that are newer are refused: what was found of the newest.
    Refused(Vec<Finding>),
    /// Nothing newer is installed.
    RunsAlready,
}

impl UpgradeArgs {
    /// What is asked for: of the kernel that was named, or of the newest, which is looked for by checks.
    pub fn meant(self, ask: impl Fn(&Request) -> Result<Reply, Failure>) -> Result<Meant, Failure> {
        if let Some(kernel) = self.kernel.clone() {
            return Ok(Meant::This(self.wish(kernel)));
        }
        let check = |release: &str| match ask(&Request::Check(self.wish(newest::image(release))))? {
            Reply::Checked { findings } => Ok(findings),
            other => Err(unexpected(&other)),
        };
        Ok(match newest::choose(newest::candidates()?, check)? {
            Choice::RunsAlready => Meant::RunsAlready,
            Choice::Refused(findings) => Meant::Refused(findings),
            Choice::This { release, passed_over } => {
                for (newer, cause) in passed_over {
                    eprintln!("{newer} is refused: {cause}");
                }
                eprintln!("to {release}");
                Meant::This(self.wish(newest::image(&release)))
            }
        })
    }

    fn wish(&self, kernel: PathBuf) -> Upgrade {
        Upgrade { probation: self.probation, require_commit: self.require_commit, ..self.boot.wish(&kernel) }
    }
}

/// Says that nothing is to be done.
pub fn runs_already(json: bool) -> ExitCode {
    if json {
        #[derive(Serialize)]
        struct RunsAlready<'a> {
            schema_version: u32,
            outcome: &'a str,
        }
        print_json(&RunsAlready { schema_version: 1, outcome: "runs_already" });
    } else {
        println!("no kernel of this flavour that apt has installed is newer than the one that runs");
    }
    ExitCode::SUCCESS
}

/// Prints how it ended.
pub fn run(json: bool, reply: Reply) -> Result<ExitCode, Failure> {
    let (release, timeline) = match reply {
        Reply::Committed { release, timeline } => (release, timeline),
        Reply::Refused { findings } => return Ok(refused(json, &findings)),
        other => return Err(unexpected(&other)),
    };
    if json {
        #[derive(Serialize)]
        struct Committed<'a> {
            schema_version: u32,
            outcome: &'a str,
            successor_release: &'a str,
            timeline: &'a [crate::update::timeline::Span],
        }
        print_json(&Committed {
            schema_version: 1,
            outcome: "committed",
            successor_release: &release,
            timeline: &timeline,
        });
    } else {
        println!("committed: {release} serves; this kernel hands over its last CPU now");
    }
    Ok(ExitCode::SUCCESS)
}

/// Nothing was touched: every refusal is told, not the first only.
pub fn refused(json: bool, findings: &[Finding]) -> ExitCode {
    #[derive(Serialize)]
    struct Refused<'a> {
        schema_version: u32,
        outcome: &'a str,
        #[serde(flatten)]
        first: &'a Failure,
        findings: &'a [Finding],
    }
    let refusals: Vec<Failure> = findings.iter().filter_map(Finding::refusal).collect();
    let unknown = Failure::new(Class::Failed, "batond refuses and does not say why", "see batond's log");
    let first = refusals.first().unwrap_or(&unknown);
    if json {
        print_json(&Refused { schema_version: 1, outcome: "failed", first, findings });
    }
    for Failure { cause, advice, .. } in &refusals {
        complain(cause, advice);
    }
    eprintln!("{}", summary(findings));
    ExitCode::from(first.class.exit_code())
}
