//! fst's own loads: the facade, as a user has it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Result;
use fst::{Checkpoint, Device, Dtype, Loader};
use serde_json::json;

use super::record::Record;
use super::sum::DeviceSum;

/// Loads the checkpoint in `path` and fills in what came of it. With `keep_pinned`, host memory that an
/// earlier load pinned is there, and stays; without, none is. The clock runs from before the
/// headers are read until [`Loader::load`] returns; the sum is made afterwards.
///
/// # Errors
/// The load's.
pub fn load(
    device: &Device,
    sum: &DeviceSum,
    path: &Path,
    dtype: Option<Dtype>,
    keep_pinned: bool,
    record: &mut Record,
) -> Result<()> {
    let mut loader = Loader::new().device(device.clone()).keep_pinned(keep_pinned);
    if let Some(dtype) = dtype {
        loader = loader.dtype(dtype);
    }
    if !keep_pinned {
        fst::gpu::release_kept();
    } else if fst::gpu::kept_bytes() == 0 {
        loader.load(&Checkpoint::open(path)?)?;
    }
    let (seconds, tensors, host_bytes) = watching_memory(|| {
        let start = Instant::now();
        let checkpoint = Checkpoint::open(path)?;
        let tensors = loader.load(&checkpoint)?;
        Ok((start.elapsed().as_secs_f64(), tensors))
    })?;
    let report = tensors.report();
    record.seconds = seconds;
    record.bytes = report.bytes;
    record.host_bytes = Some(host_bytes);
    record.sum = Some(sum.of(&tensors)?.to_string());
    let stages: serde_json::Map<_, _> =
        report.stages.iter().map(|s| (s.name.to_owned(), json!([s.seconds, s.bytes]))).collect();
    let copy = report.device_copy.as_ref().map(|copy| {
        json!({
            "reason": copy.reason,
            "registered_bytes": copy.registered_bytes,
            "staged_bytes": copy.staged_bytes,
            "registered_gb_per_s": copy.registered_rate.map(|rate| rate / 1e9),
            "staged_gb_per_s": copy.staged_rate.map(|rate| rate / 1e9),
            "refused": copy.refused,
            "pinned_bytes": copy.pinned_bytes,
            "streams": copy.streams,
            "copy_calls": copy.copy_calls,
            "launches": copy.launches,
            "ring_waits": copy.ring_waits,
            "first_block": copy.first_block,
            "preparations": copy.preparations.iter().map(|part| {
                (part.name.to_owned(), json!([part.began, part.seconds, part.ahead]))
            }).collect::<serde_json::Map<_, _>>(),
        })
    });
    record.detail = json!({
        "copy": copy,
        "tensors": report.tensors,
        "engine": report.engine.used.as_str(),
        "why": report.engine.reason,
        "workers": report.workers,
        "block_bytes": report.block_bytes,
        "bytes_read": report.bytes_read,
        "stages": stages,
    });
    Ok(())
}

/// Runs `load`; also says by how much the memory that is this process's own (not mapped files) grew
/// at most meanwhile. Looked at every millisecond.
fn watching_memory<T>(load: impl FnOnce() -> Result<(f64, T)>) -> Result<(f64, T, u64)> {
    let before = own_bytes();
    let (peak, done) = (AtomicU64::new(before), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                peak.fetch_max(own_bytes(), Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let result = load();
        done.store(true, Relaxed);
        let (seconds, value) = result?;
        Ok((seconds, value, peak.load(Relaxed).saturating_sub(before)))
    })
}

/// `RssAnon` of `/proc/self/status` in bytes, by the cheaper `statm`: resident without shared pages.
fn own_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut fields = text.split(' ').skip(1).map(|field| field.parse::<u64>().unwrap_or(0));
    let (resident, shared) = (fields.next().unwrap_or(0), fields.next().unwrap_or(0));
    resident.saturating_sub(shared) * 4096
}
