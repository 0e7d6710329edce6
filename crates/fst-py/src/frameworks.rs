//! Loaded tensors as tensors of PyTorch and arrays of NumPy, without a copy; and fresh ones of theirs to read into.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

use fst::gpu::dlpack::DlManagedTensor;
use fst::{Dtype, Tensor};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};
use pyo3::{IntoPyObjectExt, ffi, intern};

use crate::{dtypes, errors};

/// Whose tensors are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framework {
    Torch,
    Numpy,
}

/// Where tensors of PyTorch are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    Cuda(usize),
}

impl Framework {
    pub(crate) fn parse(py: Python<'_>, name: &str) -> PyResult<Self> {
        match name {
            "pt" | "torch" | "pytorch" => Ok(Self::Torch),
            "np" | "numpy" => Ok(Self::Numpy),
            _ => Err(errors::invalid(
                py,
                &format!("unknown framework {name:?}: expected \"pt\" or \"np\""),
            )),
        }
    }

    /// The tensor as one of this framework, whose memory it becomes.
    pub(crate) fn wrap<'py>(self, py: Python<'py>, tensor: Tensor) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Self::Torch => Torch::get(py)?.wrap(py, tensor),
            Self::Numpy => Numpy::get(py)?.wrap(py, tensor),
        }
    }

    /// A tensor of this framework whose elements are still to be written, and the address of its memory.
    pub(crate) fn empty<'py>(
        self,
        py: Python<'py>,
        dtype: Dtype,
        shape: &[usize],
        place: &Place,
    ) -> PyResult<(Bound<'py, PyAny>, usize)> {
        match self {
            Self::Torch => Torch::get(py)?.empty(py, dtype, shape, place),
            Self::Numpy => Numpy::get(py)?.empty(py, dtype, shape),
        }
    }

    /// Whether [`empty`](Self::empty) gives memory that holds elements as the file has them.
    pub(crate) fn has_layout(self, dtype: Dtype) -> bool {
        // NumPy has no packed elements: they are unpacked.
        self == Self::Torch || dtype != Dtype::F4
    }
}

fn no_counterpart(py: Python<'_>, dtype: Dtype, framework: &str) -> PyErr {
    errors::no_counterpart(py, &format!("{framework} has no type for {dtype} elements"))
}

/// Shapes as a framework has them: packed elements are counted by the byte.
fn torch_shape<'py>(
    py: Python<'py>,
    dtype: Dtype,
    shape: &[usize],
) -> PyResult<Bound<'py, PyTuple>> {
    match (dtype, shape.split_last()) {
        (Dtype::F4, Some((last, rest))) => PyTuple::new(py, [rest, &[last / 2]].concat()),
        _ => PyTuple::new(py, shape),
    }
}

/// What is called of PyTorch, looked up once.
struct Torch {
    empty: Py<PyAny>,
    from_dlpack: Py<PyAny>,
    /// By their place in [`Dtype::ALL`].
    dtypes: Vec<Option<Py<PyAny>>>,
    on_host: Py<PyDict>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// Names of capsules that hold a tensor, before and after somebody took it.
const CAPSULE: &CStr = c"dltensor";

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let dtype = |dtype: &Dtype| {
                let name = dtypes::framework_name(*dtype)?;
                torch.getattr(name).ok().map(Bound::unbind)
            };
            let on_host = PyDict::new(py);
            on_host.set_item("device", "cpu")?;
            Ok(Self {
                empty: torch.getattr("empty")?.unbind(),
                from_dlpack: py.import("torch.utils.dlpack")?.getattr("from_dlpack")?.unbind(),
                dtypes: Dtype::ALL.iter().map(dtype).collect(),
                on_host: on_host.unbind(),
            })
        })
    }

    fn dtype<'py>(&self, py: Python<'py>, dtype: Dtype) -> PyResult<&Bound<'py, PyAny>> {
        let known = self.dtypes.get(dtype as usize).and_then(Option::as_ref);
        let known = known.map(|known| known.bind(py));
        known.ok_or_else(|| no_counterpart(py, dtype, "this version of PyTorch"))
    }

    fn wrap<'py>(&self, py: Python<'py>, tensor: Tensor) -> PyResult<Bound<'py, PyAny>> {
        let dtype = tensor.dtype();
        let own = self.dtype(py, dtype)?;
        if tensor.byte_len() == 0 {
            return self.empty(py, dtype, tensor.shape(), &Place::Host).map(|(empty, _)| empty);
        }
        // Not all versions take these types, and none takes packed ones.
        let by_bytes = matches!(
            dtype,
            Dtype::F4
                | Dtype::F8E4M3
                | Dtype::F8E5M2
                | Dtype::F8E4M3Fnuz
                | Dtype::F8E5M2Fnuz
                | Dtype::F8E8M0
        );
        let shape = by_bytes.then(|| tensor.shape().to_vec());
        let exported = match by_bytes {
            true => tensor.into_dlpack_bytes(),
            false => tensor.into_dlpack(),
        };
        let exported = exported.map_err(|error| errors::raised(py, &error))?;
        let capsule = capsule(py, exported.into_managed())?;
        let made = self.from_dlpack.bind(py).call1((capsule,))?;
        let Some(shape) = shape else { return Ok(made) };
        let view = intern!(py, "view");
        made.call_method1(view, (own,))?.call_method1(view, (torch_shape(py, dtype, &shape)?,))
    }

    fn empty<'py>(
        &self,
        py: Python<'py>,
        dtype: Dtype,
        shape: &[usize],
        place: &Place,
    ) -> PyResult<(Bound<'py, PyAny>, usize)> {
        let arguments = match place {
            Place::Host => self.on_host.bind(py).copy()?,
            Place::Cuda(ordinal) => {
                let arguments = PyDict::new(py);
                arguments.set_item("device", format!("cuda:{ordinal}"))?;
                arguments
            }
        };
        arguments.set_item(intern!(py, "dtype"), self.dtype(py, dtype)?)?;
        let shape = torch_shape(py, dtype, shape)?;
        let made = self.empty.bind(py).call((shape,), Some(&arguments))?;
        let address = made.call_method0(intern!(py, "data_ptr"))?.extract()?;
        Ok((made, address))
    }
}

/// A capsule that frees its tensor unless somebody has taken it.
fn capsule(py: Python<'_>, managed: NonNull<DlManagedTensor>) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: the pointer is not null, the name lives as long as the program, and the destructor knows what the
    // capsule holds.
    let capsule = unsafe {
        let made = ffi::PyCapsule_New(managed.as_ptr().cast(), CAPSULE.as_ptr(), Some(destroy));
        Bound::from_owned_ptr_or_err(py, made)
    };
    if capsule.is_err() {
        // SAFETY: just exported, and nobody else has it.
        unsafe { delete(managed.as_ptr().cast()) };
    }
    capsule
}

/// # Safety
///
/// `managed` is an export that nobody else frees.
unsafe fn delete(managed: *mut c_void) {
    let managed = managed.cast::<DlManagedTensor>();
    // SAFETY: the caller's contract.
    unsafe {
        if let Some(deleter) = (*managed).deleter {
            deleter(managed);
        }
    }
}

unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with the capsule that it is the destructor of. Whoever takes the tensor gives the
    // capsule another name, so that what is found by this one is still the capsule's.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, CAPSULE.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, CAPSULE.as_ptr()));
        }
    }
}

/// What is called of NumPy, looked up once.
struct Numpy {
    asarray: Py<PyAny>,
    empty: Py<PyAny>,
    /// By their place in [`Dtype::ALL`]; types of ml_dtypes where it is installed.
    dtypes: Vec<Option<Py<PyAny>>>,
}

static NUMPY: PyOnceLock<Numpy> = PyOnceLock::new();

impl Numpy {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        NUMPY.get_or_try_init(py, || {
            let numpy = py.import("numpy")?;
            let more = py.import("ml_dtypes").ok();
            let dtype = |dtype: &Dtype| {
                let name = match dtype {
                    Dtype::F4 => "float4_e2m1fn",
                    dtype => dtypes::framework_name(*dtype)?,
                };
                let make = numpy.getattr("dtype").ok()?;
                let found = more.as_ref().and_then(|more| more.getattr(name).ok());
                make.call1((found.or_else(|| name.into_bound_py_any(py).ok())?,))
                    .ok()
                    .map(Bound::unbind)
            };
            Ok(Self {
                asarray: numpy.getattr("asarray")?.unbind(),
                empty: numpy.getattr("empty")?.unbind(),
                dtypes: Dtype::ALL.iter().map(dtype).collect(),
            })
        })
    }

    fn dtype<'py>(&self, py: Python<'py>, dtype: Dtype) -> PyResult<&Bound<'py, PyAny>> {
        let known = self.dtypes.get(dtype as usize).and_then(Option::as_ref);
        let known = known.map(|known| known.bind(py));
        known.ok_or_else(|| no_counterpart(py, dtype, "NumPy without the package ml_dtypes"))
    }

    fn wrap<'py>(&self, py: Python<'py>, tensor: Tensor) -> PyResult<Bound<'py, PyAny>> {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        let own = self.dtype(py, dtype)?;
        if tensor.byte_len() == 0 {
            return self.empty(py, dtype, &shape).map(|(empty, _)| empty);
        }
        let exported = tensor.into_dlpack_bytes().map_err(|error| errors::raised(py, &error))?;
        let packed = dtype == Dtype::F4;
        let (typestr, stored) = match packed {
            true => ("|u1", exported.shape.iter().map(|dim| *dim as usize).collect()),
            false => (dtypes::typestr(dtype), shape.clone()),
        };
        let memory = HostMemory { exported, typestr, shape: stored };
        let made = self.asarray.bind(py).call1((memory,))?;
        if packed {
            let unpack = py.import("fst._numpy")?.getattr("unpack_f4")?;
            return unpack.call1((made, own, PyTuple::new(py, &shape)?));
        }
        match made.getattr(intern!(py, "dtype"))?.is(own) {
            true => Ok(made),
            false => made.call_method1(intern!(py, "view"), (own,)),
        }
    }

    fn empty<'py>(
        &self,
        py: Python<'py>,
        dtype: Dtype,
        shape: &[usize],
    ) -> PyResult<(Bound<'py, PyAny>, usize)> {
        let own = self.dtype(py, dtype)?;
        let made = self.empty.bind(py).call1((PyTuple::new(py, shape)?, own))?;
        let interface = made.getattr(intern!(py, "__array_interface__"))?;
        let (address, _): (usize, bool) = interface.get_item(intern!(py, "data"))?.extract()?;
        Ok((made, address))
    }
}

/// Memory of a loaded tensor that nobody else refers to, for NumPy's array interface: the array that is made of it
/// keeps it alive.
#[pyclass(frozen, module = "fst._fst")]
pub(crate) struct HostMemory {
    exported: fst::gpu::dlpack::DlSource,
    typestr: &'static str,
    shape: Vec<usize>,
}

#[pymethods]
impl HostMemory {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("typestr", self.typestr)?;
        interface.set_item("shape", PyTuple::new(py, &self.shape)?)?;
        interface.set_item("data", (self.exported.address, false))?;
        Ok(interface)
    }
}
