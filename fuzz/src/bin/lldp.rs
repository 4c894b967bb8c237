//! libFuzzer against `lldp`. Run by tests/fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lifeboat_fuzz::lldp::holds(data));
