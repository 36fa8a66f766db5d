//! The module's own test program (`kexec-core/kmod/selftest.c` and what is beside it), which runs in a machine.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use demos::lab::inside::Inside;
use demos::lab::kmod;

use crate::lab;

/// Its bytes, made by the compiler of the lab's tree.
pub fn build() -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let copied = Command::new("cp").arg("-r").arg(kmod::sources().join(".")).arg(folder.path()).status()?;
    ensure!(copied.success(), "copying the module's sources: {copied}");
    let inside = Inside::with_host_network(lab().tree(), folder.path())?;
    let mut make = inside.command("make");
    make.args(["-s", "-C", "/mnt", "selftest", "CC=gcc-14"]);
    inside.output("make selftest", make)?;
    std::fs::read(folder.path().join("selftest")).context("reading the self-test")
}
