//! From operations to driver calls: ranges are checked, neighbours joined, small copies sent many
//! to a call, and bytes for kernels taken through scratch memory on the device.
//!
//! Where the driver has no call for many copies, many small ones go as one copy to scratch memory,
//! and a kernel scatters them; slices and casts of small tensors share launches likewise.

use super::jobs::{Job, launch_jobs, many_slices, many_small, pack, small_slice, transforms};
use super::tables::Tables;
use super::{Goal, Lane, LaneState, Pipeline};
use crate::cuda::buffer::device::{DEVICE_ALIGN, DeviceArena};
use crate::cuda::kernel::{Kernel, StridedJob};
use crate::cuda::stream::Stream;
use crate::cuda::sys::{Run, copy_batch};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// From this many copies in a submission on, one call carries them all, if the driver can.
const BATCH_FROM: usize = 4;

/// Transforms whose sources lie at most this many bytes apart share a copy to scratch memory: about
/// what the copy engine moves in the time that a call takes.
const TRANSFORM_GAP: u64 = 64 << 10;

/// One operation on the bytes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyOp {
    /// A run of bytes.
    Linear {
        /// First byte in the block.
        source: u64,
        /// Device address.
        destination: u64,
        /// Bytes.
        len: u64,
    },
    /// Rows that lie apart: a slice of an inner dimension.
    Strided {
        /// First byte of the first row in the block.
        source: u64,
        /// Bytes from row to row in the block.
        source_pitch: u64,
        /// Device address of the first row.
        destination: u64,
        /// Bytes from row to row on the device.
        destination_pitch: u64,
        /// Bytes of a row.
        width: u64,
        /// Rows.
        rows: u64,
    },
    /// A gather or a cast: the bytes go to scratch memory on the device, where the kernel reads
    /// them.
    Transform {
        /// [`Kernel::Gather`] or [`Kernel::Cast`].
        kernel: Kernel,
        /// What it does. Its `src` counts from the block's first byte, its `dst` is a device
        /// address.
        job: StridedJob,
    },
}

/// The bytes of the source that an operation reads, or `None` where the sum overflows.
pub(crate) fn source_range(op: &CopyOp) -> Option<(u64, u64)> {
    let (start, len) = match *op {
        CopyOp::Linear { source, len, .. } => (source, len),
        CopyOp::Transform { kernel, job } => {
            let width = job.cols.checked_mul(match kernel {
                Kernel::Cast { from, .. } => from.size() as u64,
                _ => 1,
            })?;
            if job.rows == 0 || width == 0 {
                (job.src, 0)
            } else if job.rows > 1 && job.src_pitch < width {
                return None;
            } else {
                (job.src, job.src_pitch.checked_mul(job.rows - 1)?.checked_add(width)?)
            }
        }
        CopyOp::Strided { source, source_pitch, destination_pitch, width, rows, .. } => {
            if rows == 0 || width == 0 {
                (source, 0)
            } else if source_pitch < width || destination_pitch < width {
                return None;
            } else {
                (source, source_pitch.checked_mul(rows - 1)?.checked_add(width)?)
            }
        }
    };
    Some((start, start.checked_add(len)?))
}

/// Refuses operations that read outside their source.
pub(super) fn check_ranges(ops: &[CopyOp], len: u64) -> Result<()> {
    for op in ops {
        match source_range(op) {
            Some((_, end)) if end <= len => {}
            range => {
                let (start, end) = range.unwrap_or((0, u64::MAX));
                return Err(Error::OutOfRange { what: "source of a copy", start, end, len });
            }
        }
    }
    Ok(())
}

/// Adds a copy, joined with the one before if it continues that on both sides.
pub(crate) fn push_run(runs: &mut Vec<Run>, (source, destination, len): Run) {
    match runs.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.0 + last.2 == source && last.1 + last.2 == destination => {
            last.2 += len;
        }
        _ => runs.push((source, destination, len)),
    }
}

/// Joins linear copies that continue each other on both sides.
pub(crate) fn joined(ops: &[CopyOp]) -> Vec<Run> {
    let mut runs = Vec::new();
    for op in ops {
        if let CopyOp::Linear { source, destination, len } = *op {
            push_run(&mut runs, (source, destination, len));
        }
    }
    runs
}

impl Pipeline {
    /// Queues all operations of one submission on a lane.
    ///
    /// # Safety
    ///
    /// As for [`Pipeline::submit`], with ranges checked, the context current, and `start` kept
    /// until the lane's work has run.
    pub(super) unsafe fn enqueue(
        &self,
        lane: &Lane,
        state: &mut LaneState,
        start: NonNull<u8>,
        ops: &[CopyOp],
    ) -> Result<()> {
        let base = start.as_ptr() as u64;
        let mut runs = joined(ops);
        self.counters.copies.fetch_add(ops.len() as u64, Ordering::Relaxed);
        let mut jobs = transforms(ops);
        if self.no_batch.load(Ordering::Relaxed) && self.can_pack(lane, many_small(&runs)) {
            jobs.extend(pack(&mut runs));
        }
        let sliced = self.can_pack(lane, many_slices(ops));
        if sliced {
            jobs.extend(ops.iter().filter_map(small_slice));
        }
        // SAFETY: the caller's contract, passed on to each copy.
        let refused = unsafe { self.enqueue_runs(lane, base, &runs)? };
        if refused {
            // The driver has the call and does not do it: now it is known.
            if self.can_pack(lane, many_small(&runs)) {
                jobs.extend(pack(&mut runs));
            }
            // SAFETY: as above; nothing of them was queued.
            unsafe { self.enqueue_runs(lane, base, &runs)? };
        }
        // SAFETY: as above.
        unsafe { self.enqueue_jobs(lane, state, base, jobs)? };
        for op in ops {
            if let CopyOp::Strided {
                source,
                source_pitch,
                destination,
                destination_pitch,
                width,
                rows,
            } = *op
            {
                if sliced && small_slice(op).is_some() {
                    continue;
                }
                let (from, to) = ((base + source, source_pitch), (destination, destination_pitch));
                self.counters.bytes.fetch_add(width * rows, Ordering::Relaxed);
                self.counters.copy_calls.fetch_add(1, Ordering::Relaxed);
                // SAFETY: as above.
                unsafe { copy_rows(&lane.stream, From::Host, from, to, (width, rows))? };
            }
        }
        Ok(())
    }

    /// Whether kernels may scatter copies that are `many`: the device must take the kernel.
    fn can_pack(&self, lane: &Lane, many: bool) -> bool {
        let Goal { device, packs, .. } = &self.goals[lane.device];
        many && *packs.get_or_init(|| device.prepare(Kernel::GatherBatch).is_ok())
    }

    /// Brings the sources of all jobs to scratch memory and launches their kernels.
    ///
    /// Scratch memory is reused without waiting: what is there is read by work queued earlier on
    /// the same stream that will write it.
    ///
    /// # Safety
    ///
    /// As for [`Pipeline::enqueue`].
    unsafe fn enqueue_jobs(
        &self,
        lane: &Lane,
        state: &mut LaneState,
        base: u64,
        mut jobs: Vec<Job>,
    ) -> Result<()> {
        jobs.sort_by_key(|job| job.start);
        let room = self.block_bytes() as u64;
        let mut rest = &jobs[..];
        while let Some(&Job { start: first, mut end, .. }) = rest.first() {
            // As many as lie within one copy, over small gaps.
            let mut count = 1;
            for job in &rest[1..] {
                let longer = end.max(job.end);
                if job.start > end + TRANSFORM_GAP || longer - first > room {
                    break;
                }
                end = longer;
                count += 1;
            }
            if end - first > room {
                return Err(Error::OutOfRange {
                    what: "source of a transform, which must fit a block",
                    start: first,
                    end,
                    len: room,
                });
            }
            if state.scratch.is_none() {
                let arena = DeviceArena::new(lane.stream.device(), super::lane_bytes(room))?;
                state.scratch = Some(arena);
            }
            let Some(scratch) = &state.scratch else { break };
            // The source's alignment is kept: kernels are fastest on aligned elements.
            let to = scratch.address() + DEVICE_ALIGN / 2 + first % (DEVICE_ALIGN / 2);
            let table = scratch.address() + (room + DEVICE_ALIGN).next_multiple_of(DEVICE_ALIGN);
            // SAFETY: the caller's contract; the scratch memory has room for a block.
            unsafe { self.enqueue_runs(lane, base, &[(first, to, end - first)])? };
            let placed = rest[..count]
                .iter()
                .map(|job| (job.kernel, StridedJob { src: to + (job.start - first), ..job.job }));
            // SAFETY: the sources are in scratch memory, the destinations the caller's.
            let launches = unsafe { launch_jobs(&lane.stream, table, &mut state.tables, placed)? };
            self.counters.copy_calls.fetch_add(launches.tables, Ordering::Relaxed);
            self.counters.launches.fetch_add(launches.launches, Ordering::Relaxed);
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Queues plain copies; `true` when the driver turned out to have no call for many copies: then
    /// none is queued.
    ///
    /// # Safety
    ///
    /// As for [`Pipeline::enqueue`].
    unsafe fn enqueue_runs(&self, lane: &Lane, base: u64, runs: &[Run]) -> Result<bool> {
        let bytes: u64 = runs.iter().map(|r| r.2).sum();
        if runs.len() >= BATCH_FROM && !self.no_batch.load(Ordering::Relaxed) {
            let (stream, device) = (lane.stream.handle(), lane.stream.device().ordinal());
            // SAFETY: the caller's contract for each copy.
            let done = unsafe { copy_batch(base, runs, stream, device)? };
            if !done {
                self.no_batch.store(true, Ordering::Relaxed);
                return Ok(true);
            }
            self.counters.copy_calls.fetch_add(1, Ordering::Relaxed);
            self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
            return Ok(false);
        }
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        for &(source, destination, len) in runs {
            // SAFETY: the caller's contract.
            let result = unsafe {
                sys::cuMemcpyHtoDAsync_v2(
                    destination,
                    (base + source) as *const _,
                    len as usize,
                    lane.stream.handle(),
                )
            };
            lane.stream.device().check(result, "cuMemcpyHtoDAsync")?;
            self.counters.copy_calls.fetch_add(1, Ordering::Relaxed);
        }
        Ok(false)
    }
}

/// Where rows that are copied come from.
#[derive(Clone, Copy)]
pub(crate) enum From {
    Host,
    Device,
}

/// Queues a copy of rows to the device.
///
/// # Safety
///
/// The device's context is current. Both sides hold the rows, and stay until the stream's work has run.
pub(crate) unsafe fn copy_rows(
    stream: &Stream,
    from: From,
    (source, source_pitch): (u64, u64),
    (destination, destination_pitch): (u64, u64),
    (width, rows): (u64, u64),
) -> Result<()> {
    if width == 0 || rows == 0 {
        return Ok(());
    }
    let (kind, host, device) = match from {
        From::Host => (sys::CUmemorytype::CU_MEMORYTYPE_HOST, source, 0),
        From::Device => (sys::CUmemorytype::CU_MEMORYTYPE_DEVICE, 0, source),
    };
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: kind,
        srcHost: host as *const _,
        srcDevice: device,
        srcArray: std::ptr::null_mut(),
        srcPitch: source_pitch as usize,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: destination,
        dstArray: std::ptr::null_mut(),
        dstPitch: destination_pitch as usize,
        WidthInBytes: width as usize,
        Height: rows as usize,
    };
    // SAFETY: the caller's contract; the description is read during the call.
    let result = unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream.handle()) };
    if result == sys::CUresult::CUDA_ERROR_INVALID_VALUE && matches!(from, From::Device) {
        // Within a device the call "may fail for pitches not computed by cuMemAllocPitch()".
        let (from, to) = ((source, source_pitch), (destination, destination_pitch));
        // SAFETY: the caller's contract.
        return unsafe { copy_each_row(stream, from, to, (width, rows)) };
    }
    stream.device().check(result, "cuMemcpy2DAsync")
}

/// [`copy_rows`] within a device, row by row.
///
/// # Safety
///
/// As for [`copy_rows`].
unsafe fn copy_each_row(
    stream: &Stream,
    (source, source_pitch): (u64, u64),
    (destination, destination_pitch): (u64, u64),
    (width, rows): (u64, u64),
) -> Result<()> {
    const AT_ONCE: u64 = 4096;
    let mut first = 0;
    while first < rows {
        let part = first..rows.min(first + AT_ONCE);
        first = part.end;
        let row =
            |row: u64| (source + row * source_pitch, destination + row * destination_pitch, width);
        // SAFETY: the caller's contract for each row.
        unsafe { copy_within(stream, 0, &part.map(row).collect::<Vec<Run>>())? };
    }
    Ok(())
}

/// Queues plain copies within a device, by one call if they are many and the driver can. Sources count from
/// `base`.
///
/// # Safety
///
/// The device's context is current. Both sides are allocated, and stay until the stream's work has run.
pub(crate) unsafe fn copy_within(stream: &Stream, base: u64, runs: &[Run]) -> Result<()> {
    let device = stream.device();
    if runs.len() >= BATCH_FROM {
        // SAFETY: the caller's contract for each copy.
        let done = unsafe { copy_batch(base, runs, stream.handle(), device.ordinal())? };
        if done {
            return Ok(());
        }
    }
    for &(source, destination, len) in runs {
        // SAFETY: the caller's contract.
        let result = unsafe {
            sys::cuMemcpyDtoDAsync_v2(destination, base + source, len as usize, stream.handle())
        };
        device.check(result, "cuMemcpyDtoDAsync")?;
    }
    Ok(())
}

/// Queues the operations of a block whose `len` bytes are on the device already, at `base`.
///
/// # Safety
///
/// The bytes stay until the stream's work has run, and may be read a little around (see
/// [`crate::cuda::kernel`]); for destinations as for [`Pipeline::submit`], for `table` and `tables` as for
/// [`launch_jobs`].
pub(crate) unsafe fn enqueue_on_device(
    stream: &Stream,
    (base, len): (u64, u64),
    table: u64,
    tables: &mut Option<Tables>,
    ops: &[CopyOp],
) -> Result<()> {
    check_ranges(ops, len)?;
    let _current = stream.device().make_current()?;
    let mut runs = joined(ops);
    let mut jobs = transforms(ops);
    let packs = |many: bool| many && stream.device().prepare(Kernel::GatherBatch).is_ok();
    if packs(many_small(&runs)) {
        jobs.extend(pack(&mut runs));
    }
    let sliced = packs(many_slices(ops));
    if sliced {
        jobs.extend(ops.iter().filter_map(small_slice));
    }
    // SAFETY: the caller's contract, ranges checked.
    unsafe { copy_within(stream, base, &runs)? };
    for op in ops {
        if let CopyOp::Strided { source, source_pitch, destination, destination_pitch, width, rows } =
            *op
            && !(sliced && small_slice(op).is_some())
        {
            let (from, to) = ((base + source, source_pitch), (destination, destination_pitch));
            // SAFETY: as above.
            unsafe { copy_rows(stream, From::Device, from, to, (width, rows))? };
        }
    }
    let placed =
        jobs.iter().map(|job| (job.kernel, StridedJob { src: base + job.start, ..job.job }));
    // SAFETY: as above.
    unsafe { launch_jobs(stream, table, tables, placed) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(source: u64, destination: u64, len: u64) -> CopyOp {
        CopyOp::Linear { source, destination, len }
    }

    #[test]
    fn neighbours_join_only_when_both_sides_continue() {
        let ops = [
            linear(0, 1000, 10),
            linear(10, 1010, 0),
            linear(10, 1010, 6),
            linear(16, 1100, 4),
            linear(21, 1104, 4),
        ];
        assert_eq!(joined(&ops), [(0, 1000, 16), (16, 1100, 4), (21, 1104, 4)]);
    }

    #[test]
    fn ranges_outside_the_source_are_refused() {
        assert!(check_ranges(&[linear(6, 0, 4)], 10).is_ok());
        assert!(check_ranges(&[linear(7, 0, 4)], 10).is_err());
        assert!(check_ranges(&[linear(u64::MAX, 0, 4)], 10).is_err());
        let rows = |source, source_pitch, width, rows| CopyOp::Strided {
            source,
            source_pitch,
            destination: 0,
            destination_pitch: 8,
            width,
            rows,
        };
        assert!(check_ranges(&[rows(2, 4, 4, 2)], 10).is_ok());
        assert!(check_ranges(&[rows(3, 4, 4, 2)], 10).is_err());
        assert!(check_ranges(&[rows(0, 2, 4, 2)], 10).is_err());
        assert!(check_ranges(&[rows(0, 4, 4, u64::MAX)], 10).is_err());
        assert!(check_ranges(&[rows(9, 4, 4, 0)], 10).is_ok());
    }
}
