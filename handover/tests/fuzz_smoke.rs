//! The fuzz targets of `fuzz/src/shared.rs`, over their corpus and some hundred changes of it. (KHO's and LUO's: `tests/kho`.)

use std::path::Path;

use handover::arena::Store;

#[path = "../fuzz/src/shared.rs"]
mod entries;
#[path = "../../state-schemas/fuzz/src/smoke.rs"]
mod smoke;

fn run(target: &str, entry: fn(&[u8])) {
    smoke::run(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz"), target, 300, entry);
}

#[test]
fn channel() {
    run("channel", entries::channel);
}

#[test]
fn arena() {
    run("arena", entries::arena);
}

/// The corpus leads past the first checks; `BATON_GOLDEN=write` writes it where it is missing.
#[test]
fn the_corpus_holds_a_store() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/arena/store");
    if !path.exists() && std::env::var_os("BATON_GOLDEN").is_some_and(|value| value == "write") {
        let mut memory = vec![0; 16 << 10];
        let mut store = Store::create(&mut memory, "fuzz", 7, 42).unwrap();
        for number in 0..20u8 {
            store.set(&[b'k', number], &vec![number; usize::from(number) * 10]).unwrap();
            store.rpush(b"list", &[number; 5]).unwrap();
            store.sadd(b"set", &[number; 9]).unwrap();
        }
        store.del(b"k\x03").unwrap();
        std::fs::write(&path, &memory).unwrap();
    }
    let mut memory = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(Store::attach(&mut memory).unwrap().verify().unwrap().keys, 21);
    // The older version's, from before there was a record.
    let mut memory = std::fs::read(path.with_file_name("store-v1")).unwrap();
    assert_eq!(Store::attach(&mut memory).unwrap().verify().unwrap().keys, 21);
}
