//! `baton handover check`: whether what this kernel hands over can be read by that one, and by the agent that will run on
//! it. Needs neither batond nor the module; a batond that answers is asked for its services.

use std::path::Path;

use anyhow::{Context, Result};
use kexec_core::image::{BzImage, KernelFacts};

use super::show::kind_name;
use crate::daemon::control::{self, Finding, Reply, Request};
use crate::daemon::outcome::Class;
use crate::update::findings::Findings;
use crate::update::versions;
use crate::userland::kernels;
use crate::userland::known_images;

/// Every question about this pair, answered; what depends on an answer that was no is not asked.
pub fn findings(image: &Path, socket: &Path) -> Vec<Finding> {
    let mut findings = Findings::default();
    let facts = findings.check("image", facts(image));
    if let Some((release, facts)) = facts {
        findings.check("kexec handover", crate::update::kho::spoken(&facts, &release));
    }
    findings.check("agent", versions::agent());
    findings.check("services", services(socket));
    findings.into_list()
}

fn facts(path: &Path) -> Result<((String, KernelFacts), String)> {
    let bytes = kernels::read_image(path)?;
    let parsed = BzImage::parse(&bytes).map_err(|error| kernels::not_an_image(path, &error))?;
    let facts = known_images::facts(&parsed).map_err(|error| kernels::not_an_image(path, &error))?;
    let release = parsed.release().to_owned();
    let found = format!("kernel {release}");
    Ok(((release, facts), found))
}

/// What the services keep. Whether their programs of tomorrow read it, the trial shows: they say so before they are relied on.
fn services(socket: &Path) -> Result<((), String)> {
    let status = match control::ask(socket, &Request::Status, |_, _| {}) {
        Ok(Reply::Status(status)) => status,
        Ok(other) => return Err(anyhow::anyhow!("batond answered something else than was asked: {other:?}")),
        Err(failure) if failure.class == Class::Unreachable => {
            return Ok(((), "batond does not answer: nothing is known of services".to_owned()));
        }
        Err(failure) => return Err(failure).context("cannot ask for the services"),
    };
    let kept = |service: &control::ServiceStatus| {
        format!("{} keeps {} version {}", service.name, kind_name(service.schema_kind), service.schema_version)
    };
    let list: Vec<String> = status.services.iter().map(kept).collect();
    Ok(((), if list.is_empty() { "none".to_owned() } else { list.join(", ") }))
}
