//! libFuzzer against `disk_frame`. Run by tests/fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lifeboat_fuzz::disk_frame::holds(data));
