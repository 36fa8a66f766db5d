//! The module stays small enough to be read in one sitting: at most 2600 lines of C.
//! Everything in it runs with the kernel's rights and is in nobody's tree but ours; what can be done in user space belongs there.
//!
//! The limit was 2000 until devices hibernated (`hibernate.c`): the callbacks by which a driver gives its device up and takes it
//! back with all that it has made of it are reached from within the kernel only. What user space had instead, unbinding, destroys
//! mounts, addresses and connections. (And an IOMMU is switched off on leaving by a kernel's own call.)

use std::fs;
use std::path::Path;

/// The first count that is too many is one more.
const LIMIT: usize = 2600;

/// Sources of the module itself: not its test program, which is no part of it, and not `uapi/`, which is the contract.
fn sources() -> Vec<(String, usize)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kmod");
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let is_source = path.extension().is_some_and(|extension| ["c", "h", "S"].iter().any(|e| extension == *e));
        // `*.mod.c` is what a build in this folder leaves behind.
        if is_source && name != "selftest.c" && !name.ends_with(".mod.c") {
            found.push((name, fs::read_to_string(&path).unwrap().lines().count()));
        }
    }
    found.sort();
    found
}

#[test]
fn the_module_has_at_most_2600_lines_of_c() {
    let sources = sources();
    let total: usize = sources.iter().map(|(_, lines)| lines).sum();
    assert!(sources.iter().any(|(name, _)| name == "main.c"), "the module's sources are not where they were");
    assert!(total <= LIMIT, "{total} lines of C in the module, at most {LIMIT} are allowed: {sources:?}");
}

/// Else the limit above would be kept by writing longer lines.
#[test]
fn no_line_of_the_module_is_longer_than_120_columns() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kmod");
    for (name, _) in sources() {
        let text = fs::read_to_string(folder.join(&name)).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            let columns = line.chars().fold(0, |at, c| if c == '\t' { at / 8 * 8 + 8 } else { at + 1 });
            assert!(columns <= 120, "{name}:{number} has {columns} columns");
        }
    }
}
