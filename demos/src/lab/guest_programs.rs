//! The programs that run inside machines, linked statically so that they run in any initramfs. Built by cargo, which knows best what is
//! fresh, in a target folder of their own: their flags differ from everything else's.

use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{Doing, LabError, Result, last_lines};
use super::host;
use super::progress::Progress;

/// The agent's programs, the demo services, the one that tries out its arena, and the lab's hand.
pub const PROGRAMS: [&str; 7] = ["baton", "batond", "baton-init", "baton-kv", "baton-memo", "arena-probe", "labd"];
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "guest";
/// What the surrounding cargo or the user's shell may have set for other builds than this one.
const NOT_OURS: [&str; 7] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_INCREMENTAL",
];

/// Builds those of these that are not fresh; the folder that holds them.
pub fn build(programs: &[&str], progress: Progress) -> Result<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = target_folder(&workspace).join("guest");
    // Inside a cargo run this is that very cargo.
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = host::leashed(&cargo);
    command
        .current_dir(&workspace)
        .args(["build", "--profile", PROFILE, "--target", TARGET, "--target-dir"])
        .arg(&target);
    // A static program needs `--target` even on the same platform, or procedural macros would be static too.
    command.args(["-p", "agent", "-p", "demos", "-p", "baton-tests"]).env("RUSTFLAGS", "-C target-feature=+crt-static");
    command.args(programs.iter().flat_map(|program| ["--bin", program]));
    for name in NOT_OURS {
        command.env_remove(name);
    }
    run_cargo(&mut command, progress)?;
    Ok(target.join(TARGET).join(PROFILE))
}

fn run_cargo(command: &mut Command, progress: Progress) -> Result<()> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().doing("starting cargo")?;
    let mut said = String::new();
    let mut task = None;
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines() {
            let line = line.doing("reading what cargo says")?;
            let doing = line.trim_start();
            if doing.starts_with("Compiling") || doing.starts_with("Blocking") {
                // Nothing is shown when everything is fresh.
                let task = task.get_or_insert_with(|| {
                    let task = progress.task("guest programs");
                    task.step("compiling");
                    task
                });
                task.detail(doing);
            }
            said.push_str(&line);
            said.push('\n');
        }
    }
    let status = child.wait().doing("waiting for cargo")?;
    if !status.success() {
        return Err(LabError::Program { program: "cargo build".into(), status, output: last_lines(&said, 60) });
    }
    if let Some(task) = task {
        task.done("built");
    }
    Ok(())
}

/// The target folder of the build that this program came from, which cargo marked; whatever the environment says by now.
fn target_folder(workspace: &Path) -> PathBuf {
    let own = env::current_exe().unwrap_or_default();
    let marked = own.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    marked.map_or_else(|| workspace.join("target"), Path::to_owned)
}
