//! What kernels are to do: plain data of the layout that `kernels/*.cu` reads.

use std::ffi::c_void;

use bytemuck::{Pod, Zeroable};

/// Rows of a strided source into a dense destination. Layout of `Job` in `kernels/strided.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct StridedJob {
    /// Address of the first source element, any alignment.
    pub src: u64,
    /// Address of the first destination element.
    pub dst: u64,
    /// Number of rows.
    pub rows: u64,
    /// Elements in a row; bytes for a gather.
    pub cols: u64,
    /// Bytes from the start of a source row to the start of the next; of no matter for one row.
    pub src_pitch: u64,
}

impl StridedJob {
    /// Consecutive elements (bytes for a gather).
    pub const fn dense(src: u64, dst: u64, elements: u64) -> Self {
        Self { src, dst, rows: 1, cols: elements, src_pitch: 0 }
    }

    /// The parameters of a launch of [`super::Kernel::Gather`] or [`super::Kernel::Cast`], as
    /// `cuLaunchKernel` takes them: addresses of the five fields, which it reads during the call.
    pub fn params(&mut self) -> [*mut c_void; 5] {
        [
            (&raw mut self.src).cast(),
            (&raw mut self.dst).cast(),
            (&raw mut self.rows).cast(),
            (&raw mut self.cols).cast(),
            (&raw mut self.src_pitch).cast(),
        ]
    }

    /// Cuts the job into pieces of about `bytes` on the wider side and gives them to `each`, in the
    /// order of the destination, so that a batch's blocks have similar work. `from` and `to` are the
    /// bytes of a source and of a destination element (1 and 1 for a gather).
    pub fn pieces(self, from: u64, to: u64, bytes: u64, mut each: impl FnMut(Self)) {
        let mut job = self;
        if job.rows == 0 || job.cols == 0 {
            return;
        }
        if job.rows > 1 && job.src_pitch == job.cols * from {
            job = Self::dense(job.src, job.dst, job.rows * job.cols);
        }
        // Whole vectors, so that pieces keep the alignment that the job has.
        let limit = (bytes / from.max(to)).next_multiple_of(64).max(64);
        if job.rows == 1 || job.cols > limit {
            for row in 0..job.rows {
                let src = job.src + row * job.src_pitch;
                let dst = job.dst + row * job.cols * to;
                let mut first = 0;
                while first < job.cols {
                    let elements = limit.min(job.cols - first);
                    each(Self::dense(src + first * from, dst + first * to, elements));
                    first += elements;
                }
            }
        } else {
            let rows_at_once = limit / job.cols;
            let mut first = 0;
            while first < job.rows {
                let rows = rows_at_once.min(job.rows - first);
                each(Self {
                    src: job.src + first * job.src_pitch,
                    dst: job.dst + first * job.cols * to,
                    rows,
                    ..job
                });
                first += rows;
            }
        }
    }
}

/// A part of a buffer to be summed. Layout of `ChecksumJob` in `kernels/checksum.cu`.
///
/// A buffer is little-endian 64-bit words `w[i]`, the last padded with zeros. A launch adds the sum of
/// all `w[i]` to word `2 * slot` of the sums and the sum of all `w[i] * (2 * i + 1)` to the next,
/// modulo 2^64; the caller zeroes the sums first. The tests have a slow one that gives the same.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ChecksumJob {
    /// Address of the first byte, any alignment.
    pub src: u64,
    /// Length in bytes; whole words but for the last part of a buffer.
    pub bytes: u64,
    /// Which word of the buffer is the first here.
    pub first_word: u64,
    /// Which pair of sums to add to.
    pub slot: u64,
}

impl ChecksumJob {
    /// Cuts a buffer into parts of at most `part` bytes (rounded up to whole words), one for a block
    /// each.
    pub fn parts(src: u64, bytes: u64, slot: u64, part: u64, mut each: impl FnMut(Self)) {
        let part = part.next_multiple_of(16).max(16);
        let mut first = 0;
        while first < bytes {
            let bytes = part.min(bytes - first);
            each(Self { src: src + first, bytes, first_word: first / 8, slot });
            first += bytes;
        }
    }
}
