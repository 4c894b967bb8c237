//! libFuzzer against `page_frame`. Run by tests/fuzz.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lifeboat_fuzz::page_frame::holds(data));
