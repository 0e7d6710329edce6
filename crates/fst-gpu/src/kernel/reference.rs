//! What the kernels do, on slices: slow, obvious, and the oracle of their tests.

use crate::cast::{CastError, CastType, cast};

/// Why strided rows do not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StridedError {
    /// The rows reach past the end of the source.
    #[error(
        "{rows} rows of {row_bytes} bytes, {src_pitch} bytes apart, exceed a source of {found}"
    )]
    SourceBounds {
        /// Number of rows.
        rows: usize,
        /// Bytes of a row.
        row_bytes: usize,
        /// Bytes from row to row.
        src_pitch: usize,
        /// Bytes of the source.
        found: usize,
    },
    /// The destination is not exactly as long as all rows.
    #[error("destination of {found} bytes, expected {expected}")]
    DestinationLength {
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The rows cannot be cast.
    #[error(transparent)]
    Cast(#[from] CastError),
}

/// Rows of a source: their number, elements in each, and bytes from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Number of rows.
    pub rows: usize,
    /// Elements in a row; bytes for a gather.
    pub cols: usize,
    /// Bytes from the start of a row to the start of the next.
    pub src_pitch: usize,
}

/// Copies strided rows of bytes into a dense destination.
///
/// # Errors
/// The rows do not fit the source or the destination.
pub fn gather(src: &[u8], dst: &mut [u8], rows: Rows) -> Result<(), StridedError> {
    each_row(src, 1, dst, 1, rows, |from, to| {
        to.copy_from_slice(from);
        Ok(())
    })
}

/// Casts strided rows into a dense destination.
///
/// # Errors
/// The rows do not fit the source or the destination, or the pair is not supported.
pub fn gather_cast(
    src: &[u8],
    from: CastType,
    dst: &mut [u8],
    to: CastType,
    rows: Rows,
) -> Result<(), StridedError> {
    each_row(src, from.size(), dst, to.size(), rows, |src, dst| cast(src, from, dst, to))
}

fn each_row(
    src: &[u8],
    from_size: usize,
    dst: &mut [u8],
    to_size: usize,
    Rows { rows, cols, src_pitch }: Rows,
    mut each: impl FnMut(&[u8], &mut [u8]) -> Result<(), CastError>,
) -> Result<(), StridedError> {
    let row_bytes = cols.saturating_mul(from_size);
    let dst_row_bytes = cols.saturating_mul(to_size);
    let expected = dst_row_bytes.saturating_mul(rows);
    if dst.len() != expected {
        return Err(StridedError::DestinationLength { expected, found: dst.len() });
    }
    for row in 0..rows {
        let start = row.checked_mul(src_pitch);
        let from = start
            .and_then(|start| src.get(start..start.checked_add(row_bytes)?))
            .ok_or(StridedError::SourceBounds { rows, row_bytes, src_pitch, found: src.len() })?;
        each(from, &mut dst[row * dst_row_bytes..][..dst_row_bytes])?;
    }
    Ok(())
}

/// The two sums that [`super::Kernel::Checksum`] makes of a buffer.
pub fn checksum(bytes: &[u8]) -> [u64; 2] {
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
