//! Makes free memory equally cheap to use before each run.
//!
//! Under a hypervisor that takes back free memory (virtio-balloon's free page reporting), the first touch
//! of a page that was free for some seconds costs a page fault in the host: on one such machine, touching
//! 4.6 GB took 0.6 s right after another process had freed as much, and 4 to 10 s half a minute later. Who
//! pays that is chance, unless each run starts from memory that was in use a moment ago, or each after a pause in
//! which the hypervisor has taken it back.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::huge::HugeBuffer;

/// What free memory is like when a run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FreeMemory {
    /// The hypervisor has backed it: it was touched and freed just before.
    #[default]
    Backed,
    /// The hypervisor has taken it back, as after a pause.
    Idle,
    /// As it is found.
    AsFound,
}

/// Share of the memory of a run that the hypervisor must have taken back for it to be idle.
pub const TAKEN_BACK: f64 = 0.9;

/// The longest pause: the kernel reports free memory every few seconds.
const PAUSE: Duration = Duration::from_secs(60);

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

/// Touches and frees `bytes` of memory, and waits until the hypervisor has taken as much back, a minute at most.
/// Says which share it took, by what the kernel tells: what others freed meanwhile counts, too.
///
/// # Errors
/// A kernel that does not tell, or the error of `mmap(2)`.
pub fn idle(bytes: u64) -> Result<f64> {
    settle(bytes)?;
    let returned = || {
        returned_bytes().context(
            "the kernel does not tell what the hypervisor takes back (page_reporting's reported_kib)",
        )
    };
    let (before, began) = (returned()?, Instant::now());
    loop {
        let share = (returned()? - before) as f64 / bytes.max(1) as f64;
        if share >= 1.0 || began.elapsed() > PAUSE {
            return Ok(share.min(1.0));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
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

    #[test]
    fn a_pause_lets_the_hypervisor_take_memory_back_where_the_kernel_tells() {
        match (idle(64 << 20), returned_bytes()) {
            (Ok(share), Some(_)) => assert!((0.0..=1.0).contains(&share), "{share}"),
            (Err(error), None) => assert!(error.to_string().contains("reported_kib"), "{error}"),
            (result, returned) => panic!("{result:?} where the kernel tells {returned:?}"),
        }
    }
}
