//! Work for kernels on a block's bytes: gathers, casts, and many small copies and slices that a
//! kernel scatters. Small jobs share launches, by way of tables in device memory.

use super::enqueue::{CopyOp, source_range};
use super::tables::{TABLE_BYTES, Tables};
use crate::cuda::kernel::{Kernel, Launch, PIECE_BYTES, StridedJob};
use crate::cuda::stream::Stream;
use crate::cuda::sys::Run;
use crate::error::Result;

/// From this many small copies (or slices) in a submission on, a kernel scatters them, where no
/// single call can: the copy, the table of jobs and the launch are calls, too.
const PACK_FROM: usize = 16;

/// Longest copy that is small, in bytes: the copy engine moves more in the time of a call.
const PACK_MOST: u64 = 32 << 10;

/// From this many jobs of one kernel on, they share a launch.
const BATCH_JOBS_FROM: usize = 4;

/// Longest job that shares a launch, in bytes on its wider side: longer ones fill the device.
const BATCH_JOB_MOST: u64 = 256 << 10;

/// A kernel's work on bytes `start..end` of a source; the job's own source address is not set.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) kernel: Kernel,
    pub(super) job: StridedJob,
}

/// The gathers and casts among operations.
pub(super) fn transforms(ops: &[CopyOp]) -> Vec<Job> {
    let job = |op: &CopyOp| match *op {
        CopyOp::Transform { kernel, job } => {
            let (start, end) = source_range(op)?;
            (end > start).then_some(Job { start, end, kernel, job })
        }
        _ => None,
    };
    ops.iter().filter_map(job).collect()
}

fn is_small(run: &Run) -> bool {
    run.2 <= PACK_MOST
}

/// Whether so many copies are small that a kernel should scatter them.
pub(super) fn many_small(runs: &[Run]) -> bool {
    runs.len() >= PACK_FROM && runs.iter().filter(|run| is_small(run)).count() >= PACK_FROM
}

/// Takes the small copies out of `runs`, as gathers.
pub(super) fn pack(runs: &mut Vec<Run>) -> Vec<Job> {
    let gather = |&(start, destination, len): &Run| Job {
        start,
        end: start + len,
        kernel: Kernel::Gather,
        job: StridedJob::dense(0, destination, len),
    };
    let jobs = runs.iter().filter(|run| is_small(run)).map(gather).collect();
    runs.retain(|run| !is_small(run));
    jobs
}

/// A slice that is small and dense on the device, as a gather.
pub(super) fn small_slice(op: &CopyOp) -> Option<Job> {
    let CopyOp::Strided { source_pitch, destination, destination_pitch, width, rows, .. } = *op
    else {
        return None;
    };
    let (start, end) = source_range(op)?;
    let small = destination_pitch == width && end > start && end - start <= PACK_MOST;
    let job = StridedJob { src: 0, dst: destination, rows, cols: width, src_pitch: source_pitch };
    small.then_some(Job { start, end, kernel: Kernel::Gather, job })
}

/// Whether so many slices are small that a kernel should cut them.
pub(super) fn many_slices(ops: &[CopyOp]) -> bool {
    ops.len() >= PACK_FROM && ops.iter().filter_map(small_slice).count() >= PACK_FROM
}

/// Calls that [`launch_jobs`] made.
#[derive(Default)]
pub(super) struct Launches {
    pub(super) tables: u64,
    pub(super) launches: u64,
}

/// Launches the kernels of jobs whose sources are on the device. Small jobs of one kernel share
/// launches, by way of a table at device address `table`, [`TABLE_BYTES`] long, and `tables` on the
/// host, made when first needed.
///
/// # Safety
///
/// For sources and destinations as for [`Stream::run`]; for `table` and `tables` as for
/// [`Tables::send`]. The context is current.
pub(super) unsafe fn launch_jobs(
    stream: &Stream,
    table: u64,
    tables: &mut Option<Tables>,
    jobs: impl Iterator<Item = (Kernel, StridedJob)>,
) -> Result<Launches> {
    let mut made = Launches::default();
    let mut shared: Vec<(Kernel, Vec<StridedJob>)> = Vec::new();
    let mut alone = Vec::new();
    for (kernel, job) in jobs {
        let (from, to) = element_sizes(kernel);
        if job.rows * job.cols * from.max(to) > BATCH_JOB_MOST || in_batch(kernel).is_none() {
            alone.push((kernel, job));
        } else if let Some((_, jobs)) = shared.iter_mut().find(|(other, _)| *other == kernel) {
            jobs.push(job);
        } else {
            shared.push((kernel, vec![job]));
        }
    }
    for (kernel, jobs) in shared {
        let batch = in_batch(kernel).filter(|_| jobs.len() >= BATCH_JOBS_FROM);
        let Some(batch) = batch else {
            alone.extend(jobs.into_iter().map(|job| (kernel, job)));
            continue;
        };
        let (from, to) = element_sizes(kernel);
        let mut pieces = Vec::with_capacity(jobs.len());
        jobs.into_iter().for_each(|job| job.pieces(from, to, PIECE_BYTES, |p| pieces.push(p)));
        for part in pieces.chunks(TABLE_BYTES as usize / size_of::<StridedJob>()) {
            let host = match tables.take() {
                Some(host) => host,
                None => Tables::new(stream.device())?,
            };
            // SAFETY: the caller's contract; a part is no longer than a table.
            unsafe { tables.insert(host).send(stream, table, bytemuck::cast_slice(part))? };
            let launch = Launch::batch(part.len() as u64, stream.device().processors());
            let (mut jobs, mut count) = (table, part.len() as u64);
            let mut params = [(&raw mut jobs).cast(), (&raw mut count).cast()];
            // SAFETY: these kernels take the table's address and length.
            unsafe { stream.launch(batch, launch, &mut params)? };
            made.tables += 1;
            made.launches += 1;
        }
    }
    for (kernel, job) in alone {
        // SAFETY: the caller's contract.
        unsafe { stream.run(kernel, job)? };
        made.launches += 1;
    }
    Ok(made)
}

/// The kernel that does many jobs of `kernel`.
fn in_batch(kernel: Kernel) -> Option<Kernel> {
    match kernel {
        Kernel::Gather => Some(Kernel::GatherBatch),
        Kernel::Cast { from, to } => Some(Kernel::CastBatch { from, to }),
        _ => None,
    }
}

/// Bytes of a source and of a destination element.
fn element_sizes(kernel: Kernel) -> (u64, u64) {
    match kernel {
        Kernel::Cast { from, to } => (from.size() as u64, to.size() as u64),
        _ => (1, 1),
    }
}
