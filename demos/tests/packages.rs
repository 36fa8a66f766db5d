//! The Debian packages are built, and looked into: what lies where, what dpkg and systemd are told, what lintian says; and the module is
//! built by DKMS out of its package, for each of the lab's kernels, in a copy of the lab's Debian tree (so it is not loaded here; on a
//! machine, `tests/cases/an_ordinary_server_is_not_harmed.rs` installs the agent's package).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use demos::lab::{Lab, Progress, host, kmod};
use demos::package::{self, Packages};

/// Both packages, built once for all tests of this file.
fn built() -> &'static (tempfile::TempDir, Packages) {
    static BUILT: OnceLock<(tempfile::TempDir, Packages)> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let packages = package::build(folder.path(), Progress::auto()).unwrap_or_else(|why| panic!("{why}"));
        (folder, packages)
    })
}

fn said(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|why| panic!("{command:?}: {why}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Permissions, owner and path of all that is in a package, by path.
fn content(package: &Path) -> BTreeMap<String, String> {
    let list = said(Command::new("dpkg-deb").arg("-c").arg(package));
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (mode, owner) = (words.next()?, words.next()?);
        let path = line.split_whitespace().nth(5)?;
        Some((path.trim_start_matches('.').to_owned(), format!("{mode} {owner}")))
    };
    list.lines().filter_map(line).collect()
}

#[test]
fn everything_is_in_its_place() {
    let (_, packages) = built();
    let agent = content(&packages.baton);
    for (path, how) in [
        ("/usr/sbin/baton", "-rwxr-xr-x root/root"),
        ("/usr/sbin/batond", "-rwxr-xr-x root/root"),
        ("/usr/sbin/baton-init", "-rwxr-xr-x root/root"),
        ("/usr/bin/baton", "lrwxrwxrwx root/root"),
        ("/usr/lib/systemd/system/batond.service", "-rw-r--r-- root/root"),
        ("/usr/lib/systemd/system/baton-kernels.service", "-rw-r--r-- root/root"),
        ("/usr/lib/systemd/system/baton-upgrade.service", "-rw-r--r-- root/root"),
        ("/usr/lib/systemd/system/baton-upgrade.timer", "-rw-r--r-- root/root"),
        ("/usr/lib/modules-load.d/baton.conf", "-rw-r--r-- root/root"),
        ("/usr/lib/sysusers.d/baton.conf", "-rw-r--r-- root/root"),
        ("/etc/kernel/postinst.d/zz-baton", "-rwxr-xr-x root/root"),
        ("/etc/kernel/postrm.d/zz-baton", "-rwxr-xr-x root/root"),
        ("/usr/share/man/man1/baton.1.gz", "-rw-r--r-- root/root"),
        ("/usr/share/man/man1/baton-config-check.1.gz", "-rw-r--r-- root/root"),
        ("/usr/share/man/man5/baton-config.toml.5.gz", "-rw-r--r-- root/root"),
        ("/usr/share/man/man8/batond.8.gz", "-rw-r--r-- root/root"),
        ("/usr/share/bash-completion/completions/baton", "-rw-r--r-- root/root"),
        ("/usr/share/zsh/vendor-completions/_baton", "-rw-r--r-- root/root"),
        ("/usr/share/fish/vendor_completions.d/baton.fish", "-rw-r--r-- root/root"),
        ("/usr/share/doc/baton/copyright", "-rw-r--r-- root/root"),
    ] {
        assert_eq!(agent.get(path).map(String::as_str), Some(how), "{path} in {agent:#?}");
    }
    assert!(!agent.keys().any(|path| path.starts_with("/etc/baton")), "a configuration is the operator's");

    let source = content(&packages.dkms);
    let place = format!("/usr/src/baton-{}", package::module_version().unwrap());
    for (name, _) in kmod::read_sources(&kmod::sources()).unwrap() {
        let is_test = name.starts_with("tests") || name.starts_with("selftest.c");
        let path = format!("{place}/{}", name.display());
        assert_eq!(source.contains_key(&path), !is_test, "{path} in {source:#?}");
    }
    assert!(source.contains_key(&format!("{place}/dkms.conf")), "{source:#?}");

    for (package, name) in [(&packages.baton, "baton"), (&packages.dkms, "baton-dkms")] {
        let field = |field: &str| said(Command::new("dpkg-deb").arg("-f").arg(package).arg(field)).trim().to_owned();
        assert_eq!((field("Package").as_str(), field("Version").as_str()), (name, package::version()));
        assert!(field("Installed-Size").parse::<u64>().unwrap() > 0);
    }
    // The programs need nothing that a successor's initrd has not.
    let folder = tempfile::tempdir().unwrap();
    said(Command::new("dpkg-deb").arg("-x").arg(&packages.baton).arg(folder.path()));
    let ran = said(Command::new(folder.path().join("usr/bin/baton")).arg("--version"));
    assert_eq!(ran.trim(), format!("baton {}", package::version()));
}

/// The same sources give the same bytes.
#[test]
fn a_package_can_be_built_again() {
    let (_, packages) = built();
    let folder = tempfile::tempdir().unwrap();
    let again = package::build(folder.path(), Progress::auto()).unwrap_or_else(|why| panic!("{why}"));
    assert!(fs::read(&packages.baton).unwrap() == fs::read(again.baton).unwrap(), "baton differs");
    assert!(fs::read(&packages.dkms).unwrap() == fs::read(again.dkms).unwrap(), "baton-dkms differs");
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|at| at.join(program).is_file()))
}

#[test]
fn lintian_has_nothing_to_say() {
    let (_, packages) = built();
    if !on_path("lintian") {
        return println!("SKIPPED: lintian is not installed here (apt-get install lintian)");
    }
    let mut lintian = Command::new("lintian");
    // It warns of being root, and of its own age by the changelog's suite.
    lintian.args(["--allow-root", "--fail-on", "error,warning", "--tag-display-limit", "0"]);
    let output = lintian.arg(&packages.baton).arg(&packages.dkms).stdin(Stdio::null()).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}");
    let complaint = said.lines().find(|line| line.starts_with("E:") || line.starts_with("W:"));
    assert_eq!(complaint, None, "{said}");
}

/// Its overrides each have a reason.
#[test]
fn each_override_says_why() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/packaging");
    for name in ["baton", "baton-dkms"] {
        let Ok(text) = fs::read_to_string(folder.join(format!("{name}.lintian-overrides"))) else { continue };
        let mut reason = false;
        for line in text.lines().filter(|line| !line.is_empty()) {
            assert!(line.starts_with('#') || reason, "no reason above `{line}`");
            reason = line.starts_with('#') || reason;
        }
    }
}

/// What `systemd-analyze security` gives batond, of 10 (a unit without any hardening: 9.6). It may sink, and rise with a reason.
const EXPOSURE: f64 = 6.2;

#[test]
fn batond_is_shut_as_far_as_its_work_allows() {
    if !on_path("systemd-analyze") {
        return println!("SKIPPED: systemd-analyze is not installed here");
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/packaging");
    let said = said(
        Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--no-pager", "--threshold=100"])
            .arg(folder.join("batond.service")),
    );
    let line = said.lines().find(|line| line.contains("Overall exposure level")).unwrap_or_else(|| panic!("{said}"));
    println!("{line}");
    let figure = line.split_whitespace().find_map(|word| word.parse::<f64>().ok());
    assert!(figure.is_some_and(|figure| figure <= EXPOSURE), "{said}");
}

/// In a copy of the lab's tree (an overlay whose upper half is thrown away), in namespaces of its own: dkms from the tree's mirror, our
/// package, and a module for each kernel.
const DKMS: &str = r#"
set -e
mount -t tmpfs -o size=1g tmpfs "$SCRATCH"
mkdir "$SCRATCH/upper" "$SCRATCH/work" "$SCRATCH/root"
mount -t overlay -o "lowerdir=$TREE,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work" overlay "$SCRATCH/root"
root="$SCRATCH/root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
cp /etc/resolv.conf "$root/etc/resolv.conf"
# Headers of a kernel that the lab built name no compiler, as Debian's do; no user has such a one.
rm -rf "$root"/usr/lib/modules/*-kho-*
cp "$PACKAGE" "$root/tmp/baton-dkms.deb"
enter() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"; }
enter apt-get update -q -o APT::Update::Error-Mode=any
enter apt-get install -q -y --no-install-recommends /tmp/baton-dkms.deb
for release in $RELEASES; do
	enter modinfo -k "$release" -F vermagic baton
	enter modinfo -k "$release" -F filename baton
done
enter dkms status
enter apt-get purge -q -y baton-dkms
if find "$root/usr/src" "$root/var/lib/dkms" "$root/usr/lib/modules" -name '*baton*' | grep .; then
	echo "left behind" >&2
	exit 1
fi
"#;

#[test]
#[ignore = "written, and not yet seen to end well: of one kernel the module was seen to be built and installed"]
fn dkms_builds_the_module_for_each_kernel_and_purge_leaves_nothing() {
    if !host::is_root() {
        return println!("SKIPPED: a copy of the lab's tree needs root");
    }
    let (folder, packages) = built();
    let lab = Lab::open(Progress::auto()).unwrap_or_else(|why| panic!("{why}"));
    let kernels = lab.tree().kernels().iter().filter(|kernel| !kernel.release.contains("-kho-"));
    let releases: Vec<&str> = kernels.map(|kernel| kernel.release.as_str()).collect();
    assert!(releases.len() > 1, "{releases:?}");
    let scratch = folder.path().join("dkms");
    fs::create_dir(&scratch).unwrap();
    let mut script = host::leashed("unshare");
    script.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--propagation=private", "--", "sh", "-c", DKMS]);
    script.env("SCRATCH", &scratch).env("TREE", lab.tree().root()).env("PACKAGE", &packages.dkms);
    script.env("RELEASES", releases.join(" "));
    let log = said(&mut script);
    println!("{log}");
    for release in releases {
        assert!(log.lines().any(|line| line.starts_with(release) && line.contains("SMP")), "vermagic: {log}");
        let place = format!("{release}/updates/dkms/baton.ko");
        assert!(log.contains(&place), "agent looks for {place}: {log}");
    }
}
