//! libFuzzer against `return_path`. Run by tests/fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lifeboat_fuzz::return_path::holds(data));
