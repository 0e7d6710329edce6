//! Checkpoints for Python: paths, lists of them, ids of repositories in the hub's cache, open files.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use fst::{Error, TensorInfo, format};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::errors;

/// A checkpoint, and the file that is held open for it, if one is.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) checkpoint: fst::Checkpoint,
    held: Option<Held>,
}

/// A file that is read through its descriptor, so that it is there as long as this value lives, whatever becomes of
/// its name.
#[derive(Debug)]
struct Held {
    /// Closed when this is dropped.
    _file: File,
    /// The path that leads to the descriptor.
    link: String,
    /// The path that the caller gave.
    shown: String,
}

impl Held {
    fn new(file: File, shown: String) -> Self {
        Self { link: format!("/proc/self/fd/{}", file.as_raw_fd()), _file: file, shown }
    }
}

impl Source {
    /// Opens the files that `paths` stand for, by their paths.
    pub(crate) fn open(py: Python<'_>, paths: &[PathBuf]) -> PyResult<Self> {
        let checkpoint = py.detach(|| fst::Checkpoint::open_all(resolved(paths)));
        let checkpoint = checkpoint.map_err(|error| errors::raised(py, &error.into()))?;
        Ok(Self { checkpoint, held: None })
    }

    /// As [`open`](Self::open), but a single file stays open, and is read even if it loses its name.
    pub(crate) fn hold(py: Python<'_>, paths: &[PathBuf]) -> PyResult<Self> {
        let [path] = paths else { return Self::open(py, paths) };
        let is_index = path.extension().is_some_and(|extension| extension == "json");
        let file = match path.is_file() && !is_index {
            // What is wrong with it is said when it is opened by its path.
            true => File::open(path).ok(),
            false => None,
        };
        match file {
            Some(file) => Self::of_file(py, file, path.to_string_lossy().into_owned()),
            None => Self::open(py, paths),
        }
    }

    /// The file of an open descriptor, which the caller may close.
    pub(crate) fn of_descriptor(py: Python<'_>, descriptor: RawFd) -> PyResult<Self> {
        if descriptor < 0 {
            return Err(errors::invalid(py, "a file descriptor is not negative"));
        }
        // SAFETY: the caller of this Python function has it open and waits; should it not be, then cloning fails
        // with EBADF, and nothing else is done with it.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let file = descriptor.try_clone_to_owned()?;
        Self::of_file(py, file.into(), "the open file".to_owned())
    }

    fn of_file(py: Python<'_>, file: File, shown: String) -> PyResult<Self> {
        let held = Held::new(file, shown);
        let checkpoint = py.detach(|| fst::Checkpoint::open(&held.link));
        let replaced = Some((&*held.link, &*held.shown));
        let checkpoint =
            checkpoint.map_err(|error| errors::raised_at(py, &error.into(), replaced))?;
        Ok(Self { checkpoint, held: Some(held) })
    }

    /// The exception for an error of reading this.
    pub(crate) fn raised(&self, py: Python<'_>, error: &Error) -> PyErr {
        let shown = self.held.as_ref().map(|held| (&*held.link, &*held.shown));
        errors::raised_at(py, error, shown)
    }
}

/// Where there is nothing of a name that can be the id of a repository, its folder in the hub's cache.
fn resolved(paths: &[PathBuf]) -> Vec<PathBuf> {
    let cached = |path: &Path| {
        let folder = format::hub::folder(&format::hub::cache()?, path.to_str()?)?;
        folder.is_dir().then_some(folder)
    };
    let one = |path: &PathBuf| match path.exists() {
        true => path.clone(),
        false => cached(path).unwrap_or_else(|| path.clone()),
    };
    paths.iter().map(one).collect()
}

/// A path, or a list of them.
pub(crate) fn paths_of(path: &Bound<'_, PyAny>) -> PyResult<Vec<PathBuf>> {
    if path.is_instance_of::<PyList>() || path.is_instance_of::<PyTuple>() {
        path.extract()
    } else {
        Ok(vec![path.extract()?])
    }
}

/// What a header says of a tensor, and where its bytes are.
#[pyclass(frozen, module = "fst", name = "TensorInfo")]
#[derive(Debug)]
pub(crate) struct Info {
    info: TensorInfo,
}

#[pymethods]
impl Info {
    #[getter]
    fn name(&self) -> &str {
        self.info.name()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.info.dtype().as_str()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.info.shape())
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.info.byte_len()
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.info.path().to_owned()
    }

    #[getter]
    fn file_range(&self) -> (u64, u64) {
        let range = self.info.file_range();
        (range.start, range.end)
    }

    fn __repr__(&self) -> String {
        let (name, dtype, shape) = (self.info.name(), self.info.dtype(), self.info.shape());
        format!("TensorInfo(name={name:?}, dtype={:?}, shape={shape:?})", dtype.as_str())
    }
}

/// The tensors of a checkpoint and the files that hold them.
#[pyclass(frozen, mapping, module = "fst")]
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) source: Source,
    paths: Vec<PathBuf>,
}

#[pymethods]
impl Checkpoint {
    #[new]
    fn new(py: Python<'_>, path: &Bound<'_, PyAny>) -> PyResult<Self> {
        let paths = paths_of(path)?;
        Ok(Self { source: Source::open(py, &paths)?, paths })
    }

    /// Names of all tensors, by shard, and by place in the file within a shard.
    fn keys(&self) -> Vec<&str> {
        self.source.checkpoint.tensors().iter().map(TensorInfo::name).collect()
    }

    fn __len__(&self) -> usize {
        self.source.checkpoint.tensors().len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        PyList::new(py, self.keys())?.call_method0("__iter__")
    }

    fn __contains__(&self, name: &str) -> bool {
        self.source.checkpoint.get(name).is_some()
    }

    fn __getitem__(&self, py: Python<'_>, name: &str) -> PyResult<Info> {
        match self.source.checkpoint.get(name) {
            Some(info) => Ok(Info { info: info.clone() }),
            None => Err(errors::raised(py, &Error::UnknownTensor { name: name.to_owned() })),
        }
    }

    /// The metadata of all files; of two values for one key, the earlier file's.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metadata = PyDict::new(py);
        for (key, value) in self.source.checkpoint.metadata().iter() {
            metadata.set_item(key, value)?;
        }
        Ok(metadata)
    }

    /// The files.
    #[getter]
    fn files(&self) -> Vec<PathBuf> {
        self.source.checkpoint.shards().iter().map(|shard| shard.path().to_owned()).collect()
    }

    /// Bytes of all tensors together.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.source.checkpoint.byte_len()
    }

    /// What the checkpoint could be opened without, but may not be meant; one line each.
    #[getter]
    fn notices(&self) -> Vec<String> {
        self.source.checkpoint.notices().iter().map(ToString::to_string).collect()
    }

    /// By its paths.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Vec<PathBuf>,))> {
        Ok((slf.get_type().into_any(), (slf.get().paths.clone(),)))
    }

    fn __repr__(&self) -> String {
        let paths: Vec<_> = self.paths.iter().map(|path| path.to_string_lossy()).collect();
        let (tensors, bytes) = (self.__len__(), self.nbytes());
        format!("Checkpoint({:?}, tensors={tensors}, nbytes={bytes})", paths.join(", "))
    }
}
