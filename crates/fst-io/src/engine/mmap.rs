//! Threads that copy out of a mapping. Slow when cold (the kernel faults page by page); here for
//! file systems where nothing else works well, and for comparison.
//!
//! A mapping whose file shrinks kills who touches it (SIGBUS). The copy therefore goes through
//! `process_vm_readv(2)`, which answers EFAULT instead.

use std::time::Instant;

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

use super::job::{Hand, Job};
use crate::buffer::HUGE_PAGE;
use crate::error::Error;
use crate::plan::Block;
use crate::sink::Target;
use crate::stats::{Stage, WorkerStats};
use crate::sys;

/// Why this engine cannot run here, or `None` when it can.
pub(super) fn refusal() -> Option<String> {
    let (source, mut copy) = ([1u8; 8], [0u8; 8]);
    // SAFETY: both arrays are live, and `copy` is this function's own.
    let copied = unsafe { sys::copy_fallible(source.as_ptr(), copy.as_mut_ptr(), 8) };
    match copied {
        Ok(8) if source == copy => None,
        Ok(n) => Some(format!("process_vm_readv copied {n} of 8 bytes")),
        Err(e) => Some(format!("process_vm_readv is refused: {e}")),
    }
}

pub(super) fn work(job: &Job<'_>, worker: usize) -> WorkerStats {
    let mut stats = WorkerStats::default();
    // Blocks come file by file, so that one mapping at a time is enough.
    let mut mapping: Option<(u32, MmapRaw)> = None;
    let mut hand = Hand::default();
    while let Some((block, target)) = job.next(&mut hand, true, &mut stats) {
        let began = Instant::now();
        match copy(job, block, &target, &mut mapping) {
            Ok(()) => {
                job.record(&mut stats, Stage::Mapped, block, began, worker);
                job.landed(block, target, &mut stats);
            }
            Err(error) => {
                job.abandoned(block, target);
                job.fail(error);
            }
        }
    }
    stats
}

fn copy(
    job: &Job<'_>,
    block: &Block,
    target: &Target,
    mapping: &mut Option<(u32, MmapRaw)>,
) -> Result<(), Error> {
    let file = job.file(block);
    let unsupported = || job.read_error(block, 0, std::io::ErrorKind::Unsupported.into());
    let opened = file.buffered().ok_or_else(unsupported)?;
    let map = match mapping {
        Some((number, map)) if *number == block.file => map,
        _ => {
            let map = MmapOptions::new()
                .map_raw_read_only(opened)
                .map_err(|e| job.read_error(block, 0, e))?;
            // Read-ahead is an optimisation; without it the copy is slower.
            let _ = map.advise(Advice::Sequential);
            &mut mapping.insert((block.file, map)).1
        }
    };
    // The file may have grown or shrunk between the check of its length and the mapping.
    let mapped = map.len() as u64;
    if mapped < block.need_end() {
        return Err(job.early_end(block, mapped));
    }
    let (mut done, mut retries) = (0u64, 0);
    while done < block.need {
        // SAFETY: the sink lends `block.len` bytes to this worker alone; the source is checked by
        // the kernel.
        let copied = unsafe {
            sys::copy_fallible(
                map.as_ptr().wrapping_add((block.offset + done) as usize),
                target.ptr().as_ptr().add(done as usize),
                (block.need - done) as usize,
            )
        };
        match copied {
            Ok(0) => return Err(job.early_end(block, block.offset + done)),
            Ok(n) => (done, retries) = (done + n as u64, 0),
            Err(e) if sys::is_fault(&e) => {
                return Err(match opened.metadata() {
                    Ok(now) if now.len() < block.need_end() => job.early_end(block, now.len()),
                    // A page that cannot be read in: what `pread` calls EIO.
                    _ => job.read_error(block, done, std::io::Error::from_raw_os_error(libc::EIO)),
                });
            }
            Err(e) => match job.retry(&e, retries) {
                true => retries += 1,
                false => return Err(job.read_error(block, done, e)),
            },
        }
    }
    unmap_pages(map, block.offset, block.need_end());
    Ok(())
}

/// Takes the pages that were copied out of the process's page tables: they would count as its memory
/// until the file's last block. A fault maps neighbours too, as far as a huge page goes.
fn unmap_pages(map: &MmapRaw, start: u64, end: u64) {
    let around = HUGE_PAGE as u64;
    let start = start.saturating_sub(around) / around * around;
    let end = (end + around).min(map.len() as u64);
    // SAFETY: of a shared mapping of a file this drops no bytes: the next access finds them in the
    // page cache. A refusal costs nothing but the accounting.
    let _ = unsafe {
        map.unchecked_advise_range(
            UncheckedAdvice::DontNeed,
            start as usize,
            end.saturating_sub(start) as usize,
        )
    };
}
