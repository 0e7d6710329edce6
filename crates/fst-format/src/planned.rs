//! A tensor as it would be loaded.

use std::ops::Range;
use std::sync::Arc;

use crate::{Dtype, Runs, Slice, TensorInfo};

/// A tensor that a [`Selection`](crate::Selection) selects: what of it is loaded, as what. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Planned {
    pub(crate) source: TensorInfo,
    /// The name of the loaded tensor, if it is another.
    pub(crate) name: Option<Arc<str>>,
    /// The part of it to load; all of it if `None`.
    pub(crate) slice: Option<Slice>,
    pub(crate) dtype: Dtype,
    /// The device asked for, by its name.
    pub(crate) device: Option<Arc<str>>,
}

impl Planned {
    /// Its name once it is loaded.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.source.name())
    }

    /// The name that it is given, if it is not that in the checkpoint.
    #[must_use]
    pub fn new_name(&self) -> Option<&Arc<str>> {
        self.name.as_ref()
    }

    /// The tensor of the checkpoint: its name there, its file, its place in it.
    #[must_use]
    pub fn source(&self) -> &TensorInfo {
        &self.source
    }

    /// The part of the tensor that is loaded, unless it is all of it.
    #[must_use]
    pub fn slice(&self) -> Option<&Slice> {
        self.slice.as_ref()
    }

    /// Dimensions as loaded, outermost first.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.slice.as_ref().map_or_else(|| self.source.shape(), |slice| slice.shape())
    }

    /// Type of the loaded elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The [device](crate::Request::device) that it is to go to, if its request names one.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// The type that elements are converted from, and the one that they are converted to, if these differ.
    #[must_use]
    pub fn conversion(&self) -> Option<(Dtype, Dtype)> {
        Some((self.source.dtype(), self.dtype)).filter(|(from, to)| from != to)
    }

    /// Its name in the checkpoint, and type and shape as loaded: what a [manifest](crate::Manifest::check)
    /// is compared with.
    #[must_use]
    pub fn as_loaded(&self) -> (&str, Dtype, &[usize]) {
        (self.source.name(), self.dtype, self.shape())
    }

    /// The runs of the tensor's bytes that are wanted, from its start, in the order of the loaded bytes.
    pub fn runs(&self) -> impl Iterator<Item = Runs> + '_ {
        let whole = match self.slice {
            None => Some(Runs::one(self.source.byte_len())).filter(|runs| runs.len > 0),
            Some(_) => None,
        };
        whole.into_iter().chain(self.slice.iter().flat_map(|slice| slice.runs()).copied())
    }

    /// The range of the file that it is, if it is one and is not empty.
    #[must_use]
    pub fn contiguous(&self) -> Option<Range<u64>> {
        let mut runs = self.runs();
        let Runs { first, len, count: 1, .. } = runs.next()? else { return None };
        let start = self.source.file_range().start + first;
        runs.next().is_none().then_some(start..start + len)
    }

    /// Bytes wanted from the file.
    #[must_use]
    pub fn source_len(&self) -> u64 {
        self.runs().map(|runs| runs.byte_len()).sum()
    }

    /// Bytes as loaded.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        let bytes = self.source_len();
        self.conversion().map_or(bytes, |(from, to)| {
            let elements = u128::from(bytes) * 8 / u128::from(from.bits());
            u64::try_from(elements * u128::from(to.bits()) / 8).unwrap_or(u64::MAX)
        })
    }

    /// The same bytes, in order, in parts of at most `most` bytes of the file, a multiple of the size of
    /// any element; or this as it is, where its bytes are not in the order of the file. At least one; their
    /// shape is that of the whole.
    #[must_use]
    pub fn parts(&self, most: u64) -> Vec<Planned> {
        let mut parts: Vec<(u64, Vec<Runs>)> = Vec::new();
        let mut end = 0;
        for runs in self.runs() {
            if runs.first < end {
                return vec![self.clone()];
            }
            end = runs.end();
            for piece in pieces(runs, most) {
                let bytes = piece.byte_len();
                match parts.last_mut() {
                    Some((used, part)) if *used + bytes <= most => {
                        *used += bytes;
                        part.push(piece);
                    }
                    _ => parts.push((bytes, vec![piece])),
                }
            }
        }
        if parts.len() < 2 {
            return vec![self.clone()];
        }
        let whole = self.slice.clone().unwrap_or_else(|| Slice::whole(&self.source));
        let part = |(_, runs)| Planned { slice: Some(whole.with_runs(runs)), ..self.clone() };
        parts.into_iter().map(part).collect()
    }
}

/// Runs, in pieces of at most `most` bytes: short ones several at a time, long ones cut.
fn pieces(runs: Runs, most: u64) -> impl Iterator<Item = Runs> {
    let at_once = (most / runs.len).max(1);
    let cuts = if at_once > 1 { 1 } else { runs.len.div_ceil(most) };
    (0..runs.count.div_ceil(at_once)).flat_map(move |group| {
        let done = group * at_once;
        let count = at_once.min(runs.count - done);
        (0..cuts).map(move |cut| {
            let (from, to) = match cuts {
                1 => (0, runs.len),
                _ => (cut * most, runs.len.min((cut + 1).saturating_mul(most))),
            };
            let first = runs.first + done * runs.stride + from;
            let stride = if count == 1 { to - from } else { runs.stride };
            Runs { first, len: to - from, stride, count }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoint;

    #[test]
    fn parts_are_the_runs_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let header = r#"{"a":{"dtype":"U8","shape":[7,5,11],"data_offsets":[0,385]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 385]);
        std::fs::write(folder.path().join("a.safetensors"), file).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let source = checkpoint.get("a").unwrap();
        let slices: [&[(usize, Range<usize>)]; 8] = [
            &[],
            &[(0, 1..6)],
            &[(1, 1..4)],
            &[(2, 3..5)],
            &[(1, 2..2)],
            &[(0, 1..4), (1, 1..3), (2, 0..9)],
            &[(2, 0..3), (2, 5..6)],
            &[(0, 3..7), (0, 0..4)],
        ];
        for cuts in slices {
            let slice = (!cuts.is_empty()).then(|| Slice::new(source, cuts.to_vec()).unwrap());
            let source = source.clone();
            let all = Planned { source, name: None, slice, dtype: Dtype::U8, device: None };
            let bytes = |one: &Planned| -> Vec<u64> {
                one.runs().flat_map(|runs| runs.iter()).flatten().collect()
            };
            for most in [1, 8, 32, 64, 1024] {
                let parts = all.parts(most);
                let sorted = bytes(&all).is_sorted();
                let short = parts.iter().all(|part| part.source_len() <= most);
                assert!(!parts.is_empty() && (short || !sorted), "{most} of {cuts:?}");
                let joined: Vec<u64> = parts.iter().flat_map(bytes).collect();
                assert_eq!(joined, bytes(&all), "{most} of {cuts:?}");
            }
        }
    }
}
