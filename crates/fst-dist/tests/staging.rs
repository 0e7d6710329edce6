//! Staging costs memory only where it is used.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use fst_dist::{Backend, Cause, HostBackend, ReadInto, Reader};

struct Nothing;

impl Reader for Nothing {
    fn read(&self, _ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        Ok(())
    }
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn staging_is_aligned_and_not_written_to_when_it_is_made() {
    let before = resident();
    let staging = HostBackend::new(Nothing).stage(256 << 20).unwrap();
    assert!(staging.addr().is_multiple_of(4096));
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes");
}
