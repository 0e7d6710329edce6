//! Whole loads: into memory of their own, and into memory of the caller's.

use std::path::PathBuf;

use fst::{
    CancelToken, Destination, Device, Dtype, Engine, Error, Loader, Loading, Manifest, Request,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::checkpoint::{Checkpoint, Source};
use crate::frameworks::{Framework, Place};
use crate::group::Ranks;
use crate::report::Report;
use crate::spec::{Memory, Spec, check_apart, host_memory};
use crate::wait::{Attention, TICK, loaded};
use crate::{dtypes, errors};

/// What a load is asked for, as Python says it.
#[derive(FromPyObject)]
pub(crate) struct Options {
    #[pyo3(item)]
    dtype: Option<String>,
    #[pyo3(item)]
    select: Option<Vec<String>>,
    #[pyo3(item)]
    names: Option<Vec<String>>,
    #[pyo3(item)]
    engine: String,
    #[pyo3(item)]
    verify: Option<PathBuf>,
}

impl Options {
    fn dtype(&self, py: Python<'_>) -> PyResult<Option<Dtype>> {
        let Some(name) = &self.dtype else { return Ok(None) };
        let unknown = || errors::invalid(py, &format!("unknown dtype {name:?}"));
        dtypes::parse(name).map(Some).ok_or_else(unknown)
    }

    pub(crate) fn loader(self, py: Python<'_>) -> PyResult<Loader> {
        let engine = engine(py, &self.engine)?;
        let mut loader = Loader::new().engine(engine);
        if let Some(dtype) = self.dtype(py)? {
            loader = loader.dtype(dtype);
        }
        for pattern in self.select.into_iter().flatten() {
            loader = loader.select(pattern);
        }
        if let Some(names) = self.names {
            loader = loader.request(names);
        }
        if let Some(path) = self.verify {
            let manifest = Manifest::read(path);
            let manifest = manifest.map_err(|error| errors::raised(py, &error.into()))?;
            loader = loader.verify(manifest);
        }
        Ok(loader)
    }
}

/// The engine of this name.
pub(crate) fn engine(py: Python<'_>, name: &str) -> PyResult<Engine> {
    let parsed = name.parse::<Engine>();
    parsed.map_err(|error| errors::invalid(py, &error.to_string()))
}

/// The CUDA device of this number.
pub(crate) fn cuda(py: Python<'_>, ordinal: usize) -> PyResult<Device> {
    py.detach(|| Device::cuda(ordinal)).map_err(|error| errors::raised(py, &error))
}

/// Loads tensors into a dictionary, in the checkpoint's order: on the host, or on a CUDA device of this number. As
/// one rank of several, loads its shards to where its group has them.
#[pyfunction]
#[pyo3(signature = (checkpoint, framework, options, progress=None, cuda=None, ranks=None))]
pub(crate) fn load<'py>(
    py: Python<'py>,
    checkpoint: &Checkpoint,
    framework: &str,
    options: Options,
    progress: Option<Py<PyAny>>,
    cuda: Option<usize>,
    ranks: Option<Ranks>,
) -> PyResult<Bound<'py, PyDict>> {
    let framework = Framework::parse(py, framework)?;
    let loader = options.loader(py)?;
    if let Some(ranks) = ranks {
        return take_all(py, &checkpoint.source, ranks.apply(py, loader)?, framework, progress);
    }
    let place = cuda.map_or(Place::Host, Place::Cuda);
    load_all(py, &checkpoint.source, loader, framework, &place, progress)
}

/// Names of the tensors that a load would bring, and their bytes in memory.
#[pyfunction]
pub(crate) fn planned(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    options: Options,
) -> PyResult<Vec<(String, u64)>> {
    let (loader, source) = (options.loader(py)?, &checkpoint.source);
    let planned = py.detach(|| loader.planned(&source.checkpoint));
    let planned = planned.map_err(|error| source.raised(py, &error))?;
    Ok(planned.iter().map(|one| (one.name().to_owned(), one.byte_len())).collect())
}

/// Loads what `loader` selects.
pub(crate) fn load_all<'py>(
    py: Python<'py>,
    source: &Source,
    loader: Loader,
    framework: Framework,
    place: &Place,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    match place {
        Place::Host => take_all(py, source, loader, framework, progress),
        Place::Cuda(ordinal) => load_cuda(py, source, loader, framework, *ordinal, progress),
    }
}

/// Loads what `loader` selects into memory that it allocates.
fn take_all<'py>(
    py: Python<'py>,
    source: &Source,
    loader: Loader,
    framework: Framework,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (loader, mut attention) = Attention::new(loader.in_order(true), progress);
    let started = py.detach(|| loader.start(&source.checkpoint));
    let loading = started.map_err(|error| source.raised(py, &error))?;
    let loaded = PyDict::new(py);
    let mut take = || -> PyResult<()> {
        loop {
            match py.detach(|| loading.next_timeout(TICK)) {
                Ok(Some(tensor)) => {
                    let name = tensor.name().to_owned();
                    loaded.set_item(name, framework.wrap(py, tensor)?)?;
                }
                Ok(None) if is_over(&loading) => return attention.tell(py),
                Ok(None) => {}
                Err(error) => return Err(source.raised(py, &error)),
            }
            attention.pay(py)?;
        }
    };
    let taken = take();
    // Waits until no read is in flight.
    py.detach(move || drop::<Loading>(loading));
    taken.map(|()| loaded)
}

/// Whether all tensors were taken and the load has ended well; what lands just now is still to be taken.
pub(crate) fn is_over(loading: &Loading) -> bool {
    loading.remaining() == 0 && loading.report().is_some()
}

/// Loads into memory of PyTorch's own allocator, on a CUDA device.
fn load_cuda<'py>(
    py: Python<'py>,
    source: &Source,
    loader: Loader,
    framework: Framework,
    ordinal: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let planned = py.detach(|| loader.planned(&source.checkpoint));
    let planned = planned.map_err(|error| source.raised(py, &error))?;
    let loaded = PyDict::new(py);
    let mut memory = Vec::with_capacity(planned.len());
    for one in planned {
        let place = Place::Cuda(ordinal);
        let (tensor, address) = framework.empty(py, one.dtype(), one.shape(), &place)?;
        loaded.set_item(one.name(), tensor)?;
        memory.push(Memory { name: one.name().to_owned(), address, len: one.byte_len() as usize });
    }
    fill(py, source, loader, memory, Some(ordinal), progress)?;
    Ok(loaded)
}

/// Fills memory on the host or on a CUDA device.
pub(crate) fn fill(
    py: Python<'_>,
    source: &Source,
    loader: Loader,
    memory: Vec<Memory>,
    ordinal: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Report> {
    let loader = match ordinal {
        Some(ordinal) => {
            wait_for_stream(py, ordinal)?;
            loader.device(cuda(py, ordinal)?)
        }
        None => loader,
    };
    let cancel = CancelToken::new();
    let (loader, attention) = Attention::new(loader.cancel(cancel.clone()), progress);
    let destination = |one: &Memory| {
        // SAFETY: the callers of this module's functions give memory of tensors that they hold, of this length,
        // and for nobody else to use until the load returns, which is when `loaded` returns.
        let place = unsafe {
            match ordinal {
                Some(_) => Destination::device_bytes(one.address as u64, one.len as u64),
                None => host_memory(one.address, one.len).into(),
            }
        };
        (one.name.clone(), place)
    };
    let report = loaded(py, &cancel, attention, || {
        loader.load_into(&source.checkpoint, memory.iter().map(destination))
    })?;
    report.map(Report::of).map_err(|error| source.raised(py, &error))
}

/// Waits for what is queued on PyTorch's current stream: it may still use memory that its allocator hands out again.
fn wait_for_stream(py: Python<'_>, ordinal: usize) -> PyResult<()> {
    let stream = py.import("torch.cuda")?.call_method1("current_stream", (ordinal,))?;
    stream.call_method0("synchronize").map(drop)
}

/// Loads into tensors of the caller's, whose types it converts to. With a number, they are PyTorch's, on the CUDA
/// device of that number.
#[pyfunction]
#[pyo3(signature = (checkpoint, tensors, options, progress=None, cuda=None))]
pub(crate) fn load_into(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    tensors: Vec<Spec>,
    options: Options,
    progress: Option<Py<PyAny>>,
    cuda: Option<usize>,
) -> PyResult<Report> {
    let source = &checkpoint.source;
    let asked: Option<Dtype> = options.dtype(py)?;
    let mut requests = Vec::with_capacity(tensors.len());
    let mut memory = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let own = tensor.dtype(py)?;
        let wrong = |asked, found| {
            let tensor = tensor.name.clone();
            source.raised(py, &Error::WrongDtype { tensor, asked, found })
        };
        if let Some(asked) = asked.filter(|asked| *asked != own) {
            return Err(wrong(asked, own));
        }
        let request = Request::new(&tensor.name).dtype(own);
        let planned = Loader::new().reader(&source.checkpoint).planned(request.clone());
        let planned = planned.map_err(|error| source.raised(py, &error))?;
        if planned.dtype() != own {
            return Err(wrong(own, planned.dtype()));
        }
        requests.push(request);
        memory.push(Memory { name: tensor.name, address: tensor.address, len: tensor.len });
    }
    check_apart(py, &memory)?;
    let loader = options.loader(py)?.request(requests);
    fill(py, source, loader, memory, cuda, progress)
}
