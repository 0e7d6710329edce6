#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| fst_fuzz::format::decoder(file));
