//! What several tests need: the lab's tree, and small synthetic kernel images.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;

mod bzimage;
#[path = "../../../tests/support/lab_tree.rs"]
mod lab_tree;

pub use lab_tree::lab_tree;

/// The lab's stock kernels: release prefix and image.
pub fn lab_kernels() -> Vec<(&'static str, PathBuf)> {
    let tree = lab_tree();
    let find = |folder: PathBuf, prefix: &str, file: &dyn Fn(&Path) -> PathBuf| {
        let mut found: Vec<PathBuf> = std::fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix))
            .map(|path| file(&path))
            .filter(|path| path.is_file())
            .collect();
        found.sort();
        found.pop()
    };
    let mut kernels = Vec::new();
    for series in ["6.12", "7."] {
        let image = find(tree.join("boot"), &format!("vmlinuz-{series}"), &|p| p.to_owned())
            .or_else(|| find(tree.join("usr/lib/modules"), series, &|p| p.join("vmlinuz")));
        kernels.push((series, image.unwrap_or_else(|| panic!("no kernel {series} in {}", tree.display()))));
    }
    kernels
}

/// Runs a program of the tree on a file of ours; gives what it printed.
pub fn in_lab(program: &str, arguments: &[&str], folder: &Path) -> String {
    // The tree's own loader and libraries, without chroot: neither root nor a bind mount is needed.
    let tree = lab_tree();
    let lib = tree.join("usr/lib/x86_64-linux-gnu");
    let output = Command::new(lib.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&lib)
        .arg(tree.join("usr/bin").join(program))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("{program} of the lab: {error}; run `cargo demo lab`"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// A small image that passes every check; its payload is zeros.
pub fn synthetic_image() -> Vec<u8> {
    bzimage::with_payload(&[0; 0x1000], 0x2000)
}
