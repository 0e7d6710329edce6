//! From operations to driver calls: ranges are checked, neighbours joined, small copies sent many
//! to a call, and bytes for kernels taken through scratch memory on the device.

use super::{Lane, LaneState, Pipeline};
use crate::buffer::device::{DEVICE_ALIGN, DeviceArena};
use crate::error::{Error, Result};
use crate::stream::Stream;
use cudarc::driver::sys;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// From this many copies in a submission on, one call carries them all, if the driver can.
const BATCH_FROM: usize = 4;

/// Work on the device that reads bytes which the pipeline brought there, such as a cast kernel.
pub trait DeviceWork: Sync {
    /// Queues the work on `stream`. The bytes are at `source`, 256-byte aligned, and stay until
    /// the work queued here has run.
    ///
    /// # Safety
    ///
    /// `source` holds the number of bytes that the operation named, and the device's context is
    /// current. Work goes to `stream` only.
    unsafe fn launch(&self, stream: &Stream, source: u64) -> Result<()>;
}

/// One operation on the bytes of a block.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum CopyOp<'a> {
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
    /// A run of bytes that a kernel reads from scratch memory.
    Kernel {
        /// First byte in the block.
        source: u64,
        /// Bytes.
        len: u64,
        /// What to do with them.
        work: &'a dyn DeviceWork,
    },
}

impl fmt::Debug for CopyOp<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear { source, destination, len } => {
                write!(f, "Linear({source} -> {destination:#x}, {len})")
            }
            Self::Strided { source, destination, width, rows, .. } => {
                write!(f, "Strided({source} -> {destination:#x}, {rows} x {width})")
            }
            Self::Kernel { source, len, .. } => write!(f, "Kernel({source}, {len})"),
        }
    }
}

/// The bytes of the source that an operation reads, or `None` where the sum overflows.
fn source_range(op: &CopyOp<'_>) -> Option<(u64, u64)> {
    let (start, len) = match *op {
        CopyOp::Linear { source, len, .. } | CopyOp::Kernel { source, len, .. } => (source, len),
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
pub(super) fn check_ranges(ops: &[CopyOp<'_>], len: u64) -> Result<()> {
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

/// A plain copy: offset in the source, device address, bytes.
type Run = (u64, u64, u64);

/// Joins linear copies that continue each other on both sides.
fn joined(ops: &[CopyOp<'_>]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for op in ops {
        let CopyOp::Linear { source, destination, len } = *op else {
            continue;
        };
        match runs.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.0 + last.2 == source && last.1 + last.2 == destination => {
                last.2 += len;
            }
            _ => runs.push((source, destination, len)),
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
        ops: &[CopyOp<'_>],
    ) -> Result<()> {
        let base = start.as_ptr() as u64;
        let runs = joined(ops);
        self.counters.copies.fetch_add(ops.len() as u64, Ordering::Relaxed);
        // SAFETY: the caller's contract, passed on to each copy.
        unsafe { self.enqueue_runs(lane, base, &runs)? };
        let mut scratch_used = 0;
        for op in ops {
            // SAFETY: as above.
            unsafe {
                match *op {
                    CopyOp::Linear { .. } => {}
                    CopyOp::Strided {
                        source,
                        source_pitch,
                        destination,
                        destination_pitch,
                        width,
                        rows,
                    } => self.enqueue_rows(
                        lane,
                        (base + source, source_pitch),
                        (destination, destination_pitch),
                        (width, rows),
                    )?,
                    CopyOp::Kernel { source, len, work } => {
                        let to = self.scratch(state, &mut scratch_used, len)?;
                        self.enqueue_runs(lane, base, &[(source, to, len)])?;
                        work.launch(&lane.stream, to)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A place in the lane's scratch memory. Reuse is safe without waiting: what is there is read
    /// by work queued earlier on the same stream that will write it.
    fn scratch(&self, state: &mut LaneState, used: &mut u64, len: u64) -> Result<u64> {
        let least = self.block_bytes() as u64;
        if state.scratch.as_ref().is_none_or(|s| s.len() < len) {
            // Freeing a smaller one waits for the device by itself; it happens only when a mapped
            // range is longer than a block.
            if state.scratch.is_some() {
                self.device.synchronize()?;
            }
            state.scratch = Some(DeviceArena::new(&self.device, len.max(least))?);
            *used = 0;
        }
        let Some(scratch) = &state.scratch else {
            return Ok(0);
        };
        if *used + len > scratch.len() {
            *used = 0;
        }
        let address = scratch.range(*used, len)?;
        *used = (*used + len).next_multiple_of(DEVICE_ALIGN);
        Ok(address)
    }

    /// # Safety
    ///
    /// As for [`Pipeline::enqueue`].
    unsafe fn enqueue_runs(&self, lane: &Lane, base: u64, runs: &[Run]) -> Result<()> {
        let bytes: u64 = runs.iter().map(|r| r.2).sum();
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        if runs.len() >= BATCH_FROM && !self.no_batch.load(Ordering::Relaxed) {
            let mut destinations: Vec<u64> = runs.iter().map(|r| r.1).collect();
            let mut sources: Vec<u64> = runs.iter().map(|r| base + r.0).collect();
            let mut sizes: Vec<usize> = runs.iter().map(|r| r.2 as usize).collect();
            // SAFETY: the caller's contract for each copy; the arrays have one length above 0.
            let done = unsafe {
                crate::sys::copy_batch(
                    &mut destinations,
                    &mut sources,
                    &mut sizes,
                    lane.stream.handle(),
                    self.device.ordinal(),
                )?
            };
            if done {
                self.counters.copy_calls.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            self.no_batch.store(true, Ordering::Relaxed);
        }
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
            self.device.check(result, "cuMemcpyHtoDAsync")?;
            self.counters.copy_calls.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`Pipeline::enqueue`].
    unsafe fn enqueue_rows(
        &self,
        lane: &Lane,
        (source, source_pitch): (u64, u64),
        (destination, destination_pitch): (u64, u64),
        (width, rows): (u64, u64),
    ) -> Result<()> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        self.counters.bytes.fetch_add(width * rows, Ordering::Relaxed);
        self.counters.copy_calls.fetch_add(1, Ordering::Relaxed);
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: source as *const _,
            srcDevice: 0,
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
        let result = unsafe { sys::cuMemcpy2DAsync_v2(&copy, lane.stream.handle()) };
        self.device.check(result, "cuMemcpy2DAsync")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(source: u64, destination: u64, len: u64) -> CopyOp<'static> {
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
