#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bandtrain_fuzz::fuzz(bandtrain_fuzz::hellaswag_lines, data));
