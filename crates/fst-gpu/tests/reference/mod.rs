//! What the kernels do, on slices: slow, obvious, and the oracle of their tests.

use fst_gpu::cast::{CastType, cast};

/// Rows of a source: their number, elements in each, and bytes from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Number of rows.
    pub(crate) rows: usize,
    /// Elements in a row; bytes for a gather.
    pub(crate) cols: usize,
    /// Bytes from the start of a row to the start of the next.
    pub(crate) src_pitch: usize,
}

/// Copies strided rows of bytes into a dense destination.
pub(crate) fn gather(src: &[u8], dst: &mut [u8], rows: Rows) {
    each_row(src, 1, dst, 1, rows, |from, to| to.copy_from_slice(from));
}

/// Casts strided rows into a dense destination.
pub(crate) fn gather_cast(src: &[u8], from: CastType, dst: &mut [u8], to: CastType, rows: Rows) {
    each_row(src, from.size(), dst, to.size(), rows, |src, dst| cast(src, from, dst, to).unwrap());
}

fn each_row(
    src: &[u8],
    from_size: usize,
    dst: &mut [u8],
    to_size: usize,
    Rows { rows, cols, src_pitch }: Rows,
    mut each: impl FnMut(&[u8], &mut [u8]),
) {
    assert_eq!(dst.len(), cols * to_size * rows);
    for (row, to) in dst.chunks_mut((cols * to_size).max(1)).enumerate() {
        each(&src[row * src_pitch..][..cols * from_size], to);
    }
}

/// The two sums that `Kernel::Checksum` makes of a buffer.
pub(crate) fn checksum(bytes: &[u8]) -> [u64; 2] {
    let mut sums = [0u64; 2];
    for (index, chunk) in (0u64..).zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let word = u64::from_le_bytes(word);
        sums[0] = sums[0].wrapping_add(word);
        sums[1] = sums[1].wrapping_add(word.wrapping_mul(2 * index + 1));
    }
    sums
}
