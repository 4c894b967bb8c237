//! libFuzzer against `openflow`. Run by tests/fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lifeboat_fuzz::openflow::holds(data));
