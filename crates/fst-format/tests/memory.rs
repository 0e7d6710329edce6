//! What a header costs in memory, whoever wrote it. The only test of its process, whose peak it reads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write;
use std::fs;

use fst_format::Header;

/// The most memory that this process has had, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}

#[test]
fn a_header_full_of_short_metadata_takes_a_few_times_its_size() {
    let mut json = String::from("{\"__metadata__\":{");
    for key in 0..2_000_000 {
        write!(json, "\"{key:x}\":\"\",").unwrap();
    }
    json.pop();
    json.push_str("}}");
    let before = peak();
    let header = Header::parse(json.as_bytes(), 0).unwrap();
    let grown = peak() - before;
    assert_eq!(header.metadata().len(), 2_000_000);
    assert_eq!(header.metadata().get("fffff"), Some(""));
    assert!(grown < 6 * json.len(), "{} times the header", grown / json.len());
}
