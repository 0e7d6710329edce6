//! Launch sizes that keep a device's memory busy.

use crate::cast::CastType;

/// Threads of a block, for every kernel. They are compiled for at most this many.
pub const BLOCK_THREADS: u32 = 256;

/// Bytes (on the wider side) that suit one block of a batch: see [`super::StridedJob::pieces`].
pub const PIECE_BYTES: u64 = 64 << 10;

/// Grids are not larger than this many blocks a multiprocessor: more only start and end.
const BLOCKS_PER_PROCESSOR: u64 = 32;

/// The size of a launch, in blocks and in threads of a block. No dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
}

impl Launch {
    /// For one gather of `bytes` in total, on a device of `processors` multiprocessors.
    pub fn gather(bytes: u64, processors: u32) -> Self {
        Self::blocks(bytes.div_ceil(u64::from(BLOCK_THREADS) * 2 * 16), processors)
    }

    /// For one cast of `elements` in total.
    pub fn cast(elements: u64, from: CastType, to: CastType, processors: u32) -> Self {
        // Vectors and loads in flight as kernels/strided.cuh has them.
        let larger = from.size().max(to.size()) as u64;
        let smaller = from.size().min(to.size()) as u64;
        let vector = (16 / larger).max(4 / smaller);
        let unroll = if vector * (from.size() as u64) < 16 { 4 } else { 2 };
        let per_block = u64::from(BLOCK_THREADS) * unroll * vector;
        Self::blocks(elements.div_ceil(per_block), processors)
    }

    /// For a batch of `jobs` (gathers, casts or checksums).
    pub fn batch(jobs: u64, processors: u32) -> Self {
        Self::blocks(jobs, processors)
    }

    fn blocks(wanted: u64, processors: u32) -> Self {
        let most = BLOCKS_PER_PROCESSOR * u64::from(processors.max(1));
        let blocks = u32::try_from(wanted.clamp(1, most)).unwrap_or(u32::MAX);
        Self { grid: [blocks, 1, 1], block: [BLOCK_THREADS, 1, 1] }
    }
}
