//! Where the bytes of tensors come from: a load in the background, or a read of their own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn_core::tensor::{AllocationProperty, BoolStore, Bytes, DType, Shape, TensorData};
use burn_store::bridge;
use burn_store::burn_pack::{Error as PackError, Tensor as PackTensor};
use fst::{Dtype, Loading, Planned, Reader, Request};

use crate::StoreError;

/// What tensors of a checkpoint are read by.
pub(crate) struct Source {
    reader: Reader,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    loading: Option<Loading>,
    /// The first read that failed.
    error: Option<fst::Error>,
}

/// A load in the background, until it is dropped.
pub(crate) struct Reading<'s>(&'s Source);

impl Source {
    pub(crate) fn new(reader: Reader) -> Self {
        Self { reader, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has tensors come from a load, those that it has.
    pub(crate) fn read_ahead(&self, loading: Loading) -> Reading<'_> {
        *self.state() = State { loading: Some(loading), error: None };
        Reading(self)
    }

    /// A tensor. What was taken out of the load before is read again, so that nothing is held for whoever
    /// might ask twice.
    fn read(&self, planned: &Planned) -> fst::Result<fst::Tensor> {
        let loading = self.state().loading.clone().filter(|all| all.contains(planned.name()));
        match loading.map(|loading| loading.take(planned.name())) {
            None | Some(Err(fst::Error::Taken { .. })) => {
                self.reader.tensor(Request::new(planned.source().name()).named(planned.name()))
            }
            Some(taken) => taken,
        }
    }

    /// The bytes of a tensor.
    fn bytes(&self, planned: &Planned) -> Result<Bytes, PackError> {
        let bytes = self.read(planned).and_then(shared);
        bytes.map_err(|error| {
            let text = PackError::IoError(error.to_string());
            self.state().error.get_or_insert(error);
            text
        })
    }
}

impl Reading<'_> {
    /// Ends the load; why it failed, if it did.
    pub(crate) fn end(self) -> Option<fst::Error> {
        self.0.state().error.take()
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // The lock is not held while the reads in flight come to their end.
        let loading = self.0.state().loading.take();
        drop(loading);
    }
}

/// A tensor's own memory as burn's.
fn shared(tensor: fst::Tensor) -> fst::Result<Bytes> {
    let bytes = bytes::Bytes::from_owner(tensor.into_bytes()?);
    Ok(Bytes::from_shared(bytes, AllocationProperty::Native))
}

/// A tensor that is read when its bytes are asked for.
pub(crate) fn tensor(source: &Arc<Source>, planned: Planned) -> Result<PackTensor, StoreError> {
    let dtype = burns(planned.dtype()).ok_or_else(|| StoreError::Dtype {
        tensor: planned.name().to_owned(),
        dtype: planned.dtype(),
    })?;
    let (name, source) = (planned.name().to_owned(), source.clone());
    let shape = Shape::from(planned.shape().to_vec());
    // burn matches parameters by their names, and keeps their own identities.
    Ok(bridge::deferred(name, dtype, shape.clone(), None, move || {
        TensorData::try_from_bytes(source.bytes(&planned)?, shape.clone(), dtype)
            .map_err(|error| PackError::TensorBytesSizeMismatch(error.to_string()))
    }))
}

/// burn's name for a type of element; `None` where it has none.
fn burns(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U64 => DType::U64,
        Dtype::U32 => DType::U32,
        Dtype::U16 => DType::U16,
        Dtype::U8 => DType::U8,
        Dtype::Bool => DType::Bool(BoolStore::Native),
        _ => return None,
    })
}
