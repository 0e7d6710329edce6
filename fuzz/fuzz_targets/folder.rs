#![no_main]

libfuzzer_sys::fuzz_target!(|names: &[u8]| fst_fuzz::format::folder(names));
