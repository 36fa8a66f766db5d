//! The lab's Debian tree, for tests of rooms that know nothing of the lab (`trampoline`, `kexec-core`): found, or set up
//! by the command that anybody would use. Each test that needs it takes this file in with `#[path]`.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;

/// `$BATON_LAB_TREE`, or the one that `cargo demo lab` makes; made now if it is not there yet.
pub fn lab_tree() -> PathBuf {
    if let Some(tree) = std::env::var_os("BATON_LAB_TREE") {
        return tree.into();
    }
    static SET_UP: Once = Once::new();
    let tree = cache().join("baton/lab/current/tree");
    // The tests of one program run side by side, programs do not; the lab has a lock of its own besides.
    SET_UP.call_once(|| {
        if !tree.join("usr/bin/qemu-system-x86_64").exists() {
            let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
            let mut demo = Command::new(env!("CARGO"));
            demo.current_dir(workspace).args(["run", "--quiet", "--package", "demos", "--bin", "demo", "--", "lab"]);
            let ended = demo.status().expect("cargo starts");
            assert!(ended.success(), "`cargo demo lab` failed ({ended}); see above for what to do");
        }
    });
    tree.canonicalize().unwrap_or_else(|e| panic!("there is no lab at {}: {e}", tree.display()))
}

fn cache() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .expect("XDG_CACHE_HOME or HOME is set")
}
