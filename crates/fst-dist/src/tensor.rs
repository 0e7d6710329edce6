//! What the planner needs to know of a tensor: its name, shape, element width and place on disk.

use std::ops::Range;

/// A tensor of a checkpoint, as the planner sees it.
///
/// It is neutral of file formats: any table of (name, shape, bits, file, byte range) can be planned,
/// with or without files behind it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorDesc {
    /// The name, unique in the checkpoint.
    pub name: String,
    /// Bits of one element (4 and 6 for the sub-byte dtypes).
    pub bits: u32,
    /// The shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// Which file of the checkpoint holds the data: an index into its list of files.
    pub shard: u32,
    /// Absolute byte range of the data in that file.
    pub file_range: Range<u64>,
}

impl From<&fst_format::TensorInfo> for TensorDesc {
    fn from(tensor: &fst_format::TensorInfo) -> Self {
        Self {
            name: tensor.name().to_owned(),
            bits: tensor.dtype().bits(),
            shape: tensor.shape().iter().map(|&extent| extent as u64).collect(),
            shard: tensor.shard() as u32,
            file_range: tensor.file_range(),
        }
    }
}

impl TensorDesc {
    /// The tensors of a checkpoint, in its order.
    #[must_use]
    pub fn table(checkpoint: &fst_format::Checkpoint) -> Vec<Self> {
        checkpoint.tensors().iter().map(Self::from).collect()
    }

    /// Bytes of the data.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.file_range.end.saturating_sub(self.file_range.start)
    }

    /// Bytes that shape and element width ask for; `None` when the product overflows or ends within
    /// a byte.
    #[must_use]
    pub fn shape_bytes(&self) -> Option<u64> {
        let mut bits = u64::from(self.bits);
        for &extent in &self.shape {
            bits = bits.checked_mul(extent)?;
        }
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// A run of equally long, equally spaced pieces, copied from a tensor as it lies on disk into the
/// tensor that a rank keeps. Offsets count bytes from the start of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Offset of the first piece in the tensor on disk.
    pub src: u64,
    /// Offset of the first piece in the kept tensor.
    pub dst: u64,
    /// Bytes of one piece.
    pub len: u64,
    /// How many pieces.
    pub count: u64,
    /// From the start of one piece to the start of the next, on disk.
    pub src_stride: u64,
    /// The same in the kept tensor.
    pub dst_stride: u64,
}

impl Strided {
    /// Bytes moved in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len * self.count
    }

    /// Bytes on disk from the first piece's start to the last one's end.
    #[must_use]
    pub fn src_span(&self) -> u64 {
        match self.count {
            0 => 0,
            n => (n - 1) * self.src_stride + self.len,
        }
    }

    /// The pieces merged into one where both sides are contiguous.
    fn merged(self) -> Self {
        if self.count > 1 && self.src_stride == self.len && self.dst_stride == self.len {
            let len = self.len * self.count;
            return Self { len, count: 1, src_stride: len, dst_stride: len, ..self };
        }
        self
    }
}

/// One cut of every row: bytes `src..src + len` of a row on disk go to `dst` in the kept row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) dst: u64,
}

/// How a rank's part of one tensor lies on disk and in the tensor that it keeps.
///
/// A tensor is `rows` rows of `src_row` bytes; of each row the cuts are kept, and a kept row is
/// `dst_row` bytes. Where several tensors are fused into one, their cuts share kept rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub(crate) rows: u64,
    pub(crate) src_row: u64,
    pub(crate) dst_row: u64,
    pub(crate) cuts: Vec<Cut>,
}

impl Geometry {
    /// Bytes that are kept of the whole tensor.
    #[must_use]
    pub fn kept(&self) -> u64 {
        self.rows * self.cuts.iter().map(|cut| cut.len).sum::<u64>()
    }

    /// Bytes that are kept of the tensor's first `pos` bytes.
    fn kept_before(&self, pos: u64) -> u64 {
        if self.src_row == 0 {
            return 0;
        }
        let (row, within) = (pos / self.src_row, pos % self.src_row);
        self.cuts
            .iter()
            .map(|cut| row * cut.len + within.saturating_sub(cut.src).min(cut.len))
            .sum()
    }

    /// Bytes that are kept of a byte range of the tensor on disk.
    #[must_use]
    pub fn kept_in(&self, range: &Range<u64>) -> u64 {
        self.kept_before(range.end) - self.kept_before(range.start)
    }

    /// The copies that move what is kept of `range` (bytes of the tensor on disk), cut by cut and
    /// upwards within a cut. Sender and receiver of a message both count through this order.
    pub fn copies(&self, range: &Range<u64>, mut f: impl FnMut(Strided)) {
        if self.src_row == 0 || range.start >= range.end {
            return;
        }
        let row = self.src_row;
        for cut in self.cuts.iter().filter(|cut| cut.len > 0) {
            // The part of row `r` that lies both in the cut and in the range.
            let part = |r: u64| {
                let (lo, hi) = (r * row + cut.src, r * row + cut.src + cut.len);
                let (start, end) = (lo.max(range.start), hi.min(range.end));
                (start < end).then(|| Strided {
                    src: start,
                    dst: r * self.dst_row + cut.dst + (start - lo),
                    len: end - start,
                    count: 1,
                    src_stride: row,
                    dst_stride: self.dst_row,
                })
            };
            let (first, last) = (range.start / row, (range.end - 1) / row);
            let is_whole = |piece: &Option<Strided>| piece.is_some_and(|p| p.len == cut.len);
            let (head, tail) = (part(first), part(last));
            // Rows that hold the whole cut travel as one strided copy.
            let start = if is_whole(&head) { first } else { first + 1 };
            let end = if is_whole(&tail) { last + 1 } else { last };
            if !is_whole(&head)
                && let Some(piece) = head
            {
                f(piece);
            }
            if start < end
                && let Some(piece) = part(start)
            {
                f(Strided { count: end - start, ..piece }.merged());
            }
            if last != first
                && !is_whole(&tail)
                && let Some(piece) = tail
            {
                f(piece);
            }
        }
    }
}
