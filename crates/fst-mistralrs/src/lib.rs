#![doc = include_str!("../README.md")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use fst::{Dtype, TensorInfo};
use fst_candle::{Repeats, Weights};
use mistralrs_quant::{ShardedSafeTensors, ShardedVarBuilder};
use regex::Regex;

/// Says whether a tensor is there, by its name.
pub type Predicate = Arc<dyn Fn(String) -> bool + Send + Sync + 'static>;

/// A `ShardedVarBuilder` over safetensors files, which are read in the background from now on.
///
/// Tensors whose names match one of `make_dummy_regexes`, or that `predicate` says no to, are not read, and
/// are not there for whoever asks.
///
/// A tensor is handed over, and read again for whoever asks again: in-situ quantisation makes something else of
/// it, and the rest is kept by the model.
///
/// # Errors
///
/// What is wrong with the files, or too little memory.
pub fn sharded<P: AsRef<Path>>(
    paths: &[P],
    dtype: DType,
    device: &Device,
    make_dummy_regexes: Option<Arc<Vec<Regex>>>,
    predicate: Predicate,
) -> Result<ShardedVarBuilder> {
    let weights = Weights::open(paths)?.repeats(Repeats::ReadAgain);
    wrap(weights, dtype, device, make_dummy_regexes, predicate)
}

/// The same over [`Weights`], which say more: a budget, other names, an engine, progress. Which tensors are read
/// ahead is said here.
///
/// # Errors
///
/// As for [`sharded`].
pub fn wrap(
    weights: Weights,
    dtype: DType,
    device: &Device,
    make_dummy_regexes: Option<Arc<Vec<Regex>>>,
    predicate: Predicate,
) -> Result<ShardedVarBuilder> {
    let is_there = move |name: &str| {
        let is_dummy = |regexes: &Arc<Vec<Regex>>| regexes.iter().any(|regex| regex.is_match(name));
        !make_dummy_regexes.as_ref().is_some_and(is_dummy) && predicate(name.to_owned())
    };
    let tensors = weights.checkpoint().tensors().iter();
    let there = tensors.filter(|tensor| is_there(tensor.name()));
    let dtypes: Arc<HashMap<String, Dtype>> =
        Arc::new(there.map(|tensor| (tensor.name().to_owned(), tensor.dtype())).collect());
    let known = dtypes.clone();
    // What would be converted ahead, and is asked for as it is, is read when it is asked for.
    let ahead = move |tensor: &TensorInfo| {
        known.contains_key(tensor.name())
            && !(matches!(
                tensor.dtype(),
                Dtype::F64 | Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E8M0
            ) && given(tensor.dtype(), dtype) != dtype)
    };
    let backend = weights.read_ahead(ahead).backend(dtype, device)?;
    Ok(ShardedSafeTensors::wrap(Box::new(Engine { backend, dtypes }), dtype, device.clone()))
}

/// Gives out what is there, in the types that mistral.rs's own loader gives.
struct Engine {
    backend: Box<dyn SimpleBackend>,
    /// Types of the elements of all tensors that are there.
    dtypes: Arc<HashMap<String, Dtype>>,
}

/// The type that elements of type `found` have for whoever asks for `asked`. mistral.rs converts between three
/// types; all others stay what they are.
fn given(found: Dtype, asked: DType) -> DType {
    match found {
        Dtype::BF16 | Dtype::F16 => asked,
        Dtype::F32 if matches!(asked, DType::BF16 | DType::F16) => asked,
        found => fst_candle::native_dtype(found).unwrap_or(asked),
    }
}

impl Engine {
    fn dtype(&self, name: &str, asked: DType) -> Result<DType> {
        let unknown = || Error::CannotFindTensor { path: name.to_owned() }.bt();
        Ok(given(*self.dtypes.get(name).ok_or_else(unknown)?, asked))
    }
}

impl SimpleBackend for Engine {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.backend.get(s, name, h, self.dtype(name, dtype)?, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.backend.get_unchecked(name, self.dtype(name, dtype)?, dev)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.dtypes.contains_key(name)
    }
}
