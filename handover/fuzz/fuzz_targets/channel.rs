#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| handover_fuzz::shared::channel(input));
