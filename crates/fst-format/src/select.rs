//! What to load: names, patterns, slices and dtypes become a list of tensors. Pure.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{
    Checkpoint, Cut, Dtype, Pattern, PatternError, Planned, Request, Slice, SliceError, TensorInfo,
};

type Predicate = Arc<dyn Fn(&TensorInfo) -> bool + Send + Sync>;

/// Says whether elements of the first type can be converted to the second.
pub type Converts<'a> = &'a dyn Fn(Dtype, Dtype) -> bool;

/// Which tensors, which parts of them, as what. Without a word: all, as they are.
///
/// ```no_run
/// use fst_format::{Checkpoint, Request, Selection};
///
/// let checkpoint = Checkpoint::open("model")?;
/// let selection = Selection::new().select("model.layers.{0..3}.*").request(["lm_head.weight"]);
/// for tensor in selection.resolve(&checkpoint, &|_, _| false)? {
///     println!("{} {:?} of {:?}", tensor.name(), tensor.shape(), tensor.source().path());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Default)]
pub struct Selection {
    patterns: Vec<Wanted>,
    predicate: Option<Predicate>,
    slices: HashMap<String, Vec<Cut>>,
    dtype: Option<Dtype>,
    /// `Some` as soon as there was a list of them, be it empty.
    requests: Option<Vec<Request>>,
}

/// A pattern, and whether it may match nothing.
#[derive(Clone, Debug)]
struct Wanted {
    pattern: String,
    optional: bool,
}

/// Why a selection selects nothing of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectError {
    /// There is no tensor of this name.
    #[error("no tensor named {name:?}")]
    UnknownTensor {
        /// The name asked for.
        name: String,
    },
    /// A slice does not fit its tensor.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A slice of a tensor that is not among those to load.
    #[error("tensor {tensor:?} is sliced, but not selected")]
    SliceNotSelected {
        /// The tensor.
        tensor: String,
    },
    /// A pattern makes no sense.
    #[error("malformed pattern {pattern:?}: {source}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it, and where.
        source: PatternError,
    },
    /// A pattern matched no tensor.
    #[error("no tensor matches {pattern:?}")]
    NoMatch {
        /// The pattern.
        pattern: String,
    },
    /// There is no conversion between these types of elements.
    #[error("tensor {tensor:?}: cannot convert {from} to {to}")]
    Cast {
        /// The tensor.
        tensor: String,
        /// Its type in the checkpoint.
        from: Dtype,
        /// The type asked for.
        to: Dtype,
    },
    /// A tensor was requested more than once.
    #[error("tensor {tensor:?} is requested twice")]
    RequestedTwice {
        /// The tensor.
        tensor: String,
    },
    /// Two loaded tensors would have one name.
    #[error("two tensors would be named {name:?}")]
    NamedTwice {
        /// The name.
        name: String,
    },
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

impl Selection {
    /// Every tensor, as it is.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only tensors whose name matches a [`Pattern`]; with several, those that match any. A pattern that
    /// matches nothing is an error.
    #[must_use]
    pub fn select(mut self, pattern: impl Into<String>) -> Self {
        self.patterns.push(Wanted { pattern: pattern.into(), optional: false });
        self
    }

    /// As [`select`](Self::select), for tensors that need not be there.
    #[must_use]
    pub fn select_optional(mut self, pattern: impl Into<String>) -> Self {
        self.patterns.push(Wanted { pattern: pattern.into(), optional: true });
        self
    }

    /// Only tensors that `wanted` says yes to (and a pattern matches, if there are any).
    #[must_use]
    pub fn select_with(
        mut self,
        wanted: impl Fn(&TensorInfo) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.predicate = Some(Arc::new(wanted));
        self
    }

    /// Of tensor `name`, only positions `range` of dimension `dim`, unless a request of it has slices of its
    /// own; several calls for one tensor are as several [of a request](Request::slice).
    #[must_use]
    pub fn slice(mut self, name: impl Into<String>, dim: usize, range: Range<usize>) -> Self {
        self.slices.entry(name.into()).or_default().push((dim, range).into());
        self
    }

    /// Converts tensors of floating-point types to this one, unless a request says another.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Exactly these tensors, each as its request says; with patterns, besides those that the patterns
    /// select. A name is looked up, not searched for. Each tensor may be asked for once, and names of loaded
    /// tensors must differ.
    #[must_use]
    pub fn request<R: Into<Request>>(mut self, requests: impl IntoIterator<Item = R>) -> Self {
        self.requests.get_or_insert_default().extend(requests.into_iter().map(Into::into));
        self
    }

    /// The same, for these tensors only: where all are selected, there is no need to go through all.
    #[must_use]
    pub fn of_names<'n>(mut self, names: impl Iterator<Item = &'n String>) -> Self {
        if self.patterns.is_empty() && self.predicate.is_none() && self.requests.is_none() {
            let names: HashSet<&String> = names.collect();
            self.slices.retain(|name, _| names.contains(name));
            self.requests = Some(names.into_iter().map(Request::new).collect());
        }
        self
    }

    /// The tensors that are selected, in the order of the files.
    ///
    /// # Errors
    ///
    /// Whatever of the selection does not suit the checkpoint.
    pub fn resolve(
        &self,
        checkpoint: &Checkpoint,
        converts: Converts<'_>,
    ) -> Result<Vec<Planned>, SelectError> {
        let requests = self.requests.as_deref().unwrap_or_default();
        let mut planned = Vec::with_capacity(requests.len());
        let mut requested = HashSet::with_capacity(requests.len());
        for request in requests {
            if !requested.insert(&*request.tensor) {
                return Err(SelectError::RequestedTwice { tensor: request.tensor.clone() });
            }
            planned.push(self.resolve_one(checkpoint, request, converts)?);
        }
        let mut unused: HashSet<&str> = self.slices.keys().map(String::as_str).collect();
        unused.retain(|name| !requested.contains(name));
        if self.requests.is_none() || !self.patterns.is_empty() {
            self.search(checkpoint, converts, &mut unused, &requested, &mut planned)?;
        }
        if let Some(name) = unused.into_iter().min() {
            find(checkpoint, name)?;
            return Err(SelectError::SliceNotSelected { tensor: name.to_owned() });
        }
        if self.requests.is_some() {
            // As by reading the checkpoint from its start.
            planned.sort_by_key(|one| (one.source.shard(), one.source.file_range().start));
            let mut names = HashSet::with_capacity(planned.len());
            if let Some(one) = planned.iter().find(|one| !names.insert(one.name())) {
                return Err(SelectError::NamedTwice { name: one.name().to_owned() });
            }
        }
        Ok(planned)
    }

    /// What one request comes to, whatever is selected.
    ///
    /// # Errors
    ///
    /// Whatever of it does not suit the checkpoint.
    pub fn resolve_one(
        &self,
        checkpoint: &Checkpoint,
        request: &Request,
        converts: Converts<'_>,
    ) -> Result<Planned, SelectError> {
        let source = find(checkpoint, &request.tensor)?;
        let cuts = match &request.cuts[..] {
            [] => self.cuts_of(source.name()),
            own => own,
        };
        let dtype = request.dtype.or(self.dtype);
        let planned = plan(source, cuts, dtype, converts)?;
        let name = request.name.as_deref().map(Into::into);
        Ok(Planned { name, device: request.device.clone(), ..planned })
    }

    /// Adds what patterns and the predicate select, less what is `requested`; what is sliced is no longer
    /// `unused`.
    fn search(
        &self,
        checkpoint: &Checkpoint,
        converts: Converts<'_>,
        unused: &mut HashSet<&str>,
        requested: &HashSet<&str>,
        planned: &mut Vec<Planned>,
    ) -> Result<(), SelectError> {
        let parse = |Wanted { pattern, .. }: &Wanted| {
            let parsed = pattern.parse::<Pattern>();
            parsed.map_err(|source| SelectError::Pattern { pattern: pattern.clone(), source })
        };
        let patterns: Vec<Pattern> = self.patterns.iter().map(parse).collect::<Result<_, _>>()?;
        let mut matched: Vec<bool> = self.patterns.iter().map(|wanted| wanted.optional).collect();
        for source in checkpoint.tensors() {
            let mut wanted = patterns.is_empty();
            for (pattern, matched) in patterns.iter().zip(&mut matched) {
                if pattern.matches(source.name()) {
                    (wanted, *matched) = (true, true);
                }
            }
            let wanted = wanted && self.predicate.as_ref().is_none_or(|wants| wants(source));
            if wanted && (requested.is_empty() || !requested.contains(source.name())) {
                unused.remove(source.name());
                planned.push(plan(source, self.cuts_of(source.name()), self.dtype, converts)?);
            }
        }
        match matched.iter().position(|matched| !matched) {
            Some(unused) => {
                Err(SelectError::NoMatch { pattern: self.patterns[unused].pattern.clone() })
            }
            None => Ok(()),
        }
    }

    fn cuts_of(&self, name: &str) -> &[Cut] {
        if self.slices.is_empty() {
            return &[];
        }
        self.slices.get(name).map_or(&[], |cuts| cuts)
    }
}

fn find<'c>(checkpoint: &'c Checkpoint, name: &str) -> Result<&'c TensorInfo, SelectError> {
    checkpoint.get(name).ok_or_else(|| SelectError::UnknownTensor { name: name.to_owned() })
}

/// A tensor, cut, and as elements of type `to` if it is of a floating-point type.
fn plan(
    source: &TensorInfo,
    cuts: &[Cut],
    to: Option<Dtype>,
    converts: Converts<'_>,
) -> Result<Planned, SelectError> {
    let slice = (!cuts.is_empty()).then(|| Slice::new(source, cuts.iter().cloned())).transpose()?;
    let from = source.dtype();
    let dtype = to.filter(|to| *to != from && from.is_float()).unwrap_or(from);
    if dtype != from && !converts(from, dtype) {
        return Err(SelectError::Cast { tensor: source.name().to_owned(), from, to: dtype });
    }
    Ok(Planned { source: source.clone(), name: None, slice, dtype, device: None })
}
