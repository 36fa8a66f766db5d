//! The fuzz targets of `fuzz/`, over their corpus and some hundred changes of it.

use std::path::Path;

use kexec_core::image::{BzImage, KernelFacts};

#[path = "../fuzz/src/lib.rs"]
mod entries;
#[path = "../../state-schemas/fuzz/src/smoke.rs"]
mod smoke;

fn run(target: &str, entry: fn(&[u8])) {
    smoke::run(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz"), target, 400, entry);
}

#[test]
fn image() {
    run("image", entries::image);
}

#[test]
fn initrd() {
    run("initrd", entries::initrd);
}

#[test]
fn payload() {
    run("payload", entries::payload);
}

#[test]
fn texts() {
    run("texts", entries::texts);
}

#[test]
fn klog() {
    run("klog", entries::klog);
}

/// The corpus leads past the first checks.
#[test]
fn the_corpus_holds_a_kernel_that_answers() {
    let file = include_bytes!("../fuzz/corpus/image/with_kernel");
    let facts = KernelFacts::of(&BzImage::parse(file).unwrap()).unwrap();
    assert_eq!(
        facts,
        KernelFacts { mailbox_reset_vector: true, kho: Some("kho-v4".into()), luo: Some("luo-v5".into()), memfd: None }
    );
}
