//! Threads that call `pread(2)`: works everywhere. As many reads are in flight as there are
//! threads; cold blocks go around the page cache where the file system allows it. What is no local file is
//! asked for its bytes in the same way.

use std::fs::File;
use std::io;
use std::time::Instant;

use super::job::{Hand, Job, REQUEST, Route};
use crate::error::Error;
use crate::plan::Block;
use crate::sink::Target;
use crate::stats::{Stage, WorkerStats};
use crate::sys;

pub(super) fn work(job: &Job<'_>, worker: usize) -> WorkerStats {
    let mut stats = WorkerStats::default();
    let mut hand = Hand::default();
    while let Some((block, target)) = job.next(&mut hand, true, &mut stats) {
        let route = job.route(block);
        if let Route::Direct(_) = route {
            let mut touched = 0;
            while let Some(next) = job.touch(block, &target, touched, &mut stats) {
                touched = next;
            }
        }
        let began = Instant::now();
        // SAFETY: `target` was just lent for this block, and this is the only read into it.
        let result = unsafe {
            match route {
                Route::Direct(file) => read_direct(job, block, &target, file),
                Route::Cached | Route::Buffered => job.read_buffered(block, &target, 0),
                Route::Remote => job.read_remote(block, &target),
            }
        };
        match result {
            Ok(()) => {
                let stage = match route {
                    Route::Direct(_) => Stage::Direct,
                    Route::Cached => Stage::Cached,
                    Route::Buffered => Stage::Buffered,
                    Route::Remote => Stage::Remote,
                };
                job.record(&mut stats, stage, block, began, worker);
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

/// Direct reads, and buffered ones for whatever it leaves.
///
/// # Safety
///
/// As for [`Job::read_buffered`].
unsafe fn read_direct(
    job: &Job<'_>,
    block: &Block,
    target: &Target,
    file: &File,
) -> Result<(), Error> {
    let (mut done, mut retries) = (0, 0);
    while done < block.need && done % job.file(block).align() == 0 {
        let len = (block.len - done).min(REQUEST) as usize;
        // SAFETY: the sink lends at least `block.len` bytes from `ptr`, to this worker alone.
        let read = unsafe {
            sys::pread(file, target.ptr().as_ptr().add(done as usize), len, block.offset + done)
        };
        match read {
            Ok(0) => break,
            Ok(n) => (done, retries) = (done + n as u64, 0),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                job.file(block).refuse_direct();
                break;
            }
            Err(e) => match job.retry(&e, retries) {
                true => retries += 1,
                false => return Err(job.read_error(block, done, e)),
            },
        }
    }
    // SAFETY: passed on from the caller; the direct reads are over.
    unsafe { job.read_buffered(block, target, done) }
}
