//! Reads of single tensors, and of parts of them: what `safe_open` is made of.

use std::num::NonZeroUsize;
use std::os::fd::RawFd;

use fst::{CancelToken, Destination, Engine, Error, Loader, Reader, Request, TensorInfo};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::checkpoint::{Source, paths_of};
use crate::errors;
use crate::frameworks::{Framework, Place};
use crate::load::{self, fill, load_all};
use crate::spec::{Memory, host_memory};
use crate::wait::{Attention, loaded};

/// Up to this many bytes are read into memory that the framework allocates, by the thread that asks.
const SMALL: u64 = 1 << 20;

/// An open checkpoint, and how its tensors are handed out.
#[pyclass(frozen, module = "fst._fst")]
pub(crate) struct Session {
    source: Source,
    reader: Reader,
    engine: Engine,
    framework: Framework,
    place: Place,
}

/// A dimension, the first position of it that is wanted, the end of these, and the step between them.
type Cut = (usize, usize, usize, NonZeroUsize);

#[pymethods]
impl Session {
    /// Opens a path, a list of them, or the file of a descriptor.
    #[new]
    #[pyo3(signature = (path, framework, engine, cuda=None, descriptor=None))]
    fn new(
        py: Python<'_>,
        path: Option<&Bound<'_, PyAny>>,
        framework: &str,
        engine: &str,
        cuda: Option<usize>,
        descriptor: Option<RawFd>,
    ) -> PyResult<Self> {
        let framework = Framework::parse(py, framework)?;
        let engine = load::engine(py, engine)?;
        let source = match (path, descriptor) {
            (Some(path), None) => Source::hold(py, &paths_of(path)?)?,
            (None, Some(descriptor)) => Source::of_descriptor(py, descriptor)?,
            _ => return Err(errors::invalid(py, "a path or a descriptor is needed")),
        };
        let reader = Loader::new().engine(engine).reader(&source.checkpoint);
        let place = cuda.map_or(Place::Host, Place::Cuda);
        Ok(Self { source, reader, engine, framework, place })
    }

    /// Names, by shard, and by place in the file within a shard.
    fn names(&self) -> Vec<&str> {
        self.source.checkpoint.tensors().iter().map(TensorInfo::name).collect()
    }

    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metadata = PyDict::new(py);
        for (key, value) in self.source.checkpoint.metadata().iter() {
            metadata.set_item(key, value)?;
        }
        Ok(metadata)
    }

    fn contains(&self, name: &str) -> bool {
        self.source.checkpoint.get(name).is_some()
    }

    /// The format's name of a tensor's type, and its shape as the file has it.
    fn info<'py>(
        &self,
        py: Python<'py>,
        name: &str,
    ) -> PyResult<(&'static str, Bound<'py, PyTuple>)> {
        let info = self.find(py, name)?;
        Ok((info.dtype().as_str(), PyTuple::new(py, info.shape())?))
    }

    /// A tensor, or these positions of it.
    #[pyo3(signature = (name, cuts=Vec::new()))]
    fn tensor<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        cuts: Vec<Cut>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let request = Request::new(name);
        let request = cuts.into_iter().fold(request, |request, (dim, start, end, step)| {
            request.slice_by(dim, start..end, step)
        });
        let planned = self.reader.planned(request.clone());
        let planned = planned.map_err(|error| errors::raised(py, &error))?;
        let (dtype, len) = (planned.dtype(), planned.byte_len() as usize);
        let small = len as u64 <= SMALL && self.framework.has_layout(dtype);
        if small || self.place != Place::Host {
            let (made, address) = self.framework.empty(py, dtype, planned.shape(), &self.place)?;
            if let Place::Cuda(ordinal) = self.place {
                let loader = self.loader().request([request]);
                let memory = Memory { name: name.to_owned(), address, len };
                fill(py, &self.source, loader, vec![memory], Some(ordinal), None)?;
                return Ok(made);
            }
            // SAFETY: `made` is new, has these bytes, and is nobody else's before it is returned.
            let memory = unsafe { host_memory(address, len) };
            let read = py.detach(|| self.reader.read(request, Destination::from(memory)));
            read.map_err(|error| self.source.raised(py, &error))?;
            return Ok(made);
        }
        let cancel = CancelToken::new();
        let loader = self.loader().cancel(cancel.clone()).request([request]);
        let load = || loader.load(&self.source.checkpoint);
        let tensor = loaded(py, &cancel, Attention::to_signals(), load)?;
        let tensor = tensor.map_err(|error| self.source.raised(py, &error))?.into_iter().next();
        match tensor {
            Some(tensor) => self.framework.wrap(py, tensor),
            None => Err(errors::failed(py, "the load brought no tensor")),
        }
    }

    /// All tensors.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        load_all(py, &self.source, self.loader(), self.framework, &self.place, None)
    }
}

impl Session {
    fn find(&self, py: Python<'_>, name: &str) -> PyResult<&TensorInfo> {
        let unknown = || errors::raised(py, &Error::UnknownTensor { name: name.to_owned() });
        self.source.checkpoint.get(name).ok_or_else(unknown)
    }

    fn loader(&self) -> Loader {
        Loader::new().engine(self.engine)
    }
}
