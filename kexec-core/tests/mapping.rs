//! [`Mapping`] as [`SharedMemory`], on an ordinary file: two mappings of it are two kernels that see the same memory.

use kexec_core::sys::{Access, Mapping};
use proptest::prelude::*;
use state_schemas::shared::SharedMemory;

fn pair(len: u64) -> (Mapping, Mapping) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    (Mapping::new(&file, len, Access::ReadWrite).unwrap(), Mapping::new(&file, len, Access::ReadOnly).unwrap())
}

#[test]
fn words_are_little_endian_and_shared() {
    let (ours, theirs) = pair(4096);
    ours.store(8, 0x0123_4567_89ab_cdef);
    assert_eq!(theirs.load(8), 0x0123_4567_89ab_cdef);
    let mut bytes = [0; 8];
    theirs.read(8, &mut bytes);
    assert_eq!(bytes, 0x0123_4567_89ab_cdefu64.to_le_bytes());
    assert_eq!(theirs.size(), 4096);
}

#[test]
#[should_panic(expected = "8 bytes at 0xff9 are outside of a mapping of 0x1000")]
fn behind_the_end_is_a_bug() {
    pair(4096).0.load(0xff9);
}

#[test]
#[should_panic(expected = "outside of a mapping")]
fn an_offset_that_wraps_is_a_bug() {
    pair(4096).0.read(u64::MAX, &mut [0; 2]);
}

#[test]
#[should_panic(expected = "word at 0x4 is not 8-aligned")]
fn a_crooked_word_is_a_bug() {
    pair(4096).0.store(4, 1);
}

#[test]
#[should_panic(expected = "mapping is read-only")]
fn writing_a_readonly_mapping_is_a_bug() {
    pair(4096).1.write(0, &[1]);
}

#[test]
fn nothing_cannot_be_mapped() {
    let file = tempfile::tempfile().unwrap();
    assert_eq!(Mapping::new(&file, 0, Access::ReadOnly).unwrap_err(), nix::errno::Errno::EINVAL);
}

proptest! {
    #[test]
    fn any_offset_and_length_is_copied_exactly(
        offset in 0usize..200,
        bytes in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (ours, theirs) = pair(4096);
        ours.write(0, &[0xee; 512]);
        ours.write(offset as u64, &bytes);
        let mut all = vec![0; 512];
        theirs.read(0, &mut all);
        let mut expected = vec![0xee; 512];
        expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
        prop_assert_eq!(&all, &expected);
        let mut part = vec![0; bytes.len()];
        theirs.read(offset as u64, &mut part);
        prop_assert_eq!(part, bytes);
    }
}
