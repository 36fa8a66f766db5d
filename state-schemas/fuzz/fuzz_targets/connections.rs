#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| state_schemas_fuzz::connections(bytes));
