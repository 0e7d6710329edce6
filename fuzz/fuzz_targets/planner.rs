#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fst_fuzz::planner::planner(bytes));
