//! `baton kernels`: those that run, the images that could, and what was found of these beforehand.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;

use super::newest;
use super::output::{print_json, unexpected};
use crate::daemon::control::{Finding, Reply, Request, Upgrade};
use crate::daemon::outcome::Failure;
use crate::userland::kernels::{self, Image};
use crate::userland::newest::{Sentinel, sentinel};
use crate::userland::packages::{self, State};
use crate::userland::verdicts::{self, Refusal, Verdict};

/// How packages say that a reboot is wanted, and which packages want it (needrestart(1), kured and unattended-upgrades go by these).
const REBOOT_REQUIRED: &str = "/run/reboot-required";
/// See [`REBOOT_REQUIRED`].
const REBOOT_REQUIRED_PKGS: &str = "/run/reboot-required.pkgs";
/// What others write into the sentinel.
const MESSAGE: &str = "*** System restart required ***\n";

/// What is to be done besides listing.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Check the images first (all, or those of this release), keep the verdicts, and set or clear /run/reboot-required: it stands
    /// while apt has installed a kernel of the running one's flavour that is newer than it.
    #[arg(long, value_name = "RELEASE", num_args = 0..=1, require_equals = true)]
    examine: Option<Option<String>>,
}

/// Lists them.
pub fn run(
    args: &KernelsArgs,
    ask: impl Fn(&Request) -> Result<Reply, Failure>,
    json: bool,
) -> Result<ExitCode, Failure> {
    if let Some(only) = &args.examine {
        // The sentinel needs no batond: it is set also where none answers.
        mind_sentinel().map_err(|e| Failure::from_error(&e))?;
        examine(only.as_deref(), ask)?;
    }
    let list = kernels::list().map_err(|e| Failure::from_error(&e))?;
    if json {
        print_json(&list);
    } else {
        print!("{list}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Has each image checked, and keeps what was found.
fn examine(only: Option<&str>, ask: impl Fn(&Request) -> Result<Reply, Failure>) -> Result<(), Failure> {
    let list = kernels::list().map_err(|e| Failure::from_error(&e))?;
    let running = running().map_err(|e| Failure::from_error(&e))?;
    let wanted = |image: &&Image| {
        let release = image.release.as_deref();
        // A link (/boot/vmlinuz.old) is another name of an image that has its own line.
        !image.path.is_symlink() && release.is_some_and(|release| only.is_none_or(|only| only == release))
    };
    let mut fresh = Vec::new();
    for image in list.images.iter().filter(wanted) {
        let findings = match ask(&Request::Check(Upgrade::of(image.path.clone())))? {
            Reply::Checked { findings } => findings,
            other => return Err(unexpected(&other)),
        };
        let (size, modified_s) = verdicts::stamp(&image.path).map_err(|e| Failure::from_error(&e.into()))?;
        let (checked_on, refusals) = (running.clone(), refusals(&findings));
        fresh.push(Verdict { image: image.path.clone(), size, modified_s, checked_on, refusals });
    }
    verdicts::keep(Path::new(verdicts::STORE), fresh).map_err(|e| Failure::from_error(&e.into()))
}

fn refusals(findings: &[Finding]) -> Vec<Refusal> {
    let refusal = |finding: &Finding| {
        let accept = finding.accept.map(|accept| accept.to_string());
        Some(Refusal { check: finding.check.clone(), cause: finding.refusal()?.cause, accept })
    };
    findings.iter().filter_map(refusal).collect()
}

fn running() -> anyhow::Result<String> {
    Ok(nix::sys::utsname::uname()?.release().to_string_lossy().into_owned())
}

/// Sets or clears the sentinel, as [`sentinel`] says.
fn mind_sentinel() -> anyhow::Result<()> {
    // In a package's own script, where the hook runs, it is not wholly installed yet.
    let there: Vec<String> =
        packages::kernels()?.into_iter().filter(|p| p.state != State::Absent).map(|package| package.release).collect();
    let images: Vec<&str> =
        there.iter().map(String::as_str).filter(|release| newest::image(release).exists()).collect();
    let text = match fs::read_to_string(REBOOT_REQUIRED_PKGS) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let listed: Option<Vec<&str>> = text.as_ref().map(|text| text.lines().filter(|line| !line.is_empty()).collect());
    match sentinel(&running()?, &images, listed.as_deref()) {
        Sentinel::Leave => {}
        Sentinel::Needed(packages) => {
            fs::write(REBOOT_REQUIRED_PKGS, packages.join("\n") + "\n")?;
            fs::write(REBOOT_REQUIRED, MESSAGE)?;
        }
        Sentinel::Clear => {
            for file in [REBOOT_REQUIRED, REBOOT_REQUIRED_PKGS] {
                match fs::remove_file(file) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}
