//! `baton.ko` for each kernel of the tree, built from this repository by the tree's compiler (the one that built the kernels), and kept
//! by a hash of its sources: an unchanged module is never built twice.

use std::fs;
use std::path::{Path, PathBuf};

use super::cache::{self, Construction, Key, Lock};
use super::error::{Doing, LabError, Result};
use super::inside::Inside;
use super::progress::Progress;
use super::tree::{Kernel, Tree};

/// Modules kept for other states of the sources: other branches, other users.
const KEPT: usize = 16;

/// The module's sources in this repository.
#[must_use]
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kexec-core/kmod")
}

/// `baton.ko` for this kernel.
pub fn module_for(tree: &Tree, kernel: &Kernel, progress: Progress) -> Result<PathBuf> {
    module_from(tree, kernel, &sources(), progress)
}

/// The same from sources elsewhere: a module of another version, for a test.
pub fn module_from(tree: &Tree, kernel: &Kernel, sources: &Path, progress: Progress) -> Result<PathBuf> {
    let files = read_sources(sources)?;
    let key = files.iter().fold(Key::default().with(tree.key().as_bytes()), |key, (name, text)| {
        key.with(name.to_string_lossy().as_bytes()).with(text)
    });
    let modules = cache::root()?.join("kmod");
    let place = modules.join(format!("{}-{}", kernel.release, key.name()));
    let module = place.join("baton.ko");
    if module.is_file() {
        return Ok(module);
    }
    let task = progress.task(&format!("baton.ko for {}", kernel.release));
    let _lock = Lock::exclusive(&modules.join("build.lock"), &task)?;
    if module.is_file() {
        return Ok(module);
    }
    task.step("compiling");
    let work = Construction::begin(&place)?;
    for (name, text) in &files {
        let to = work.path().join(name);
        let folder = to.parent().unwrap_or(work.path());
        fs::create_dir_all(folder).doing(format_args!("creating {}", folder.display()))?;
        fs::write(&to, text).doing(format_args!("writing {}", to.display()))?;
    }
    compile(tree, kernel, work.path())?;
    work.publish()?;
    forget_old(&modules, &place)?;
    task.done("built");
    Ok(module)
}

fn compile(tree: &Tree, kernel: &Kernel, folder: &Path) -> Result<()> {
    let inside = Inside::with_host_network(tree, folder)?;
    let mut make = inside.command("make");
    let headers = format!("/usr/lib/modules/{}/build", kernel.release);
    // Warnings count: a module that a newer compiler frowns at is one that a newer kernel will not take.
    // Debian's headers name their compiler; those of a kernel that the lab built leave it to whoever calls make.
    make.args(["-s", "-j2", "-C", &headers, "M=/mnt", "CC=gcc-14", "KCFLAGS=-Werror", "modules"]);
    inside.output("make", make)?;
    if folder.join("baton.ko").is_file() {
        Ok(())
    } else {
        Err(LabError::Reply { from: "make".into(), problem: format!("no baton.ko in {}", folder.display()) })
    }
}

/// Everything that make reads, by path below the folder, sorted. Products of a build beside the sources are left out.
pub fn read_sources(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(sub) = folders.pop() {
        let here = folder.join(&sub);
        for entry in fs::read_dir(&here).doing(format_args!("listing {}", here.display()))? {
            let entry = entry.doing(format_args!("listing {}", here.display()))?;
            let name = sub.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(name);
            } else if is_source(&name) {
                let text = fs::read(entry.path()).doing(format_args!("reading {}", entry.path().display()))?;
                found.push((name, text));
            }
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(LabError::Refused {
            who: folder.display().to_string(),
            why: "no sources of a module in it".into(),
        });
    }
    Ok(found)
}

fn is_source(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let generated = name.ends_with(".mod.c") || name.starts_with('.');
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    !generated && (matches!(extension, "c" | "h" | "S") || name == "Kbuild" || name == "Makefile")
}

fn forget_old(modules: &Path, keep: &Path) -> Result<()> {
    let listing = fs::read_dir(modules).doing(format_args!("listing {}", modules.display()))?;
    let mut built: Vec<_> = listing
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.is_dir() && p != keep)
        .filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p)))
        .collect();
    built.sort();
    for (_, old) in built.iter().take(built.len().saturating_sub(KEPT)) {
        fs::remove_dir_all(old).doing(format_args!("removing {}", old.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_beside_the_sources_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("uapi")).unwrap();
        let sources = ["Kbuild", "Makefile", "main.c", "uapi/baton.h"];
        for name in sources {
            fs::write(dir.path().join(name), name).unwrap();
        }
        for product in ["baton.ko", "baton.mod.c", ".main.o.cmd", "main.o", "Module.symvers", "README.md"] {
            fs::write(dir.path().join(product), "x").unwrap();
        }
        let found: Vec<_> = read_sources(dir.path()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(found, sources.map(PathBuf::from));
    }

    #[test]
    fn the_repository_has_the_module() {
        assert!(read_sources(&sources()).unwrap().iter().any(|(name, _)| name.ends_with("uapi/baton.h")));
    }
}
