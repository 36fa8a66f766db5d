#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kexec_core_fuzz::klog(bytes));
