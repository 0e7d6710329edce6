//! What to load: names, slices and dtypes become a list of items. Pure.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use fst_format::{Checkpoint, Dtype, Runs, Slice, TensorInfo};
use fst_gpu::cast::{self, CastType};

use crate::error::{Error, Result};
use crate::pattern::Pattern;
use crate::request::Request;

type Predicate = Arc<dyn Fn(&TensorInfo) -> bool + Send + Sync>;

/// Which tensors, which parts of them, as what.
#[derive(Clone, Default)]
pub(crate) struct Selection {
    patterns: Vec<String>,
    predicate: Option<Predicate>,
    slices: Vec<(String, usize, Range<usize>)>,
    dtype: Option<Dtype>,
    /// `Some` as soon as there was a list of them, be it empty.
    requests: Option<Vec<Request>>,
}

impl fmt::Debug for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selection")
            .field("patterns", &self.patterns)
            .field("predicate", &self.predicate.is_some())
            .field("slices", &self.slices)
            .field("dtype", &self.dtype)
            .field("requests", &self.requests)
            .finish()
    }
}

/// One tensor to load.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) info: TensorInfo,
    /// The name of the loaded tensor, if it is another.
    pub(crate) name: Option<Arc<str>>,
    /// The part of it to load; all of it if `None`.
    pub(crate) slice: Option<Slice>,
    /// Of these, the runs of bytes to load; all of them if `None`.
    pub(crate) part: Option<Runs>,
    /// Type of the loaded elements.
    pub(crate) dtype: Dtype,
}

impl Item {
    /// Name of the loaded tensor.
    pub(crate) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.info.name())
    }

    /// Dimensions of the loaded tensor.
    pub(crate) fn shape(&self) -> &[usize] {
        self.slice.as_ref().map_or_else(|| self.info.shape(), |slice| slice.shape())
    }

    /// The runs of the tensor's bytes that are wanted, from its start.
    pub(crate) fn runs(&self) -> Runs {
        match (self.part, &self.slice) {
            (Some(part), _) => part,
            (None, Some(slice)) => slice.runs(),
            (None, None) => {
                let len = self.info.byte_len();
                Runs { first: 0, len, stride: len, count: u64::from(len > 0) }
            }
        }
    }

    /// Bytes wanted from the file.
    pub(crate) fn source_len(&self) -> u64 {
        let runs = self.runs();
        runs.len * runs.count
    }

    /// The same bytes, in order, in parts of at most `most` bytes of the file, a multiple of the size of
    /// any element. At least one.
    pub(crate) fn parts(self, most: u64) -> impl Iterator<Item = Item> {
        let runs = self.runs();
        // Short runs go several at a time, and long ones in pieces.
        let at_once = (most / runs.len.max(1)).max(1);
        let pieces = if at_once > 1 { 1 } else { runs.len.div_ceil(most).max(1) };
        let groups = runs.count.div_ceil(at_once).max(1);
        (0..groups).flat_map(move |group| (0..pieces).map(move |piece| (group, piece))).map(
            move |(group, piece)| {
                let done = group * at_once;
                let count = at_once.min(runs.count - done);
                let (from, to) = (piece * most, runs.len.min((piece + 1).saturating_mul(most)));
                let (from, to) = if pieces == 1 { (0, runs.len) } else { (from, to) };
                let first = runs.first + done * runs.stride + from;
                let part = Runs { first, len: to - from, stride: runs.stride, count };
                Item { part: Some(part), ..self.clone() }
            },
        )
    }

    /// How source elements become loaded ones, when they differ.
    pub(crate) fn cast(&self) -> Option<(CastType, CastType)> {
        if self.dtype == self.info.dtype() {
            return None;
        }
        cast_type(self.info.dtype()).zip(cast_type(self.dtype))
    }

    /// Whether elements that are to be converted do not start at multiples of their size in the
    /// file, so that block borders can cut them.
    pub(crate) fn is_torn(&self) -> bool {
        self.cast().is_some_and(|(from, _)| {
            !self.info.file_range().start.is_multiple_of(from.size() as u64)
        })
    }

    /// Bytes of the loaded tensor.
    pub(crate) fn len(&self) -> u64 {
        match self.cast() {
            Some((from, to)) => self.source_len() / from.size() as u64 * to.size() as u64,
            None => self.source_len(),
        }
    }

    /// Alignment of the loaded elements in bytes.
    pub(crate) fn align(&self) -> u64 {
        self.dtype.alignment() as u64
    }

    /// Whether the wanted bytes are one piece of the file that can be used where it lands.
    pub(crate) fn lands_in_place(&self) -> bool {
        let runs = self.runs();
        runs.count <= 1
            && self.dtype == self.info.dtype()
            && (self.info.file_range().start + runs.first).is_multiple_of(self.align())
    }
}

/// The element types that can be converted.
pub(crate) fn cast_type(dtype: Dtype) -> Option<CastType> {
    Some(match dtype {
        Dtype::F64 => CastType::F64,
        Dtype::F32 => CastType::F32,
        Dtype::F16 => CastType::F16,
        Dtype::BF16 => CastType::BF16,
        Dtype::F8E4M3 => CastType::F8E4M3,
        Dtype::F8E5M2 => CastType::F8E5M2,
        Dtype::F8E8M0 => CastType::F8E8M0,
        _ => return None,
    })
}

/// Floating-point types, the ones that a dtype for the whole checkpoint is meant for.
fn is_float(dtype: Dtype) -> bool {
    use Dtype::{
        BF16, F4, F6E2M3, F6E3M2, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0, F16, F32, F64,
    };
    matches!(
        dtype,
        F4 | F6E2M3
            | F6E3M2
            | F8E5M2
            | F8E4M3
            | F8E5M2Fnuz
            | F8E4M3Fnuz
            | F8E8M0
            | F16
            | BF16
            | F32
            | F64
    )
}

impl Selection {
    pub(crate) fn add_pattern(&mut self, pattern: String) {
        self.patterns.push(pattern);
    }

    pub(crate) fn set_predicate(&mut self, predicate: Predicate) {
        self.predicate = Some(predicate);
    }

    pub(crate) fn add_slice(&mut self, name: String, dim: usize, range: Range<usize>) {
        self.slices.push((name, dim, range));
    }

    pub(crate) fn set_dtype(&mut self, dtype: Dtype) {
        self.dtype = Some(dtype);
    }

    pub(crate) fn add_requests(&mut self, requests: impl Iterator<Item = Request>) {
        self.requests.get_or_insert_default().extend(requests);
    }

    /// The same, for these tensors only: where all are selected, there is no need to go through all.
    pub(crate) fn of_names<'n>(mut self, names: impl Iterator<Item = &'n String>) -> Self {
        if self.patterns.is_empty() && self.predicate.is_none() && self.requests.is_none() {
            let names: HashSet<&String> = names.collect();
            self.slices.retain(|(name, ..)| names.contains(name));
            self.requests = Some(names.into_iter().map(Request::new).collect());
        }
        self
    }

    /// The items, in the checkpoint's order.
    pub(crate) fn resolve(&self, checkpoint: &Checkpoint) -> Result<Vec<Item>> {
        let mut slices: HashMap<&str, Slice> = HashMap::with_capacity(self.slices.len());
        for (name, dim, range) in &self.slices {
            let slice = slice(find(checkpoint, name)?, *dim, range)?;
            if slices.insert(name, slice).is_some() {
                return Err(Error::SlicedTwice { tensor: name.clone() });
            }
        }
        let requests = self.requests.as_deref().unwrap_or_default();
        let mut items = Vec::with_capacity(requests.len());
        let mut requested = HashSet::with_capacity(requests.len());
        for request in requests {
            if !requested.insert(&*request.tensor) {
                return Err(Error::RequestedTwice { tensor: request.tensor.clone() });
            }
            let default = slices.remove(&*request.tensor);
            items.push(self.item(checkpoint, request, default)?);
        }
        if self.requests.is_none() || !self.patterns.is_empty() {
            self.select(checkpoint, &mut slices, &requested, &mut items)?;
        }
        if let Some(name) = slices.into_keys().min() {
            return Err(Error::SliceNotSelected { tensor: name.to_owned() });
        }
        if self.requests.is_some() {
            // As by reading the checkpoint from its start.
            items.sort_by_key(|item| (item.info.shard(), item.info.file_range().start));
            let mut names = HashSet::with_capacity(items.len());
            if let Some(item) = items.iter().find(|item| !names.insert(item.name())) {
                return Err(Error::NamedTwice { name: item.name().to_owned() });
            }
        }
        Ok(items)
    }

    /// The item of one request, with this slice unless it says one.
    fn item(
        &self,
        checkpoint: &Checkpoint,
        request: &Request,
        default: Option<Slice>,
    ) -> Result<Item> {
        let info = find(checkpoint, &request.tensor)?;
        let own = request.slice.as_ref();
        let own = own.map(|(dim, range)| slice(info, *dim, range)).transpose()?;
        Ok(Item {
            info: info.clone(),
            name: request.name.as_deref().map(Into::into),
            slice: own.or(default),
            part: None,
            dtype: target_dtype(info, request.dtype.or(self.dtype))?,
        })
    }

    /// The item of one request alone.
    pub(crate) fn item_of(&self, checkpoint: &Checkpoint, request: &Request) -> Result<Item> {
        let default = self.slices.iter().find(|(name, ..)| *name == request.tensor);
        let default = default.filter(|_| request.slice.is_none());
        let default = default
            .map(|(name, dim, range)| slice(find(checkpoint, name)?, *dim, range))
            .transpose()?;
        self.item(checkpoint, request, default)
    }

    /// What this asks for, of one tensor only.
    pub(crate) fn for_one(&self, request: Request) -> Self {
        let (dtype, mut slices) = (self.dtype, self.slices.clone());
        slices.retain(|(name, ..)| *name == request.tensor);
        Self { dtype, slices, requests: Some(vec![request]), ..Self::default() }
    }

    /// Adds what patterns and the predicate select, less what is `requested`.
    fn select(
        &self,
        checkpoint: &Checkpoint,
        slices: &mut HashMap<&str, Slice>,
        requested: &HashSet<&str>,
        items: &mut Vec<Item>,
    ) -> Result<()> {
        let parse = |pattern: &String| {
            pattern
                .parse::<Pattern>()
                .map_err(|source| Error::Pattern { pattern: pattern.clone(), source })
        };
        let patterns: Vec<Pattern> = self.patterns.iter().map(parse).collect::<Result<_>>()?;
        let mut matched = vec![false; patterns.len()];
        items.reserve(checkpoint.tensors().len());
        for info in checkpoint.tensors() {
            let mut wanted = patterns.is_empty();
            for (pattern, matched) in patterns.iter().zip(&mut matched) {
                if pattern.matches(info.name()) {
                    (wanted, *matched) = (true, true);
                }
            }
            let wanted = wanted && self.predicate.as_ref().is_none_or(|wants| wants(info));
            if wanted && (requested.is_empty() || !requested.contains(info.name())) {
                items.push(Item {
                    info: info.clone(),
                    name: None,
                    slice: slices.remove(info.name()),
                    part: None,
                    dtype: target_dtype(info, self.dtype)?,
                });
            }
        }
        match matched.iter().position(|matched| !matched) {
            Some(unused) => Err(Error::NoMatch { pattern: self.patterns[unused].clone() }),
            None => Ok(()),
        }
    }
}

fn find<'c>(checkpoint: &'c Checkpoint, name: &str) -> Result<&'c TensorInfo> {
    checkpoint.get(name).ok_or_else(|| Error::UnknownTensor { name: name.to_owned() })
}

fn slice(info: &TensorInfo, dim: usize, range: &Range<usize>) -> Result<Slice> {
    let slice = info.slice(dim, range.clone());
    slice.map_err(|source| Error::Slice { tensor: info.name().to_owned(), source })
}

/// The type of element that a tensor is loaded as, if `to` is asked for.
fn target_dtype(info: &TensorInfo, to: Option<Dtype>) -> Result<Dtype> {
    let from = info.dtype();
    let Some(to) = to.filter(|to| *to != from && is_float(from)) else { return Ok(from) };
    match (cast_type(from), cast_type(to)) {
        (Some(a), Some(b)) if cast::supported(a, b) => Ok(to),
        _ => Err(Error::Cast { tensor: info.name().to_owned(), from, to }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_runs_in_order() {
        let folder = std::env::temp_dir().join(format!("fst-parts-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let header = r#"{"a":{"dtype":"U8","shape":[7,5,11],"data_offsets":[0,385]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 385]);
        std::fs::write(folder.join("a.safetensors"), file).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let info = checkpoint.get("a").unwrap();
        let slices = [None, Some((0, 1..6)), Some((1, 1..4)), Some((2, 3..5)), Some((1, 2..2))];
        for slice in slices {
            let slice = slice.map(|(dim, range)| info.slice(dim, range).unwrap());
            let item = Item { info: info.clone(), name: None, slice, part: None, dtype: Dtype::U8 };
            let bytes = |item: &Item| -> Vec<u64> {
                let runs = item.runs();
                let starts = (0..runs.count).map(|run| runs.first + run * runs.stride);
                starts.flat_map(|start| start..start + runs.len).collect()
            };
            for most in [1, 8, 32, 64, 1024] {
                let parts: Vec<Item> = item.clone().parts(most).collect();
                assert!(!parts.is_empty() && parts.iter().all(|part| part.source_len() <= most));
                let joined: Vec<u64> = parts.iter().flat_map(bytes).collect();
                assert_eq!(joined, bytes(&item), "{most} of {:?}", item.runs());
            }
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
