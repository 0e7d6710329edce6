//! Makes free memory equally cheap to use before each run.
//!
//! Under a hypervisor that takes back free memory (virtio-balloon's free page reporting), the first touch
//! of a page that was free for some seconds costs a page fault in the host: on one such machine, touching
//! 4.6 GB took 0.6 s right after another process had freed as much, and 4 to 10 s half a minute later. Who
//! pays that is chance, unless each run starts from memory that was in use a moment ago.

use std::fs;
use std::io;

use crate::huge::HugeBuffer;

/// Free memory that [`settle`] leaves alone, so that it does not push out the page cache.
const LEAVE: u64 = 512 << 20;

/// Touches and frees `bytes` of memory, less where less is free.
///
/// # Errors
/// The error of `mmap(2)`.
pub fn settle(bytes: u64) -> io::Result<()> {
    let bytes = bytes.min(free_bytes().unwrap_or(0).saturating_sub(LEAVE));
    drop(HugeBuffer::prefaulted(bytes as usize)?);
    Ok(())
}

/// How much to settle before a load of `bytes`: those, and some for what the loader needs beside them and
/// for what is taken back during the load.
#[must_use]
pub fn settle_for(bytes: u64) -> u64 {
    bytes + (bytes / 2).clamp(256 << 20, 1 << 30)
}

/// Bytes given back to the hypervisor since boot; `None` where the kernel does not count them.
#[must_use]
pub fn returned_bytes() -> Option<u64> {
    let kib = fs::read_to_string("/sys/module/page_reporting/parameters/reported_kib").ok()?;
    Some(kib.trim().parse::<u64>().ok()? * 1024)
}

fn free_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settling_leaves_memory_free_and_asks_for_more_than_the_load() {
        assert!(free_bytes().unwrap() > 0);
        settle(16 << 20).unwrap();
        assert_eq!(settle_for(0), 256 << 20);
        assert_eq!(settle_for(8 << 30), 9 << 30);
    }
}
