//! What several tests need: the lab's tree, and small synthetic kernel images.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;

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

/// A small image that passes every check: what each field is for is in `bzimage.rs`.
pub fn synthetic_image() -> Vec<u8> {
    const SETUP_SECTS: usize = 4;
    const SETUP: usize = (SETUP_SECTS + 1) * 512;
    const KERNEL: usize = 0x2000;
    let mut file = vec![0u8; SETUP + KERNEL];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[SETUP_SECTS as u8]);
    put(0x1f4, &(KERNEL as u32 / 16).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x20e, &0x400u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &0x300u32.to_le_bytes());
    put(0x24c, &0x1000u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x300_0000u32.to_le_bytes());
    put(0x600, b"6.99.1-test (builder@host) #1\0");
    file
}
