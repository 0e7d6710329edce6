//! What happens inside a contender's process: prepare, measure one load, report one line of JSON.

use std::io;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::contender::{self, Op};
use crate::digest::TensorDigest;
use crate::memory;

/// The line that a contender's process prints, also by `peers/load.py`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measurement {
    /// Wall time of the load alone: from before the first open to the last tensor usable.
    pub seconds: f64,
    /// Bytes of tensor data that the caller holds afterwards (0 for runs that only open).
    pub bytes: u64,
    /// User and system time of the process and its children during the load.
    pub cpu_seconds: f64,
    /// Largest resident set during the load, mapped files included.
    pub peak_rss_bytes: u64,
    /// Resident set just before the load: what the program itself needs.
    pub base_rss_bytes: u64,
    /// Free memory that the kernel gave back to the hypervisor during the load, where it tells
    /// ([`memory::returned_bytes`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub returned_bytes: Option<u64>,
    /// The digest of all tensors ([`TensorDigest`]), when asked for; taken after the measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What the contender tells about the path it took (engine, stages), when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<serde_json::Value>,
}

/// Arguments of the contender program.
#[derive(Debug, Clone, clap::Parser)]
#[command(about = "Runs one load of one contender and prints its measurement as JSON")]
pub struct ContenderArgs {
    /// Which loader: a name that `--bench load -- --list` prints.
    #[arg(long)]
    pub contender: String,
    /// What to load.
    #[arg(long, value_enum, default_value_t = Op::Load)]
    pub op: Op,
    /// Folder of the checkpoint.
    #[arg(long)]
    pub path: PathBuf,
    /// Touch and free this much memory first ([`memory::settle`]).
    #[arg(long, default_value_t = 0)]
    pub settle: u64,
    /// Also print the digest of the loaded tensors.
    #[arg(long)]
    pub digest: bool,
}

/// Runs one load in this process.
///
/// # Errors
/// Unknown contender, or the load's own error.
pub fn run(args: &ContenderArgs) -> Result<Measurement> {
    let files = contender::safetensors_files(&args.path)?;
    let job = contender::prepare(&args.contender, args.op, &args.path, &files)?;
    memory::settle(args.settle)?;
    reset_peak_rss();
    let returned_before = memory::returned_bytes();
    let base_rss_bytes = status_bytes("VmRSS:").context("VmRSS in /proc/self/status")?;
    let cpu_before = cpu_seconds()?;
    let start = Instant::now();
    let loaded = job()?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = cpu_seconds()? - cpu_before;
    let peak_rss_bytes = status_bytes("VmHWM:").context("VmHWM in /proc/self/status")?;
    let returned_bytes =
        returned_before.zip(memory::returned_bytes()).map(|(before, after)| after - before);
    let digest = if args.digest {
        let mut digest = TensorDigest::default();
        loaded.for_each(&mut |name, shape, data| digest.add(name, shape, data))?;
        Some(digest.finish())
    } else {
        None
    };
    Ok(Measurement {
        seconds,
        bytes: loaded.bytes(),
        cpu_seconds,
        peak_rss_bytes,
        base_rss_bytes,
        returned_bytes,
        digest,
        detail: loaded.detail(),
    })
}

/// User and system seconds of this process and its waited-for children so far, by `getrusage(2)`.
///
/// # Errors
/// The error of `getrusage`.
pub fn cpu_seconds() -> io::Result<f64> {
    let mut total = 0.0;
    for who in [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN] {
        // SAFETY: `rusage` is plain data for which all-zero bytes are a valid value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` is a valid out-pointer.
        if unsafe { libc::getrusage(who, &raw mut usage) } != 0 {
            return Err(io::Error::last_os_error());
        }
        for time in [usage.ru_utime, usage.ru_stime] {
            total += time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
        }
    }
    Ok(total)
}

/// Sets the peak back to the present resident set (`proc_pid_clear_refs(5)`, value 5). Where the kernel
/// refuses, the peak covers the preparation too, which only makes the figure larger.
fn reset_peak_rss() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// A line of `/proc/self/status` such as `VmHWM:     1234 kB`, in bytes. (`ru_maxrss` is no substitute:
/// it is inherited through `execve` from the parent.)
fn status_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_rss_sees_touched_memory() {
        reset_peak_rss();
        let before = status_bytes("VmHWM:").unwrap();
        let block = std::hint::black_box(vec![1u8; 256 << 20]);
        let after = status_bytes("VmHWM:").unwrap();
        // Other tests may give memory back meanwhile.
        assert!(after >= before + (128 << 20), "{before} {after} {}", block.len());
    }

    #[test]
    fn cpu_seconds_grow_with_work() {
        let before = cpu_seconds().unwrap();
        let start = Instant::now();
        let mut x = 1u64;
        while start.elapsed().as_millis() < 200 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(cpu_seconds().unwrap() > before, "{x}");
    }
}
